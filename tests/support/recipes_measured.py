"""Recipes whose evaluations are no means, and whose inputs and outputs are no plain tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchord import Recipe

LENGTHS = (3, 5, 2, 7, 4, 6, 3, 5, 2, 4, 6, 7)


def generator(seed: int) -> torch.Generator:
    """A generator of its own."""
    return torch.Generator().manual_seed(seed)


def marks(size: int = 40, seed: int = 3) -> torch.utils.data.TensorDataset:
    """Points with a rare mark, as (point, 0 or 1)."""
    inputs = torch.randn(size, 4, generator=generator(seed))
    return torch.utils.data.TensorDataset(inputs, (inputs[:, 0] + inputs[:, 1] > 1).long())


def scorer() -> nn.Module:
    """One score a point."""
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1), nn.Flatten(0))


def prober() -> nn.Module:
    """A probability for each point."""
    return nn.Sequential(scorer(), nn.Sigmoid())


def probability_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Binary cross entropy."""
    return F.binary_cross_entropy(outputs, targets.float())


def constant_scorer() -> nn.Module:
    """The same score for every point, as an untrained model may give."""
    made = nn.Linear(4, 1)
    nn.init.zeros_(made.weight)
    nn.init.constant_(made.bias, -1)
    return nn.Sequential(made, nn.Flatten(0))


def mark_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Binary cross entropy."""
    return F.binary_cross_entropy_with_logits(outputs, targets.float())


def auroc(outputs: Tensor, targets: Tensor) -> Tensor:
    """The share of (marked, unmarked) pairs in the right order; NaN without one."""
    marked, others = outputs[targets == 1], outputs[targets == 0]
    return (marked[:, None] > others[None]).double().mean()


def f1(outputs: Tensor, targets: Tensor) -> float:
    """F1 of the marks; 0 where none is found."""
    found, true = outputs > 0, targets == 1
    right = int((found & true).sum())
    return 2 * right / max(1, int(found.sum()) + int(true.sum()))


def hits(outputs: Tensor, targets: Tensor) -> Tensor:
    """The share of points that are marked rightly."""
    return ((outputs > 0) == (targets == 1)).float().mean()


def scores(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """All that an AUROC is worked out from."""
    return outputs, targets


def auroc_of(states: Sequence[tuple[Tensor, Tensor]]) -> float:
    """The AUROC over all batches, whose states are `scores`."""
    return float(auroc(torch.cat([state[0] for state in states]), torch.cat([state[1] for state in states])))


def mistakes(outputs: Tensor, targets: Tensor) -> dict[str, Any]:
    """Counts of both kinds of mistakes."""
    found, true = outputs > 0, targets == 1
    return {"missed": int((true & ~found).sum()), "false": int((found & ~true).sum())}


def mistakes_of(states: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """Their sums."""
    return {name: sum(state[name] for state in states) for name in ("missed", "false")}


def pair_of_marks(outputs: Tensor, targets: Tensor) -> Tensor:
    """Forget to take the mean."""
    return outputs


class Extremes:
    """The largest and smallest score, as a metric object of somebody's own: a state dict, and merging."""

    def __init__(self, least: float = 0.0) -> None:
        self.low, self.high = least, -least

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Take a batch."""
        self.low, self.high = min(self.low, float(outputs.min())), max(self.high, float(outputs.max()))

    def compute(self) -> dict[str, float]:
        """Both figures."""
        return {"low": self.low, "high": self.high}

    def state_dict(self) -> dict[str, Any]:
        """What it remembers."""
        return {"low": self.low, "high": self.high}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Remember it."""
        self.low, self.high = state["low"], state["high"]

    def merge_state(self, others: Sequence[Extremes]) -> Extremes:
        """Take what others have seen."""
        for other in others:
            self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        return self


class LastBatch(Extremes):
    """Forget what came before."""

    def merge_state(self, others: Sequence[Extremes]) -> Extremes:
        """Take the last."""
        self.load_state_dict(others[-1].state_dict())
        return self


class Hoarder:
    """A metric object that nobody can merge."""

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Take a batch."""

    def compute(self) -> float:
        """Nothing."""
        return 0.0


def marked(**changes: Any) -> Recipe:
    """The scorer on points with marks."""
    entries: dict[str, Any] = {
        "model": scorer,
        "dataset": marks,
        "loss": mark_loss,
        "optimizer": partial(torch.optim.SGD, lr=0.5),
        "evaluation": partial(marks, size=61, seed=5),
    }
    return Recipe(**{**entries, **changes})


# --- texts of several lengths, a model that takes keywords and returns an object ------------


class Texts(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Tokens of several lengths, as a dictionary."""

    def __len__(self) -> int:
        return len(LENGTHS)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        drawn = torch.randint(1, 11, (LENGTHS[index],), generator=generator(index))
        return {"input_ids": drawn, "labels": drawn}


def padded(samples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """A batch with zeros behind the shorter texts."""
    longest = max(len(sample["input_ids"]) for sample in samples)
    names = [name for name in ("input_ids", "labels") if name in samples[0]]
    return {
        name: torch.stack([F.pad(sample[name], (0, longest - len(sample[name]))) for sample in samples])
        for name in names
    }


class Cache:
    """What a model keeps for its next token; no tensor."""


@dataclass
class ReaderOutput:
    """What the reader returns."""

    logits: Tensor
    hidden: tuple[Tensor, ...]
    cache: Cache
    loss: Tensor | None = None


class Reader(nn.Module):
    """Sums what it read so far."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6, padding_idx=0)
        self.head = nn.Linear(6, 11)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> ReaderOutput:
        """Logits for each place, as an object."""
        hidden = self.embedding(input_ids).cumsum(1)
        logits = self.head(hidden)
        loss = (
            None if labels is None else (F.one_hot(labels, 11).float() - logits).square().mean((1, 2)).mean()
        )
        return ReaderOutput(logits, (hidden,), Cache(), loss)


class Named(NamedTuple):
    """What `named_outputs` returns."""

    last: Tensor
    count: int


def reading(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The mean over texts of each one's mean over its first two tokens."""
    outputs = model(batch["input_ids"])
    return F.cross_entropy(outputs.logits[:, :2].flatten(0, 1), batch["input_ids"][:, :2].flatten())


def first_logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Logits of the first token."""
    found: Tensor = model(batch["input_ids"]).logits[:, 0]
    return found


def named_outputs(model: nn.Module, batch: Mapping[str, Tensor]) -> Named:
    """The same, as a named tuple."""
    return Named(first_logits(model, batch), 3)


def unspeakable(model: nn.Module, batch: Mapping[str, Tensor]) -> Any:
    """Return what cannot travel."""
    return [Cache()]


def first_right(outputs: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """The share of texts whose first token is found."""
    return (outputs.argmax(1) == batch["input_ids"][:, 0]).float().mean()


def texts(**changes: Any) -> Recipe:
    """The reader on texts of several lengths."""
    entries: dict[str, Any] = {
        "model": Reader,
        "dataset": Texts,
        "collate": padded,
        "step": reading,
        "optimizer": partial(torch.optim.SGD, lr=0.1),
        "evaluation": Texts,
    }
    return Recipe(**{**entries, **changes})


def standing_still(parameters: Any) -> torch.optim.Optimizer:
    """Leave every weight alone."""
    return torch.optim.SGD(parameters, lr=0.0)
