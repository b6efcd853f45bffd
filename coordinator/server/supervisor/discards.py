"""Messages of ours that somebody takes and throws away.

A Celery worker that serves one of our queues without torchord's tasks discards what it takes, and says so in
its own log alone. The supervisor sends such messages again, so the run goes on, many times slower.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping

from torchord.cache.ledger.ledger import Ledger
from torchord.cache.ledger.workers import WorkerInfo

log = logging.getLogger(__name__)

WINDOW_SECONDS = 60.0
LOSSES = 3
"""One may be a worker that died between taking a message and beginning; so many in the window are not."""


def said_of(queue: str) -> str:
    """What people are told."""
    return (
        f"messages on queue {queue!r} are taken and thrown away by somebody who is no torchord worker: they "
        "are gone from the queue and nobody has begun them, while workers of torchord are idle. Look for a "
        "Celery worker that serves this queue without torchord's tasks (its log says 'Received unregistered "
        "task'), or one of your own app that holds messages back (worker_prefetch_multiplier above 1)"
    )


class Discards:
    """Counts lost messages by queue, and says so when they are too many.

    Args:
        clock: monotonic seconds.
        report: told, whenever that changes, what is wrong now: queue -> what people are told.
    """

    def __init__(self, clock: Callable[[], float], report: Callable[[dict[str, str]], None]) -> None:
        self._clock = clock
        self._report = report
        self._losses: dict[str, deque[float]] = {}
        self._since: dict[tuple[str, str], float] = {}  # (queue, run) -> when its event was written
        self._reported: dict[str, str] = {}

    def lost(self, queue: str, ledger: Ledger, alive: Mapping[str, WorkerInfo]) -> None:
        """Hear that messages of a run are neither in their queue nor begun by anybody.

        That counts only while a worker is there that would have begun them.
        """
        run = ledger.run
        serving = [info for info in alive.values() if queue in info.queues]
        if any(run in info.refuses for info in serving) or all(info.tasks for info in serving):
            return
        now = self._clock()
        losses = self._losses.setdefault(queue, deque(maxlen=LOSSES))
        losses.append(now)
        if not self._many(losses) or now - self._since.get((queue, run), float("-inf")) < WINDOW_SECONDS:
            return
        self._since[queue, run] = now
        log.warning("run %s: %s", run, said_of(queue))
        ledger.emit("discarded", {"queue": queue, "message": said_of(queue)})

    def end_round(self) -> None:
        """Report what is wrong now, if that is news."""
        now = self._clock()
        self._since = {key: at for key, at in self._since.items() if now - at < WINDOW_SECONDS}
        wrong = {queue: said_of(queue) for queue, losses in self._losses.items() if self._many(losses)}
        if wrong != self._reported:
            self._reported = wrong
            self._report(wrong)

    def _many(self, losses: deque[float]) -> bool:
        return len(losses) == LOSSES and self._clock() - losses[0] < WINDOW_SECONDS
