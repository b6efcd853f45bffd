"""Waiting for a run to be done, for its workers to come, and for Redis to come back."""

from __future__ import annotations

import logging
import math
import sys
import time
from types import TracebackType
from typing import Protocol

from torchord.cache.errors import (
    CacheUnreachable,
    NoWorker,
    RunCancelled,
    RunFailed,
    RunNotFound,
    WaitTimeout,
)
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.ledger.records import Head
from torchord.cache.servers.address import masked
from torchord.coordinator.local_cluster.starting import coming, starting
from torchord.coordinator.master.fleet import Fleet
from torchord.coordinator.master.follower import Follower
from torchord.coordinator.master.progress import Progress
from torchord.coordinator.messages.task_names import worker_command
from torchord.coordinator.messages.waits import Wait, WaitKind, Waits

log = logging.getLogger(__name__)

RESTING = ("done", "failed", "cancelled")
POLL_SECONDS = 0.5
SHOWN_SECONDS = 5.0  # without a step, before the bar says what is waited for
QUIET_SECONDS = 15.0  # ... and the log
_LOOK_SECONDS = 2.0
_PACE_SECONDS = 0.05


class Detached(KeyboardInterrupt):
    """Waiting was interrupted; the run goes on without this process.

    A program that this ends shows no traceback: what there is to say was said before.
    """


def _show_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not isinstance(error, Detached):
        sys.__excepthook__(kind, error, trace)


def detached(run: str, url: str) -> Detached:
    """Say how to come back to a run whose waiting was interrupted; returns what to raise."""
    sys.stderr.write(
        f"\nDetached. Run {run!r} goes on as long as its workers do; come back with\n"
        f"    Master({masked(url)!r}).run({run!r}).wait(progress=True)\n"
    )
    if sys.excepthook is sys.__excepthook__:  # nobody else shows this program's errors
        sys.excepthook = _show_error
    return Detached(f"run {run!r} goes on")


class Shown(Protocol):
    """Where a person reads what a run waits for."""

    def quiet(self, said: str) -> None:
        """Show in a few words what it waits for; "" once it goes on."""

    def say(self, said: str) -> None:
        """Say once what it waits for, since when and who can end it: "waits for ..."."""


class Quiet:
    """Says what a run waits for once nothing has happened in it for a while.

    Args:
        waits: of the run.
        fleet: its workers.
        shown: where it is said.
    """

    def __init__(self, waits: Waits, fleet: Fleet, shown: Shown) -> None:
        self._waits = waits
        self._fleet = fleet
        self._shown = shown
        self._since = self._looked = time.monotonic()
        self._began = time.time()
        self._logged: list[WaitKind] = []

    def look(self, head: Head | None, *, moved: bool) -> None:
        """Called again and again.

        Args:
            head: None while Redis is away.
            moved: whether something has happened in the run.
        """
        now = time.monotonic()
        if moved:
            self._since, self._began, self._logged = now, time.time(), []
            self._shown.quiet("")
            return
        if now - self._since < SHOWN_SECONDS or now - self._looked < _LOOK_SECONDS:
            return
        self._looked = now
        waits = self._found(head)
        if not waits:
            return
        self._shown.quiet(f"waits for {waits[0].kind.value}")
        kinds = [wait.kind for wait in waits]
        patience = QUIET_SECONDS if head is not None else SHOWN_SECONDS  # asking took ten seconds as it was
        if now - self._since >= patience and kinds != self._logged:
            self._logged = kinds
            for wait in waits:
                self._shown.say(wait.said(time.time()))

    def reason(self, head: Head) -> str:
        """What the run waits for, for the end of a sentence; "" while it moves."""
        if time.monotonic() - self._since < SHOWN_SECONDS:
            return ""
        return "".join(f"; it {wait.said(time.time())}" for wait in self._found(head)[:1])

    def _found(self, head: Head | None) -> tuple[Wait, ...]:
        try:
            if head is not None:
                return self._waits.look(head, self._fleet.alive())
        except (CacheUnreachable, RunNotFound):
            pass  # away again, since the head was read
        what, ends = "Redis, which does not answer or has forgotten the run", "it is asked again and again"
        return (Wait(WaitKind.REDIS, what, ends, self._began),)


class Waiting:
    """Waits for one run.

    Args:
        ledger: of the run.
        fleet: its workers.
        quiet: says what it waits for.
    """

    def __init__(self, ledger: Ledger, fleet: Fleet, quiet: Quiet) -> None:
        self._ledger = ledger
        self._fleet = fleet
        self._quiet = quiet

    def until_done(self, bar: Progress, timeout: float | None, worker_timeout: float | None) -> None:
        """Wait until the run is done; arguments and errors as for `Run.wait`.

        Args:
            bar: shows how it goes.
        """
        name = self._ledger.run
        began = workers_seen = time.monotonic()
        deadline = None if timeout is None else began + timeout
        patience = math.inf if worker_timeout is None else worker_timeout
        follower = Follower(self._ledger)
        while True:
            head, events = follower.look(block_seconds=POLL_SECONDS, resting=RESTING)
            now = time.monotonic()
            self._quiet.look(head, moved=bool(events))
            if head is None:
                if deadline is not None and now > deadline:
                    raise WaitTimeout(f"run {name!r} cannot be asked: Redis is away; call wait() again")
                workers_seen = now
                continue
            bar.head(head)
            for event in events:
                bar.event(event)
                if event.type == "discarded":
                    log.warning("run %s: %s", name, event.data["message"])
            if head.status == "done" and not events:
                return
            if head.status == "failed" and not events:
                raise RunFailed(_failure(name, head))
            if head.status == "cancelled":
                raise RunCancelled(f"run {name!r} was cancelled at version {head.version}")
            if deadline is not None and now > deadline:
                raise WaitTimeout(
                    f"run {name!r} is {head.status} at version {head.version} of {head.total_steps} "
                    f"after {timeout:g} s{self._quiet.reason(head)}; it goes on, call wait() again"
                )
            if (
                events
                or head.status == "paused"
                or self._worked_on(
                    bar,
                    alone=now - workers_seen > patience,
                    overdue=now - began > min(patience, QUIET_SECONDS),
                )
            ):
                workers_seen = now
            if events and head.status == "running":
                time.sleep(_PACE_SECONDS)  # steps may take a few milliseconds: don't ask after each

    def _worked_on(self, bar: Progress, *, alone: bool, overdue: bool) -> bool:
        """Whether each queue has a worker, or will get one from a cluster that this program has started.

        Args:
            bar: shows whom the run waits for.
            alone: whether it is high time; else only a program's own cluster is looked at.
            overdue: whether a starting cluster has taken long.

        Raises:
            NoWorker: it is high time and nobody will come, or a worker of the cluster failed to start.
        """
        started = starting(self._fleet.url)  # before the registry, see there
        if not started and not alone:
            return False
        idle = self._fleet.idle_queues()
        names = coming(started, idle)
        if names:
            bar.waiting(names, overdue=overdue)
        elif idle and alone:
            raise NoWorker(_no_worker(self._ledger.run, idle, self._fleet.refused()))
        return bool(names) or not idle


def _failure(name: str, head: Head) -> str:
    error = head.error or {}
    text = f"run {name!r} stopped at version {head.version}: {error.get('message', 'no reason recorded')}"
    if error.get("traceback"):
        text += "\n" + "\n".join("    " + line for line in str(error["traceback"]).splitlines())
    return (
        f"{text}\nCorrect the cause, restart the workers if code changed, then "
        f"Master(...).run({name!r}).resume()."
    )


def _no_worker(name: str, queues: list[str], refused: tuple[str, ...]) -> str:
    commands = "\n".join(f"    {worker_command(queue)}" for queue in queues)
    listed = " and ".join(repr(queue) for queue in queues)
    if refused:
        reasons = "\n".join(f"    {reason}" for reason in refused)
        return (
            f"no worker that may work on run {name!r} is consuming queue {listed}; it stays queued.\n"
            f"{reasons}"
        )
    return (
        f"no worker is consuming queue {listed}, so run {name!r} cannot go on; it stays queued. Start\n"
        f"{commands}\n(or `celery -A torchord worker` for everything on one worker), then wait() again.\n"
        "A worker of another app, such as `celery -A tasks` beside a tasks.py of your own, is not torchord's"
    )
