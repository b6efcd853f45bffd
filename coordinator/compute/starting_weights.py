"""Weights that a run starts from in place of the recipe's own: put into a new model by name, or refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from torchord.cache.errors import InvalidInput
from torchord.cache.tensors.codec import copy_bits, dtype_name, same_bits
from torchord.coordinator.compute.averaging import ENTRY

_SHOWN = 4


def final_tensors(version: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a version of a run stands for: averaged weights where it has them, and nothing of torchord's."""
    found = {name: tensor for name, tensor in version.items() if "/" not in name}
    prefix = f"{ENTRY}/"
    return found | {n.removeprefix(prefix): tensor for n, tensor in version.items() if n.startswith(prefix)}


@torch.no_grad()
def put_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Give a new model the values of all its parameters and persistent buffers.

    Args:
        model: as the recipe's model entry made it; buffers with `persistent=False` stay so.
        weights: name -> tensor as in a state dict, on the CPU; of tied ones, one name will do.
        source: where they come from, for messages.

    Raises:
        InvalidInput: one is missing, is not the model's, or has another shape or dtype; all are named.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    passing = {name for name in buffers if _is_passing(model, name)}
    own: dict[str, Tensor] = {**parameters, **{n: b for n, b in buffers.items() if n not in passing}}
    given: dict[int, str] = {}
    other, twice = [], []
    for name, tensor in own.items():
        if (value := weights.get(name)) is None:
            continue
        if (value.shape, value.dtype) != (tensor.shape, tensor.dtype):
            there, here = _described(value), _described(tensor)
            other.append(f"{name!r} is {there} there and {here} in the model")
            continue
        first = given.setdefault(id(tensor), name)
        if first != name and not same_bits(weights[first], value):
            twice.append(f"{first!r} and {name!r} are one tensor in the model and differ there")
    named = {id(own[name]) for name in own if name in weights}
    missing = [name for name, tensor in own.items() if id(tensor) not in named]
    unknown = [name for name in weights if name not in own and name not in passing]
    problems = [
        *_listed("it lacks", map(repr, missing)),
        *_listed("the model lacks", map(repr, unknown)),
        *_listed("", other),
        *_listed("", twice),
    ]
    if problems:
        raise InvalidInput(
            f"start_from: {source} does not fit the recipe's model: {'; '.join(problems)}. Give the model "
            "the form that the weights have, or load what is to be taken over in the recipe's model function"
        )
    for name in given.values():
        value = weights[name].to(own[name].device)
        copy_bits(own[name].detach(), value)


def _is_passing(model: nn.Module, name: str) -> bool:
    """Whether a buffer is left out of state dicts."""
    home, _, last = name.rpartition(".")
    return last in model.get_submodule(home)._non_persistent_buffers_set


def _described(tensor: Tensor) -> str:
    return f"{dtype_name(tensor.dtype)} {tuple(tensor.shape)}"


def _listed(what: str, items: Iterable[str]) -> list[str]:
    """At most one problem that names the first items."""
    found = list(items)
    if not found:
        return []
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return [f"{what} {', '.join(found[:_SHOWN])}{more}".strip()]
