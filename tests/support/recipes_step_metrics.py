"""Recipes whose steps measure more than a loss."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tests.support import models
from tests.support import recipes_weights as weights
from torchord import Measure, Recipe

Batch = tuple[Tensor, Tensor]
_sgd = partial(torch.optim.SGD, lr=0.1)


def recipe(step: Any, **entries: Any) -> Recipe:
    """A classifier of a few examples, or what is given."""
    defaults: dict[str, Any] = {
        "model": partial(models.Mlp, hidden=8, dropout=0.0),
        "dataset": models.points,
        "optimizer": _sgd,
    }
    return Recipe(step=step, **{**defaults, **entries})


def _right(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.argmax(-1) == targets).float()


def accuracy(model: nn.Module, batch: Batch) -> Any:
    """A mean over the examples; a sum over the shards; an exp and a root of means over something else."""
    outputs = model(batch[0])
    loss = F.cross_entropy(outputs, batch[1])
    squares = (outputs**2).sum()
    return loss, {
        "accuracy": _right(outputs, batch[1]).mean(),
        "same": loss,
        "seen": Measure(len(batch[1]), how="sum"),
        "rms": Measure(squares, outputs.numel(), "sqrt"),
        "of class 0": (_right(outputs, batch[1])[batch[1] == 0].sum(), (batch[1] == 0).sum()),
    }


def perplexity(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    """A language model's: the loss is a mean over its labelled tokens, the perplexity the exp of that."""
    logits, labels = model(batch["tokens"]), batch["labels"]
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=weights.IGNORED)
    count = (labels != weights.IGNORED).sum()
    return loss, {"perplexity": Measure(loss * count, count, "exp"), "nats": loss}


def summed(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    """The same from a loss that says itself what it is a mean over."""
    loss, measured = perplexity(model, batch)
    count = (batch["labels"] != weights.IGNORED).sum()
    return (loss * count, count), measured


class Gan(nn.Module):
    """A generator and a discriminator, each trained by its own term of one loss."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Linear(models.FEATURES, models.FEATURES)
        self.discriminator = nn.Sequential(nn.Linear(models.FEATURES, 8), nn.Tanh(), nn.Linear(8, 1))


def gan(model: Gan, batch: Batch) -> Any:
    real, made = batch[0], model.generator(batch[0].flip(1))
    frozen = [p.requires_grad_(False) for p in model.discriminator.parameters()]
    fooled = F.softplus(-model.discriminator(made)).mean()
    for parameter in frozen:
        parameter.requires_grad_(True)
    told = (
        F.softplus(-model.discriminator(real)).mean() + F.softplus(model.discriminator(made.detach())).mean()
    )
    return fooled + told, {"generator": fooled, "discriminator": told}


def reward(model: nn.Module, batch: Batch) -> Any:
    """A policy gradient: what is reported is the reward, not the surrogate."""
    chosen = F.log_softmax(model(batch[0]), -1).gather(1, batch[1][:, None])[:, 0]
    paid = batch[0].sum(1)
    return -(chosen * paid).mean(), {"reward": paid.mean().item(), "wins": (paid > 0).double().mean()}


def now_and_then(model: nn.Module, batch: Batch) -> Any:
    """NaN, infinite, and measured by some shards alone."""
    outputs = model(batch[0])
    first = batch[1][0].item() == 0
    more = {"of some": Measure(outputs.detach().mean(), how="shard")} if first else {}
    nothing = (outputs.sum() * 0, torch.zeros(()))
    measured = {"nan": float("nan"), "inf": float("inf"), "nothing": Measure(*nothing), **more}
    return F.cross_entropy(outputs, batch[1]), measured


def view_of_a_weight(model: nn.Module, batch: Batch) -> Any:
    """What is measured is changed by the next local step."""
    weight = next(model.parameters())
    return F.cross_entropy(model(batch[0]), batch[1]), {"weight": weight[0, 0]}


def returning(model: nn.Module, batch: Batch, *, what: str) -> Any:
    """What cannot be logged, or is no mean."""
    outputs = model(batch[0])
    loss = F.cross_entropy(outputs, batch[1])
    right = _right(outputs, batch[1])
    return loss, {
        "a text": {"accuracy": "high"},
        "outputs": {"logits": outputs},
        "complex": {"spectrum": 1j},
        "a list": {"accuracies": [1.0, 2.0]},
        "nothing": {"accuracy": None},
        "a number for a name": {7: 1.0},
        "a long name": {"x" * 65: 1.0},
        "an unprintable name": {"a\nb": 1.0},
        "too many": {str(number): 1.0 for number in range(33)},
        "a weight of text": {"accuracy": (1.0, "many")},
        "an exp": {"perplexity": loss.exp()},
        "a maximum": {"confidence": outputs.detach().softmax(-1).max()},
        "a count": {"right": right.sum()},
        "a root": {"rms": (outputs**2).mean().sqrt()},
    }[what]


def maximum(model: nn.Module, batch: Batch) -> Any:
    """A maximum, which is said to be each shard's."""
    outputs = model(batch[0])
    return F.cross_entropy(outputs, batch[1]), {"most": Measure(outputs.max(), how="shard")}


def beside_a_loss(outputs: Tensor, targets: Tensor) -> Any:
    """A `loss` that measures, too."""
    return F.cross_entropy(outputs, targets), {"accuracy": _right(outputs, targets).mean()}


def language(step: Any = perplexity, **entries: Any) -> Recipe:
    return weights.language(step, **entries)


def held_out() -> TensorDataset:
    return models.points(20)
