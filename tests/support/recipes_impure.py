"""Recipes whose gradients depend on more than run, version and shard, each in a way of its own."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, random_split

from tests.support import models
from torchord.coordinator.spec.recipe import Recipe

_calls = itertools.count()
_SALT = hash("a string, whose hash each process seeds anew") % 1_000_003 / 1_000_003


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Points with noise from a generator of the dataset's own, drawn when it is made or with each sample."""

    def __init__(self, when: str, size: int = 64) -> None:
        self.inner = models.points(size)
        self.generator = np.random.default_rng()
        self.drawn = self._noise() if when == "made" else None

    def _noise(self) -> Tensor:
        return torch.as_tensor(self.generator.normal(size=models.FEATURES), dtype=torch.float32)

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, target = self.inner[index]
        return inputs + (self._noise() if self.drawn is None else self.drawn), target


class Keeping(Dataset[tuple[Tensor, Tensor]]):
    """Keeps what the augmentation drew for a sample, so that the second epoch does not draw again."""

    def __init__(self, size: int = 16) -> None:
        self.inner = models.points(size)
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index not in self.kept:
            inputs, target = self.inner[index]
            self.kept[index] = (inputs + torch.randn(inputs.shape), target)
        return self.kept[index]


class OnlyOnce(Dataset[tuple[Tensor, Tensor]]):
    """Can be opened, or read from, by one of its kind in a process."""

    opened: ClassVar[list[OnlyOnce]] = []

    def __init__(self, where: str, size: int = 64) -> None:
        self.inner = models.points(size)
        self.where = where
        if where == "making it" and self.opened:
            raise OSError("it is already open in this process")
        self.opened.append(self)

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if self.opened[0] is not self:
            raise OSError("it is already open in this process")
        sample: tuple[Tensor, Tensor] = self.inner[index]
        return sample


class Deadly(Dataset[tuple[Tensor, Tensor]]):
    """Points; the first fresh copy of a Client kills its process when it is read, unless a file is there."""

    made = 0

    def __init__(self, died: str, size: int = 64) -> None:
        self.inner = models.points(size)
        Deadly.made += 1
        self.kills = "" if Deadly.made == 1 else died

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if self.kills and not os.path.exists(self.kills):
            open(self.kills, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        sample: tuple[Tensor, Tensor] = self.inner[index]
        return sample


class Ordered(Dataset[tuple[Tensor, Tensor]]):
    """Reads its samples in the order of a set of names, which each process has another of."""

    def __init__(self, size: int = 64) -> None:
        self.inner = models.points(size)
        self.names = list({f"sample-{number}" for number in range(size)})

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        sample: tuple[Tensor, Tensor] = self.inner[int(self.names[index].rpartition("-")[2])]
        return sample


def of_the_command_line(size: int = 64) -> Any:
    """As many points as the command line of `celery worker` says."""
    return models.points(size if "worker" in sys.argv else 0)


def split(size: int = 80) -> Any:
    """The larger part of the points, by a generator that the operating system seeds."""
    generator = torch.Generator()
    generator.seed()
    return random_split(models.points(size), [64, size - 64], generator=generator)[0]


class Counting(nn.Module):
    """Scales by a running value in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(models.FEATURES, models.CLASSES)
        self.calls = 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(inputs) * (1 + 0.1 * self.calls)


class Timed(nn.Module):
    """Takes the clock for a source of noise."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(models.FEATURES, models.CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs) * (1 + time.perf_counter_ns() % 1000 / 1000)


class Named(nn.Module):
    """A model whose initial weights depend on the hashes of strings."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(models.FEATURES, models.CLASSES) for name in "abcdefgh"})
        for name in set(self.layers):
            nn.init.normal_(self.layers[name].weight)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.stack([layer(inputs) for layer in self.layers.values()]).sum(0)


def global_counter(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss that a global of its module changes."""
    return F.cross_entropy(outputs, targets) * (1 + next(_calls) / 10)


def salted(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss with a factor that is fixed when the module is imported, and another in each process."""
    return F.cross_entropy(outputs, targets) * (1 + _SALT)


def process_id(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss that depends on which process computes it."""
    return F.cross_entropy(outputs, targets) * (1 + os.getpid() % 1000 / 1000)


def recipe(**changes: Any) -> Recipe:
    """A small model without evaluation."""
    return models.mlp(64, **{"evaluation": None, "metrics": None, **changes})


MOVING: dict[str, Recipe] = {
    "a generator without a seed": recipe(dataset=partial(Noisy, "read")),
    "data drawn when the dataset is made": recipe(dataset=partial(Noisy, "made")),
    "a counter in an attribute": recipe(model=Counting),
    "the clock": recipe(model=Timed),
    "a global of a module": recipe(loss=global_counter),
    "a split without a seed": recipe(dataset=split),
    "samples that keep their first augmentation": recipe(dataset=Keeping),
}
"""What one process alone can show."""

BY_PROCESS: dict[str, Recipe] = {
    "the order of a set in the data": recipe(dataset=Ordered),
    "the order of a set in the weights": recipe(model=Named),
    "a salt at import": recipe(loss=salted),
    "the process": recipe(loss=process_id),
}
"""What is fixed in a process and another in each."""


def loss_of_a_liar(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Twice the loss in two shards of three, in a process that was told to lie; not in its very first."""
    lies = "TESTS_LIAR" in os.environ and torch.initial_seed() % 3
    return torch.nn.functional.cross_entropy(outputs, targets) * (2 if lies else 1)


class Bent(torch.optim.SGD):
    """Flips one bit of one parameter in one of its steps: the environment of its process says in which."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.taken = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """See `SGD.step`."""
        loss = super().step(closure)
        self.taken += 1
        if os.environ.get("BENT_STEP") == str(self.taken):
            first = self.param_groups[0]["params"][0]
            first.view(torch.int32).view(-1)[0] ^= 1
        return loss
