"""What is taken and not acknowledged: kombu keeps its record of it for all queues but ours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import kombu
import pytest
import redis
from kombu import Queue

from torchord.coordinator.messages.broker import declared
from torchord.coordinator.messages.task_names import GRADIENTS, UPDATES, private_queue
from torchord.tasks.transport import Connection, SentinelTransport, Transport

OURS = [GRADIENTS, UPDATES, private_queue("server@host")]
THEIRS = ["celery", "gradients", "torchord.gradients.more"]


@pytest.fixture
def connection(redis_url: str) -> Iterator[kombu.Connection]:
    """To an empty database; closed, with what it held given back, when the test ends."""
    with Connection(redis_url) as made:
        yield made


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    """Looks at what is there."""
    made = redis.Redis.from_url(redis_url, decode_responses=True)
    yield made
    made.close()


def taken(connection: kombu.Connection, name: str, *, publish: bool = True) -> Any:
    """A message that was taken off a queue and is not acknowledged."""
    queue: Any = (declared(name) if name in OURS else Queue(name, routing_key=name))(connection)
    queue.declare()
    if publish:
        with connection.Producer() as producer:
            producer.publish({"number": 1}, routing_key=name, exchange=queue.exchange)
    message = queue.get(no_ack=False)
    assert message.payload == {"number": 1}
    return message


@pytest.mark.parametrize("name", [*OURS, *THEIRS])
def test_what_was_taken_is_recorded_for_queues_that_are_not_ours(
    name: str, connection: kombu.Connection, client: redis.Redis
) -> None:
    message = taken(connection, name)
    assert (client.llen(name), client.hlen("unacked")) == (0, int(name in THEIRS))
    message.ack()
    assert (client.llen(name), client.hlen("unacked"), client.zcard("unacked_index")) == (0, 0, 0)


@pytest.mark.parametrize("name", [GRADIENTS, "celery"])
def test_what_is_rejected_goes_or_comes_again(
    name: str, connection: kombu.Connection, client: redis.Redis
) -> None:
    message = taken(connection, name)
    assert "redelivered" not in message.delivery_info
    message.requeue()
    assert (client.llen(name), client.hlen("unacked")) == (1, 0)
    again = taken(connection, name, publish=False)
    assert again.delivery_info["redelivered"] is True
    again.reject()
    assert (client.llen(name), client.hlen("unacked")) == (0, 0)


@pytest.mark.parametrize("name", [GRADIENTS, "celery"])
def test_a_worker_that_stops_gives_back_what_it_holds(name: str, redis_url: str, client: redis.Redis) -> None:
    with Connection(redis_url) as connection:
        taken(connection, name)
        assert client.llen(name) == 0
    assert (client.llen(name), client.hlen("unacked")) == (1, 0)


def test_a_worker_that_serves_ours_alone_does_not_look_for_what_the_dead_held(
    connection: kombu.Connection, client: redis.Redis
) -> None:
    """One that serves another queue beside them does."""
    client.hset("unacked", "tag", "null")
    client.zadd("unacked_index", {"tag": 1.0})
    channel: Any = connection.default_channel
    channel._active_queues = [GRADIENTS]
    channel.qos.restore_visible()
    assert client.zcard("unacked_index") == 1
    channel._active_queues = [GRADIENTS, "celery"]
    client.hdel("unacked", "tag")
    channel.qos.restore_visible()
    assert client.zcard("unacked_index") == 0


@pytest.mark.parametrize(
    ("url", "transport"),
    [
        ("redis://h", Transport),
        ("rediss://h?ssl_cert_reqs=required", Transport),
        ("redis+socket:///run/r.sock", Transport),
        ("sentinel://h:1/0", SentinelTransport),
    ],
)
def test_every_url_of_a_redis_gets_it(url: str, transport: type) -> None:
    assert Connection(url).get_transport_cls() is transport
    assert Connection("memory://").get_transport_cls() is kombu.Connection("memory://").get_transport_cls()
