"""The training server's tasks: the chord callback, and the same thing without a chord."""

from __future__ import annotations

from typing import Any

from torchord.coordinator.messages.task_names import ADVANCE, APPLY_UPDATE
from torchord.tasks.receipt import Receipt
from torchord.tasks.registry import task


@task(APPLY_UPDATE)
def apply_update(receipts: list[Any], *, run: str, step: int) -> Receipt:
    """The callback of a step's chord: average, update, commit, launch the next step.

    Safe to run twice, early or late: it acts on the ledger's slots, not on `receipts`, and the
    commit is a compare-and-swap of the head under a fencing token.
    """
    from torchord.tasks.worker import process

    return Receipt(process().server.advance(run, step=step))


@task(ADVANCE)
def advance(*, run: str) -> Receipt:
    """Do whatever comes next in a run: initialise, apply, launch, finish.

    Safe to run twice: see `apply_update`.
    """
    from torchord.tasks.worker import process

    return Receipt(process().server.advance(run))
