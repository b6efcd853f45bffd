"""What a training server reads of a complete step: the roots of its tree, and what they say of its shards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from cache.ledger import Ledger
from cache.records import SlotReceipt, SlotRecord
from coordinator.fan_in import FanIn

PARTIAL_SUMS = "partial_sums"
"""In the notes of a ledger entry: [number, digest, worker, attempt] of each partial sum, in order."""


def roots_of(ledger: Ledger, step: int, tree: FanIn) -> dict[int, SlotRecord] | None:
    """The root slots of a step by number, None while any slot of the step is missing."""
    if not tree.partials:
        found = ledger.slots(step)
        return found if len(found) >= tree.total else None
    found, present = ledger.some_slots(step, tree.roots)
    return found if present >= tree.total and len(found) == len(tree.roots) else None


def receipts_of(roots: Sequence[SlotRecord]) -> tuple[list[SlotReceipt], list[list[Any]]]:
    """(what the ledger keeps of each shard, what it notes of each partial sum), each in order."""
    shards: list[SlotReceipt] = []
    sums: list[SlotReceipt] = []
    for root in roots:
        if root.total is None:
            shards.append(root.receipt())
        else:
            shards += root.total.receipts
            sums += [*root.total.sums, root.receipt()]
    sums.sort(key=lambda receipt: receipt.shard)
    return shards, [[each.shard, each.digest, each.worker, each.attempt] for each in sums]


def loss_of(roots: Sequence[SlotRecord]) -> float:
    """The count-weighted mean loss of a step, summed in shard order."""
    shards = [part for root in roots for part in (root.total.receipts if root.total else (root,))]
    return sum(shard.loss * shard.examples for shard in shards) / sum(shard.examples for shard in shards)


def nonfinite(roots: Sequence[SlotRecord]) -> list[int]:
    """The shards whose loss or gradient was NaN or infinite."""
    found: list[int] = []
    for root in roots:
        if root.total is not None:
            found += root.total.nonfinite
        elif not (math.isfinite(root.loss) and math.isfinite(root.grad_norm)):
            found.append(root.shard)
    return found
