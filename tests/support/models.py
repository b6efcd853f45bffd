"""Recipes for tests: models, datasets, losses and collates that any worker can import.

Everything is small and a function of its arguments alone; what draws random numbers draws
them from the global generators, as users' code does.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from torchord.coordinator.spec.recipe import Recipe

CLASSES = 3
FEATURES = 6
VOCABULARY = 17


# --- datasets ---------------------------------------------------------------------------


def points(size: int = 40, seed: int = 0, features: int = FEATURES) -> TensorDataset:
    """Points in `features` dimensions and their class: a linear rule with a little noise."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(size, features, generator=generator)
    rule = torch.randn(features, CLASSES, generator=torch.Generator().manual_seed(99))
    noise = 0.1 * torch.randn(size, CLASSES, generator=generator)
    return TensorDataset(inputs, (inputs @ rule + noise).argmax(1))


def curve(size: int = 40, seed: int = 0) -> TensorDataset:
    """Points and a real value for each, for regressions: targets of shape (size, 1)."""
    inputs = points(size, seed).tensors[0]
    return TensorDataset(inputs, inputs.sin().sum(1, keepdim=True))


class Images(Dataset[tuple[Tensor, int]]):
    """Small images with augmentation that draws from torch, numpy and random on each access."""

    def __init__(self, size: int = 24, seed: int = 0, augment: bool = True) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.pixels = torch.rand(size, 1, 8, 8, generator=generator)
        self.labels = torch.randint(CLASSES, (size,), generator=generator)
        self.augment = augment

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.pixels[index]
        if self.augment:
            if random.random() < 0.5:
                image = image.flip(-1)
            image = image + 0.05 * torch.randn_like(image)
            image = image * float(np.random.uniform(0.9, 1.1))
        return image, int(self.labels[index])


class Batched(Dataset[tuple[Tensor, Tensor]]):
    """Offers `__getitems__` and refuses single access, which a reader should then not use."""

    def __init__(self, size: int = 40) -> None:
        self.inner = points(size)

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        raise AssertionError("__getitems__ should have been asked")

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        return [self.inner[index] for index in indices]


class Sentences(Dataset[dict[str, Tensor]]):
    """Token sequences as dicts, the way language-model data comes."""

    def __init__(self, size: int = 24, length: int = 9, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(VOCABULARY, (size, length), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"inputs": self.tokens[index, :-1], "labels": self.tokens[index, 1:]}


class Raising(Dataset[tuple[Tensor, Tensor]]):
    """`points`, but reading the sample `at` raises."""

    def __init__(self, at: int, size: int = 40) -> None:
        self.inner = points(size)
        self.at = at

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index == self.at:
            raise OSError(f"cannot read sample {index}")
        sample: tuple[Tensor, Tensor] = self.inner[index]
        return sample


def poisoned(at: int, size: int = 40) -> TensorDataset:
    """`points`, but the inputs of sample `at` are NaN, so its shard's loss and gradient are."""
    data = points(size)
    data.tensors[0][at] = float("nan")
    return data


# --- models -----------------------------------------------------------------------------


class Mlp(nn.Module):
    """Two layers with dropout between them."""

    def __init__(self, hidden: int = 16, dropout: float = 0.2, outputs: int = CLASSES) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, hidden)
        self.dropout = nn.Dropout(dropout)
        self.second = nn.Linear(hidden, outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.second(self.dropout(self.first(inputs).relu()))


class Cnn(nn.Module):
    """Two convolutions with BatchNorm, whose running statistics are part of the state."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, CLASSES, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        return self.second(self.norm(self.first(images)).relu()).mean((2, 3))


class Gpt(nn.Module):
    """One attention block; the embedding is tied to the output layer, the mask not persistent."""

    def __init__(self, width: int = 8, length: int = 8, dropout: float = 0.1) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.place = nn.Parameter(0.02 * torch.randn(length, width))
        self.attention = nn.MultiheadAttention(width, 2, dropout=dropout, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("mask", torch.ones(length, length, dtype=torch.bool).triu(1), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.place
        attended, _ = self.attention(x, x, x, attn_mask=self.mask, need_weights=False)
        return self.head(self.norm(x + attended))


class Odd(nn.Module):
    """Everything that a state can hold: an unused and a frozen parameter, a random buffer that
    is not persistent, an integer counter that a forward replaces, a bool, a float64 and an
    empty buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, CLASSES)
        self.unused = nn.Parameter(torch.ones(2))
        self.frozen = nn.Parameter(torch.full((CLASSES,), 0.5), requires_grad=False)
        self.register_buffer("projection", torch.randn(FEATURES, FEATURES), persistent=False)
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("seen", torch.tensor([False, True]))
        self.register_buffer("mean", torch.zeros(FEATURES, dtype=torch.float64))
        self.register_buffer("nothing", torch.empty(0))
        self.calls: Tensor
        self.mean: Tensor

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.calls = self.calls + 1
            self.mean.mul_(0.9).add_(0.1 * inputs.detach().mean(0))
        return self.layer(inputs @ self.projection) * self.frozen


class Branching(nn.Module):
    """Uses its second layer only for shards whose first input is positive: a parameter that has
    a gradient in some shards."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, CLASSES)
        self.second = nn.Linear(FEATURES, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = self.first(inputs)
        return outputs + self.second(inputs) if bool(inputs[0, 0] > 0) else outputs


class Exploding(nn.Module):
    """Raises in its forward if any input is above `limit`."""

    def __init__(self, limit: float = 2.0) -> None:
        super().__init__()
        self.inner = Mlp()
        self.limit = limit

    def forward(self, inputs: Tensor) -> Tensor:
        if bool((inputs > self.limit).any()):
            raise ZeroDivisionError("an input is above the limit")
        outputs: Tensor = self.inner(inputs)
        return outputs


class Writing(nn.Module):
    """Clamps its own weights in the forward, as weight-constrained models do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            self.layer.weight.mul_(0.5)
        return self.layer(inputs)


# --- losses, steps, metrics, optimizers -------------------------------------------------


def language_step(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Loss of a language model on a dict batch."""
    return F.cross_entropy(model(batch["inputs"]).flatten(0, 1), batch["labels"].flatten())


def classifier_step(model: nn.Module, batch: list[Tensor]) -> Tensor:
    """The same as loss=cross_entropy, written as a step."""
    return F.cross_entropy(model(batch[0]), batch[1])


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Share of examples whose largest output is their class."""
    return (outputs.argmax(1) == targets).float().mean()


def undefined(outputs: Tensor, targets: Tensor) -> float:
    """NaN, as an AUROC of a single class is."""
    return float("nan")


def unbounded(outputs: Tensor, targets: Tensor) -> Tensor:
    """Infinite, as a perplexity that overflows is."""
    return torch.tensor(torch.inf)


def raising_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Raise whatever is given."""
    raise ArithmeticError("this loss always raises")


class _Bent(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, outputs: Tensor, value: float) -> Tensor:
        context.value = value
        return outputs.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        bent = gradient.clone()
        bent.view(-1)[0] = context.value
        return bent, None


def bent_loss(outputs: Tensor, targets: Tensor, value: str) -> Tensor:
    """Is finite, while its gradient holds `value`."""
    return F.cross_entropy(_Bent.apply(outputs, float(value)), targets)  # type: ignore[no-untyped-call]


def vector_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Forget to take the mean."""
    return F.cross_entropy(outputs, targets, reduction="none")


def number_loss(outputs: Tensor, targets: Tensor) -> float:
    """Return a Python number."""
    return F.cross_entropy(outputs, targets).item()


def detached_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Depend on no parameter."""
    return F.cross_entropy(outputs.detach(), targets)


def halved(step: int) -> float:
    """Factor for LambdaLR."""
    return 0.5**step


def lambda_scheduler(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    """LambdaLR, whose function cannot be an argument of a recipe."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, halved)


def warmup_then_cosine(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.SequentialLR:
    """Two schedulers one after the other."""
    schedulers = torch.optim.lr_scheduler
    parts = [
        schedulers.LinearLR(optimizer, start_factor=0.1, total_iters=2),
        schedulers.CosineAnnealingLR(optimizer, T_max=5),
    ]
    return schedulers.SequentialLR(optimizer, parts, milestones=[2])


def decay_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Weight decay for matrices only."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]


def collate_doubled(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """A collate of one's own: inputs times two."""
    return 2 * torch.stack([x for x, _ in samples]), torch.stack([y for _, y in samples])


# --- whole recipes ----------------------------------------------------------------------

_ADAM = partial(torch.optim.AdamW, lr=1e-2)
_SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def mlp(size: int = 40, **changes: Any) -> Recipe:
    """MLP with dropout on points, evaluated by accuracy."""
    entries: dict[str, Any] = {
        "model": Mlp,
        "dataset": partial(points, size=size),
        "loss": F.cross_entropy,
        "optimizer": _ADAM,
        "evaluation": partial(points, size=20, seed=1),
        "metrics": {"accuracy": accuracy},
    }
    return Recipe(**{**entries, **changes})


def cnn(size: int = 24, **changes: Any) -> Recipe:
    """CNN with BatchNorm on augmented images."""
    entries: dict[str, Any] = {
        "model": Cnn,
        "dataset": partial(Images, size=size),
        "loss": F.cross_entropy,
        "optimizer": _SGD,
        "scheduler": partial(torch.optim.lr_scheduler.StepLR, step_size=2),
    }
    return Recipe(**{**entries, **changes})


def gpt(size: int = 24, **changes: Any) -> Recipe:
    """Language model with tied weights; its step returns the loss."""
    entries: dict[str, Any] = {
        "model": Gpt,
        "dataset": partial(Sentences, size=size),
        "step": language_step,
        "optimizer": _ADAM,
        "evaluation": partial(Sentences, size=12, seed=1),
    }
    return Recipe(**{**entries, **changes})


def odd(size: int = 40, **changes: Any) -> Recipe:
    """The model with every kind of state."""
    entries: dict[str, Any] = {
        "model": Odd,
        "dataset": partial(points, size=size),
        "loss": F.cross_entropy,
        "optimizer": _SGD,
        "buffers": {"mean": "mean"},
    }
    return Recipe(**{**entries, **changes})
