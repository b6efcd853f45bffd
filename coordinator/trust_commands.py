"""`torchord quarantined` and `torchord readmit`: workers that were found to lie."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict

import click

from torchord.cache.ledger.workers import Registry
from torchord.coordinator.commands.common import BAD, OK, guarded, settings_of, told, with_json, with_url


def _with_registry(url: str | None, act: Callable[[Registry], int]) -> int:
    from torchord.cache.servers.redis_client import connect

    def perform() -> int:
        there = settings_of(url).url
        with connect(there) as client:
            return act(Registry(client, there))

    return guarded(perform)


@click.command("quarantined", help="Workers that get no shard of a run that checks, since they lied.")
@with_url
@with_json
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
@with_url
@with_json
def readmit(node: str, url: str | None, as_json: bool) -> int:
    """See the help."""

    def act(registry: Registry) -> int:
        if registry.readmit(node):
            told(f"{node} gets shards again, within a second", {"node": node}, as_json=as_json)
            return OK
        print(f"{node} is not quarantined; `torchord quarantined` lists who is", file=sys.stderr)
        return BAD

    return _with_registry(url, act)
