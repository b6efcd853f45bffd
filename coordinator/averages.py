"""Averages of the weights that recipes name: `average=partial(ema, decay=0.999)`.

How they are kept is in `torchord.coordinator.compute.averaging`; `Average` is for a rule of your own.
"""

from __future__ import annotations

from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn

from torchord.coordinator.compute.averaging import Average, Update

__all__ = ["Average", "ema", "swa"]


def ema(decay: float = 0.999, *, start: int = 0, every: int = 1, buffers: bool = False) -> Average:
    """The exponential moving average of the weights, as `torch.optim.swa_utils.AveragedModel` keeps it.

    Equation:
        a_1 = w_1,   a_{t+1} = decay * a_t + (1 - decay) * w_{t+1}

    Args:
        decay: in [0, 1].
        start: as in `Average`.
        every: as in `Average`.
        buffers: as in `Average`.

    Example:
        >>> ema(0.9).every
        1
    """
    update: Update = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
    return Average(update, start=start, every=every, buffers=buffers)


def swa(*, start: int, every: int = 1, buffers: bool = False) -> Average:
    """Stochastic weight averaging: the mean of the weights of versions `start`, `start + every`, ...

    Args:
        start: as in `Average`.
        every: as in `Average`.
        buffers: as in `Average`.

    Paper:
        Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization",
        arXiv 1803.05407. Deviation: the running statistics of BatchNorm are the weights' own, as in
        `AveragedModel`, or their mean (`buffers=True`); the paper computes them anew at the end, which
        `torch.optim.swa_utils.update_bn(loader, trained.module)` does.

    Example:
        >>> swa(start=100, every=10).start
        100
    """
    update: Update = get_swa_multi_avg_fn()  # type: ignore[no-untyped-call]
    return Average(update, start=start, every=every, buffers=buffers)
