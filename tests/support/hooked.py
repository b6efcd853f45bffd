"""Models whose gradients are not simply done when a backward has reached their parameters."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.support.models import CLASSES, FEATURES


class Nested(nn.Module):
    """A layer that is used in two checkpointed segments: each has a backward of its own in the backward."""

    def __init__(self, hidden: int = 16) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, hidden)
        self.twice = nn.Linear(hidden, hidden)
        self.last = nn.Linear(hidden, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        x = self.first(inputs)
        for _ in range(2):
            x = checkpoint(lambda y: self.twice(y).relu(), x, use_reentrant=True)
        return self.last(x)


class Rewriting(nn.Module):
    """Changes its gradients after they are accumulated, behind autograd's back."""

    def __init__(self, hidden: int = 16) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, hidden)
        self.second = nn.Linear(hidden, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        return _Late.apply(self.second(self.first(inputs).relu()), self.second)


class _Late(torch.autograd.Function):
    """Hands itself on, and has the engine halve a layer's gradients when the backward is done."""

    @staticmethod
    def forward(context: Any, value: Tensor, layer: nn.Module) -> Tensor:
        context.layer = layer
        return value.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Any:
        def halve() -> None:
            for parameter in context.layer.parameters():
                if parameter.grad is not None:
                    parameter.grad.data.mul_(0.5)

        torch.autograd.Variable._execution_engine.queue_callback(halve)
        return gradient, None


class Strided(nn.Module):
    """A weight that does not lie in memory as its version does, so that its gradient does not either."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(CLASSES, FEATURES).t())

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs @ self.weight


def accumulating_step(model: nn.Module, batch: list[Tensor]) -> Tensor:
    """Go back through half of the batch before the loss of the other half is returned."""
    inputs, targets = batch
    half = len(inputs) // 2
    if half:
        F.cross_entropy(model(inputs[:half]), targets[:half]).backward()
    return F.cross_entropy(model(inputs[half:]), targets[half:])
