"""Whose turn a check is: whoever computed the shard leaves the check to others, for a short while.

What is wrong with one worker alone shows in another only: bad memory, or what its process keeps where fresh
copies of model and dataset do not reach. With nobody else there it computes the check itself.
"""

from __future__ import annotations

import time

from torchord.coordinator.client.slot_lease import SlotLease, SlotTask
from torchord.coordinator.messages.task_names import GRADIENTS
from torchord.coordinator.runtime.context import RunContext

PASSES = 4
"""How often a check is left to others before it is computed all the same."""

_PAUSE_SECONDS = 0.02  # at most, and at most this part of the shard:
_PAUSE_SHARE = 1 / PASSES
_KEPT = 64


class CheckTurns:
    """Leaves checks to others, for one worker process.

    Args:
        lease: hands a slot back, and knows who this process is.
    """

    def __init__(self, lease: SlotLease) -> None:
        self._lease = lease
        self._passed: dict[tuple[str, int, int], int] = {}

    def left(self, context: RunContext, task: SlotTask, shard: int) -> bool:
        """Whether a check went back into the queue, for another worker to take.

        Args:
            task: the check, whose lease this process has.
            shard: that is to be computed once more.
        """
        key, worker = (task.run, task.step, task.slot), self._lease.worker
        passed = self._passed.pop(key, 0)
        found, _ = context.ledger.some_slots(task.step, [shard])
        if passed >= PASSES or shard not in found or found[shard].worker != worker:
            return False
        others = (info for id, info in context.services.registry.alive().items() if id != worker)
        if not any(
            GRADIENTS in info.queues and info.environment and context.run not in info.refuses
            for info in others
        ):
            return False
        while len(self._passed) >= _KEPT:
            del self._passed[next(iter(self._passed))]
        self._passed[key] = passed + 1
        self._lease.end(task)
        self._lease.sender.gradient(task.run, task.step, task.slot, version=task.version)
        time.sleep(min(_PAUSE_SECONDS, found[shard].seconds * _PAUSE_SHARE))  # whoever is idle takes it
        return True
