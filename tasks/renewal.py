"""A worker that is of no use any more, seen from inside, starts its program anew.

Two things can be known of a worker by itself alone, and neither ends by itself: it is idle and the loop
that takes its messages does not turn (it is deaf), or all that it is at is what nobody waits for any more, of
a run that is at rest (an endless loop, a deadlock, code that reads from a terminal). No worker is touched
that computes what somebody waits for, however long that takes.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from billiard.process import active_children
from celery.worker import state

from torchord.cache.errors import CacheError, RunNotFound
from torchord.cache.ledger.workers import WorkerInfo
from torchord.coordinator.messages.waits import duration
from torchord.coordinator.runtime import activity

log = logging.getLogger(__name__)

ABANDONED_SECONDS = 60.0  # at what a run that is at rest has no use for
AGAIN = 75  # EX_TEMPFAIL, the exit code of a process that is to be started again
_LOOK_SECONDS = 5.0

_ARGUMENTS = tuple(sys.orig_argv[1:])
_DIRECTORY = os.getcwd()


class Renewal:
    """Told of each beat of a worker's heartbeat, decides whether the worker is to start anew.

    Args:
        status: what a run's head says, as in "running".
        awaited: whether somebody keeps a version, as who predicts from it does (for up to ten minutes more).
        start_anew: does it; told why.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        status: Callable[[str], str],
        awaited: Callable[[str, int], bool],
        start_anew: Callable[[WorkerInfo, str], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._status = status
        self._awaited = awaited
        self._start_anew = start_anew
        self._clock = clock
        self._looked = float("-inf")
        self._abandoned: dict[str, float] = {}  # task -> when its run was first seen at rest

    def __call__(self, said: WorkerInfo) -> None:
        """Look, after a beat that has arrived."""
        if said.deaf and not state.active_requests:  # those of other apps are no tasks of ours
            why = f"idle, and the loop that takes its messages has not turned for {said.silent:.0f} s"
            self._start_anew(said, why)
        elif not said.where:
            self._abandoned.clear()
        elif self._clock() - self._looked >= _LOOK_SECONDS:
            self._looked = self._clock()
            self._look(said)

    def _look(self, said: WorkerInfo) -> None:
        """Whether all that it is at, it is at for nobody, and has been for long."""
        now = self._clock()
        at_rest = [task for task in said.tasks if self._rests(task)]
        kept = self._abandoned = {task: self._abandoned.get(task, now) for task in at_rest}
        busy_with_others = len(at_rest) < max(len(said.tasks), len(state.active_requests))
        if busy_with_others or now - max(kept.values(), default=now) < ABANDONED_SECONDS:
            return
        places = "; ".join(f"{task}, {said.where.get(task, 'of late')}" for task in at_rest)
        why = f"at what nobody has waited for since {duration(now - max(kept.values()))}: {places}"
        self._start_anew(said, why)

    def _rests(self, task: str) -> bool:
        try:
            if (predicted := activity.predicted(task)) is not None:
                return not self._awaited(*predicted)
            run = activity.trained(task)
            return bool(run) and self._status(run) not in ("pending", "running", "paused")
        except RunNotFound:
            return True
        except CacheError:
            return False


def start_anew(leave: Callable[[], None], why: str, *, forks: bool, forked: bool) -> NoReturn:
    """Run the worker's program anew, in this process; one log line says why.

    A process of a pool ends, and its parent starts another. The parent of a pool that forks ends with its
    children and the exit code `AGAIN`: whoever supervises it starts it again.

    Args:
        leave: ends its lease, so that nobody counts on it.
        forks: whether this is the parent of a prefork pool.
        forked: whether this is a process of one.
    """
    log.critical("this worker starts anew: it was %s", why)
    try:
        leave()
    except Exception as error:  # noqa: BLE001 - nothing must keep it
        log.warning("its lease ends by itself: %s", error)
    for handler in logging.getLogger().handlers:
        handler.flush()
    if forks:
        for child in active_children():
            with suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGKILL)
    if not forks and not forked:
        with suppress(OSError):
            run_again()
    os._exit(AGAIN)


def run_again() -> NoReturn:
    """Run this process's program anew, without its threads and connections, as Celery does it at a SIGHUP.

    Raises:
        OSError: it cannot be.
    """
    os.chdir(_DIRECTORY)
    for number in map(int, os.listdir("/dev/fd")):
        if number > 2:
            with suppress(OSError):  # the one that this list was read from
                os.set_inheritable(number, False)
    os.execv(sys.executable, [sys.executable, *_ARGUMENTS])
