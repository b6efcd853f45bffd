"""Models that write in their forward where autograd does not look: those that cannot be carried, and those
that only seem to."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize
from torch.utils.data import TensorDataset

FEATURES, CLASSES = 8, 3


def points(size: int = 48) -> TensorDataset:
    """Gaussian points with labels that a linear map gives."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(size, FEATURES, generator=generator)
    return TensorDataset(x, (x @ torch.randn(FEATURES, CLASSES, generator=generator)).argmax(1))


def words(size: int = 48) -> TensorDataset:
    """Sequences of four numbers below ten, and the class of each."""
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(0, 10, (size, 4), generator=generator)
    return TensorDataset(tokens, tokens.sum(1) % CLASSES)


class Bounded(nn.Linear):
    """Rows of bounded norm, written into the weight: `way` says how."""

    def __init__(self, way: str, most: float = 0.3) -> None:
        super().__init__(FEATURES, CLASSES)
        self.way, self.most = way, most

    def forward(self, inputs: Tensor) -> Tensor:
        new = torch.renorm(self.weight.data, 2, 0, self.most)
        if self.way == "data =":
            self.weight.data = new
        elif self.way == "data.copy_":
            self.weight.data.copy_(new)
        elif self.way == "copy_":
            with torch.no_grad():
                self.weight.copy_(new)
        elif self.way == "half":
            self.weight.data = new.half()
            return nn.functional.linear(inputs.half(), self.weight, self.bias.half()).float()
        else:
            self.weight = nn.Parameter(new)
        return super().forward(inputs)


class Once(nn.Linear):
    """Writes through `.data` in one step alone, long after the first."""

    def __init__(self, step: int) -> None:
        super().__init__(FEATURES, CLASSES)
        self.step = step
        self.count: Tensor
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            if int(self.count) == self.step:
                self.bias.data.mul_(2.0)
            self.count += 1
        return super().forward(inputs)


class OnceInMany(nn.Module):
    """The same in one of several layers, which together are too large to be compared in each step."""

    def __init__(self, step: int, change: str = "mul_") -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(FEATURES, 300), nn.Tanh(), nn.Linear(300, 300), nn.Tanh(), nn.Linear(300, CLASSES)
        )
        self.step = step
        self.change = change
        self.count: Tensor
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            if int(self.count) == self.step:
                getattr(self.layers[2].weight.data, self.change)(0.999)
            self.count += 1
        return self.layers(inputs)  # type: ignore[no-any-return]


class RowBound(nn.Module):
    """The parametrization that a bounded weight is to be written with."""

    def forward(self, weight: Tensor) -> Tensor:
        return torch.renorm(weight, 2, 0, 0.3)


def parametrized() -> nn.Module:
    """`Bounded`, as it is to be written."""
    layer = nn.Linear(FEATURES, CLASSES)
    parametrize.register_parametrization(layer, "weight", RowBound())
    return layer


class Embedded(nn.Module):
    """torch's own embedding, whose rows are renormalised in the forward above a norm."""

    def __init__(self, max_norm: float) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 5, max_norm=max_norm)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.table(tokens).mean(1))
        return out


class ActNorm(nn.Module):
    """Shift and scale from the first batch, with a flag in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(FEATURES))
        self.scale = nn.Parameter(torch.ones(FEATURES))
        self.register_buffer("ready", torch.tensor(False))
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training and not self.ready:
            self.shift.data.copy_(-inputs.mean(0))
            self.scale.data.copy_(1 / (inputs.std(0) + 1e-5))
            self.ready.fill_(True)
        out: Tensor = self.head((inputs + self.shift) * self.scale)
        return out


def started() -> nn.Module:
    """`ActNorm`, as it is to be made: from a batch that the model function runs."""
    model = ActNorm()
    model(points().tensors[0][:16])
    return model


class Late(nn.Module):
    """Makes a part of itself in its first forward; `what` says which."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.layer = nn.Linear(FEATURES, CLASSES)
        if what in ("buffer", "memory"):
            self.register_buffer("mean", None, persistent=what == "buffer")

    def forward(self, inputs: Tensor) -> Tensor:
        if self.what in ("buffer", "memory"):
            batch = inputs.detach().mean(0)
            self.mean = batch if self.mean is None else 0.9 * self.mean + 0.1 * batch
            inputs = inputs - self.mean
        elif self.what == "registered" and not hasattr(self, "seen"):
            self.register_buffer("seen", torch.zeros(2))
        elif self.what == "parameter" and not hasattr(self, "bias"):
            self.bias = nn.Parameter(torch.zeros(CLASSES))
        elif self.what == "layer" and not hasattr(self, "first"):
            self.first = nn.Linear(inputs.shape[1], FEATURES)
        elif self.what == "activation":  # which has no state
            self.activation = nn.Tanh()
            inputs = self.activation(inputs)
        return self.layer(inputs)


class Resizing(nn.Module):
    """A buffer of another shape after the first batch, as observers of quantization have."""

    def __init__(self, *, in_place: bool, evaluation_only: bool = False) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, CLASSES)
        self.in_place, self.evaluation_only = in_place, evaluation_only
        self.register_buffer("least", torch.empty(0))

    def forward(self, inputs: Tensor) -> Tensor:
        if not (self.evaluation_only and self.training):
            least = inputs.detach().amin(0)
            if self.in_place:
                self.least.resize_(least.shape).copy_(least)
            else:
                self.least = least
        return self.layer(inputs)


class Counted(nn.Module):
    """Counts its calls in what `get_extra_state` gives, or only says what it is."""

    def __init__(self, *, counts: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, CLASSES)
        self.counts, self.told = counts, {"calls": 0, "scale": torch.ones(2), "names": ["a"]}

    def get_extra_state(self) -> Any:
        return self.told

    def set_extra_state(self, state: Any) -> None:
        self.told = state

    def forward(self, inputs: Tensor) -> Tensor:
        if self.counts:
            self.told["calls"] += 1
        return self.layer(inputs)


class Writer(nn.Module):
    """Writes to its weight in evaluation only."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.training:
            self.layer.weight.data.mul_(0.5)
        return self.layer(inputs)


# --- those that are carried ----------------------------------------------------------------------------


class Teacher(nn.Module):
    """A frozen average of the layer, moved in the forward as MoCo's code does, or past torch's count."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.layer, self.teacher = nn.Linear(FEATURES, CLASSES), nn.Linear(FEATURES, CLASSES)
        self.teacher.requires_grad_(False)

    @torch.no_grad()
    def _follow(self) -> None:
        for old, new in zip(self.teacher.parameters(), self.layer.parameters(), strict=True):
            if self.way == "data =":
                old.data = old.data * 0.9 + new.data * 0.1
            elif self.way == "in place":
                old.mul_(0.9).add_(new, alpha=0.1)
            else:
                old.data.mul_(0.9).add_(new.data, alpha=0.1)

    def forward(self, inputs: Tensor) -> Tensor:
        self._follow()
        with torch.no_grad():
            aim = self.teacher(inputs)
        out: Tensor = self.layer(inputs)
        return out + 0.1 * (out - aim).tanh()


class Rotary(nn.Module):
    """Tables in a buffer that is in no state dict and grows with the longest input."""

    def __init__(self, *, late: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, CLASSES)
        self.register_buffer("table", None if late else self._made(2), persistent=False)
        self.last: Tensor | None = None

    @staticmethod
    def _made(size: int) -> Tensor:
        return torch.arange(size).float().cos()

    def forward(self, inputs: Tensor) -> Tensor:
        if self.table is None or len(self.table) < len(inputs):
            self.register_buffer("table", self._made(len(inputs)), persistent=False)
        self.last = inputs.detach()
        return self.layer(inputs) * self.table[:1]


class Idle(nn.Module):
    """Writes the bytes that are there already, and trains by a call with other parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            self.layer.weight.copy_(self.layer.weight.clone())
        own = {name: parameter * 1.5 for name, parameter in self.layer.named_parameters()}
        out: Tensor = functional_call(self.layer, own, (inputs,))
        return out


class Folding(nn.Module):
    """A low-rank addition that evaluation folds into the frozen weight, and training takes out again."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, CLASSES)
        self.layer.requires_grad_(False)
        self.low, self.high = nn.Parameter(torch.randn(FEATURES, 2)), nn.Parameter(torch.randn(2, CLASSES))
        self.folded = False

    def train(self, mode: bool = True) -> Folding:
        if mode == self.folded:
            sign = -1.0 if mode else 1.0
            self.layer.weight.data += sign * (self.low.data @ self.high.data).T
            self.folded = not mode
        super().train(mode)
        return self

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.layer(inputs)
        return out if self.folded else out + inputs @ self.low @ self.high


def normed(kind: Callable[..., nn.Module]) -> nn.Module:
    """A layer under one of torch's own reparametrizations."""
    return nn.Sequential(kind(nn.Linear(FEATURES, 6)), nn.Tanh(), nn.Linear(6, CLASSES))


def old_weight_norm(layer: nn.Module) -> nn.Module:
    """torch's first form, which puts the weight into a plain attribute before each forward."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer)


# --- steps -----------------------------------------------------------------------------------------------


def noisy_step(model: nn.Module, batch: Any) -> Tensor:
    """Weight noise past torch's count, never taken back."""
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def sharp_step(model: nn.Module, batch: Any) -> Tensor:
    """Sharpness-aware minimisation by hand: weights moved uphill, and back but for rounding."""
    nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
    moved = [(p, 0.05 * p.grad) for p in model.parameters() if p.grad is not None]
    for parameter, by in moved:
        parameter.data.add_(by)
    model.zero_grad()
    loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
    loss.backward()
    for parameter, by in moved:
        parameter.data.sub_(by)
    return loss.detach() + 0 * sum(p.sum() for p in model.parameters())
