"""Averages the shards of a step, in slot order, the same way whoever computed them.

With N examples in the step and n_k in shard k, w_k = n_k / N, the averaged gradient is

    g = ((w_0 g_0 + w_1 g_1) + w_2 g_2) + ...

summed strictly in slot order. If each w_k is a power of two it has the bits of accumulating
`(loss_k * w_k).backward()` in that order in one process.

Buffers are part of the state, too. A floating buffer that a forward changed, such as the
running mean of a BatchNorm, becomes the average of the shards' values, weighted by w_k (a
shard that left it alone counts with the old value); an integer or boolean buffer takes the
value of the lowest slot that changed it. Each shard normalises by its own batch statistics,
as each rank does under DDP; but where DDP keeps rank 0's running statistics, here they are
the average over the shards, so that every example counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from torchord.cache.errors import InvalidInput

_HALVES = (torch.float16, torch.bfloat16)


class Aggregate(NamedTuple):
    """The average over one step.

    Attributes:
        gradients: parameter name -> averaged gradient in the gradient's own dtype; parameters
            without a gradient in any shard are left out.
        buffers: buffer name -> new value, for those that changed.
    """

    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]


class Accumulator:
    """Adds up the shards of one step, one after the other in slot order.

    Args:
        old: name -> value in the version that the shards were computed on, at least of every
            buffer; read, never written to.
        examples: examples in the whole step, known beforehand from the plan.

    Example:
        >>> total = Accumulator({}, 4)
        >>> total.add({"w": torch.tensor([1.0])}, {}, 2)
        >>> total.add({"w": torch.tensor([3.0])}, {}, 2)
        >>> total.result().gradients["w"]
        tensor([2.])
    """

    def __init__(self, old: Mapping[str, Tensor], examples: int) -> None:
        if examples < 1:
            raise InvalidInput(f"a step needs at least one example, not {examples}.")
        self.examples = examples
        self._seen = 0
        self._dtypes: dict[str, torch.dtype] = {}
        self._gradients: dict[str, Tensor] = {}
        self._buffers = _BufferAverage(old)

    @torch.no_grad()
    def add(self, gradients: Mapping[str, Tensor], buffers: Mapping[str, Tensor], examples: int) -> None:
        """Add the next shard; the caller keeps slot order.

        Args:
            gradients: parameter name -> gradient of the shard's mean loss; parameters without
                one are left out. Not kept and never written to.
            buffers: buffer name -> value after the forward, for those that changed; the same.
            examples: examples in the shard, at least 1.

        Raises:
            InvalidInput: the shards have more examples together than the step.
        """
        self._seen += examples
        if examples < 1 or self._seen > self.examples:
            raise InvalidInput(
                f"a shard of {examples} examples makes {self._seen} in a step of {self.examples}; was it "
                f"added twice?"
            )
        weight = examples / self.examples
        for name, gradient in gradients.items():
            wide = _widened(gradient)
            total = self._gradients.get(name)
            if total is None:
                self._dtypes[name] = gradient.dtype
                self._gradients[name] = wide * weight
            else:
                total.add_(wide, alpha=weight)
        self._buffers.take(buffers, weight)

    def result(self) -> Aggregate:
        """Return the average; the tensors are the caller's to change.

        Raises:
            InvalidInput: a shard is missing.
        """
        if self._seen != self.examples:
            raise InvalidInput(f"the shards added have {self._seen} of the step's {self.examples} examples.")
        gradients = {name: total.to(self._dtypes[name]) for name, total in self._gradients.items()}
        return Aggregate(gradients, self._buffers.result())


class _BufferAverage:
    """Averages floating buffers around the first slot's value, and picks the others.

    new = b_0 + sum over k > 0 of w_k (b_k - b_0), which is the weighted mean, gives b_0 itself
    for a single shard, and leaves alone what all shards agree on, bit for bit.
    """

    def __init__(self, old: Mapping[str, Tensor]) -> None:
        self._old = old
        self._taken: list[float] = []
        self._base: dict[str, Tensor] = {}
        self._sum: dict[str, Tensor] = {}

    def take(self, buffers: Mapping[str, Tensor], weight: float) -> None:
        for name, value in buffers.items():
            if name not in self._base:
                self._begin(name, value)
        for name, total in self._sum.items():
            total.add_(self._deviation(name, buffers.get(name, self._old[name])), alpha=weight)
        self._taken.append(weight)

    def _begin(self, name: str, value: Tensor) -> None:
        """Start with the first slot that changed the buffer; those before it kept the old value."""
        if not (value.is_floating_point() or value.is_complex()):
            self._base[name] = value.clone()
            return
        first = self._old[name] if self._taken else value
        self._base[name] = _widened(first).clone()
        self._sum[name] = torch.zeros_like(self._base[name])

    def _deviation(self, name: str, value: Tensor) -> Tensor:
        base, wide = self._base[name], _widened(value)
        return torch.where(wide == base, torch.zeros_like(base), wide - base)  # inf - inf would be NaN

    def result(self) -> dict[str, Tensor]:
        return {name: self._value(name, base) for name, base in self._base.items()}

    def _value(self, name: str, base: Tensor) -> Tensor:
        deviation = self._sum.get(name)
        if deviation is None:
            return base
        moved = torch.where(deviation == 0, base, base + deviation)  # keeps a base of -0.0
        return moved.to(self._old[name].dtype)


def _widened(tensor: Tensor) -> Tensor:
    """Return half-precision values as float32, in which they are summed; others as they are."""
    return tensor.float() if tensor.dtype in _HALVES else tensor
