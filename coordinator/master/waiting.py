"""Waiting for a run to be done, for its workers to come, and for Redis to come back."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType

from torchord.cache.errors import NoWorker, RunCancelled, RunFailed, WaitTimeout
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.ledger.records import Head
from torchord.coordinator.local_cluster.starting import coming, starting
from torchord.coordinator.master.fleet import Fleet
from torchord.coordinator.master.follower import Follower
from torchord.coordinator.master.progress import Progress
from torchord.coordinator.messages.task_names import worker_command

log = logging.getLogger(__name__)

RESTING = ("done", "failed", "cancelled")
POLL_SECONDS = 0.5
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
        f"    Master({url!r}).run({run!r}).wait(progress=True)\n"
    )
    if sys.excepthook is sys.__excepthook__:  # nobody else shows this program's errors
        sys.excepthook = _show_error
    return Detached(f"run {run!r} goes on")


class Waiting:
    """Waits for one run.

    Args:
        ledger: of the run.
        fleet: its workers.
    """

    def __init__(self, ledger: Ledger, fleet: Fleet) -> None:
        self._ledger = ledger
        self._fleet = fleet

    def until_done(self, bar: Progress, timeout: float | None, worker_timeout: float) -> None:
        """Wait until the run is done; arguments and errors as for `Run.wait`.

        Args:
            bar: shows how it goes.
        """
        name = self._ledger.run
        began = workers_seen = time.monotonic()
        deadline = None if timeout is None else began + timeout
        follower = Follower(self._ledger)
        while True:
            head, events = follower.look(block_seconds=POLL_SECONDS, resting=RESTING)
            now = time.monotonic()
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
                    f"after {timeout:g} s; it goes on, call wait() again"
                )
            if (
                events
                or head.status == "paused"
                or self._worked_on(
                    bar, alone=now - workers_seen > worker_timeout, overdue=now - began > worker_timeout
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
