"""What two runs may differ in, for tests of where they part."""

from __future__ import annotations

import torch
from torch.utils.data import TensorDataset

from tests.support import models


def spoilt(size: int, sample: int) -> TensorDataset:
    """`models.points` with another input at one place."""
    inputs, targets = models.points(size).tensors
    changed = inputs.clone()
    changed[sample] += 1.0
    return TensorDataset(changed, targets)


def other_start() -> torch.nn.Module:
    """`models.Mlp` with another last bias."""
    model = models.Mlp()
    with torch.no_grad():
        list(model.parameters())[-1].add_(1.0)
    return model
