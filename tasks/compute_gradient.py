"""The Client's task: one shard's gradient."""

from __future__ import annotations

from typing import Any

from cache.errors import TorchordError
from coordinator.task_names import COMPUTE_GRADIENT
from tasks.celery_app import app


@app.task(bind=True, name=COMPUTE_GRADIENT, throws=(TorchordError,))
def compute_gradient(
    self: Any, *, run: str, step: int, shard: int, version: int, backup: bool = False
) -> dict[str, Any]:
    """Compute one shard's gradient and write its slot.

    Safe to run twice: the gradient is a function of (run, version, shard) alone, and the slot is
    written once; a duplicate, early or late delivery changes nothing but a counter.
    """
    from tasks.partial_sum import joined
    from tasks.worker import process

    return process().client.compute_gradient(
        run,
        step,
        shard,
        delivery=self.request.id,
        join=joined(self.request),
        backup=backup,
        version=version,
    )
