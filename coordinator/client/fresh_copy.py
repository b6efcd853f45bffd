"""A shard computed in fresh copies of model and dataset, in which nothing was computed before.

What a recipe keeps where torchord does not see it (an attribute of the model, a generator of the dataset, a
cache of samples) is at its beginning there, so a gradient that depends on it comes out otherwise.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torchord.coordinator.compute.batch import open_dataset
from torchord.coordinator.compute.replica import Replica
from torchord.coordinator.compute.shard import ShardWork, work
from torchord.coordinator.runtime.context import RunContext
from torchord.coordinator.runtime.environment import device
from torchord.coordinator.runtime.machine import spare_memory_nbytes, used_memory_nbytes

log = logging.getLogger(__name__)

SHARE = 0.002
"""Part of a worker's time that making fresh copies may take, from its first check of a run on,"""

FREE_SECONDS = 2.0
"""and so much besides, for the checks at a run's start."""


class Allowance:
    """Which copies may be made anew, so that it all takes at most `FREE_SECONDS` and `SHARE` of the time.

    What was never made is always made once.
    """

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._spent_seconds = 0.0
        self._last_seconds: dict[str, float] = {}

    def covers(self, part: str) -> bool:
        """Whether a part may be made anew now."""
        seconds = self._last_seconds.get(part)
        if seconds is None:
            return True
        return self._spent_seconds + seconds <= FREE_SECONDS + SHARE * (time.monotonic() - self._since)

    def made(self, part: str, seconds: float) -> None:
        """Note that a part was made anew; the first time is not counted."""
        if part in self._last_seconds:
            self._spent_seconds += seconds
        self._last_seconds[part] = seconds

    def longer(self, part: str, seconds: float) -> None:
        """Note that a part took longer than was said, as for kernels that are compiled at first use."""
        self._spent_seconds += seconds
        self._last_seconds[part] += seconds


class FreshCopies:
    """Computes shards in fresh copies, for one worker process.

    Where a copy cannot be had (making it takes too long to be done again, or too much memory; a file that
    can be opened once only), the process's own serves instead: what moves from call to call still
    shows there, and so does everything that differs between processes.
    """

    def __init__(self) -> None:
        self._allowances: WeakKeyDictionary[RunContext, Allowance] = WeakKeyDictionary()

    def work(
        self,
        context: RunContext,
        replica: Replica,
        step: int,
        shard: int,
        state: Mapping[str, Any] | None,
    ) -> ShardWork:
        """Compute a shard as `torchord.coordinator.compute.shard.work` does, in copies that are then dropped.

        Args:
            replica: the process's own, loaded with the version that the step is computed at.
            state: as for `work`.

        Raises:
            Exception: whatever the recipe's code raises in the process's own copies.
        """
        own = replica, context.dataset()
        model, dataset = self._model(context, replica), self._dataset(context)
        if (model, dataset) != (None, None):
            chosen = own[0] if model is None else model, own[1] if dataset is None else dataset
            began = time.monotonic()
            try:
                return work(chosen[0], context.recipe, context.plan(), chosen[1], step, shard, state)
            except Exception:  # the process's own copies decide whether this is the recipe's fault
                log.info("run %s: fresh copies fail at shard %d", context.run, shard, exc_info=True)
            finally:
                if model is not None and model.compiled is not None:
                    self._allowances[context].longer("model", time.monotonic() - began)
        return work(own[0], context.recipe, context.plan(), own[1], step, shard, state)

    def _model(self, context: RunContext, replica: Replica) -> Replica | None:
        def make() -> Replica:
            made = Replica.build(context.recipe, context.config, device(), computing=True)
            assert replica.flat is not None
            made.arrange(replica.manifest)
            made.load(replica.flat, replica.rest)
            return made

        made: Replica | None = self._made(context, "model", make)
        return made

    def _dataset(self, context: RunContext) -> Any:
        return self._made(context, "dataset", lambda: open_dataset(context.recipe, context.config))

    def _made(self, context: RunContext, part: str, make: Any) -> Any:
        """A part made anew; None if it cannot be had."""
        allowance = self._allowances.setdefault(context, Allowance())
        if not allowance.covers(part) or spare_memory_nbytes() < used_memory_nbytes():
            return None
        began = time.monotonic()
        try:
            return make()
        except Exception:  # such as for a file that can be opened once only
            log.info("run %s: no fresh copy of the %s", context.run, part, exc_info=True)
            return None
        finally:
            allowance.made(part, time.monotonic() - began)
