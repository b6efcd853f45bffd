"""A node that stops gives what its pool's processes hold to other workers at once."""

from __future__ import annotations

import logging

from torchord.cache.errors import RunNotFound
from torchord.coordinator.runtime.services import Services

log = logging.getLogger(__name__)


def hand_back(services: Services, node: str) -> None:
    """End every lease that processes of a Celery node hold; the supervisor sends those shards again.

    Their computation goes on until they end; whoever is first writes the slot.

    Raises:
        CacheError: Redis is away.
    """
    registry = services.registry
    ours = {info.id for info in registry.alive().values() if info.node == node}
    for run in registry.active_runs():
        ledger = services.ledger(run)
        try:
            head = ledger.head()
        except RunNotFound:
            continue
        for step in range(head.version, max(head.version, head.launched or 0) + 1):
            for lease in ledger.leases(step).values():
                if lease.open and lease.worker in ours:
                    log.info(
                        "run %s: slot %d of step %d is handed back: this worker stops", run, lease.shard, step
                    )
                    ledger.end_lease(step, lease.shard, worker=lease.worker, delivery=lease.delivery)
