"""Models of whose state a large part rests: never changes, or not at first."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from torchord import Recipe

WIDTH, LAYERS = 128, 6  # 0.4 MB that rest


class Adapted(nn.Module):
    """A frozen linear layer and, trained, the product of two thin matrices beside it."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.base = nn.Linear(width, width).requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, width) / width**0.5)
        self.up = nn.Parameter(torch.zeros(width, rank))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + torch.tanh(self.base(inputs) + inputs @ self.down.T @ self.up.T)


def adapters(width: int = WIDTH, layers: int = LAYERS, rank: int = 1) -> nn.Module:
    """What is trained lies between what is frozen; a constant buffer beside."""
    model = nn.Sequential(*(Adapted(width, rank) for _ in range(layers)), nn.Linear(width, 4))
    model.register_buffer("table", torch.randn(16, 16))
    return model


class Backbone(nn.Module):
    """Frozen layers whose normalisation keeps its running statistics up to date, and a trained head."""

    def __init__(self, width: int = WIDTH, layers: int = LAYERS) -> None:
        super().__init__()
        blocks = [
            m for _ in range(layers) for m in (nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU())
        ]
        self.body = nn.Sequential(*blocks).requires_grad_(False)
        self.head = nn.Linear(width, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.body(inputs))


class Waking(nn.Module):
    """Buffers, or a buffer and a frozen parameter, that its forward begins to write one after the other."""

    def __init__(self, width: int = WIDTH, layers: int = LAYERS, *, parameter: bool = False) -> None:
        super().__init__()
        self.body = adapters(width, layers)
        if parameter:
            self.offset = nn.Parameter(torch.zeros(256, width), requires_grad=False)
        else:
            self.register_buffer("offset", torch.zeros(256, width))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("late", torch.zeros(width, width))
        self.register_buffer("gap", torch.zeros(3, dtype=torch.bool))

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.steps += 1
            if self.steps > 2:
                self.late += inputs.detach().mean(0)
            if self.steps > 4:
                with torch.no_grad():
                    self.offset += 1e-3 * inputs.detach().mean(0)
        return self.body(inputs + self.offset[0] + 1e-3 * self.late[0])


class Teacher(nn.Module):
    """A student, and a frozen average of it whose bytes the optimizer writes past autograd's counters."""

    def __init__(self, width: int = WIDTH, layers: int = LAYERS) -> None:
        super().__init__()
        self.student = adapters(width, layers)
        self.average = adapters(width, layers).requires_grad_(False)
        self.average.load_state_dict(self.student.state_dict())

    def forward(self, inputs: Tensor) -> Tensor:
        return self.student(inputs) + 0.1 * self.average(inputs)


class Averaging(torch.optim.SGD):
    """SGD that moves the second half of its parameters towards the first, from some step on."""

    def __init__(self, params: Iterable[Tensor], lr: float, begin: int = 3) -> None:
        super().__init__(params, lr=lr)
        self.param_groups[0]["taken"], self.begin = 0, begin

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        group = self.param_groups[0]
        group["taken"] += 1
        if group["taken"] > self.begin:
            half = len(group["params"]) // 2
            for student, average in zip(group["params"][:half], group["params"][half:], strict=True):
                average.data.lerp_(student.data, 0.1)


def samples(size: int = 48, width: int = WIDTH) -> TensorDataset:
    """Points of a class that a linear rule gives them."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(size, width, generator=generator)
    return TensorDataset(inputs, (inputs @ torch.randn(width, 4, generator=generator)).argmax(1))


def recipe(
    model: Callable[..., nn.Module] = adapters, *, width: int = WIDTH, layers: int = LAYERS, **entries: Any
) -> Recipe:
    """A recipe of one of these models."""
    made: dict[str, Any] = {
        "model": partial(model, width=width, layers=layers),
        "dataset": partial(samples, width=width),
        "loss": torch.nn.functional.cross_entropy,
        "optimizer": partial(torch.optim.AdamW, lr=1e-2),
    }
    return Recipe(**{**made, **entries})
