"""A bound on how long one shard's gradient may be."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torchord.cache.errors import TorchordError


class TooLong(TorchordError):
    """A shard's gradient is longer than `TrainingConfig.max_shard_norm`; the message has both figures."""


def within(most: float | None) -> Callable[[dict[str, Tensor]], None] | None:
    """What to show each shard's gradients to; None without a bound.

    Args:
        most: L2 norm over all tensors of a shard's gradient that is still admitted. What is not finite is
            left to `TrainingConfig.nonfinite`.

    Raises:
        TooLong: it is longer.

    Example:
        >>> look = within(5.0)
        >>> look({"weight": torch.tensor([3.0, 4.0])})
    """
    if most is None:
        return None

    def look(gradients: dict[str, Tensor]) -> None:
        norms = {name: torch.linalg.vector_norm(each.detach().float()) for name, each in gradients.items()}
        if not norms:
            return
        norm = float(torch.linalg.vector_norm(torch.stack(list(norms.values()))))
        if most < norm < float("inf"):
            name, part = max(norms.items(), key=lambda each: float(each[1]))
            raise TooLong(
                f"its gradient has a norm of {norm:.6g}, most of it in {name!r} ({float(part):.6g}), and "
                f"max_shard_norm is {most:.6g}: raise that, or find out who computes such a gradient"
            )

    return look
