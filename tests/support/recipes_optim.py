"""Recipes whose weights are averaged, whose gradients are changed, whose layers thaw: optimizers' habits."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support import models
from torchord import Recipe
from torchord.coordinator.averages import Average, ema, swa

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


class Normed(nn.Module):
    """A BatchNorm, a frozen layer and tied weights: what an average may get wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(models.FEATURES, 8)
        self.norm = nn.BatchNorm1d(8)
        self.second = nn.Linear(8, 8)
        self.third = nn.Linear(8, 8)
        self.third.weight = self.second.weight
        self.frozen = nn.Linear(8, models.CLASSES).requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.norm(self.first(inputs)).tanh()
        return self.frozen(self.third(self.second(hidden).tanh()))


def normed(**changes: Any) -> Recipe:
    """The model above under SGD with momentum, without anything random."""
    return models.mlp(**{"size": 40, "model": Normed, "optimizer": SGD, **changes})


# --- averages ---------------------------------------------------------------------------

AVERAGES: dict[str, Any] = {
    "ema": partial(ema, decay=0.8),
    "ema of torch": partial(torch.optim.swa_utils.get_ema_multi_avg_fn, 0.8),
    "ema with buffers": partial(ema, decay=0.8, buffers=True),
    "ema, every second": partial(ema, decay=0.8, every=2),
    "swa": partial(swa, start=4),
    "swa, every third": partial(swa, start=6, every=3),
    "own": "tests.support.recipes_optim:warm_ema",
}


def warm_ema() -> Average:
    """An average of one's own: a decay that grows with the number averaged."""

    def update(averaged: list[Tensor], present: list[Tensor], number: Tensor) -> None:
        decay = min(0.9, (1.0 + int(number)) / (10.0 + int(number)))
        for mean, value in zip(averaged, present, strict=True):
            mean.mul_(decay).add_(value, alpha=1.0 - decay)

    return Average(update, start=2)


def no_average() -> int:
    return 3


# --- gradients --------------------------------------------------------------------------


def clip_each(gradients: dict[str, Tensor], parameters: Mapping[str, nn.Parameter], limit: float) -> None:
    """Clip layer by layer."""
    for gradient in gradients.values():
        gradient.mul_((limit / gradient.norm().clamp_min(1e-12)).clamp_max(1.0))


def centralized(gradients: dict[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Gradient centralisation, returned and not in place."""
    return {n: g - g.mean(dim=tuple(range(1, g.dim())), keepdim=True) if g.dim() > 1 else g
            for n, g in gradients.items()}  # fmt: skip


def adaptive(gradients: dict[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    """Clip by the ratio to the weights, and leave the biases alone."""
    for name in list(gradients):
        if name.endswith("bias"):
            del gradients[name]
        else:
            gradients[name] = gradients[name] * (
                0.05 * parameters[name].norm() / gradients[name].norm()
            ).clamp_max(1)


def noisy(gradients: dict[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    """Noise from the global generator."""
    for gradient in gradients.values():
        gradient.add_(torch.randn_like(gradient), alpha=0.01)


def of_nothing(gradients: dict[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> Any:
    return {**gradients, "nothing": torch.zeros(1)}


def doubles(gradients: dict[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> Any:
    return {name: gradient.double() for name, gradient in gradients.items()}


def a_number(gradients: dict[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> Any:
    return 3


def to_nan(gradients: dict[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    for gradient in gradients.values():
        gradient.fill_(torch.nan)


RULES: dict[str, Any] = {
    "clip_each": partial(clip_each, limit=0.05),
    "centralized": centralized,
    "adaptive": adaptive,
}


# --- layers that thaw -------------------------------------------------------------------


class Thawing(models.Mlp):
    """Its forward unfreezes the first layer when a counter says so."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.way = way
        if way == "forward":
            next(self.parameters()).requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.seen += 1
            first = next(self.parameters())
            if self.way == "forward" and int(self.seen) > 2:
                first.requires_grad_(True)
            if self.way == "freezes" and int(self.seen) > 2:
                first.requires_grad_(False)
            if self.way == "puts back":
                first.requires_grad_(False)
                outputs = super().forward(inputs)
                first.requires_grad_(True)
                return outputs
        return super().forward(inputs)


class ThawingLR(torch.optim.lr_scheduler.LambdaLR):
    """At its third step it unfreezes what the optimizer holds."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer, lambda step: 1.0)

    def step(self, epoch: int | None = None) -> None:
        super().step()
        if self.last_epoch == 3:
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.requires_grad_(True)


def half_frozen() -> nn.Module:
    model = models.Mlp()
    next(model.parameters()).requires_grad_(False)
    return model


# --- two networks -----------------------------------------------------------------------


class Gan(nn.Module):
    """A generator and a discriminator of points."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, models.FEATURES))
        self.discriminator = nn.Sequential(nn.Linear(models.FEATURES, 8), nn.Tanh(), nn.Linear(8, 1))


def gan_step(model: Gan, batch: list[Tensor]) -> Tensor:
    """Both losses as one: each part reaches only its own network."""
    real = batch[0]
    fake = model.generator(real[:, :4].cos())
    judge = model.discriminator
    truth, lie = judge(real), judge(fake.detach())
    judging = F.softplus(-truth).mean() + F.softplus(lie).mean()
    still = {name: value.detach() for name, value in judge.named_parameters()}
    deceiving = F.softplus(-torch.func.functional_call(judge, still, (fake,))).mean()
    return judging + deceiving


def gan_groups(model: Gan) -> list[dict[str, Any]]:
    return [
        {"params": model.generator.parameters(), "lr": 2e-2},
        {"params": model.discriminator.parameters(), "lr": 1e-2},
    ]


class Both(torch.optim.Optimizer):
    """SGD for matrices and AdamW for the rest, as one optimizer."""

    def __init__(self, parameters: Any) -> None:
        given = list(parameters)
        super().__init__([{"params": [p]} for p in given], {"lr": 0.05})
        self.inner = [
            torch.optim.SGD([p for p in given if p.dim() > 1], lr=0.1, momentum=0.9),
            torch.optim.AdamW([p for p in given if p.dim() <= 1], lr=0.01),
        ]

    def step(self, closure: Any = None) -> None:
        for each in self.inner:
            each.step()

    def state_dict(self) -> dict[str, Any]:
        return {"inner": [each.state_dict() for each in self.inner]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for each, own in zip(self.inner, state["inner"], strict=True):
            each.load_state_dict(own)


class Careless(Both):
    """The same, whose state dict has nothing of the two."""

    state_dict = torch.optim.Optimizer.state_dict  # type: ignore[assignment]
    load_state_dict = torch.optim.Optimizer.load_state_dict  # type: ignore[assignment]


def two(parameters: Any) -> Any:
    given = list(parameters)
    return torch.optim.SGD(given[:1], lr=0.1), torch.optim.AdamW(given[1:])


def two_by_name(parameters: Any) -> Any:
    return dict(zip("gd", two(parameters), strict=True))
