"""`torchord doctor`: what is wrong with a fleet, and what to do about it. Loads no torch, changes nothing."""

from __future__ import annotations

import os
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from torchord.cache.errors import CacheUnreachable, TorchordError

if TYPE_CHECKING:
    from torchord.cache.ledger.store_facts import StoreFacts
    from torchord.cache.ledger.workers import WorkerInfo

OK, BAD, UNREACHABLE = 0, 1, 4
_WIDTH = 80
_ROOM_NBYTES = 1 << 30
_SKEW_SECONDS, _FAR_SECONDS = 5.0, 0.05
_FULL = 0.8


@dataclass(frozen=True)
class Finding:
    """What one look has found.

    Attributes:
        about: what was looked at, one word.
        state: "ok", "look" (it works, and somebody should look) or "wrong".
        said: what is so, one sentence.
        do: what to do about it, "" if nothing.
    """

    about: str
    state: str
    said: str
    do: str = ""


def examined(url: str, checkpoint_dir: str, *, host_cache: bool) -> list[Finding]:
    """Look at the server, the workers and this machine.

    Raises:
        CacheUnreachable: the server does not answer.
    """
    from torchord.cache.ledger.store_facts import store_facts
    from torchord.cache.ledger.workers import Registry
    from torchord.cache.servers.redis_client import connect
    from torchord.coordinator.messages.task_names import QUEUES

    found: list[Finding] = []
    with connect(url) as client:
        registry = Registry(client, url)
        try:
            facts: StoreFacts | None = store_facts(client, url, QUEUES)
        except CacheUnreachable:
            raise
        except TorchordError as error:
            facts = None
            found.append(Finding("broker", "look", str(error), "let this user run INFO, TIME and LLEN"))
        alive = registry.alive()
        memory = registry.memory()
    if facts is not None:
        found += _of_the_server(facts)
    if memory is not None:
        found += _of_its_memory(memory.used, memory.limit, memory.policy)
    found += _of_workers(alive, facts.lengths if facts else {})
    found += _of_here(checkpoint_dir, host_cache=host_cache)
    return found


def _of_the_server(facts: StoreFacts) -> Iterator[Finding]:
    said = f"{facts.release} answers in {facts.seconds * 1000:.1f} ms"
    far = facts.seconds > _FAR_SECONDS
    yield Finding("broker", "look" if far else "ok", said, "put it nearer to the workers" if far else "")
    if facts.persists:
        yield Finding("persistence", "ok", f"it keeps what it holds by {facts.persists}")
    else:
        yield Finding(
            "persistence",
            "look",
            "it forgets everything when it ends: runs then go on from their last checkpoint",
            "appendonly yes, appendfsync everysec",
        )
    apart = abs(facts.clock)
    yield Finding(
        "clock",
        "look" if apart > _SKEW_SECONDS else "ok",
        f"this machine's and the server's are {apart:.1f} s apart",
        "set both by NTP: ages and times that are shown are wrong by that" if apart > _SKEW_SECONDS else "",
    )


def _of_its_memory(used: int, limit: int, policy: str) -> Iterator[Finding]:
    if policy != "noeviction":
        said = f"once it is full it throws keys away ({policy}), and with them runs"
        yield Finding("memory", "wrong", said, "maxmemory-policy noeviction")
    share = used / limit if limit else 0.0
    bound = f"{limit / 1e6:,.0f} MB" if limit else "as many as there are"
    said = f"{used / 1e6:,.0f} MB are used, of {bound}"
    state = "wrong" if share >= 1 else "look" if share > _FULL else "ok"
    do = "" if state == "ok" else "raise maxmemory, or let finished runs expire"
    yield Finding("memory", state, said, do)


def _of_workers(alive: Mapping[str, WorkerInfo], lengths: Mapping[str, int]) -> Iterator[Finding]:
    from torchord.coordinator.messages.task_names import QUEUES, worker_command

    for queue in QUEUES:
        there = [info for info in alive.values() if queue in info.queues]
        waiting = lengths.get(queue, 0)
        said = f"{len(there)} on queue {queue}, where {waiting} messages wait"
        state = "ok" if there else "wrong"
        yield Finding("workers", state, said, "" if there else f"start one: {worker_command(queue)}")
    for info in alive.values():
        if info.deaf:
            yield Finding(
                "workers",
                "wrong",
                f"{info.id} lives and has taken no messages for {info.silent:.0f} s",
                f"it starts anew by itself, else restart it (process {info.pid} on {info.host})",
            )
        for run, why in info.refuses.items():
            yield Finding("workers", "look", f"{info.id} refuses run {run}: {why}", "do as it says")
        for said in info.discarded.values():
            yield Finding("queues", "wrong", said, "stop whoever takes torchord's messages")
    yield from _of_environments({info.environment for info in alive.values() if info.environment})


def _of_environments(environments: Iterable[str]) -> Iterator[Finding]:
    kinds = sorted(environments)
    if len(kinds) == 1:
        yield Finding("devices", "ok", f"all workers have {kinds[0]}")
    elif kinds:
        yield Finding(
            "devices",
            "look",
            f"workers differ, and a run is computed by those of one kind: {'; '.join(kinds)}",
            "give all the same torch and device, start all with TORCHORD_HARDWARE=portable "
            "(docs/portable.md), or submit with skew='admit' (other bits)",
        )


def _of_here(checkpoint_dir: str, *, host_cache: bool) -> Iterator[Finding]:
    if "://" not in checkpoint_dir:
        place = Path(checkpoint_dir)
        there = next(parent for parent in (place, *place.parents) if parent.exists())
        free = shutil.disk_usage(there).free
        said = f"{checkpoint_dir} has {free / 1e9:,.1f} GB free"
        if not os.access(there, os.W_OK):
            said = f"this user may not write to {there}"
            yield Finding("checkpoints", "wrong", said, "set TORCHORD_CHECKPOINT_DIR to where it may")
        elif free < _ROOM_NBYTES:
            yield Finding("checkpoints", "look", said, "make room, or set TORCHORD_CHECKPOINT_DIR")
        else:
            yield Finding("checkpoints", "ok", said)
    shared = Path("/dev/shm")
    if host_cache and shared.is_dir():
        free = shutil.disk_usage(shared).free
        few = free < _ROOM_NBYTES
        do = "give it more (docker run --shm-size=4g), or set TORCHORD_HOST_CACHE=off" if few else ""
        said = f"{shared} has {free / 1e9:,.1f} GB free for what processes of this host share"
        yield Finding("shared memory", "look" if few else "ok", said, do)


def _allowed(listed: tuple[str, ...] | None) -> Finding:
    words = ",".join(listed or (".", "torch"))
    said = f"a worker that starts here with this environment admits recipes from {words}"
    wide = "*" in (listed or ())
    do = "name your packages in TORCHORD_ALLOWED_MODULES: '*' lets whoever submits run anything"
    return Finding("allow-list", "look", said, do) if wide else Finding("allow-list", "ok", said)


def in_lines(found: Iterable[Finding]) -> Iterator[str]:
    """Findings for a person, in lines of at most 80 columns."""
    signs = {"ok": "ok   ", "look": "look ", "wrong": "WRONG"}
    for each in found:
        begin = f"{signs[each.state]}  {each.about:<13}  "
        indent = " " * len(begin)
        yield from textwrap.wrap(each.said, _WIDTH, initial_indent=begin, subsequent_indent=indent)
        if each.do:
            yield from textwrap.wrap(each.do, _WIDTH, initial_indent=f"{indent}-> ", subsequent_indent=indent)


@click.command(
    "doctor",
    help="Look at the server, the workers and this machine, and say what to do. "
    "Exit code 0 if nothing is wrong, 1 if something is, 4 if Redis does not answer.",
)
@click.option("--url", metavar="URL", help="Redis URL of broker and control plane (else TORCHORD_URL).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(url: str | None, as_json: bool) -> int:
    """See the help."""
    from torchord.cache.ledger.figures import for_others
    from torchord.cache.settings import from_environment

    try:
        settings = from_environment()
        there = url or settings.url
        found = examined(there, settings.checkpoint_dir, host_cache=settings.host_cache)
        found.append(_allowed(settings.allowed_modules))
    except TorchordError as error:
        click.echo(f"error: {error}", err=True)
        return UNREACHABLE if isinstance(error, CacheUnreachable) else BAD
    if as_json:
        click.echo(for_others([asdict(each) for each in found]))
    else:
        for line in in_lines(found):
            click.echo(line)
    return BAD if any(each.state == "wrong" for each in found) else OK
