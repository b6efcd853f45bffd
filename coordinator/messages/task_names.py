"""Names of the Celery tasks and queues: all that the coordinator knows of the `tasks` package."""

from __future__ import annotations

COMPUTE_GRADIENT = "torchord.compute_gradient"
PARTIAL_SUM = "torchord.partial_sum"
APPLY_UPDATE = "torchord.apply_update"
ADVANCE = "torchord.advance"
EVALUATE = "torchord.evaluate"
PREDICT = "torchord.predict"
OUR_TASKS = frozenset({COMPUTE_GRADIENT, PARTIAL_SUM, APPLY_UPDATE, ADVANCE, EVALUATE, PREDICT})

GRADIENTS = "torchord.gradients"
UPDATES = "torchord.updates"
QUEUES = (GRADIENTS, UPDATES)
"""Names that nobody chooses by chance: who serves such a queue without our tasks discards our messages."""


def private_queue(node: str) -> str:
    """The queue of one training server's node: callbacks of the runs that it holds go there."""
    return f"{UPDATES}.{node}"


def is_ours(queue: str) -> bool:
    """Whether a queue is one of ours, private ones included."""
    return queue in QUEUES or queue.startswith(f"{UPDATES}.")


def short_name(queue: str) -> str:
    """What `-Q` also takes for one of our queues: "gradients" for "torchord.gradients"."""
    return queue.removeprefix("torchord.")


def worker_command(queue: str) -> str:
    """The command that starts a worker for a queue, for messages to people."""
    return f"celery -A torchord worker -Q {short_name(queue)} -c 1"
