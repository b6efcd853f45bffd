"""The Client's other task of a step: one partial sum, where a step has more shards than its fan-in."""

from __future__ import annotations

from typing import Any

from torchord.coordinator.messages.task_names import PARTIAL_SUM
from torchord.tasks.receipt import Receipt
from torchord.tasks.registry import task


@task(PARTIAL_SUM, bind=True)
def partial_sum(self: Any, *, run: str, step: int, slot: int, version: int, backup: bool = False) -> Receipt:
    """Add up the inputs of one slot of the step's tree and write the slot.

    Safe to run twice: the sum is a function of (run, step, slot) alone, in an order fixed by slot
    numbers, and the slot is written once. It waits for nothing: it is sent when its inputs are there,
    and ends at once if one is missing.
    """
    from torchord.coordinator.client.slot_lease import SlotTask
    from torchord.tasks.worker import process

    asked = SlotTask(run, step, slot, version, self.request.id, joined(self.request), backup)
    return Receipt(process().client.sums.partial_sum(asked))


def joined(request: Any) -> tuple[str, dict[str, Any]] | None:
    """The chord that a task belongs to, as (group id, callback), None if it belongs to none."""
    return None if request.chord is None else (request.group, dict(request.chord))
