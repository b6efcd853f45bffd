"""Recipes whose losses are means over other things than examples, or no means at all."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from tests.support import models
from torchord import Recipe, TrainingConfig
from torchord.coordinator.spec.plan import Plan

TOKENS = 11
IGNORED = -100
BALANCED = TrainingConfig(batch_size=8, shards=4, seed=3)
Batch = dict[str, Tensor]


# --- sentences of unlike lengths -----------------------------------------------------------


class Sentences(Dataset[Tensor]):
    """Token sequences of 2 to 12 tokens, or of the lengths that are given."""

    def __init__(self, size: int = 32, lengths: list[int] | None = None) -> None:
        generator = torch.Generator().manual_seed(5)
        self.lengths = lengths or [2 + index * 7 % 11 for index in range(size)]
        self.tokens = torch.randint(1, TOKENS, (size, 12), generator=generator)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Tensor:
        return self.tokens[index, : self.lengths[index]]


def sentences(size: int = 32) -> Sentences:
    return Sentences(size)


def balanced() -> Sentences:
    """Eight sentences; each shard of two in the first step of `BALANCED` has 14 tokens."""
    lengths = [0] * 8
    for place, index in enumerate(
        Plan(8, BALANCED).indices(0, shard)[k] for shard in range(4) for k in (0, 1)
    ):
        lengths[int(index)] = (2, 12, 5, 9, 7, 7, 11, 3)[place]
    return Sentences(8, lengths)


def padded(samples: list[Tensor]) -> Batch:
    """Tokens padded with 0, labels with -100."""
    tokens = nn.utils.rnn.pad_sequence(samples, batch_first=True)
    labels = nn.utils.rnn.pad_sequence(samples, batch_first=True, padding_value=IGNORED)
    return {"tokens": tokens, "labels": labels}


def mostly_unlabelled(samples: list[Tensor]) -> Batch:
    """As `padded`, with labels in sentences of more than 6 tokens alone: whole shards may have none."""
    batch = padded(samples)
    batch["labels"][[len(sample) <= 6 for sample in samples]] = IGNORED
    return batch


def unlabelled(samples: list[Tensor]) -> Batch:
    """As `padded`, with no labels at all."""
    batch = padded(samples)
    return {**batch, "labels": torch.full_like(batch["labels"], IGNORED)}


def masked_at_random(samples: list[Tensor]) -> Batch:
    """As `padded`, with half of the tokens hidden by chance."""
    batch = padded(samples)
    return {**batch, "tokens": batch["tokens"] * (torch.rand(batch["tokens"].shape) < 0.5)}


class Language(nn.Module):
    """Next tokens from those before."""

    def __init__(self, width: int = 8, *, zero: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, width, padding_idx=0)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, TOKENS, bias=False)
        if zero:
            nn.init.zeros_(self.head.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        found: Tensor = self.head(self.dropout(torch.tanh(self.embedding(tokens).cumsum(1))))
        return found


def _likelihoods(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Each token's cross entropy, and which ones count."""
    logits, labels = model(batch["tokens"])[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none"), labels != IGNORED


def token_mean(model: nn.Module, batch: Batch) -> Tensor:
    """As everybody writes it, and as models of transformers do."""
    logits, labels = model(batch["tokens"])[:, :-1], batch["labels"][:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


def masked_mean(model: nn.Module, batch: Batch) -> Tensor:
    """The same by hand."""
    each, counted = _likelihoods(model, batch)
    return (each * counted).sum() / counted.sum()


def sum_and_weight(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    each, counted = _likelihoods(model, batch)
    return (each * counted).sum(), counted.sum()


def labelled(batch: Batch) -> int:
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def sentences_of(batch: Batch) -> int:
    return len(batch["labels"])


def negative(batch: Batch) -> int:
    return -1 if len(batch["labels"]) == 2 else 5


def not_a_number(batch: Batch) -> float:
    return float("nan") if len(batch["labels"]) == 2 else 5.0


def endless(batch: Batch) -> Tensor:
    return torch.tensor(float("inf") if len(batch["labels"]) == 2 else 5.0)


def truth(batch: Batch) -> bool:
    return True


def imaginary(batch: Batch) -> complex:
    return 1j


def word(batch: Batch) -> str:
    return "12"


def each_row(batch: Batch) -> Tensor:
    return (batch["labels"] != IGNORED).sum(1)


def mask(batch: Batch) -> Tensor:
    return (batch["labels"] != IGNORED).any()


def sentence_mean(model: nn.Module, batch: Batch) -> Tensor:
    """A mean over each sentence, and over the sentences: weighed by examples as it is."""
    each, counted = _likelihoods(model, batch)
    shape = batch["labels"][:, 1:].shape
    totals, counts = (each * counted).view(shape).sum(1), counted.view(shape).sum(1)
    return (totals / counts.clamp(min=1)).mean()


def language(step: Any = token_mean, *, collate: Any = padded, size: int = 32, **options: Any) -> Recipe:
    """A small language model; options beyond the model's own are entries of the recipe."""
    own = {name: options.pop(name) for name in ("zero", "dropout") if name in options}
    return Recipe(
        model=partial(Language, **own) if own else Language,
        dataset=options.pop("dataset", partial(sentences, size)),
        step=step,
        collate=collate,
        optimizer=partial(torch.optim.SGD, lr=0.3),
        **options,
    )


# --- points and classes -------------------------------------------------------------------


def skewed(size: int = 40) -> TensorDataset:
    """Points whose later ones are all of one class."""
    inputs, targets = models.points(size).tensors
    return TensorDataset(inputs, torch.where(torch.arange(size) < size // 2, targets, 0))


def partly_labelled(size: int = 40) -> TensorDataset:
    """Points of which every third, and all from the 20th to the 30th, have no label."""
    inputs, targets = models.points(size).tensors
    numbers = torch.arange(size)
    return TensorDataset(inputs, targets.masked_fill((numbers % 3 == 0) | (numbers // 10 == 2), IGNORED))


def class_weights(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, weight=torch.tensor([1.0, 5.0, 20.0]))


def class_weights_smoothed(outputs: Tensor, targets: Tensor) -> Tensor:
    """What PyTorch divides by does not show here, and the recipe has to say it."""
    return F.cross_entropy(outputs, targets, weight=torch.tensor([1.0, 5.0, 20.0]), label_smoothing=0.1)


ALIKE = TrainingConfig(batch_size=16, shards=4, seed=3)


def alike() -> TensorDataset:
    """Points of which those in the first shard of `ALIKE` are of one class."""
    inputs, targets = models.points(16).tensors
    return TensorDataset(inputs, targets.index_fill(0, torch.tensor(Plan(16, ALIKE).indices(0, 0)), 0))


def probabilities(size: int = 40) -> TensorDataset:
    """Points and how likely each class is."""
    inputs, targets = models.points(size).tensors
    return TensorDataset(inputs, F.one_hot(targets, models.CLASSES).float() * 0.8 + 0.2 / models.CLASSES)


def slow(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.02)


def weight_of_classes(targets: Tensor) -> Tensor:
    return torch.tensor([1.0, 5.0, 20.0])[targets].sum()


def focal_sum(outputs: Tensor, targets: Tensor) -> Tensor:
    """A sum over the examples."""
    each = F.cross_entropy(outputs, targets, reduction="none")
    return ((1 - (-each).exp()) ** 2 * each).sum()


def info_nce(outputs: Tensor, targets: Tensor) -> Tensor:
    """Each example against the others of the batch."""
    views = F.normalize(outputs, dim=1), F.normalize(outputs.roll(1, dims=1), dim=1)
    return F.cross_entropy(views[0] @ views[1].T / 0.1, torch.arange(len(outputs)))


def pairs(outputs: Tensor, targets: Tensor) -> Tensor:
    """A mean over all pairs of examples."""
    distances = torch.cdist(outputs, outputs)
    same = targets[:, None] == targets[None, :]
    return torch.where(same, distances, (1 - distances).clamp(min=0)).mean()


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(models.FEATURES, models.CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        found: Tensor = self.linear(inputs)
        return found


def likelihood(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.nll_loss(outputs.log_softmax(1), targets)


_calls = itertools.count()


def counted(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss that is no function of its arguments."""
    return F.cross_entropy(outputs, targets) * next(_calls)


def too_large(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss that there is memory for only with few examples."""
    if len(outputs) > 2:
        raise torch.OutOfMemoryError("tried to allocate more than there is")
    return F.cross_entropy(outputs, targets)


def penalised(model: nn.Module, batch: Any) -> Tensor:
    inputs, targets = batch
    squares = torch.stack([parameter.square().sum() for parameter in model.parameters()]).sum()
    return F.cross_entropy(model(inputs), targets) + 0.1 * squares


class Normed(nn.Module):
    """A batch normalisation in the middle, with running statistics or without."""

    def __init__(self, *, running: bool = True) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(models.FEATURES, 16),
            nn.BatchNorm1d(16, track_running_stats=running),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Linear(16, models.CLASSES),
        )

    def forward(self, inputs: Tensor) -> Tensor:
        found: Tensor = self.layers(inputs)
        return found


class Shaken(nn.Linear):
    """Its inputs are shaken in evaluation mode, too, by numpy: an example's numbers depend on its place."""

    def __init__(self) -> None:
        super().__init__(models.FEATURES, models.CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs + 0.1 * torch.from_numpy(np.random.rand(*inputs.shape)).float())


class Autoencoder(nn.Module):
    """A variational one: it draws noise in evaluation mode, too."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(models.FEATURES, 4)
        self.decoder = nn.Linear(2, models.FEATURES)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, spread = self.encoder(inputs).chunk(2, dim=1)
        drawn = mean + torch.randn_like(mean) * (spread / 2).exp()
        return self.decoder(drawn), mean, spread


def _evidence(model: nn.Module, batch: Any) -> Tensor:
    inputs, _ = batch
    found, mean, spread = model(inputs)
    divergence = -0.5 * (1 + spread - mean.square() - spread.exp()).sum(1)
    return (found - inputs).square().sum(1) + divergence


def evidence_sum(model: nn.Module, batch: Any) -> Tensor:
    return _evidence(model, batch).sum()


class Detector(nn.Module):
    """Gives losses in training mode and predictions in evaluation mode, as those of torchvision do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(models.FEATURES, models.CLASSES)

    def forward(self, inputs: Tensor, targets: Tensor) -> Any:
        logits = self.linear(inputs)
        if not self.training:
            return [{"scores": row} for row in logits.softmax(1)]
        each = F.cross_entropy(logits, targets, reduction="none")
        return {"classes": each.mean(), "boxes": logits.square().mean()}


def detect(model: nn.Module, batch: Any) -> Tensor:
    return torch.stack(list(model(*batch).values())).sum()


def slope(model: nn.Module, batch: Any) -> Tensor:
    """A loss with a derivative in it, as physics-informed networks have."""
    inputs = batch[0].clone().requires_grad_()
    (found,) = torch.autograd.grad(model(inputs).sum(), inputs, create_graph=True)
    return found.square().mean()


def classes(loss: Any = F.cross_entropy, **options: Any) -> Recipe:
    """A linear classifier of points."""
    defaults: dict[str, Any] = {
        "model": Linear,
        "dataset": models.points,
        "optimizer": partial(torch.optim.SGD, lr=0.3),
    }
    given = {"step": options.pop("step")} if "step" in options else {"loss": loss}
    return Recipe(**{**defaults, **given, **options})
