"""Recipes whose data waits for, or breaks until, a file appears: a test decides when a run goes on."""

from __future__ import annotations

import os
import time
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from tests.support import models
from torchord.coordinator.spec.recipe import Recipe

GATE_SECONDS = 120.0


def wait_for(gate: str) -> None:
    """Wait until the file exists; meanwhile the file `gate + ".waiting"` exists."""
    deadline = time.monotonic() + GATE_SECONDS
    if not os.path.exists(gate):
        open(gate + ".waiting", "w").close()
    while not os.path.exists(gate):
        if time.monotonic() > deadline:
            raise TimeoutError(f"nobody opened {gate}")
        time.sleep(0.005)


class Gated(Dataset[tuple[Tensor, Tensor]]):
    """`models.points`, but reading the sample `at` waits until the file `gate` exists: see `wait_for`."""

    def __init__(self, gate: str, at: int, size: int = 40) -> None:
        self.inner = models.points(size)
        self.gate = gate
        self.at = at

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index == self.at:
            wait_for(self.gate)
        sample: tuple[Tensor, Tensor] = self.inner[index]
        return sample


class Fixable(Dataset[tuple[Tensor, Tensor]]):
    """`models.points`, but reading the sample `at` raises until the file `fix` exists.

    Reading the sample `gate_at` waits for the file `gate`.
    """

    def __init__(self, fix: str, at: int, size: int = 40, gate: str = "", gate_at: int = -1) -> None:
        self.inner = models.points(size)
        self.fix = fix
        self.at = at
        self.gate = gate
        self.gate_at = gate_at

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index == self.gate_at:
            wait_for(self.gate)
        if index == self.at and not os.path.exists(self.fix):
            raise OSError(f"cannot read sample {index}: the disk is not mounted")
        sample: tuple[Tensor, Tensor] = self.inner[index]
        return sample


class Broken(nn.Module):
    """A model whose forward raises."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(models.FEATURES, models.CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        raise ZeroDivisionError("this model always raises")


def unbuildable() -> nn.Module:
    """A model that cannot even be made."""
    raise FileNotFoundError("no pretrained weights at weights/backbone.bin")


def unreadable() -> Dataset[Any]:
    """A dataset that cannot even be opened."""
    raise FileNotFoundError("no data at data/train.bin")


def wrong_targets() -> Dataset[Any]:
    """Points whose class numbers are out of the model's range."""
    data = models.points(16)
    return torch.utils.data.TensorDataset(data.tensors[0], data.tensors[1] + models.CLASSES)


def putting_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss with an operator that has no deterministic implementation."""
    return F.cross_entropy(outputs.put(torch.tensor([0]), torch.ones(1)), targets)


def wide_points() -> Dataset[Any]:
    """Points with one feature more than the models take."""
    return models.points(16, features=models.FEATURES + 1)


def steep_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """A finite loss with an infinite derivative: the square root of zero."""
    return (outputs * 0.0).sum().abs().sqrt()


class OnlyInputs(Dataset[Tensor]):
    """Samples that are no (input, target) pairs, for predictions."""

    def __init__(self, size: int) -> None:
        self.inputs = models.points(size).tensors[0]

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> Tensor:
        return self.inputs[index]


def gated(gate: str, at: int, size: int = 40, **changes: Any) -> Recipe:
    """`models.mlp` over `Gated`, not evaluated."""
    return models.mlp(dataset=partial(Gated, gate, at, size), evaluation=None, metrics=None, **changes)


def fixable(fix: str, at: int, size: int = 40, **changes: Any) -> Recipe:
    """`models.mlp` over `Fixable`, not evaluated."""
    return models.mlp(dataset=partial(Fixable, fix, at, size), evaluation=None, metrics=None, **changes)


def tied_gpt(**changes: Any) -> Recipe:
    """`models.gpt` with AdamW, warm-up and cosine."""
    return models.gpt(scheduler=models.warmup_then_cosine, **changes)


def plateau(**changes: Any) -> Recipe:
    """`models.mlp` with a scheduler that looks at the loss."""
    scheduler = partial(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0, threshold=0.5)
    return models.mlp(scheduler=scheduler, **changes)


def cumulative_norm(size: int = 24, **changes: Any) -> Recipe:
    """A BatchNorm with momentum=None: its running mean depends on the integer num_batches_tracked."""
    return models.cnn(size, model=CumulativeCnn, **changes)


class CumulativeCnn(models.Cnn):
    """`models.Cnn` with a cumulative BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4, momentum=None)
