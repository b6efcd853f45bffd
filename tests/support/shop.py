"""Somebody's project: a Celery app with tasks of every kind, and torchord installed in it.

Tests copy this file into a directory of its own and start it there. It knows nothing of the tests.
"""

from __future__ import annotations

import os
from typing import Any

import redis
from celery import Celery
from celery.exceptions import Reject

import torchord

URL = os.environ["TORCHORD_URL"]
app = Celery("shop", broker=URL, backend=URL)
app.conf.update(
    broker_connection_retry_on_startup=True,
    result_expires=60,
    # So that a killed worker's tasks are redelivered within seconds.
    broker_transport_options={
        "visibility_timeout": 2,
        "unacked_restore_interval": 1,
        "unacked_restore_throttle": 1,
    },
)
torchord.install(app)
store = redis.Redis.from_url(URL, decode_responses=True)
PATIENCE_SECONDS = 60


def note(key: str, value: str) -> None:
    """Say something to the test."""
    store.rpush(f"shop:{key}", value)


@app.task
def add(x: int, y: int) -> int:
    return x + y


@app.task
def total(numbers: list[int]) -> int:
    return sum(numbers)


@app.task(bind=True, max_retries=5)
def third_time(self: Any) -> int:
    if self.request.retries < 2:
        raise self.retry(countdown=0.1)
    return int(self.request.retries)


@app.task(bind=True)
def replaced(self: Any, x: int) -> int:
    raise self.replace(add.s(x, 100))


@app.task
def fails(*_: Any) -> None:
    raise ValueError("on purpose")


@app.task
def heard(request: Any, error: Exception, _: Any, key: str) -> None:
    note(key, f"{type(error).__name__}: {error}")


@app.task(bind=True, acks_late=True)
def second_delivery(self: Any, key: str) -> bool:
    first = store.incr(f"shop:{key}:count") == 1
    note(key, "first" if first else "second")
    if first:
        raise Reject("not yet", requeue=True)
    return bool(self.request.delivery_info["redelivered"])


def _waits(key: str) -> str:
    note(key, "begun")
    found = store.blpop([f"shop:{key}:go"], timeout=PATIENCE_SECONDS)
    return "told" if found else "nobody came"


@app.task
def waits(key: str) -> str:
    return _waits(key)


@app.task(acks_late=True)
def waits_acks_late(key: str) -> str:
    return _waits(key)
