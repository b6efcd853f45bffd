"""What Celery is told of the broker: one spelling of its URL for people, and an app that publishes."""

from __future__ import annotations

from collections.abc import Container
from urllib.parse import urlsplit

from celery import Celery
from kombu import Exchange, Queue

from torchord.cache.errors import InvalidInput
from torchord.cache.servers import address
from torchord.cache.servers.address import Address
from torchord.cache.servers.redis_client import connect
from torchord.coordinator.messages.task_names import QUEUES, UPDATES, short_name


def celery_url(url: str) -> str:
    """A URL in the form that both Celery and kombu accept; see `torchord.cache.servers.address.celery_url`.

    Args:
        url: of one server, or of sentinels, which also need `transport_options`.

    Raises:
        CacheUnreachable: the URL cannot be read. Whether a server answers is not tried.

    Example:
        >>> celery_url("unix:///run/redis.sock?db=2")
        'redis+socket:///run/redis.sock?virtual_host=2'
    """
    connect(url).close()
    return address.celery_url(url)


def transport_options(url: str) -> dict[str, object]:
    """What Celery's broker and result backend need to know beside the URL: its timeouts, Sentinel's service.

    Args:
        url: as for `celery_url`, which has accepted it.
    """
    found = Address.parse(url)
    options: dict[str, object] = dict(found.timeouts)
    if not found.sentinels:
        return options
    options["master_name"] = found.service
    if found.password is not None:
        options["sentinel_kwargs"] = {}  # the password is the primary's; sentinels without one refuse it
    return options


def nameless_exchange(name: str) -> Exchange:
    """The exchange of a queue that is not configured: the nameless one, which delivers by queue name.

    Celery's default is a named exchange per queue, and each leaves a `_kombu.binding.*` key without
    TTL in Redis; the training servers' private queues would pile up there.
    """
    return Exchange("", type="direct")


def declared(name: str, *, taken: Container[str] = ()) -> Queue:
    """One of our queues; Celery takes its short name for it, too (`-Q gradients`).

    Args:
        taken: names that mean other queues in the app.
    """
    short = short_name(name)
    alias = short if name in QUEUES and short not in taken else None
    return Queue(name, nameless_exchange(name), routing_key=name, alias=alias)


def add(app: Celery, name: str) -> Queue:
    """Have an app know one of our queues, and those of its workers serve it that are not told what to serve.

    A worker that runs serves it once its consumer is told.
    """
    queues = app.amqp.queues
    queue: Queue = queues.select_add(declared(name, taken=queues))
    queue.exchange = nameless_exchange(name)  # Celery has put the exchange of the app's default queue there
    return queue


def publisher(url: str, options: dict[str, object]) -> Celery:
    """A Celery app that only publishes: it is nobody's current app and registers no task."""
    app = Celery("torchord-master", broker=url, set_as_current=False)
    app.conf.update(
        task_serializer="json",
        accept_content=["json"],
        # Nobody has results; but where they are is where the queue is, in which each run has its turn.
        result_backend=url,
        redis_socket_connect_timeout=2,
        redis_socket_timeout=10,
        task_ignore_result=True,
        broker_connection_timeout=2,
        broker_transport_options={
            "socket_connect_timeout": 2,
            "socket_timeout": 10,
            "max_retries": 3,
            **options,
        },
        task_queues=[declared(name) for name in QUEUES],
        task_default_queue=UPDATES,
        task_default_exchange="",  # else the nameless ones above take the name of the default queue
        task_default_routing_key=UPDATES,
    )
    app.amqp.autoexchange = nameless_exchange
    return app


def same_server(one: str, other: str) -> bool:
    """Whether two broker URLs, in Celery's spelling, name one server (or sentinels) and one database.

    Users, passwords and options do not count.

    Example:
        >>> same_server("redis://localhost", "redis://:secret@localhost:6379/0")
        True
    """
    return _servers(one) == _servers(other)


def _servers(url: str) -> set[tuple[object, ...]]:
    """What a URL names: (host, port, path, database) of each server; if that is none for us, the URL."""
    found: set[tuple[object, ...]] = set()
    for text in url.split(";"):
        parts = urlsplit(text)
        if parts.scheme == "sentinel":
            found.add((parts.hostname, parts.port or 26379, "sentinel", parts.path.strip("/") or "0"))
            continue
        try:
            place = Address.parse(text)
        except InvalidInput:
            return {(url,)}
        found.add((place.host, place.port, place.path, place.db))
    return found
