"""Datasets, samplers and orders as people bring them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    Subset,
    default_collate,
    random_split,
)

from tests.support import models
from torchord import Recipe
from torchord.coordinator.streaming import Streamed

SIZE = 42
LENGTHS = [1 + (7 * index) % 9 for index in range(SIZE)]
WEIGHTS = [1.0 + index % 5 for index in range(SIZE)]


def net() -> nn.Module:
    """A small classifier of points, without dropout."""
    return nn.Sequential(nn.Linear(models.FEATURES, 16), nn.Tanh(), nn.Linear(16, models.CLASSES))


def mlp(**changes: Any) -> Recipe:
    """`net` on `SIZE` points, without evaluation."""
    return Recipe(
        **{
            "model": net,
            "dataset": partial(models.points, SIZE),
            "loss": F.cross_entropy,
            "optimizer": partial(torch.optim.SGD, lr=0.1),
            **changes,
        }
    )


# --- orders -------------------------------------------------------------------------------


def easy_first(size: int, epoch: int, seed: int) -> list[int]:
    """A curriculum: by length at first, then at random; the global generators are seeded."""
    if epoch == 0:
        return sorted(range(size), key=LENGTHS.__getitem__)
    return [int(index) for index in np.random.permutation(size)]


def twice_the_first_half(size: int, epoch: int, dataset: Any) -> Iterator[int]:
    """Repeats some and leaves out others."""
    half = [index for index in range(len(dataset)) if index < size // 2]
    yield from random.sample(half, len(half))
    yield from half


class Remembering(Sampler[int]):
    """Visits the first epochs' examples in another order each time, by a counter of its own."""

    def __init__(self, data_source: Sequence[Any]) -> None:
        self.size = len(data_source)
        self.rounds = 0

    def __iter__(self) -> Iterator[int]:
        self.rounds += 1
        return iter([(index * 5 + self.rounds) % self.size for index in range(self.size)])

    def __len__(self) -> int:
        return self.size


class Told(Sampler[int]):
    """Wants to be told the epoch, as torch's `DistributedSampler` does."""

    def __init__(self, dataset: Sequence[Any], seed: int) -> None:
        self.size, self.seed, self.epoch = len(dataset), seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(torch.randperm(self.size, generator=generator))  # tensors


class Bucketing(Sampler[list[int]]):
    """Batches of one length each; the last of a length may be small."""

    def __init__(self, lengths: Sequence[int], batch_size: int) -> None:
        self.lengths, self.batch_size = lengths, batch_size

    def __iter__(self) -> Iterator[list[int]]:
        batches = []
        for length in sorted(set(self.lengths)):
            found = [index for index, its in enumerate(self.lengths) if its == length]
            random.shuffle(found)
            batches += [found[i : i + self.batch_size] for i in range(0, len(found), self.batch_size)]
        random.shuffle(batches)
        return iter(batches)


def by_tokens(size: int, epoch: int, most: int) -> list[list[int]]:
    """Batches of at most so many tokens: their number differs from epoch to epoch."""
    batches: list[list[int]] = [[]]
    for index in torch.randperm(size).tolist():
        if sum(LENGTHS[i] for i in batches[-1]) + LENGTHS[index] > most:
            batches.append([])
        batches[-1].append(index)
    return batches


# --- orders that cannot be used -----------------------------------------------------------

_own = np.random.default_rng(3)


def unseeded(size: int, epoch: int) -> list[int]:
    return _own.permutation(size).tolist()  # type: ignore[no-any-return]


def shrinking(size: int, epoch: int) -> range:
    return range(size - epoch)


def endless(size: int) -> Iterator[int]:
    return (index % size for index in count())


def outside(size: int) -> list[int]:
    return [0, size]


def mask(size: int) -> np.ndarray:
    return np.arange(size) % 2 == 0


def lists(size: int) -> list[list[int]]:
    return [[0, 1], [2, 3]]


def nothing(size: int) -> list[int]:
    return []


def needy(size: int, labels: list[int]) -> list[int]:
    return labels


# --- data ---------------------------------------------------------------------------------


class Stream(IterableDataset[Any]):
    """An iterable of points, which also says how many it has."""

    def __init__(self, size: int = 40) -> None:
        self.inner = models.points(size)

    def __iter__(self) -> Iterator[Any]:
        return iter([self.inner[index] for index in range(len(self.inner))])

    def __len__(self) -> int:
        return len(self.inner)


def stream() -> Stream:
    return Stream()


def loader() -> DataLoader[Any]:
    return DataLoader(models.points(), batch_size=8)


def generated() -> Iterator[Any]:
    yield from Stream()


def splits() -> dict[str, Any]:
    return {"train": models.points(), "test": models.points()}


def part(number: int, sizes: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """One part of `models.points`, whose examples are noisy."""
    start = sum(sizes[:number])
    points = models.points(sum(sizes))
    for index in range(start, start + sizes[number]):
        x, y = points[index]
        yield x + 0.1 * torch.randn(x.shape), y


def streamed(sizes: Sequence[int], stated: Sequence[int] | None = None, kept: int = 4) -> Streamed:
    parts = list(range(len(sizes)))
    return Streamed(partial(part, sizes=sizes), parts, stated or sizes, kept)


class Records(Dataset[dict[str, Any]]):
    """Nested dictionaries with strings in them."""

    def __init__(self, size: int = SIZE) -> None:
        self.points = models.points(size)

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> dict[str, Any]:
        x, y = self.points[index]
        return {"name": f"record {index}", "features": {"x": x, "scale": (1.0, 0.5)}, "label": int(y)}


def record_step(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    first, second = batch["features"]["scale"]
    assert all(name.startswith("record ") for name in batch["name"])
    outputs = model(batch["features"]["x"] * (first * second)[:, None].float())
    return F.cross_entropy(outputs, batch["label"])


class Broken(Dataset[Any]):
    """Points, some of which cannot be read; the first eight in a row."""

    def __init__(self, size: int = SIZE) -> None:
        self.points = models.points(size)

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> Any:
        return None if index < 8 or index % 5 == 0 else self.points[index]


def present(samples: list[Any]) -> Any:
    """Leave out what could not be read."""
    return default_collate([sample for sample in samples if sample is not None])


def own_mean(outputs: Tensor, targets: Tensor) -> Tensor:
    """A mean over the examples that nothing is known of."""
    losses = (outputs.gather(1, targets[:, None])[:, 0] - 1.0) ** 2
    return losses.sum() / len(losses)


def correct(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.argmax(1) == targets).double().mean()


class Words(Dataset[str]):
    """Strings; a collate makes tensors of them."""

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> str:
        return "abcdefghi"[: LENGTHS[index]] + "xyz"[index % 3]


def spelled(words: list[str]) -> tuple[Tensor, Tensor]:
    """Pad words to the longest; the target is the last letter."""
    letters = [[ord(letter) - ord("a") for letter in word[:-1]] for word in words]
    longest = max(map(len, letters))
    padded = torch.tensor([word + [26] * (longest - len(word)) for word in letters])
    return padded, torch.tensor([ord(word[-1]) - ord("x") for word in words])


class Speller(nn.Module):
    """A bag of letters; padding counts nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.letters = nn.Embedding(27, 8, padding_idx=26)
        self.head = nn.Linear(8, 3)

    def forward(self, words: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.letters(words).sum(1))
        return outputs


def half(which: int) -> Subset[Any]:
    """One part of a random split, without a generator of its own, as most people write it."""
    return random_split(models.points(), [32, 8])[which]


def drawn(size: int) -> Dataset[Any]:
    """Points drawn at random when they are made."""
    x = torch.randn(size, models.FEATURES)
    return torch.utils.data.TensorDataset(x, (x.sum(1) > 0).long())


def normed() -> nn.Module:
    """A BatchNorm over examples alone."""
    return nn.Sequential(nn.Linear(models.FEATURES, 8), nn.BatchNorm1d(8), nn.Linear(8, models.CLASSES))


class Evaluating(nn.Sequential):
    """`normed`, whose BatchNorm stays in evaluation mode."""

    def train(self, mode: bool = True) -> Evaluating:
        super().train(mode)
        self[1].eval()
        return self


def evaluating() -> nn.Module:
    return Evaluating(*normed())
