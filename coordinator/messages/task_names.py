"""Names of the Celery tasks and queues: all that the coordinator knows of the `tasks` package."""

from __future__ import annotations

COMPUTE_GRADIENT = "torchord.compute_gradient"
PARTIAL_SUM = "torchord.partial_sum"
APPLY_UPDATE = "torchord.apply_update"
ADVANCE = "torchord.advance"
EVALUATE = "torchord.evaluate"
PREDICT = "torchord.predict"

GRADIENTS = "gradients"
UPDATES = "updates"


def private_queue(node: str) -> str:
    """The queue of one training server's node: callbacks of the runs that it holds go there."""
    return f"{UPDATES}.{node}"


def worker_command(queue: str) -> str:
    """The command that starts a worker for a queue, for messages to people."""
    return f"celery -A torchord worker -Q {queue} -c 1"
