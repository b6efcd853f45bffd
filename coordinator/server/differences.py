"""In what two computations of one shard differ, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from torchord.cache.ledger.records import SlotRecord
from torchord.cache.stores.gradients import GradientStore
from torchord.coordinator.compute.model_state import same_bytes


def tensors_of(slot: SlotRecord, gradients: GradientStore) -> dict[str, Any]:
    """Every tensor of a slot under a name for people, and whatever else the slot keeps."""
    state = None if slot.state is None else gradients.get_state(slot.state)
    return named(*gradients.get(slot), state, slot.compression)


def named(
    payload: Mapping[str, Tensor], buffers: Mapping[str, Tensor], state: Any, compression: str
) -> dict[str, Any]:
    """What a shard sends and keeps, each part under a name for people."""
    kind = "the gradient of" if compression == "none" else "what is sent for"
    found: dict[str, Any] = {f"{kind} {name!r}": tensor for name, tensor in payload.items()}
    found |= {f"buffer {name!r}": tensor for name, tensor in buffers.items()}
    if state is not None:
        found |= {f"what the slot keeps as {path!r}": leaf for path, leaf in leaves(state, "")}
    return found


def leaves(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every leaf of a tree, with its path from `path` on."""
    children: Any = None
    if isinstance(tree, Mapping):
        children = tree.items()
    elif isinstance(tree, (list, tuple)):
        children = enumerate(tree)
    if children is None:
        yield path, tree
        return
    for name, child in children:
        yield from leaves(child, f"{path}.{name}" if path else str(name))


def first_difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """The first part in which two computations of a shard differ, in words; "" if in none."""
    for name, one in ours.items():
        if name not in theirs:
            return f"{name} was there the first time only"
        if apart := _apart(one, theirs[name]):
            return f"{name} {apart}"
    return next((f"{name} was there the second time only" for name in theirs if name not in ours), "")


def _apart(one: Any, other: Any) -> str:
    """How two leaves differ; "" if they have the same bits."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return "" if repr(one) == repr(other) else f"was {one!r} and then {other!r}"
    if one.dtype != other.dtype or one.shape != other.shape:
        return f"was {_kind(one)} and then {_kind(other)}"
    ours, theirs = one.contiguous(), other.contiguous()
    if same_bytes(ours, theirs):
        return ""
    wide = torch.complex128 if one.is_complex() else torch.float64
    most = (ours.to(wide) - theirs.to(wide)).abs().max().item()
    return f"differs by {most:.3g}" if most else "differs in its bits, such as the sign of a zero"


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}"
