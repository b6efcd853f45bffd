"""Sums and averages of a step's shards, in slot order, the same whoever computed them.

With N examples in the step and n_k in shard k, w_k = n_k / N, the averaged gradient is

    g = ((w_0 g_0 + w_1 g_1) + w_2 g_2) + ...

summed strictly in slot order. If each w_k is a power of two it has the bits of accumulating
`(loss_k * w_k).backward()` in that order in one process.

A shard may weigh something else than its examples (`torchord.coordinator.compute.weights`), which nobody
knows beforehand. Then n_k is n_k r_k / r, where r_k is the shard's weight an example and r that of the first
shard that weighs anything, and what was summed is divided once, at the root, by the sum of the w_k. So only
the ratios of the weights matter, and weights in proportion to the examples have the bits of no weights.

Buffers are part of the state, too, and each has a rule (`torchord.coordinator.compute.buffer_rules`). A
running statistic that a forward changed, such as the mean of a BatchNorm, becomes the average of the shards'
values, weighted by their examples (a shard that left it alone counts with the old value); what counts its
batches takes the value of the lowest slot that changed it. Each shard normalises by its own batch statistics,
as each rank does under DDP; but where DDP keeps rank 0's running statistics, here they are
the average over the shards, so that every example counts.

A partial sum is one over part of a step's shards, and the average may be made of such sums. That of the
shards a to b is

    S = ((w_a g_a + w_{a+1} g_{a+1}) + ...) + w_b g_b

in slot order; a partial sum of partial sums, and the average at the root, add theirs up in slot order.
`torchord.coordinator.spec.sum_tree` says what goes into which, so the average has the same bits wherever each
sum was made. Half-precision gradients are summed in float32 and rounded once, at the root.

Of buffers, a partial sum keeps the value b of the first of its shards that changed a buffer and the sum of
w_k (b_k - b) over those that did; sums of sums shift that to the first one's b, weighted by the examples
behind it; the root adds the shards that left the buffer alone with the old value. It is the same average in
the tree's order; what all shards agree on comes out bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchord.cache.errors import InvalidInput
from torchord.cache.tensors.codec import dtype_name, dtype_of
from torchord.coordinator.compute.buffer_rules import Rule, RuledBuffers, combined
from torchord.coordinator.compute.buffer_rules import wide as _wide
from torchord.coordinator.compute.shares import Shares

_HALVES = (torch.float16, torch.bfloat16)
_SUM, _BASE, _MOVED = "sum/", "base/", "moved/"


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
        rules: buffer name -> its rule; one without is a running statistic, or the count of one.

    Example:
        >>> total = Accumulator({}, 4)
        >>> total.add({"w": torch.tensor([1.0])}, {}, 2)
        >>> total.add({"w": torch.tensor([3.0])}, {}, 2)
        >>> total.result().gradients["w"]
        tensor([2.])
    """

    def __init__(
        self, old: Mapping[str, Tensor], examples: int, rules: Mapping[str, Rule] | None = None
    ) -> None:
        if examples < 1:
            raise InvalidInput(f"a step needs at least one example, not {examples}")
        self.examples = examples
        self._seen = 0
        self._dtypes: dict[str, torch.dtype] = {}
        self._gradients: dict[str, Tensor] = {}
        self._buffers = _BufferAverage(old, examples, rules or {})
        self._shares = Shares()

    @torch.no_grad()
    def add(
        self,
        gradients: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        examples: int,
        weight: float | None = None,
    ) -> None:
        """Add the next shard; the caller keeps slot order.

        Args:
            gradients: parameter name -> gradient of the shard's mean loss; parameters without
                one are left out. Not kept and never written to.
            buffers: buffer name -> value after the forward, for those that changed, of a sum what was
                added; the same.
            examples: examples in the shard, at least 1.
            weight: what the shard's loss is a mean over; None: its examples.

        Raises:
            InvalidInput: the shards have more examples together than the step.
        """
        self._seen += examples
        if examples < 1 or self._seen > self.examples:
            raise InvalidInput(
                f"a shard of {examples} examples makes {self._seen} in a step of {self.examples}; was it "
                f"added twice?"
            )
        share = self._shares.take(examples, weight) / self.examples
        for name, gradient in gradients.items() if share else ():
            wide = _wide(gradient)
            total = self._gradients.get(name)
            if total is None:
                self._dtypes[name] = gradient.dtype
                self._gradients[name] = wide * share
            else:
                total.add_(wide, alpha=share)
        self._buffers.take(buffers, examples)

    @torch.no_grad()
    def result(self) -> Aggregate:
        """Return the average, once; the tensors are the caller's to change.

        Raises:
            InvalidInput: a shard is missing.
        """
        if self._seen != self.examples:
            raise InvalidInput(f"the shards added have {self._seen} of the step's {self.examples} examples")
        self._shares.divide(self._gradients, self.examples)
        gradients = {name: total.to(self._dtypes[name]) for name, total in self._gradients.items()}
        return Aggregate(gradients, self._buffers.result())


class _BufferAverage:
    """Averages running statistics around the first slot's value, and does with others what their rule says.

    new = b_0 + sum over k > 0 of w_k (b_k - b_0), which is the weighted mean, gives b_0 itself
    for a single shard, and leaves alone what all shards agree on, bit for bit.
    """

    def __init__(self, old: Mapping[str, Tensor], whole: int, rules: Mapping[str, Rule]) -> None:
        self._old = old
        self._whole = whole
        self._rules = rules
        self._others = RuledBuffers(rules, whole)
        self._apart: list[dict[str, Tensor]] = []  # each shard's values of buffers whose rule is a function
        self._examples: list[int] = []
        self._base: dict[str, Tensor] = {}
        self._sum: dict[str, Tensor] = {}

    def take(self, buffers: Mapping[str, Tensor], examples: int) -> None:
        weight = examples / self._whole
        apart = {name: value.clone() for name, value in buffers.items() if callable(self._rules.get(name))}
        for name, value in buffers.items():
            if name not in self._base and name not in apart and not self._others.add(name, value, examples):
                self._begin(name, value)
        for name, total in self._sum.items():
            total.add_(_from(self._base[name], buffers.get(name, self._old[name])), alpha=weight)
        self._apart.append(apart)
        self._examples.append(examples)

    def _begin(self, name: str, value: Tensor) -> None:
        """Start with the first slot that changed the buffer; those before it kept the old value."""
        first = self._old[name] if self._examples else value
        self._base[name] = _wide(first).clone()
        self._sum[name] = torch.zeros_like(self._base[name])

    def result(self) -> dict[str, Tensor]:
        found = {
            name: _moved_by(base, self._sum[name], self._old[name].dtype) for name, base in self._base.items()
        }
        found.update(self._others.values(self._old))
        for name, rule in self._rules.items():
            if callable(rule) and any(name in apart for apart in self._apart):
                old = self._old[name]
                values = [apart[name] if name in apart else old.clone() for apart in self._apart]
                found[name] = combined(rule, name, old, values, list(self._examples))
        return found


@dataclass(frozen=True)
class Partial:
    """What one partial sum holds.

    Attributes:
        sums: parameter name -> weighted sum of the gradients, in float32 for half precision.
        bases: buffer name -> value in the first shard that changed it, or what all have added; floating ones
            as wide as sums.
        moved: floating buffer name -> weighted sum of the deviations from the base.
        halves: parameter name -> dtype of its gradients, where that is a half precision.
        changed: buffer name -> examples in the shards that changed it.
        examples: examples in all its shards.
        shares: what its shards count together, see `Shares`; None: their examples.
        unit: weight of one example of those.
    """

    sums: dict[str, Tensor]
    bases: dict[str, Tensor]
    moved: dict[str, Tensor]
    halves: dict[str, str]
    changed: dict[str, int]
    examples: int
    shares: float | None = None
    unit: float = 1.0

    def tensors(self) -> dict[str, Tensor]:
        """What of it travels as bytes."""
        return {
            **{_SUM + name: value for name, value in self.sums.items()},
            **{_BASE + name: value for name, value in self.bases.items()},
            **{_MOVED + name: value for name, value in self.moved.items()},
        }

    def notes(self) -> dict[str, Any]:
        """What of it travels as JSON, beside its tensors and examples."""
        weights = {} if self.shares is None else {"shares": self.shares, "unit": self.unit}
        return {"halves": self.halves, "changed": self.changed, **weights}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], notes: Mapping[str, Any], examples: int) -> Partial:
        """The inverse of `tensors` and `notes`."""

        def named(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

        return cls(
            named(_SUM),
            named(_BASE),
            named(_MOVED),
            dict(notes["halves"]),
            dict(notes["changed"]),
            examples,
            notes.get("shares"),
            notes.get("unit", 1.0),
        )


class PartialSum:
    """Adds up the inputs of one slot, one after the other in slot order.

    Args:
        examples: examples in the whole step, known beforehand from the plan.
        rules: as for `Accumulator`.

    Example:
        >>> total = PartialSum(4)
        >>> total.add_shard({"w": torch.tensor([1.0])}, {}, 2)
        >>> total.add_shard({"w": torch.tensor([3.0])}, {}, 2)
        >>> total.result().sums["w"]
        tensor([2.])
    """

    def __init__(self, examples: int, rules: Mapping[str, Rule] | None = None) -> None:
        if examples < 1:
            raise InvalidInput(f"a step needs at least one example, not {examples}")
        self._whole = examples
        self._sums: dict[str, Tensor] = {}
        self._bases: dict[str, Tensor] = {}
        self._moved: dict[str, Tensor] = {}
        self._halves: dict[str, str] = {}
        self._changed: dict[str, int] = {}
        self._others = RuledBuffers(rules or {}, examples, self._bases, self._changed)
        self._seen = 0
        self._shares = Shares()

    def _count(self, examples: int) -> None:
        self._seen += examples
        if examples < 1 or self._seen > self._whole:
            raise InvalidInput(
                f"{examples} more examples make {self._seen} in a step of {self._whole}; was an input added "
                "twice?"
            )

    @torch.no_grad()
    def add_shard(
        self,
        gradients: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        examples: int,
        weight: float | None = None,
    ) -> None:
        """Add a shard; arguments as those of `Accumulator.add`.

        Raises:
            InvalidInput: the inputs have more examples together than the step.
        """
        self._count(examples)
        share = self._shares.take(examples, weight) / self._whole
        for name, gradient in gradients.items() if share else ():
            if gradient.dtype in _HALVES:
                self._halves.setdefault(name, dtype_name(gradient.dtype))
            total = self._sums.get(name)
            if total is None:
                self._sums[name] = _wide(gradient) * share
            else:
                total.add_(_wide(gradient), alpha=share)
        for name, value in buffers.items():
            self._add_buffer(name, value, None, examples)

    @torch.no_grad()
    def add(self, partial: Partial) -> None:
        """Add a partial sum.

        Raises:
            InvalidInput: the inputs have more examples together than the step.
        """
        self._count(partial.examples)
        scale = self._shares.scale(partial.unit)
        self._shares.total += (partial.examples if partial.shares is None else partial.shares) * scale
        for name, value in partial.sums.items():
            total = self._sums.get(name)
            if total is None:
                self._sums[name] = value * scale
            else:
                total.add_(value, alpha=scale)
        for name, dtype in partial.halves.items():
            self._halves.setdefault(name, dtype)
        for name, base in partial.bases.items():
            self._add_buffer(name, base, partial.moved.get(name), partial.changed[name])

    def _add_buffer(self, name: str, value: Tensor, moved: Tensor | None, examples: int) -> None:
        """Take `examples` examples' value of a buffer, which is `value` + `moved` / their weight."""
        if self._others.add(name, value, examples):
            return
        self._changed[name] = self._changed.get(name, 0) + examples
        if name not in self._bases:
            self._bases[name] = _wide(value).clone()
            self._moved[name] = torch.zeros_like(self._bases[name]) if moved is None else moved.clone()
        else:
            if moved is not None:
                self._moved[name].add_(moved)
            self._moved[name].add_(_from(self._bases[name], value), alpha=examples / self._whole)

    def result(self) -> Partial:
        """Return the sum; the tensors are the caller's to change."""
        total, unit = self._shares.total, self._shares.unit
        weights = () if total == self._seen and unit == 1.0 else (total, 0.0 if unit is None else unit)
        return Partial(
            self._sums, self._bases, self._moved, self._halves, self._changed, self._seen, *weights
        )

    @torch.no_grad()
    def average(self, old: Mapping[str, Tensor]) -> Aggregate:
        """Return the average over the step, once; the tensors are the caller's to change.

        Args:
            old: buffer name -> value in the version that the shards were computed on.

        Raises:
            InvalidInput: an input is missing.
        """
        if self._seen != self._whole:
            raise InvalidInput(f"the inputs added have {self._seen} of the step's {self._whole} examples")
        self._shares.divide(self._sums, self._whole)
        gradients = {
            name: total.to(dtype_of(self._halves[name])) if name in self._halves else total
            for name, total in self._sums.items()
        }
        return Aggregate(gradients, {name: self._value(name, old[name]) for name in self._bases})

    def _value(self, name: str, old: Tensor) -> Tensor:
        if (ruled := self._others.value(name, old)) is not None:
            return ruled
        base, moved = self._bases[name], self._moved[name]
        unchanged = self._whole - self._changed[name]
        if unchanged:
            moved = moved.add(_from(base, old), alpha=unchanged / self._whole)
        return _moved_by(base, moved, old.dtype)


def _from(base: Tensor, value: Tensor) -> Tensor:
    """How far value is from base, 0 where they are equal: inf - inf would be NaN."""
    wide = _wide(value)
    return torch.where(wide == base, torch.zeros_like(base), wide - base)


def _moved_by(base: Tensor, deviation: Tensor, dtype: torch.dtype) -> Tensor:
    """A running statistic's new value."""
    return torch.where(deviation == 0, base, base + deviation).to(dtype)  # keeps a base of -0.0
