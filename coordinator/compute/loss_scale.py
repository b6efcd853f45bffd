"""Dynamic loss scaling for fp16: one state per version, moved on by the training server alone.

Gradients of fp16 activations underflow, so the loss is multiplied by a scale before the backward and the
gradients are divided by it afterwards (Micikevicius et al., Mixed Precision Training, arXiv 1710.03740). The
scale follows the rule of `torch.amp.GradScaler`: halved by a step whose gradients overflow, which changes
nothing else; doubled after so many steps in a row without one.

The scale is a part of the version, one more tensor beside parameters and buffers. So every Client of a
version multiplies by the same number, a replay or a restored checkpoint comes with the number of its time,
and the ledger's digests cover it. With local steps each slot has a scale of its own, in the slot's state.

Deviations from GradScaler: the scale stays a normal float32, where GradScaler's could reach 0; and with
nonfinite="stop" a run ends when the scale would fall below 1 (as DeepSpeed's does), because it is not
the scale then that overflows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchord.cache.errors import InvalidInput
from torchord.coordinator.spec.config import TrainingConfig

ENTRY = "torchord/loss_scale"
"""Name of the scale's tensor in a version; no parameter or buffer has a name with a slash in it."""

_GROWTH, _BACKOFF = 2.0, 0.5
_LEAST = torch.finfo(torch.float32).tiny
_MOST = 2.0**127


@dataclass(frozen=True)
class LossScale:
    """The scaler's state at one version.

    Attributes:
        scale: what the loss is multiplied by.
        steps: steps without an overflow since the scale last changed.

    Example:
        >>> scale = LossScale(1024.0)
        >>> scale.after(overflow=True, interval=2)
        LossScale(scale=512.0, steps=0)
        >>> scale.after(overflow=False, interval=2).after(overflow=False, interval=2)
        LossScale(scale=2048.0, steps=0)
    """

    scale: float
    steps: int = 0

    def after(self, *, overflow: bool, interval: int) -> LossScale:
        """The state after one more step.

        Args:
            overflow: whether a gradient of the step was infinite or NaN, so that it was skipped.
            interval: steps in a row without an overflow after which the scale is doubled.
        """
        if overflow:
            return LossScale(max(self.scale * _BACKOFF, _LEAST))
        if self.steps + 1 < interval:
            return LossScale(self.scale, self.steps + 1)
        return LossScale(min(self.scale * _GROWTH, _MOST))

    def tensor(self) -> Tensor:
        """The state as it lies in a version: (2,), float64, scale and steps."""
        return torch.tensor([self.scale, float(self.steps)], dtype=torch.float64)

    @classmethod
    def of(cls, tensor: Tensor) -> LossScale:
        """The inverse of `tensor`."""
        scale, steps = tensor.tolist()
        return cls(scale, int(steps))


def at_start(config: TrainingConfig) -> LossScale | None:
    """The scale of version 0; None where the precision needs none."""
    return LossScale(config.loss_scale) if config.precision == "fp16" else None


@torch.no_grad()
def unscale(parameters: Iterable[tuple[str, nn.Parameter]], scale: LossScale) -> None:
    """Divide the gradients in the parameters by the scale, in place.

    Raises:
        InvalidInput: a parameter is itself half precision, in which small gradients would vanish.
    """
    inverse = 1.0 / scale.scale
    for name, parameter in parameters:
        if parameter.grad is None:
            continue
        if parameter.dtype is torch.float16:
            raise InvalidInput(
                f"parameter {name!r} is float16, but precision='fp16' needs float32 ones: autocast makes "
                "the half-precision copies itself. Leave .half() out of the recipe's model"
            )
        parameter.grad.mul_(inverse)


def exhausted(config: TrainingConfig, scale: LossScale, loss: float) -> bool:
    """Whether an overflow is none that a smaller scale cures, so that nonfinite="stop" has to stop.

    Args:
        config: the run's config.
        scale: the scale that the gradients overflowed with.
        loss: the loss, which is not scaled itself.
    """
    return config.nonfinite == "stop" and (not math.isfinite(loss) or scale.scale * _BACKOFF < 1.0)
