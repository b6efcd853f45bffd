"""Rules for what a step makes of the values that its shards leave in a buffer.

A plain loop runs one forward over the batch; here each shard runs one over its part, from the same version.
What the batch's forward would have left can be known only for some buffers, so each has a rule:

    mean     the shards' values, weighted by their examples: running statistics
    sum      old + sum over k of (value_k - old): counts of what was seen; a flag that any shard has changed
             is changed
    shard0   the value of the first shard that changed it, as a rule shard 0
    agree    the value that all shards leave, bit for bit; any other is an error that asks for a rule
    (old, values, examples) -> new
             a function of all shards' values, in slot order (`old` where a shard has changed nothing)

Running statistics by their class (torch's BatchNorm and InstanceNorm, whatever derives from them) or by their
name (running_mean, moving_variance, ...) have "mean"; what counts batches beside them (`num_batches_tracked`)
and the vectors of torch's spectral norm, which no batch enters, have "shard0"; all others have "agree".

Frozen parameters that a forward writes, such as Keras' moving statistics, are buffers here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from torchord.cache.errors import InvalidInput
from torchord.coordinator.compute.model_state import same_bytes

MEAN, SUM, FIRST, AGREE = "mean", "sum", "shard0", "agree"

Rule: TypeAlias = str | Callable[..., Any]
"""One of the words above, or a function (old, values, examples) -> new."""

_STATISTICS = re.compile(r"(running|moving)_(mean|avg|average|var|variance|std)")


def rules_of(model: nn.Module, given: Mapping[str, Rule] | None) -> dict[str, Rule]:
    """Return the rule of each buffer and frozen parameter of a model, by every name that it has.

    Args:
        model: the model.
        given: name or pattern (`fnmatch`) -> rule, from the recipe; a name goes before patterns. None: no
            rules, as in runs that were submitted when there were none.

    Raises:
        InvalidInput: something given fits no buffer, two patterns give one buffer two rules, or a rule does
            not fit a buffer's dtype.
    """
    if given is None:
        return {}
    parameters = model.named_parameters(remove_duplicate=False)
    held: dict[str, Tensor] = {name: p for name, p in parameters if not p.requires_grad}
    held |= dict(model.named_buffers(remove_duplicate=False))
    for pattern in given:
        if not any(name == pattern or fnmatchcase(name, pattern) for name in held):
            shown = ", ".join(sorted(held)[:8]) + (", ..." if len(held) > 8 else "") if held else "none"
            raise InvalidInput(
                f"buffers: {pattern!r} fits no buffer and no frozen parameter of the model, which has {shown}"
                "; correct the name or leave it out"
            )
    owners = dict(model.named_modules(remove_duplicate=False))
    return {
        name: _rule(owners[name.rpartition(".")[0]], name, tensor, given) for name, tensor in held.items()
    }


def _rule(owner: nn.Module, name: str, tensor: Tensor, given: Mapping[str, Rule]) -> Rule:
    if name in given:
        found = [given[name]]
    else:
        found = [rule for pattern, rule in given.items() if fnmatchcase(name, pattern)]
    if not found:
        return _own_rule(owner, name.rpartition(".")[2], tensor)
    if any(rule != found[0] for rule in found):
        raise InvalidInput(f"buffers: several patterns fit {name!r} and give it other rules; name it itself")
    if found[0] == MEAN and not _numeric(tensor):
        raise InvalidInput(
            f"buffers: {name!r} is {tensor.dtype}, which has no mean; use 'shard0', 'sum' or a function"
        )
    return found[0]


def _own_rule(owner: nn.Module, local: str, tensor: Tensor) -> Rule:
    """The rule of a buffer that was given none, by its module and its name there."""
    last = local.rpartition("/")[2]  # Keras' names are paths
    if isinstance(owner, _NormBase) or _STATISTICS.fullmatch(last):
        return MEAN if _numeric(tensor) else FIRST
    if last == "num_batches_tracked" or isinstance(owner, _SpectralNorm):
        return FIRST
    hooks = owner._forward_pre_hooks.values()
    if any(
        isinstance(hook, SpectralNorm) and local in (f"{hook.name}_u", f"{hook.name}_v") for hook in hooks
    ):
        return FIRST
    return AGREE


def rule_of(rules: Mapping[str, Rule], name: str, value: Tensor) -> Rule:
    """The rule of a buffer; of one that has none, "mean" for numbers with a point and else "shard0"."""
    found = rules.get(name)
    return (MEAN if _numeric(value) else FIRST) if found is None else found


def contributions(
    changed: Mapping[str, Tensor], version: Mapping[str, Tensor], rules: Mapping[str, Rule]
) -> dict[str, Tensor]:
    """What a shard sends of the buffers that it changed: the value, of a sum what it added."""
    return {
        name: _added(value, version[name]) if rules.get(name) == SUM else value
        for name, value in changed.items()
    }


def _added(value: Tensor, old: Tensor) -> Tensor:
    return value ^ old if value.dtype is torch.bool else wide(value) - wide(old)


class RuledBuffers:
    """The buffers of some shards, or of some partial sums, whose rule is not the mean.

    Args:
        rules: buffer name -> rule.
        whole: examples in the step.
        bases: name -> what there is of a buffer so far; added to.
        changed: name -> examples in the shards that changed it; added to.
    """

    def __init__(
        self,
        rules: Mapping[str, Rule],
        whole: int,
        bases: dict[str, Tensor] | None = None,
        changed: dict[str, int] | None = None,
    ) -> None:
        self._rules = rules
        self._whole = whole
        self._bases = {} if bases is None else bases
        self._changed = {} if changed is None else changed

    def values(self, old: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The new value of each buffer that some shard has changed, of those here; see `value`."""
        found = ((name, self.value(name, old[name])) for name in self._bases)
        return {name: value for name, value in found if value is not None}

    def add(self, name: str, value: Tensor, examples: int) -> bool:
        """Take a shard's or partial sum's contribution, the next in slot order.

        Returns:
            Whether the buffer is one of those here.

        Raises:
            InvalidInput: shards that should agree do not, or a function would need their values apart.
        """
        rule = rule_of(self._rules, name, value)
        if rule == MEAN:
            return False
        if callable(rule):
            raise InvalidInput(
                f"buffers: the rule of {name!r} is a function of all shards' values, which partial sums do "
                "not keep; set fan_in to the number of shards, at least"
            )
        self._changed[name] = self._changed.get(name, 0) + examples
        base = self._bases.get(name)
        if base is None:
            self._bases[name] = wide(value).contiguous().clone()
        elif rule == SUM:
            self._bases[name] = base | value if base.dtype is torch.bool else base.add_(value)
        elif rule == AGREE and not same_bytes(base, wide(value).contiguous()):
            raise unruled(name, value)
        return True

    def value(self, name: str, old: Tensor) -> Tensor | None:
        """The new value of a buffer; None if it is none of those here.

        Raises:
            InvalidInput: only some shards have changed a buffer with a point in it.
        """
        rule = rule_of(self._rules, name, old)
        if rule == MEAN:
            return None
        base = self._bases[name]
        if rule == SUM:
            return old ^ base if old.dtype is torch.bool else (wide(old) + base).to(old.dtype)
        if rule == AGREE and _numeric(old) and self._changed[name] < self._whole:
            raise unruled(name, old)
        return base.to(old.dtype)


def combined(
    rule: Callable[..., Any], name: str, old: Tensor, values: list[Tensor], examples: list[int]
) -> Tensor:
    """What a function makes of the shards' values.

    Raises:
        InvalidInput: something else than a tensor of the buffer's shape and dtype.
        Exception: what the function raises, with a note.
    """
    try:
        new = rule(old.clone(), values, examples)
    except Exception as error:
        error.add_note(f"torchord: raised by the rule of buffer {name!r}")
        raise
    if not isinstance(new, Tensor) or new.shape != old.shape or new.dtype != old.dtype:
        shown = f"{new.dtype} of shape {tuple(new.shape)}" if isinstance(new, Tensor) else type(new).__name__
        raise InvalidInput(
            f"buffers: the rule of {name!r} returned {shown}, but must return a tensor like it, {old.dtype} "
            f"of shape {tuple(old.shape)}"
        )
    return new.detach().contiguous()


def unruled(name: str, tensor: Tensor) -> InvalidInput:
    """The error about a buffer that needs a rule and has none."""
    return InvalidInput(
        f"the forward changes {name!r} ({tensor.dtype} of shape {tuple(tensor.shape)}) by what is in the "
        "batch, it is no running statistic, and so what shards leave in it does not say what the whole batch "
        f"would: give it a rule, Recipe(buffers={{{name!r}: 'shard0'}}), or 'mean', 'sum' or a function of "
        "the shards' values in its place; or train with shards=1"
    )


def wide(tensor: Tensor) -> Tensor:
    """Half-precision values as float32, in which they are summed; others as they are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _numeric(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
