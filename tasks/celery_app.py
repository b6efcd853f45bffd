"""The Celery app. Every setting that departs from Celery's default has its reason beside it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from celery import Celery
from kombu.utils.url import parse_url

from torchord.cache.errors import TorchordError
from torchord.cache.settings import Settings, from_environment
from torchord.coordinator.messages.broker import celery_url, declared, nameless_exchange, transport_options
from torchord.coordinator.messages.task_names import (
    ADVANCE,
    APPLY_UPDATE,
    COMPUTE_GRADIENT,
    EVALUATE,
    GRADIENTS,
    PARTIAL_SUM,
    PREDICT,
    QUEUES,
    UPDATES,
)
from torchord.tasks.flower_pages.start import show_runs
from torchord.tasks.transport import Connection


def _read() -> tuple[Settings, str]:
    """The settings, and the URL as Celery takes it.

    Raises:
        SystemExit: they cannot be used, and a `celery` command asks; it would print a traceback instead.
        TorchordError: they cannot be used, and somebody else asks.
    """
    try:
        found = from_environment()
        return found, celery_url(found.url)
    except TorchordError as error:
        if "celery" in Path(sys.argv[0]).parts[-2:]:  # bin/celery, or celery/__main__.py
            raise SystemExit(f"torchord: {error}") from None
        raise


settings, _URL = _read()


def _pool(arguments: Sequence[str]) -> str:
    """The pool of a worker whose command line names none: threads.

    Celery cannot tell `--pool prefork` from its own default, and would take this setting in its
    place; so the setting follows a command line that names prefork.
    """
    for place, word in enumerate(arguments):
        name, _, value = word.partition("=") if word.startswith("--") else (word[:2], "", word[2:])
        if name in ("-P", "--pool") and (value or "".join(arguments[place + 1 : place + 2])) == "prefork":
            return "prefork"
    return "threads"


ROUTES = {
    COMPUTE_GRADIENT: {"queue": GRADIENTS},
    PARTIAL_SUM: {"queue": GRADIENTS},
    EVALUATE: {"queue": GRADIENTS},
    PREDICT: {"queue": GRADIENTS},
    APPLY_UPDATE: {"queue": UPDATES},
    ADVANCE: {"queue": UPDATES},
}

MODULES = tuple(
    f"torchord.tasks.{name}"
    for name in ("compute_gradient", "partial_sum", "apply_update", "evaluate", "predict", "worker")
)
"""Where the tasks are, and what a worker keeps beside them."""

# Not the current app of a process that has one of its own; a worker makes the app that it serves current.
app = Celery("torchord", include=MODULES, set_as_current=False)

# Kombu's transport, with less to do for our queues.
app.amqp.Connection = Connection
# Where messages and results are on one plain server, a chord's parts are counted in one script. With its URL:
# `result_backend` would yield to a CELERY_RESULT_BACKEND of the shell, which is some other app's.
if _URL.startswith(("redis://", "rediss://")):
    app.backend_cls = f"torchord.tasks.backend:Backend+{_URL}"
elif _URL.startswith("redis+socket://"):
    app.backend_cls = f"torchord.tasks.backend:Backend+{_URL.removeprefix('redis+')}"

app.amqp.autoexchange = nameless_exchange

app.conf.update(
    broker_url=_URL,
    # What the URL says of TLS, for Flower's queue lengths, which do not read it there.
    broker_use_ssl=parse_url(_URL).get("ssl", False),
    # One server: the chord counts its parts where the messages are.
    result_backend=_URL,
    # JSON only, in and out: a worker that accepts pickle runs whatever reaches its queue.
    task_serializer="json",
    result_serializer="json",
    event_serializer="json",
    accept_content=["json"],
    result_accept_content=["json"],
    # -Q gradients and -Q updates split the roles; a worker without -Q takes both.
    task_queues=[declared(name) for name in QUEUES],
    task_default_queue=GRADIENTS,
    task_default_exchange="",
    task_default_exchange_type="direct",
    task_default_routing_key=GRADIENTS,
    task_routes=ROUTES,
    # threads -c 1: one process owns one device and answers pings while it computes; nothing is
    # forked, so CUDA and OpenMP may be initialised. prefork and solo work too (docs/workers.md).
    worker_pool=_pool(sys.argv[1:]),
    worker_concurrency=1,
    # Of a prefork pool Celery itself replaces the child, in KiB; `MemoryLimit` looks after the other pools.
    worker_max_memory_per_child=settings.memory_limit_bytes >> 10 or None,
    # With late acknowledgement, 1 reserves nothing beyond the running task: a slow worker
    # holds no work that an idle one could do.
    worker_prefetch_multiplier=1,
    # Must exceed the longest step, or the chord forgets its count and hangs (the supervisor
    # would still complete the step).
    result_expires=24 * 3600,
    result_chord_retry_interval=0.1,
    # The result backend survives a restart of Redis without losing what it was to store.
    result_backend_always_retry=True,
    result_backend_max_retries=60,
    # Wait for Redis at the start and after a loss, for as long as it takes.
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,
    # ... and notice within 2 s that it is back.
    worker_consumer="torchord.tasks.consumer:Consumer",
    # Also shortens the lease under which a chord's callback is claimed, from 21 s to 6 s.
    broker_connection_timeout=1,
    worker_cancel_long_running_tasks_on_connection_loss=False,
    broker_transport_options={
        # A path that forgets connections (NAT, a firewall, a rebooted router) closes none of them: what waits
        # for messages is asked every 3 s and found out within 7 s, what sends gives up after 4 s.
        "socket_keepalive": True,
        "socket_connect_timeout": 2,
        "socket_timeout": 4,
        "health_check_interval": 3,
        **transport_options(settings.url),
    },
    result_backend_transport_options=transport_options(settings.url),
    redis_socket_timeout=5,
    # NAT loses idle connections; keep them. (Celery cannot do without it on a unix socket.)
    redis_socket_keepalive=not _URL.startswith("redis+socket:"),
    # No remote rate limits are used; the bucket machinery costs a thread hand-over a task.
    worker_disable_rate_limits=True,
    # Workers need nothing from each other: the ledger and the heartbeats say it all. What a worker obeys of
    # what others tell it is in torchord.tasks.remote_control.
    worker_enable_remote_control=settings.remote_control is not None,
    timezone="UTC",
    enable_utc=True,
    # A child of a pool that starts by spawn imports torch before it says that it is up; Celery kills one
    # that takes 4 s, and its successor likewise, for as long as the machine is slow.
    worker_proc_alive_timeout=120,
    worker_redirect_stdouts=False,
    worker_hijack_root_logger=True,
)

show_runs(app, whole=True)
