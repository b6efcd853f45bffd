"""Schedulers that recipes name: `scheduler=partial(each_epoch, scheduler=partial(StepLR, step_size=3))`.

They live under this name because specs on disk carry it. Any scheduler of torch is as good by itself; it is
then stepped once a global step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim.lr_scheduler import LRScheduler

from torchord.coordinator.compute.schedules import EachEpoch


def each_epoch(optimizer: Any, *, scheduler: Callable[[Any], LRScheduler], frequency: int = 1) -> EachEpoch:
    """A scheduler that is stepped when an epoch of the run ends, wherever that is.

    Args:
        optimizer: the recipe's.
        scheduler: (optimizer) -> scheduler.
        frequency: how many epochs there are to a step of it, at least 1.

    Raises:
        InvalidInput: the scheduler waits for a figure, or the frequency is none.
    """
    return EachEpoch(scheduler(optimizer), frequency)
