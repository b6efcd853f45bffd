"""`torchord quarantined` and `torchord readmit`: workers that were found to lie."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict

import click

from torchord.cache.errors import CacheUnreachable, TorchordError
from torchord.cache.ledger.workers import Registry

OK, NONE, UNREACHABLE = 0, 1, 4

_URL = click.option("--url", metavar="URL", help="Redis URL of broker and control plane (else TORCHORD_URL).")


def _with_registry(url: str | None, act: Callable[[Registry], int]) -> int:
    from torchord.cache.servers.redis_client import connect
    from torchord.cache.settings import from_environment

    try:
        there = url or from_environment().url
        with connect(there) as client:
            return act(Registry(client, there))
    except TorchordError as error:
        print(f"error: {error}", file=sys.stderr)
        return UNREACHABLE if isinstance(error, CacheUnreachable) else NONE


@click.command("quarantined", help="Workers that get no shard of a run that checks, since they lied.")
@_URL
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def liars(url: str | None, as_json: bool) -> int:
    """See the help."""

    def act(registry: Registry) -> int:
        found = registry.distrusted().values()
        if as_json:
            print(json.dumps([asdict(each) for each in found]))
        else:
            for each in found:
                print(each.said())
            if not found:
                print("no worker is quarantined")
        return OK

    return _with_registry(url, act)


@click.command("readmit", help="Let a quarantined worker compute again: NODE is its NAME@HOST.")
@click.argument("node")
@_URL
def readmit(node: str, url: str | None) -> int:
    """See the help."""

    def act(registry: Registry) -> int:
        if registry.readmit(node):
            print(f"{node} gets shards again, within a second")
            return OK
        print(f"{node} is not quarantined; `torchord quarantined` lists who is", file=sys.stderr)
        return NONE

    return _with_registry(url, act)
