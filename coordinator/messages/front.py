"""Tasks that go to the front of their queue: what others wait for is done before what was queued earlier.

Celery has no such option. On one plain Redis, a message that Celery made for another transport is put
where the workers take from; elsewhere the task goes to the back like any other, and is only done later.
"""

from __future__ import annotations

import json
import threading
from typing import Any, cast

from celery import Celery
from kombu import Connection
from kombu.transport import memory


class _Channel(memory.Channel):
    queues: dict[str, Any] = {}  # noqa: RUF012  as in its base class; not those of other memory transports in this process


class _Transport(memory.Transport):
    Channel = _Channel


_recording = threading.Lock()


def recorded(app: Celery, task: str, *, queue: str, **options: Any) -> bytes:
    """The message that Celery would send for a task, as it lies in a Redis list.

    Args:
        options: as for `Celery.send_task`.
    """
    with _recording, Connection(transport=_Transport) as connection:
        app.send_task(task, queue=queue, producer=connection.Producer(), add_to_parent=False, **options)
        return json.dumps(connection.default_channel._get(queue)).encode()


def push_front(app: Celery, task: str, *, queue: str, **options: Any) -> None:
    """Publish a task so that the next free worker takes it; for apps whose result backend is the broker.

    Args:
        options: as for `Celery.send_task`.
    """
    message = recorded(app, task, queue=queue, **options)
    cast(Any, app.backend).client.rpush(queue, message)
