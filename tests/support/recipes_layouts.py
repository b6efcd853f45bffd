"""Models whose state lies otherwise in memory than a fresh one's: views, strides, dtypes, orders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

FEATURES, CLASSES = 8, 3


def points(size: int = 48) -> TensorDataset:
    """Gaussian points with labels that a linear map gives."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(size, FEATURES, generator=generator)
    return TensorDataset(x, (x @ torch.randn(FEATURES, CLASSES, generator=generator)).argmax(1))


class Tied(nn.Module):
    """An encoder and a decoder that share memory, as two parameters: `how` says which views they are.

    Args:
        hidden: width; from 256 KiB on, a version goes through the same-host tier.
    """

    def __init__(self, how: str, hidden: int = 6) -> None:
        super().__init__()
        self.encode = nn.Linear(FEATURES, hidden, bias=False)
        self.decode = nn.Linear(hidden, FEATURES, bias=False)
        self.head = nn.Linear(FEATURES, CLASSES)
        weight = self.encode.weight.data
        if how == "transposed":
            self.decode.weight.data = weight.t()
        elif how == "numpy":
            shared = torch.from_numpy(np.ones(hidden * FEATURES + 1, np.float32))[1:]
            shared.copy_(weight.reshape(-1))
            self.encode.weight.data = shared.view(hidden, FEATURES)
            self.decode.weight.data = shared.view(hidden, FEATURES).t()
        else:
            self.decode.weight = nn.Parameter(weight.view(FEATURES, hidden))

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.head(self.decode(self.encode(inputs).tanh()))
        return out


class Part(nn.Module):
    """A parameter that is a part of another one."""

    def __init__(self) -> None:
        super().__init__()
        whole = torch.randn(CLASSES * FEATURES + 1)
        self.whole, self.part = nn.Parameter(whole), nn.Parameter(whole[5:13])

    def forward(self, inputs: Tensor) -> Tensor:
        return (inputs * self.part) @ self.whole[1:].view(FEATURES, CLASSES)


class Buffered(nn.Module):
    """Buffers of odd memory: expanded, views of a buffer and of a parameter, empty, 0-d, strided."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, CLASSES)
        self.register_buffer("expanded", torch.ones(1, FEATURES).expand(4, FEATURES))
        self.register_buffer("counts", torch.zeros(6))
        self.register_buffer("few", self.counts[1:4])
        self.register_buffer("row", self.layer.weight.data[1])
        self.register_buffer("empty", torch.empty(0, 3))
        self.register_buffer("scale", torch.tensor(1.0))
        self.register_buffer("strided", torch.arange(12.0).view(3, 4).t())
        self.empty_too = nn.Parameter(torch.empty(0))
        self.factor = nn.Parameter(torch.tensor(1.0))
        self.frozen = nn.Parameter(torch.ones(1).expand(5), requires_grad=False)

    def forward(self, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            self.counts[2] += 1.0  # and so in `few`
        out: Tensor = self.layer(inputs * self.expanded[0]) * self.factor * self.scale
        return out + self.row.sum() + self.strided[0, 1] + self.frozen.sum() + self.empty_too.sum()


def expanded() -> nn.Module:
    """A trained parameter of one element in memory, which no optimizer can write to."""
    model = nn.Linear(FEATURES, CLASSES)
    model.bias = nn.Parameter(torch.zeros(1).expand(CLASSES))
    return model


def strided() -> nn.Module:
    """Weights whose order in memory is not that of rows."""
    model = nn.Sequential(nn.Linear(FEATURES, 6), nn.Tanh(), nn.Linear(6, CLASSES))
    model[0].weight = nn.Parameter(model[0].weight.data.t().contiguous().t())
    model[2].weight = nn.Parameter(torch.randn(CLASSES, 12)[:, ::2])
    return model


class Pictures(nn.Module):
    """Convolutions in torch's other memory format."""

    def __init__(self) -> None:
        super().__init__()
        self.convolve = nn.Conv2d(2, 4, 2)
        self.head = nn.Linear(4, CLASSES)
        self.to(memory_format=torch.channels_last)

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.head(self.convolve(inputs.view(-1, 2, 2, 2)).flatten(1))
        return out


class Complex(nn.Module):
    """Complex weights, and a buffer that is a conjugate view."""

    def __init__(self, dtype: torch.dtype = torch.complex64) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(FEATURES, CLASSES, dtype=dtype))
        self.register_buffer("seen", torch.zeros(FEATURES, dtype=dtype))

    def forward(self, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            self.seen = (self.seen + 1j).conj()
        found: Tensor = (inputs.to(self.weight.dtype) @ self.weight).abs()
        return found


def double() -> nn.Module:
    """A model in double precision, which takes its inputs so."""
    return nn.Sequential(Cast(torch.float64), nn.Linear(FEATURES, CLASSES, dtype=torch.float64))


def doubled() -> nn.Module:
    """A model made after its function set torch's default dtype."""
    torch.set_default_dtype(torch.float64)
    return nn.Linear(FEATURES, CLASSES)


def doubled_points() -> TensorDataset:
    """The same for the data."""
    torch.set_default_dtype(torch.float64)
    return points()


class Cast(nn.Module):
    """Brings its inputs to a dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.to(self.dtype)


class Disordered(nn.Module):
    """Parameters, buffers and layers registered in an order of their own.

    Args:
        order: of the first three letters; None: that of a set of them, which differs between processes.
    """

    def __init__(self, order: str | None = None) -> None:
        super().__init__()
        letters = list({"a", "b", "c"}) if order is None else list(order)
        self.biases = nn.ParameterDict({each: torch.full((CLASSES,), 0.1) for each in letters})
        made = {each: nn.Linear(FEATURES, CLASSES) for each in "abc"}  # whose first weights no order changes
        self.layers = nn.ModuleDict({each: made[each] for each in letters})
        for each in letters:
            self.register_buffer(f"seen_{each}", torch.zeros(FEATURES))
        self.layers["c"].weight = self.layers["b"].weight  # tied: which of both names it has, order says

    def forward(self, inputs: Tensor) -> Tensor:
        out = inputs.new_zeros(())
        for place, each in enumerate("abc"):
            seen = getattr(self, f"seen_{each}")
            if self.training:
                seen.mul_(0.9).add_(inputs.detach().mean(0), alpha=0.1 * (place + 1))
            out = out + (place + 1) * (self.layers[each](inputs) + self.biases[each])
        return out


class Told(nn.Module):
    """Extra state, and a state dict with other names than the module tree's."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(FEATURES, CLASSES), nn.BatchNorm1d(CLASSES))
        self.told: Any = {"classes": CLASSES, "names": ["a", "b"], "scale": torch.ones(2)}
        self.inner.register_state_dict_post_hook(_renamed("0.", "first."))
        self.inner.register_load_state_dict_pre_hook(_loaded)

    def get_extra_state(self) -> Any:
        return self.told

    def set_extra_state(self, state: Any) -> None:
        self.told = state

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.inner(inputs)
        return out


def _renamed(before: str, after: str) -> Callable[..., None]:
    def hook(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for name in [name for name in state if name.startswith(prefix + before)]:
            state[prefix + after + name.removeprefix(prefix + before)] = state.pop(name)

    return hook


def _loaded(module: nn.Module, state: Mapping[str, Any], prefix: str, *rest: Any) -> None:
    _renamed("first.", "0.")(module, state, prefix, None)  # type: ignore[arg-type]
