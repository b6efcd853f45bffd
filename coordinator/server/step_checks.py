"""Shards that were computed twice, compared before their step counts.

A check is a slot with the gradient of a shard that has a slot of its own, computed once more by whoever
came, in fresh copies of model and dataset. Where the recipe is pure both have the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torchord.cache.errors import CacheError, Impure
from torchord.cache.ledger.records import SlotRecord
from torchord.cache.stores.gradients import GradientStore
from torchord.coordinator.compute.model_state import same_bytes
from torchord.coordinator.runtime.joining import CAUSES
from torchord.coordinator.server.warm_run import WarmRun


def compare(
    warm: WarmRun, present: Mapping[int, SlotRecord], gradients: GradientStore
) -> list[tuple[int, str, bool]]:
    """Compare the checks of the present step with the shards that they are of.

    Args:
        present: the step's slots by number, at least those of `step_slots.needed`.
        gradients: where their bytes are, for an error that names the tensor.

    Returns:
        (shard, worker that computed it once more, whether it could be compared) of each check: two
        workers that the run's owner has admitted although they differ may give other bits.

    Raises:
        Impure: one differs. The step's slots were opened again, for whoever resumes the run, and the
            difference is in the run's audit from now on.
    """
    tree = warm.context.plan().fan_in(warm.version)
    admitted = bool(tree.checked) and warm.ledger.head().skew == "admit"
    found = []
    for number in tree.checks:
        shard = tree.shard_of(number)
        slot, check = present[shard], present[number]
        comparable = slot.worker == check.worker or not admitted
        if comparable and (what := difference(slot, check, gradients)):
            _open_again(warm, slot, check)
            raise Impure(_told(warm, slot, check, what))
        found.append((shard, check.worker, comparable))
    return found


def difference(slot: SlotRecord, check: SlotRecord, gradients: GradientStore) -> str:
    """In what two computations of one shard differ, in words; "" if in nothing.

    The first tensor is named, with the largest difference of an element.
    """
    if slot.digest != check.digest:
        try:
            return _first(_tensors(slot, gradients), _tensors(check, gradients)) or _figures(slot, check)
        except CacheError as error:
            return f"the bytes differ, and cannot be looked at any more ({error})"
    return _figures(slot, check)


def _figures(slot: SlotRecord, check: SlotRecord) -> str:
    if slot.weight != check.weight:
        return f"the weight was {slot.weight!r} and then {check.weight!r} (None: the examples)"
    one, other = slot.loss, check.loss
    if one == other or (math.isnan(one) and math.isnan(other)):
        return ""
    return f"the loss was {one!r} and then {other!r}"


def _tensors(slot: SlotRecord, gradients: GradientStore) -> dict[str, Any]:
    """Every tensor of a slot under a name for people, and whatever else the slot keeps."""
    payload, buffers = gradients.get(slot)
    kind = "the gradient of" if slot.compression == "none" else "what is sent for"
    named: dict[str, Any] = {f"{kind} {name!r}": tensor for name, tensor in payload.items()}
    named |= {f"buffer {name!r}": tensor for name, tensor in buffers.items()}
    if slot.state is not None:
        kept = _leaves(gradients.get_state(slot.state), "")
        named |= {f"what the slot keeps as {path!r}": leaf for path, leaf in kept}
    return named


def _leaves(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    children: Any = None
    if isinstance(tree, Mapping):
        children = tree.items()
    elif isinstance(tree, (list, tuple)):
        children = enumerate(tree)
    if children is None:
        yield path, tree
        return
    for name, child in children:
        yield from _leaves(child, f"{path}.{name}" if path else str(name))


def _first(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
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


def _open_again(warm: WarmRun, slot: SlotRecord, check: SlotRecord) -> None:
    """Have the audit count the difference, and open every slot of the step."""
    ledger, step, plan = warm.ledger, warm.version, warm.context.plan()
    version = plan.version_for(step)
    other = replace(check, shard=slot.shard, digest="")
    ledger.finish_slot(step, other, version=version)  # a duplicate of other bytes
    for number, written in ledger.slots(step).items():
        ledger.drop_slot(step, number, nonce=written.nonce, token=warm.token)


def _told(warm: WarmRun, slot: SlotRecord, check: SlotRecord, what: str) -> str:
    where = "the same worker" if slot.worker == check.worker else f"worker {check.worker}"
    return (
        f"run {warm.run!r} is not pure: shard {slot.shard} of step {warm.version}, computed by worker "
        f"{slot.worker} and once more, in fresh copies of model and dataset, by {where}, did not come out "
        f'the same: {what}; {CAUSES}: take that out (see "Purity" in docs/recipes.md) and submit the run anew'
    )
