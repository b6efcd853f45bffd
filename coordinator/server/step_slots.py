"""A training server's view of a step with a tree: which slots its update reads, and what to send for it."""

from __future__ import annotations

import logging

from torchord.cache.ledger.ledger import Ledger
from torchord.cache.ledger.records import SlotRecord
from torchord.coordinator.messages.sender import Sender
from torchord.coordinator.spec.sum_tree import FanIn

log = logging.getLogger(__name__)


def needed(tree: FanIn) -> set[int]:
    """The slots whose records an update reads: the roots, the checks, and what these are compared with."""
    return {*tree.roots, *tree.checks, *tree.checked}


def needed_slots(ledger: Ledger, step: int, tree: FanIn) -> dict[int, SlotRecord] | None:
    """The slots of a step that its update reads, None while any slot of the step is missing."""
    if not tree.partials:
        found = own(ledger, step, tree, ledger.slots(step))
        return found if len(found) >= tree.total else None
    wanted = needed(tree)
    found, present = ledger.some_slots(step, sorted(wanted))
    if present > tree.total:
        own(ledger, step, tree, ledger.slots(step))
    return found if present >= tree.total and len(found) == len(wanted) else None


def own(ledger: Ledger, step: int, tree: FanIn, found: dict[int, SlotRecord]) -> dict[int, SlotRecord]:
    """The slots that the step has; others, which nobody of ours writes, are deleted: no commit would pass."""
    if len(found) > tree.total or max(found, default=0) >= tree.total:
        for number in [number for number in found if number >= tree.total]:
            log.error("run %s: step %d has no slot %d: deleted", ledger.run, step, number)
            ledger.drop_slot(step, number, nonce=found.pop(number).nonce, token=None)
    return found


def send_missing(
    sender: Sender,
    run: str,
    step: int,
    tree: FanIn,
    present: set[int],
    *,
    version: int,
    callback_queue: str,
) -> None:
    """Publish what a step still needs: its chord, partial sums that can be made, or the update.

    Args:
        tree: the step's slots.
        present: those that are written.
        version: what the step is computed at.
        callback_queue: private queue of the training server that holds the run.

    Raises:
        CacheUnreachable: if the broker does not take it.
    """
    shards = [slot for slot in tree.gradients if slot not in present]
    ready = tree.ready(present)
    later = sum(slot not in present for slot in tree.partials) - len(ready)
    if shards:
        joining = {"joining": later} if later else {}
        sender.step(run, step, shards, version=version, callback_queue=callback_queue, **joining)
    for slot in ready:
        sender.partial_sum(run, step, slot, version=version)
    if not shards and not ready:
        sender.advance(run, queue=callback_queue)
