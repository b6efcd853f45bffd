"""What operators and networks do to a run, one fault after another, and what was seen of each.

`python -m tests.faults` strikes with all of them and prints the table; `tests/faults/test_matrix.py` with a
few. A fault is on while a run is in the middle: meanwhile a person reads what it waits for, and afterwards
the run has the bits of one that nothing disturbed, or has come to rest with a sentence that names the cause.
"""

from __future__ import annotations

import dataclasses
import os
import re
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import redis

from tests.faults.laboratory import CONFIG, WAIT_SECONDS, Laboratory, wait_version
from tests.faults.recipes import Stuck
from tests.support.relay import Relay
from tests.support.waiting import wait_until
from torchord import Run
from torchord.cache.errors import TorchordError
from torchord.coordinator.local_cluster.embedded_server import EmbeddedServer
from torchord.coordinator.runtime.faults import POINTS

SAMPLE_SECONDS = 0.05  # so that a run is in the middle when it is struck
DISK_NBYTES = 256 << 10
LOST_SECONDS = 15.0

Kind = Literal["store", "network", "process", "limits", "recipe", "phase"]
Strike = Callable[["Site"], AbstractContextManager[None]]


class Site:
    """A training server and one Client that reaches the store by a relay.

    Args:
        folder: for logs and checkpoints.
        apart: whether this process has a network and mounts of its own, to be changed at will.
    """

    def __init__(self, folder: Path, *, apart: bool = False) -> None:
        self.apart = apart
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        options = {"enable-debug-command": "local"}
        self.server = EmbeddedServer(options=options, log=folder / "redis.log")
        self.server.start()
        place = urlsplit(self.server.url)
        assert place.port is not None
        self.relay = Relay(place.port)
        self.relay.__enter__()
        self.lab = Laboratory(folder, workers=0, url=self.server.url, wait_ready=False)
        netloc = place.netloc.replace(f":{place.port}", f":{self.relay.port}")
        near = {"TORCHORD_URL": place._replace(netloc=netloc).geturl()}
        self.worker("server", role="server")
        self.worker("client1", env=near)
        self.lab.cluster.wait_ready()

    def worker(self, name: str, **arguments: Any) -> None:
        self.lab.cluster.add_worker(name, **arguments)

    def close(self) -> None:
        self.lab.close()
        self.relay.__exit__(None, None, None)
        self.server.stop()
        if os.path.ismount(self.lab.checkpoints):
            subprocess.run(["umount", "--lazy", self.lab.checkpoints], check=True)

    def pid(self, name: str) -> int:
        return self.lab.cluster.processes[name].pid

    def ask(self, *words: Any) -> Any:
        """One command to the store."""
        with redis.Redis.from_url(self.server.url, socket_timeout=30) as client:
            return client.execute_command(*words)


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        name: what happens.
        kind: where.
        strike: is entered in the middle of a run, and left when it is over.
        seconds: that it lasts at most; it is over before once it has been said.
        said: what a person reads meanwhile, a pattern; "" where it is over too soon.
        ends: what the run comes to: "" for the bits of the undisturbed run, else a pattern of its error.
        changes: of the recipe.
        config: changes of the config.
        apart: whether it needs a network and mounts of its own.
        lost: whether the store may have lost the run; then `resume` may be the way out.
    """

    name: str
    kind: Kind
    strike: Strike = field(default=lambda site: nullcontext(), repr=False)
    seconds: float = 4.0
    said: str = ""
    ends: str = ""
    changes: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    apart: bool = False
    lost: bool = False


@dataclass
class Seen:
    """What was seen of one fault.

    Attributes:
        said_after: seconds from the strike to the sentence, None if none was due.
        said: the sentence.
        end: "same bits", or the sentence with which the run came to rest.
        recovered: seconds from the end of the fault to the end of the run.
        wrong: what should not be; "" if all is as promised.
    """

    fault: Fault
    said_after: float | None = None
    said: str = ""
    end: str = ""
    recovered: float = 0.0
    wrong: str = ""

    def row(self) -> str:
        """One line of the table."""
        after = "" if self.said_after is None else f"{self.said_after:.0f} s"
        verdict = "WRONG" if self.wrong else "ok"
        said = f"{self.wrong}; " if self.wrong else ""
        return (
            f"| {self.fault.kind} | {self.fault.name} | {after} | {said}{_short(self.said)} | "
            f"{_short(self.end)} | {self.recovered:.0f} s | {verdict} |"
        )


HEAD = (
    "| where | what happens | said after | what was said | end | after | |\n"
    "| --- | --- | --- | --- | --- | --- | --- |"
)


def _short(text: str, most: int = 110) -> str:
    text = " ".join(text.split()).replace("|", "/")
    return text if len(text) <= most else f"{text[: most - 3]}..."


def observe(site: Site, fault: Fault) -> Seen:
    """Strike a run in the middle, read what is said, and see what it comes to."""
    lab, seen = site.lab, Seen(fault)
    reference = lab.reference if not fault.ends else None
    lab.slow(SAMPLE_SECONDS)
    run = lab.submit(dataclasses.replace(CONFIG, **fault.config), **fault.changes)
    if not fault.changes:
        wait_version(run, 2)
    began = time.monotonic()
    with fault.strike(site):
        while time.monotonic() - began < fault.seconds:
            if fault.said and (found := _read(run, fault.said)):
                seen.said_after, seen.said = time.monotonic() - began, found
                break
            time.sleep(0.1)
    if fault.said and not seen.said:
        seen.wrong = f"{fault.said!r} was not said in {fault.seconds:g} s; {_waits(run)}"
    over = time.monotonic()
    if fault.lost:
        seen.end = _come_back(site, run)
    if fault.ends:
        wait_until(lambda: _rests(site, run), WAIT_SECONDS, lambda: f"the end of {run.name}: {run.status()}")
        seen.end = run.status().error or run.status().state
        if not re.search(fault.ends, seen.end):
            seen.wrong = f"it should have ended with {fault.ends!r}"
        lab.fast()
        if fault.said:  # it would start anew by itself, in a minute
            lab.cluster.processes["client1"].kill()
    else:
        lab.check(run, reference=reference)
        seen.end = f"{seen.end}same bits"
    seen.recovered = time.monotonic() - over
    lab.revive()
    lab.cluster.wait_ready()
    return seen


def _come_back(site: Site, run: Run) -> str:
    """Wait until a store that has lost the run has it again; from its checkpoint, if need be by `resume`."""

    def state() -> str:
        site.lab.revive()
        try:
            return run.status().state
        except TorchordError as error:
            return str(error)

    began = time.monotonic()
    while (found := state()) not in ("running", "done") and time.monotonic() - began < LOST_SECONDS:
        time.sleep(0.1)
    if found in ("running", "done"):
        return ""
    run.resume()
    return f"{found}; after run.resume() "


def _rests(site: Site, run: Run) -> bool:
    site.lab.revive()
    try:
        return run.status().state in ("failed", "paused", "done", "cancelled")
    except TorchordError:
        return False


def _waits(run: Run) -> list[str]:
    try:
        return [wait.said(time.time()) for wait in run.status().waits]
    except TorchordError as error:  # whoever asks learns it at once
        return [str(error)]


def _read(run: Run, pattern: str) -> str:
    return next((said for said in _waits(run) if re.search(pattern, said)), "")


# --- the store --------------------------------------------------------------------------------


@contextmanager
def full(site: Site) -> Iterator[None]:
    site.ask("CONFIG", "SET", "maxmemory", 1 << 20)
    try:
        yield
    finally:
        site.ask("CONFIG", "SET", "maxmemory", 0)


@contextmanager
def evicting(site: Site) -> Iterator[None]:
    """All that is not in use goes at once, as under pressure."""
    site.ask("CONFIG", "SET", "maxmemory-policy", "allkeys-random")
    site.ask("CONFIG", "SET", "maxmemory", 1 << 20)
    try:
        yield
    finally:
        site.ask("CONFIG", "SET", "maxmemory", 0)
        site.ask("CONFIG", "SET", "maxmemory-policy", "noeviction")


@contextmanager
def read_only(site: Site) -> Iterator[None]:
    """As after a failover that the URL does not know of: a replica of nobody who answers."""
    site.ask("REPLICAOF", "127.0.0.1", 9)
    try:
        yield
    finally:
        site.ask("REPLICAOF", "NO", "ONE")


@contextmanager
def slow(site: Site) -> Iterator[None]:
    for _ in range(3):
        site.ask("DEBUG", "SLEEP", 1.5)
    yield


@contextmanager
def restarted_empty(site: Site) -> Iterator[None]:
    site.server.kill()
    site.server.restart()
    yield


@contextmanager
def replaced(site: Site) -> Iterator[None]:
    """At the same address another server answers, with data of somebody else."""
    site.server.kill()
    site.server.restart()
    for number in range(100):
        site.ask("SET", f"somebody:{number}", "else")
    yield


@contextmanager
def silent(site: Site) -> Iterator[None]:
    site.server.pause()
    try:
        yield
    finally:
        site.server.cont()


# --- the network ------------------------------------------------------------------------------


def path(**worse: Any) -> Strike:
    return lambda site: site.relay.worse(**worse)


@contextmanager
def forgotten(site: Site) -> Iterator[None]:
    assert site.relay.forget() >= 2
    before = site.relay.swallowed
    yield
    assert site.relay.swallowed > before, "nobody used a connection that was forgotten"


@contextmanager
def link_down(site: Site) -> Iterator[None]:
    subprocess.run(["ip", "link", "set", "lo", "down"], check=True)
    try:
        yield
    finally:
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)


# --- processes and their limits ---------------------------------------------------------------


@contextmanager
def stopped(site: Site, name: str) -> Iterator[None]:
    site.lab.cluster.processes[name].pause()
    try:
        yield
    finally:
        site.lab.cluster.processes[name].cont()


@contextmanager
def signalled(site: Site, name: str, number: int) -> Iterator[None]:
    os.kill(site.pid(name), number)
    yield


@contextmanager
def limited(site: Site, name: str, what: int, room: int) -> Iterator[None]:
    """What a worker uses of a resource is nearly all that it gets, as after `ulimit`."""
    pid = site.pid(name)
    used = {
        resource.RLIMIT_AS: lambda: int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * 4096,
        resource.RLIMIT_NOFILE: lambda: max(map(int, os.listdir(f"/proc/{pid}/fd"))),
    }[what]()
    before = resource.prlimit(pid, what)
    resource.prlimit(pid, what, (used + room, before[1]))
    try:
        yield
    finally:
        with suppress(ProcessLookupError):  # it has ended, and another one takes its place
            resource.prlimit(pid, what, before)


@contextmanager
def disk_full(site: Site) -> Iterator[None]:
    """The place of the checkpoints has no room until somebody makes some."""
    place = Path(site.lab.checkpoints)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_NBYTES}", "none", place], check=True)
    filler = place / "filler"
    try:
        with filler.open("wb") as file:
            file.write(bytes(DISK_NBYTES - 4096))
        yield
    finally:
        filler.unlink()


@contextmanager
def at_point(site: Site, point: str, action: str) -> Iterator[None]:
    with site.lab.faults(f"{point}:2:{action}"):
        site.lab.wait_fired()
        yield


def stuck(how: str) -> dict[str, Any]:
    return {"dataset": partial(Stuck, how=how)}


TRIED = {"max_attempts": 2, "audit_fraction": 0.0}
ENDLESS = {**TRIED, "shard_timeout_seconds": 8.0}

FAULTS: tuple[Fault, ...] = (
    Fault("full", "store", full, 15, said="room in Redis, which is full"),
    Fault("throws keys away", "store", evicting, 2, lost=True),
    Fault("read-only", "store", read_only, 15, said="read-only|READONLY|no worker|none lives"),
    Fault("slow (DEBUG SLEEP)", "store", slow, 1),
    Fault("silent", "store", silent, 15, said="no Redis answers"),
    Fault("restarted empty", "store", restarted_empty, 1, lost=True),
    Fault("another one in its place", "store", replaced, 1, lost=True),
    Fault("path forgets its connections", "network", forgotten, 6),
    Fault(
        "nothing gets to the server", "network", path(closed=("to the server",)), 15, said="none lives"
    ),
    Fault(
        "nothing gets to the Client", "network", path(closed=("to the client",)), 15,
        said="none lives|takes no messages|nobody has begun|missing slots",
    ),
    Fault("300 ms each way", "network", path(delay_seconds=0.3), 6),
    Fault("1 % of packets are lost", "network", path(loss=0.01), 6),
    Fault("10 % of packets are lost", "network", path(loss=0.1), 6),
    Fault("link down", "network", link_down, 15, said="no Redis answers", apart=True),
    Fault("SIGSTOP, Client", "process", partial(stopped, name="client1"), 15, said="none lives"),
    Fault("SIGSTOP, training server", "process", partial(stopped, name="server"), 15, said="none lives"),
    *(
        Fault(f"{number.name}, {name}", "process", partial(signalled, name=name, number=number), 1)
        for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
        for name in ("client1", "server")
    ),
    *(
        Fault(f"no more {noun}, {name}", "limits", partial(limited, name=name, what=what, room=room), 4)
        for noun, what, room in (
            ("memory", resource.RLIMIT_AS, 64 << 20),
            ("threads or memory", resource.RLIMIT_AS, 1 << 20),
            ("file descriptors", resource.RLIMIT_NOFILE, 1),
        )
        for name in ("client1", "server")
    ),
    Fault("disk full", "limits", disk_full, 15, said="No space left", apart=True),
    Fault("os._exit()", "recipe", ends="took its worker", config=TRIED, changes=stuck("ends_the_process")),
    Fault("endless recursion", "recipe", ends="RecursionError", config=TRIED, changes=stuck("recursion")),
    Fault("out of memory", "recipe", ends="memory", config=TRIED, changes=stuck("out_of_memory")),
    Fault("input()", "recipe", ends="EOFError", config=TRIED, changes=stuck("terminal")),
    Fault(
        "endless loop", "recipe", seconds=15, said=r"recipes\.py:\d+ in endless_loop", config=ENDLESS,
        ends="exceeded shard_timeout_seconds", changes=stuck("endless_loop"),
    ),
    Fault(
        "deadlock", "recipe", seconds=15, said=r"recipes\.py:\d+ in deadlock", config=ENDLESS,
        ends="exceeded shard_timeout_seconds", changes=stuck("deadlock"),
    ),
)  # fmt: skip

PHASES: tuple[Fault, ...] = tuple(
    Fault(f"{action.upper()} at {point}", "phase", partial(at_point, point=point, action=action), 1)
    for action in ("term", "hup")
    for point in POINTS
    if point.startswith(("server.", "client.")) and "rollback" not in point and "initialise" not in point
    if not point.endswith(("acquire", "finish"))
)
