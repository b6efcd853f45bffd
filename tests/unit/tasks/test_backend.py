"""A chord that our backend counts is the chord that Celery's own backend counts."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from celery import Celery, states
from celery.backends.redis import RedisBackend

from torchord.cache.servers.fast_client import Lane
from torchord.coordinator.messages import task_names
from torchord.coordinator.messages.broker import nameless_exchange
from torchord.coordinator.messages.sender import Sender
from torchord.tasks.backend import Backend

RUN = "a-run"
QUEUE = "torchord.updates.server@host"


@pytest.fixture
def app(redis_url: str) -> Celery:
    made = Celery("test", broker=redis_url, set_as_current=False)
    made.conf.update(task_ignore_result=True, result_expires=3600, result_backend=redis_url)
    made.backend_cls = f"torchord.tasks.backend:Backend+{redis_url}"
    made.amqp.autoexchange = nameless_exchange
    made.backend.lane = Lane(redis_url)
    return made


@pytest.fixture
def client(redis_url: str) -> Iterator[Any]:
    made = redis.Redis.from_url(redis_url, decode_responses=True)
    yield made
    made.delete(task_names.GRADIENTS, QUEUE)  # a broker's queue has no TTL
    made.close()


def launched(app: Celery, client: Any, step: int, shards: int = 3) -> list[Any]:
    """Publish a step and return its header tasks' requests, in shard order."""
    Sender(app).step(RUN, step, range(shards), callback_queue=QUEUE)
    found = []
    for text in reversed(client.lrange(task_names.GRADIENTS, 0, -1)):
        message = json.loads(text)
        headers, (_, _, embed) = message["headers"], json.loads(base64.b64decode(message["body"]))
        names = ("id", "group", "group_index", "root_id")
        found.append(SimpleNamespace(**{n: headers[n] for n in names}, chord=embed["chord"], priority=0))
    client.delete(task_names.GRADIENTS)
    return found


def celerys(app: Celery, request: Any, state: str, result: Any) -> None:
    RedisBackend.on_chord_part_return(app.backend, request, state, result)


def ours(app: Celery, request: Any, state: str, result: Any) -> None:
    app.backend.on_chord_part_return(request, state, result)


def callbacks(client: Any) -> list[dict[str, Any]]:
    """What lies in the callback's queue, oldest first, bodies decoded as kombu does it."""
    found = []
    for text in reversed(client.lrange(QUEUE, 0, -1)):
        message = json.loads(text)
        body = message.pop("body")
        if message["properties"].pop("body_encoding") == "base64":
            body = base64.b64decode(body).decode()
        found.append({**message, "body": json.loads(body)})
    client.delete(QUEUE)
    return found


def receipt(shard: int) -> dict[str, Any]:
    return {"shard": shard, "loss": 0.25, "worker": 'w"\\é/0', "nothing": None, "list": [], "map": {}}


def test_the_callback_is_the_one_that_celery_publishes(app: Celery, client: Any) -> None:
    made = []
    for count in (celerys, ours):
        for request in launched(app, client, 7):
            assert not callbacks(client)
            count(app, request, states.SUCCESS, receipt(request.group_index))
        [message] = callbacks(client)
        headers = message["headers"]
        assert headers["id"] == request.chord["options"]["task_id"] == message["properties"]["correlation_id"]
        for own in ("id", "root_id", "parent_id"):  # Celery takes the latter two from the running task
            headers.pop(own)
        for own in ("correlation_id", "delivery_tag", "reply_to"):
            assert message["properties"].pop(own)
        made.append(message)
    theirs, mine = made
    assert mine["body"] == theirs["body"]
    assert mine["body"][:2] == [[[receipt(0), receipt(1), receipt(2)]], {"run": RUN, "step": 7}]
    assert mine["headers"] == theirs["headers"]
    assert mine["properties"] == theirs["properties"]
    assert mine == theirs


@pytest.mark.parametrize("by", [(celerys, ours), (ours, celerys), (ours, ours)])
def test_celerys_way_and_ours_take_turns(app: Celery, client: Any, by: tuple[Any, Any]) -> None:
    first, second = launched(app, client, 1, shards=2)
    by[0](app, second, states.SUCCESS, receipt(1))
    by[0](app, second, states.SUCCESS, {"another": "outcome of a task that ran twice"})
    assert not callbacks(client)
    by[1](app, first, states.SUCCESS, receipt(0))
    [message] = callbacks(client)
    assert message["body"][0] == [[receipt(0), receipt(1)]]
    for count in (celerys, ours):
        for request in (first, second):  # late copies
            count(app, request, states.SUCCESS, receipt(9))
    assert not callbacks(client)


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the parts that Celery's own way was given to count; it does nothing else."""
    given: list[int] = []
    monkeypatch.setattr(
        RedisBackend,
        "on_chord_part_return",
        lambda self, request, *_, **__: given.append(request.group_index),
    )
    return given


def test_what_the_short_way_has_counted_celery_does_not_count_too(
    app: Celery, client: Any, theirs: list[int]
) -> None:
    """It would take five round trips to find that out."""
    first, second = launched(app, client, 1, shards=2)
    for request in (first, first, second, second):  # counted, counted before, called, called before
        ours(app, request, states.SUCCESS, receipt(request.group_index))
    assert theirs == []
    assert len(callbacks(client)) == 1


def test_a_chord_that_somebody_else_joins_is_left_to_celery(
    app: Celery, client: Any, theirs: list[int]
) -> None:
    """Celery knows whether who claimed it is still at it."""
    first, second = launched(app, client, 1, shards=2)
    ours(app, first, states.SUCCESS, receipt(0))
    client.set(app.backend.get_key_for_group(first.group, ".c"), "a token", ex=60)
    ours(app, second, states.SUCCESS, receipt(1))
    assert theirs == [1]
    assert callbacks(client) == []


def test_a_chord_leaves_a_mark_and_nothing_else(app: Celery, client: Any) -> None:
    for request in launched(app, client, 3):
        ours(app, request, states.SUCCESS, receipt(0))
        left = set(client.scan_iter("celery-taskset-meta-*"))
        assert all(0 < client.ttl(key) <= 3600 for key in left)
    [mark] = left
    assert client.get(mark) == "done"


@pytest.mark.filterwarnings("ignore:Call to deprecated setex")  # Celery's own
def test_a_header_that_failed_is_celerys_business(app: Celery, client: Any) -> None:
    first, second = launched(app, client, 5, shards=2)
    app.backend.on_chord_part_return(first, states.FAILURE, ValueError("no"))
    ours(app, second, states.SUCCESS, receipt(1))
    assert not callbacks(client), "a chord with a failed header does not call its body"


def test_without_the_short_way_celery_counts(app: Celery, client: Any) -> None:
    app.backend.lane = Lane("redis://127.0.0.1:1/0")
    for request in launched(app, client, 2):
        ours(app, request, states.SUCCESS, receipt(request.group_index))
    [message] = callbacks(client)
    assert message["body"][0] == [[receipt(0), receipt(1), receipt(2)]]


def test_what_is_no_chord_of_ours_is_left_alone(app: Celery) -> None:
    backend = app.backend
    assert isinstance(backend, Backend)
    other = {"task": "somebody.elses", "kwargs": {}, "options": {"queue": "q", "task_id": "t"}}
    for chord in (None, other):
        request = SimpleNamespace(id="i", group="g", group_index=0, root_id="r", chord=chord)
        assert backend.part(request, {}) is None


def test_a_part_that_cannot_be_counted_ends_its_task_all_the_same(
    app: Celery, client: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Else Celery would not acknowledge the message, and the worker would take no other one."""

    def refused(*_: Any, **__: Any) -> None:
        raise redis.exceptions.OutOfMemoryError("command not allowed when used memory > 'maxmemory'")

    monkeypatch.setattr(RedisBackend, "on_chord_part_return", refused)
    (request,) = launched(app, client, 1, shards=1)
    request.task = task_names.COMPUTE_GRADIENT
    app.backend.on_chord_part_return(request, states.FAILURE, ValueError("no"))
    assert "a part of a chord of torchord.compute_gradient was not counted: command not" in caplog.text
    request.task = "shop.add"
    with pytest.raises(redis.exceptions.OutOfMemoryError):
        app.backend.on_chord_part_return(request, states.FAILURE, ValueError("no"))
