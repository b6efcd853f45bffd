"""A Celery application without torch, for tests of the cluster's processes."""

from __future__ import annotations

import os

from celery import Celery

app = Celery("stub", broker=os.environ.get("TORCHORD_URL"), backend=os.environ.get("TORCHORD_URL"))
app.conf.broker_connection_retry_on_startup = True


@app.task  # type: ignore[untyped-decorator, unused-ignore]
def add(left: int, right: int) -> int:
    return left + right
