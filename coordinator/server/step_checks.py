"""Shards that were computed twice, compared before their step counts.

A check is a slot with the gradient of a shard that has a slot of its own, computed once more by whoever
came, in fresh copies of model and dataset. Where the recipe is pure both have the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from torchord.cache.errors import CacheError, Impure
from torchord.cache.ledger.records import SlotRecord
from torchord.cache.stores.gradients import GradientStore
from torchord.coordinator.runtime.joining import CAUSES
from torchord.coordinator.server.differences import first_difference, tensors_of
from torchord.coordinator.server.jury import Jury, wrong_digest
from torchord.coordinator.server.warm_run import WarmRun


def compare(
    warm: WarmRun, present: Mapping[int, SlotRecord], gradients: GradientStore, jury: Jury
) -> list[tuple[int, str, bool]]:
    """Compare the checks of the present step with the shards that they are of.

    Args:
        present: the step's slots by number, at least those of `step_slots.needed`.
        gradients: where their bytes are, for an error that names the tensor.
        jury: decides who lied, where two workers differ.

    Returns:
        (shard, worker that computed it once more, whether it could be compared) of each check: two
        workers that the run's owner has admitted although they differ may give other bits.

    Raises:
        SlotRefused: one differs, and a third computation says whose is wrong. That worker is quarantined.
        Impure: one differs, and the recipe is at fault, or nobody can tell. The step's slots were opened
            again, for whoever resumes the run, and the difference is in the run's audit from now on.
    """
    tree = warm.context.plan().fan_in(warm.version)
    admitted = bool(tree.checked) and warm.ledger.head().skew == "admit"
    found = []
    for number in tree.checks:
        shard = tree.shard_of(number)
        slot, check = present[shard], present[number]
        comparable = slot.worker == check.worker or not admitted
        if comparable and (what := _unlike(slot, check, gradients)):
            why = jury.decide(warm, present, [slot, check])
            _open_again(warm, slot, check)
            raise Impure(_told(warm, slot, check, f"{what}; {why}" if why else what))
        found.append((shard, check.worker, comparable))
    return found


def _unlike(slot: SlotRecord, check: SlotRecord, gradients: GradientStore) -> str:
    """As `difference`; a digest that is not that of the bytes would hide one."""
    return wrong_digest(slot) or wrong_digest(check) or difference(slot, check, gradients)


def difference(slot: SlotRecord, check: SlotRecord, gradients: GradientStore) -> str:
    """In what two computations of one shard differ, in words; "" if in nothing.

    The first tensor is named, with the largest difference of an element.
    """
    if slot.digest != check.digest:
        try:
            return first_difference(tensors_of(slot, gradients), tensors_of(check, gradients)) or _figures(
                slot, check
            )
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
