"""The Client's task: one shard's gradient, or a seat in a round of several steps."""

from __future__ import annotations

from typing import Any

from torchord.cache.servers.fast_client import Command
from torchord.coordinator.messages.task_names import COMPUTE_GRADIENT
from torchord.tasks.backend import Backend, counted
from torchord.tasks.receipt import Receipt
from torchord.tasks.registry import task


@task(COMPUTE_GRADIENT, bind=True)
def compute_gradient(
    self: Any, *, run: str, step: int, shard: int, version: int, backup: bool = False, steps: int = 1
) -> Receipt:
    """Compute one shard's gradient and write its slot.

    Safe to run twice: the gradient is a function of (run, version, shard) alone, and the slot is
    written once; a duplicate, early or late delivery changes nothing but a counter.

    Args:
        steps: how many steps from this one on the Clients take by themselves; `shard` is then the number of
            a seat in that round, and the slots say who computes what.
    """
    from torchord.coordinator.client.round_task import SeatTask
    from torchord.coordinator.client.slot_lease import SlotTask
    from torchord.tasks.partial_sum import joined
    from torchord.tasks.worker import process

    if steps > 1:
        return Receipt(process().client.rounds.take_seat(SeatTask(run, step, steps, shard)))
    asked = SlotTask(run, step, shard, version, self.request.id, joined(self.request), backup)
    return Receipt(process().client.shards.compute_gradient(asked, part=_Part(self)))


class _Part:
    """Counts the running task in its chord together with the write of its slot.

    Where that worked, the request forgets its chord, and Celery, which counts after the task has
    returned, has nothing left to do.
    """

    def __init__(self, task: Any) -> None:
        self._task = task

    def command(self, receipt: dict[str, Any]) -> Command | None:
        backend = self._task.backend
        return backend.part(self._task.request, receipt) if isinstance(backend, Backend) else None

    def answered(self, answer: Any) -> None:
        if counted(answer):
            self._task.request.chord = None
