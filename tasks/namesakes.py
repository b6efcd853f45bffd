"""Warns of a second worker of one name on this host: Celery lets both run, and each gets the other's mail."""

from __future__ import annotations

import logging

from torchord.cache.errors import CacheError
from torchord.cache.ledger.workers import Registry, WorkerInfo

log = logging.getLogger(__name__)


def warn_of_namesakes(registry: Registry, ours: WorkerInfo) -> None:
    """Log one line if another living process says that it is the same node.

    Args:
        ours: what this process is about to say of itself; of a pool, its parent.
    """
    try:
        others = registry.alive().values()
    except CacheError:  # whoever waits for the server says so
        return
    for other in others:
        same = (other.node, other.host) == (ours.node, ours.host) and other.pid != ours.pid
        if same and not other.ended:
            log.warning(
                "process %d is a worker named %s, too, so each takes messages and commands that are meant "
                "for the other; give each a name of its own, such as -n client2@%%h",
                other.pid,
                ours.node,
            )
            return
