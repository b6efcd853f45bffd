"""Recipes whose training is random in ways of their own, some with terms that look at the whole batch."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset, TensorDataset, default_collate

from torchord import Recipe

FEATURES, HIDDEN, CLASSES = 6, 8, 3


def examples(count: int = 24) -> TensorDataset:
    """Vectors of random numbers and classes."""
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(count, FEATURES, generator=generator)
    return TensorDataset(inputs, torch.randint(0, CLASSES, (count,), generator=generator))


class Perturbed(nn.Module):
    """A network of two layers that training perturbs, by no module of torch's.

    Args:
        way: how.
        always: whether it does so in evaluation mode, too.
    """

    def __init__(self, way: str, always: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, HIDDEN)
        self.last = nn.Linear(HIDDEN, CLASSES)
        self.way, self.always = way, always
        self.hidden = torch.zeros(())

    def forward(self, inputs: Tensor) -> Tensor:
        self.hidden = torch.tanh(self.first(inputs))
        perturbed = self._perturbed(self.hidden) if self.training or self.always else self.hidden
        return self.last(perturbed)

    def _perturbed(self, hidden: Tensor) -> Tensor:
        if self.way == "dropout":
            return F.dropout(hidden, 0.3)
        if self.way == "noise":
            return hidden + 0.3 * torch.randn_like(hidden)
        if self.way == "mask":
            return hidden * (torch.rand(hidden.shape) > 0.3)
        if self.way == "depth":  # by example
            return hidden * torch.bernoulli(torch.full((len(hidden), 1), 0.7)) / 0.7
        if self.way == "rarely":  # two draws are likely to be alike
            return hidden * torch.bernoulli(torch.full((len(hidden), 1), 0.95)) / 0.95
        if self.way == "layer":  # by batch
            return hidden * (1.0 if random.random() < 0.7 else 0.5)
        if self.way == "weight":
            noisy = self.first.weight + 0.1 * torch.randn_like(self.first.weight)
            return hidden + noisy.mean(1)
        if self.way == "generator":
            drawn = torch.rand(hidden.shape, generator=torch.Generator().manual_seed(torch.initial_seed()))
            return hidden + drawn
        if self.way == "checkpoint":
            return checkpoint(F.dropout, hidden, 0.3, use_reentrant=False)  # type: ignore[no-any-return]
        if self.way == "transposed":  # examples in the second dimension
            return F.dropout(hidden.t(), 0.3).t()
        assert self.way == "numpy"
        return hidden + torch.from_numpy(np.random.rand(*hidden.shape)).float()


def mean(model: nn.Module, batch: Any) -> Tensor:
    """A mean over the examples."""
    return F.cross_entropy(model(batch[0]), batch[1])


def with_spread(model: Any, batch: Any) -> Tensor:
    """In training mode with the spread of the features over the batch, which no parts have."""
    found = mean(model, batch)
    return found + 0.3 * model.hidden.var(0).sum() if model.training else found


class Normalised(torch.autograd.Function):
    """Its backward looks at the whole batch."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:  # type: ignore[override]
        return inputs.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient / gradient.norm()


def with_normalised_gradient(model: Any, batch: Any) -> Tensor:
    """The same mean with another gradient."""
    scores = model(batch[0])
    return F.cross_entropy(Normalised.apply(scores) if model.training else scores, batch[1])


class Autoencoder(nn.Module):
    """A variational one: it draws in evaluation mode, too."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(FEATURES, 4)
        self.decoder = nn.Linear(2, FEATURES)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        centre, spread = self.encoder(inputs).chunk(2, dim=1)
        return self.decoder(centre + torch.randn_like(centre) * (spread / 2).exp()), centre, spread


def _divergence(centre: Tensor, spread: Tensor) -> Tensor:
    return -0.5 * (1 + spread - centre**2 - spread.exp()).sum(1)


def evidence(model: nn.Module, batch: Any) -> Tensor:
    """Means over the examples, both."""
    outputs, centre, spread = model(batch[0])
    return F.mse_loss(outputs, batch[0]) + 0.005 * _divergence(centre, spread).mean()


def mixed_evidence(model: nn.Module, batch: Any) -> Tensor:
    """A mean and a sum, as people write it by mistake; of the size of its chance."""
    outputs, centre, spread = model(batch[0])
    return F.mse_loss(outputs, batch[0]) + 0.005 * _divergence(centre, spread).sum()


def denoised(model: Any, batch: Any) -> Tensor:
    """A diffusion model's loss: noise and times are drawn for each example."""
    times = torch.randint(0, 10, (len(batch[0]),))
    noise, left = torch.randn_like(batch[0]), torch.linspace(0.99, 0.01, 10)[times][:, None]
    return F.mse_loss(model(left.sqrt() * batch[0] + (1 - left).sqrt() * noise), noise)


class Denoiser(nn.Sequential):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(FEATURES, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, FEATURES))


class Sequences(Dataset[Any]):
    """Sequences of different lengths."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        lengths = torch.randint(2, 7, (24,), generator=generator).tolist()
        self.inputs = [torch.randn(length, FEATURES, generator=generator) for length in lengths]

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.inputs[index], index % CLASSES


def packed(samples: list[Any]) -> tuple[Any, Tensor]:
    inputs, targets = zip(*samples, strict=True)
    return pack_sequence(inputs, enforce_sorted=False), torch.tensor(targets)


def padded(samples: list[Any]) -> tuple[Tensor, Tensor]:
    inputs, targets = zip(*samples, strict=True)
    return nn.utils.rnn.pad_sequence(inputs, batch_first=True), torch.tensor(targets)


class Recurrent(nn.Module):
    """Layers with dropout in between, whose rows are no examples; the last state is what counts."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.LSTM(FEATURES, HIDDEN, num_layers=2, dropout=0.3)
        self.last = nn.Linear(HIDDEN, CLASSES)

    def forward(self, inputs: Any) -> Tensor:
        _, (state, _) = self.layers(inputs)
        return self.last(state[-1])


class Summed(nn.Module):
    """Of a padded batch: dropout on each token, so that a batch's length decides how much is drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, HIDDEN, bias=False)
        self.last = nn.Linear(HIDDEN, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(torch.tanh(F.dropout(self.first(inputs), 0.3, self.training)).sum(1))


class Attending(nn.Module):
    """Attention with dropout over a padded batch: only the gradient of small weights shows its masks."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, HIDDEN)
        self.inner = nn.Linear(HIDDEN, HIDDEN, bias=False)
        nn.init.normal_(self.inner.weight, std=1e-6)
        self.last = nn.Linear(HIDDEN, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        known = inputs.ne(0).any(-1)
        tokens = torch.tanh(self.first(inputs))
        scores = (tokens @ tokens.mT).masked_fill(~known[:, None], -1e9)
        mixed = F.dropout(scores.softmax(-1), 0.3, self.training) @ self.inner(tokens)
        return self.last(tokens[:, 0] + (mixed * known[..., None]).sum(1))


def mixed_up(samples: list[Any]) -> Any:
    """Mixup, within what is collated together."""
    inputs, targets = default_collate(samples)
    part, other = float(np.random.beta(0.4, 0.4)), torch.randperm(len(inputs))
    return part * inputs + (1 - part) * inputs[other], (targets, targets[other], part)


def mixed_loss(model: nn.Module, batch: Any) -> Tensor:
    scores, (targets, others, part) = model(batch[0]), batch[1]
    return part * F.cross_entropy(scores, targets) + (1 - part) * F.cross_entropy(scores, others)


def flipped(model: nn.Module, batch: Any) -> Tensor:
    """Mixup in the step, each example with the one at the other end of the batch."""
    inputs, targets = batch
    part = random.betavariate(1.0, 1.0)
    scores = model(part * inputs + (1 - part) * inputs.flip(0))
    return part * F.cross_entropy(scores, targets) + (1 - part) * F.cross_entropy(scores, targets.flip(0))


def hardest(model: nn.Module, batch: Any) -> Tensor:
    """The two worst of a batch; of one example there are no two."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none").topk(2)[0].mean()


def chance(model: Any, step: Any = mean, **entries: Any) -> Recipe:
    """A recipe of these."""
    sgd = partial(torch.optim.SGD, lr=0.1)
    return Recipe(**{"model": model, "dataset": examples, "optimizer": sgd, "step": step, **entries})
