"""Schedulers that recipes name: `scheduler=partial(each_epoch, scheduler=partial(StepLR, step_size=3))`.

They live under this name because specs on disk carry it. Any scheduler of torch is as good by itself; it is
then stepped once a global step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim.lr_scheduler import LinearLR, LRScheduler, ReduceLROnPlateau, SequentialLR

from torchord.cache.errors import InvalidInput
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


def warmup(
    optimizer: Any,
    *,
    steps: int,
    start_factor: float = 0.01,
    scheduler: Callable[[Any], LRScheduler] | None = None,
) -> LRScheduler:
    """A learning rate that rises linearly over the first steps, and then follows another scheduler.

    Equation:
        lr_t = lr (s + (1 - s) t / n)   for t <= n;   then lr_t of `scheduler` at step t - n, or lr

    Args:
        optimizer: the recipe's.
        steps: n, global steps, at least 1.
        start_factor: s, greater than 0 and at most 1.
        scheduler: (optimizer) -> scheduler, which begins where the warm-up ends; None: the rate stays.

    Raises:
        InvalidInput: the scheduler steps by epochs or waits for a figure, or a number is out of range.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> warmup(optimizer, steps=4, start_factor=0.5).get_last_lr()
        [0.5]
    """
    if type(steps) is not int or steps < 1:
        raise InvalidInput(f"a warm-up has a number of steps from 1, not {steps!r}")
    if not 0 < start_factor <= 1:
        raise InvalidInput(f"a warm-up begins at a factor above 0 and up to 1, not {start_factor!r}")
    rising = LinearLR(optimizer, start_factor=start_factor, total_iters=steps)
    if scheduler is None:
        return rising
    following = scheduler(optimizer)
    if isinstance(following, (EachEpoch, ReduceLROnPlateau)):
        raise InvalidInput(
            f"{type(following).__name__} cannot follow a warm-up, which steps it once a global step without "
            "a figure; use a scheduler of steps, such as CosineAnnealingLR"
        )
    return SequentialLR(optimizer, [rising, following], milestones=[steps])
