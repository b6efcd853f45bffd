"""Celery's consumer, less reluctant to come back after the broker was away."""

from __future__ import annotations

from functools import partial
from typing import Any

from celery.worker.consumer import Consumer as CeleryConsumer

_RETRY = {"interval_start": 0.5, "interval_step": 0.5, "interval_max": 2.0}  # seconds


class Consumer(CeleryConsumer):
    """Asks a broker that is away every 2 s at most.

    Celery waits 2, 4, 6, ... up to 30 s between its tries and has no setting for it: after a minute
    without Redis a worker would come back up to 16 s late.
    """

    def ensure_connected(self, conn: Any) -> Any:
        """See `celery.worker.consumer.Consumer.ensure_connected`."""
        conn.ensure_connection = partial(conn.ensure_connection, **_RETRY)
        try:
            return super().ensure_connected(conn)
        finally:
            del conn.ensure_connection
