"""Reads the batch that a Client expects to need next, while it would only wait for the update.

A batch is a function of (run, step, shard) and does not depend on the parameters, so it may be read before
the step's version exists, by whoever will compute the shard. Which shard that is, the queue decides: idle
Clients get the next step's tasks in the order in which they became idle, and Redis serves who has waited
longest. So a Client that was the third to become idle reads the batch of shard 2. A wrong guess costs a
little idle time and changes nothing: the batch is thrown away, and the right one is read.

It is done only where it can pay: for plain steps whose batches take noticeable time to read, when no task
waits in the queue, when the chord has counted this one already, and while most guesses have been right.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from torchord.coordinator.compute.determinism import pinned
from torchord.coordinator.compute.gradient import Batch, IndexArray, read_batch
from torchord.coordinator.runtime import activity
from torchord.coordinator.runtime.services import RunContext

log = logging.getLogger(__name__)

LEAST_SECONDS = 0.002  # what a batch must take to be worth a guess, and a look at the queue
TRIES = 8  # after so many guesses it is counted how many were right,
REST_STEPS = 100  # and if fewer than half, nothing is read ahead for so many steps


@dataclass
class _Course:
    """What is known of one run in this process.

    Attributes:
        seconds: what the last batch took to read.
        others: most Clients seen at work elsewhere while this one was idle.
        ahead: the batch that was read ahead, with (step, shard), its indices and its dataset.
        right, wrong: guesses since they were last counted.
        resting_until: step before which nothing is read ahead.
    """

    seconds: float = 0.0
    others: int = 0
    ahead: tuple[tuple[int, int], IndexArray, Any, Batch] | None = None
    right: int = 0
    wrong: int = 0
    resting_until: int = 0


class Prefetcher:
    """One worker process's batches that are read ahead; at most one a run is kept.

    Args:
        waiting: how many tasks wait in the Clients' queue.
        doing: told what the process does meanwhile, as for the heartbeat: a dataset that hangs is then
            seen to hang everybody.
    """

    def __init__(self, waiting: Callable[[], int], doing: Callable[[str], None]) -> None:
        self._waiting = waiting
        self._doing = doing
        self._courses: WeakKeyDictionary[RunContext, _Course] = WeakKeyDictionary()

    def take(
        self, context: RunContext, step: int, shard: int, indices: IndexArray, dataset: Any
    ) -> Batch | None:
        """The shard's batch, if it was read ahead; it is handed out once."""
        course = self._courses.get(context)
        if course is None or course.ahead is None:
            return None
        (place, known, source, batch), course.ahead = course.ahead, None
        if place == (step, shard) and source is dataset and np.array_equal(known, indices):
            course.right += 1
            return batch
        course.wrong += 1
        if course.right + course.wrong >= TRIES:
            if course.wrong > course.right:
                course.resting_until = step + REST_STEPS
            course.right = course.wrong = 0
        return None

    def observe(self, context: RunContext, seconds: float) -> None:
        """What reading a batch of the run took."""
        self._courses.setdefault(context, _Course()).seconds = seconds

    def idle(self, context: RunContext, step: int, present: int) -> None:
        """Called after a shard's slot was written: read the next step's batch, if that can pay.

        Nothing that goes wrong here matters: who computes the shard reads the batch again and meets, and
        reports, the same error.

        Args:
            present: slots of the step that are there.
        """
        course = self._courses.get(context)
        if course is None or course.seconds < LEAST_SECONDS or step < course.resting_until:
            return
        try:
            if not self._waiting() and context.lock.acquire(blocking=False):
                try:
                    self._read(context, course, step, present)
                finally:
                    context.lock.release()
        except Exception as error:  # noqa: BLE001  the recipe's own, or Redis is away
            log.info("run %s: no batch of step %d read ahead: %s", context.run, step + 1, error)

    def _read(self, context: RunContext, course: _Course, step: int, present: int) -> None:
        plan = context.plan()
        working = max(0, plan.shards_in(step) - present)
        course.others = max(course.others, working)
        after, shard = step + 1 + plan.config_at(step).staleness, course.others - working
        if after >= plan.total_steps or shard >= plan.shards_in(after):
            return
        config = plan.config_at(after)
        if config.local_steps > 1:
            return
        dataset, indices = context.dataset(), plan.indices(after, shard)
        self._doing(activity.gradient(context.run, after, shard))
        with pinned(config.threads, config.deterministic):
            batch = read_batch(context.recipe, config, dataset, indices, (after, shard))
        course.ahead = (after, shard), indices, dataset, batch
