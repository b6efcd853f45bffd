"""Recipes whose loss or backward is another in training mode than evaluation mode shows."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tests.support import models


class Hooked(nn.Module):
    """A linear classifier whose weight's gradient a hook bounds, or holds still in some rows."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.linear = nn.Linear(models.FEATURES, models.CLASSES)
        trained = (torch.arange(models.CLASSES) > 0).float()[:, None]
        hooks = {"bound": lambda g: g.clamp(-0.01, 0.01), "rows": lambda g: g * trained}
        self.linear.weight.register_hook(hooks[way])  # type: ignore[no-untyped-call]

    def forward(self, inputs: Tensor) -> Tensor:
        found: Tensor = self.linear(inputs)
        return found


class ByFrequency(nn.Module):
    """Words whose gradients are divided by how often they are in the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, models.CLASSES, scale_grad_by_freq=True)

    def forward(self, words: Tensor) -> Tensor:
        found: Tensor = self.embedding(words).mean(1)
        return found


def words(size: int = 40) -> TensorDataset:
    generator = torch.Generator().manual_seed(7)
    drawn = torch.randint(0, 4, (size, 5), generator=generator)
    return TensorDataset(drawn, torch.randint(0, models.CLASSES, (size,), generator=generator))


class Experts(nn.Module):
    """A mixture of experts, which keeps how evenly the batch went to them."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(models.FEATURES, 3)
        self.experts = nn.ModuleList(nn.Linear(models.FEATURES, models.CLASSES) for _ in range(3))
        self.uneven: Any = None

    def forward(self, inputs: Tensor) -> Tensor:
        gates = self.router(inputs).softmax(1)
        chosen = F.one_hot(gates.argmax(1), 3).float()
        self.uneven = 3 * (gates.mean(0) * chosen.mean(0)).sum()
        return torch.stack([e(inputs) * gates[:, [k]] for k, e in enumerate(self.experts)]).sum(0)


def balanced_experts(model: Any, batch: Any) -> Tensor:
    """Their balance is a product of means over the batch, and enters the loss in training alone."""
    loss = F.cross_entropy(model(batch[0]), batch[1])
    return loss + 0.5 * model.uneven if model.training else loss


class TwoHeads(nn.Module):
    """A second head, in training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(models.FEATURES, 8)
        self.heads = nn.ModuleList(nn.Linear(8, models.CLASSES) for _ in range(2))

    def forward(self, inputs: Tensor) -> list[Tensor]:
        hidden = self.body(inputs).relu()
        return [head(hidden) for head in self.heads[: 2 if self.training else 1]]


def both_heads(outputs: list[Tensor], targets: Tensor) -> Tensor:
    return torch.stack([F.cross_entropy(each, targets) for each in outputs]).sum()


class Centred(nn.Module):
    """A running centre by hand: in training mode the batch's own enters it first, as in a BatchNorm."""

    centre: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(models.FEATURES, models.CLASSES)
        self.register_buffer("centre", torch.zeros(models.FEATURES))

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.centre = 0.9 * self.centre + 0.1 * inputs.detach().mean(0)
        found: Tensor = self.linear(inputs - self.centre)
        return found
