"""Celery's consumer: comes back sooner after the broker was away, and obeys few remote commands."""

from __future__ import annotations

from functools import partial
from typing import Any

from celery.worker.consumer import Consumer as CeleryConsumer

from torchord.cache.errors import InvalidInput
from torchord.cache.settings import from_environment
from torchord.tasks.remote_control import restrict

_RETRY = {"interval_start": 0.5, "interval_step": 0.5, "interval_max": 2.0}  # seconds


class Consumer(CeleryConsumer):
    """Asks a broker that is away every 2 s at most, and obeys the remote commands that it is to obey.

    Celery waits 2, 4, 6, ... up to 30 s between its tries and has no setting for it: after a minute
    without Redis a worker would come back up to 16 s late.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        try:
            restrict(self, from_environment().remote_control or frozenset())
        except InvalidInput as error:
            raise SystemExit(f"torchord: {error}") from None

    def ensure_connected(self, conn: Any) -> Any:
        """See `celery.worker.consumer.Consumer.ensure_connected`."""
        conn.ensure_connection = partial(conn.ensure_connection, **_RETRY)
        try:
            return super().ensure_connected(conn)
        finally:
            del conn.ensure_connection
