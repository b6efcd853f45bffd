"""A rendered step is the chord that Celery itself would publish, but for its ids."""

from __future__ import annotations

import base64
import json
import re
from typing import Any

import pytest
import redis
from celery import Celery

from torchord.coordinator.messages import task_names
from torchord.coordinator.messages.broker import nameless_exchange
from torchord.coordinator.messages.sender import Sender
from torchord.coordinator.messages.templates import StepTemplate

UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
RUN = "a-run"
QUEUE = "torchord.updates.server@host"


@pytest.fixture
def app(redis_url: str) -> Celery:
    made = Celery("test", broker=redis_url, backend=redis_url, set_as_current=False)
    made.conf.update(task_ignore_result=True, result_expires=3600)
    made.amqp.autoexchange = nameless_exchange
    return made


def messages(url: str) -> list[dict[str, Any]]:
    """The messages in the gradients queue, oldest first, bodies decoded."""
    client = redis.Redis.from_url(url)
    found = []
    for text in reversed(client.lrange(task_names.GRADIENTS, 0, -1)):
        message = json.loads(text)
        message["body"] = json.loads(base64.b64decode(message["body"]))
        found.append(message)
    client.delete(task_names.GRADIENTS)
    return found


def roles(message: dict[str, Any]) -> tuple[str, str, str]:
    """Task id, group id and callback id, wherever they have to be."""
    headers, embed = message["headers"], message["body"][2]
    return headers["id"], headers["group"], embed["chord"]["options"]["task_id"]


def anonymous(message: dict[str, Any]) -> Any:
    """The message with each id replaced by the role it plays."""
    task, group, callback = roles(message)
    text = json.dumps(message, sort_keys=True)
    for role, value in (("TASK", task), ("GROUP", group), ("CALLBACK", callback)):
        text = text.replace(value, role)
    return json.loads(UUID.sub("OTHER", text))


def test_each_message_is_the_one_that_celerys_canvas_publishes(app: Celery, redis_url: str) -> None:
    sender = Sender(app)
    sender._canvas_step(RUN, 12, 11, [0, 2, 3], QUEUE)
    theirs = messages(redis_url)
    sender.step(RUN, 12, [0, 2, 3], version=11, callback_queue=QUEUE)
    ours = messages(redis_url)
    assert len(ours) == len(theirs) == 3
    for mine, canvas in zip(ours, theirs, strict=True):
        left, right = anonymous(mine), anonymous(canvas)
        for envelope in (left, right):  # who published it first, which Celery takes from the running task
            envelope["headers"].pop("root_id")
            envelope["body"][2]["chord"]["options"].pop("root_id", None)
            envelope["body"][2]["chord"]["options"].pop("reply_to", None)
        assert left["headers"] == right["headers"]
        assert left["properties"] == right["properties"]
        assert left["body"][:2] == right["body"][:2]
        ours_chord, theirs_chord = left["body"][2].pop("chord"), right["body"][2].pop("chord")
        assert left["body"][2] == right["body"][2]
        assert ours_chord["task"] == theirs_chord["task"] == task_names.APPLY_UPDATE
        assert ours_chord["kwargs"] == theirs_chord["kwargs"] == {"run": RUN, "step": 12}
        assert ours_chord["options"]["queue"] == theirs_chord["options"]["queue"] == QUEUE
        assert ours_chord["options"]["ignore_result"] is theirs_chord["options"]["ignore_result"] is True


def test_a_step_has_one_group_one_callback_and_distinct_tasks(app: Celery, redis_url: str) -> None:
    Sender(app).step(RUN, 3, range(5), callback_queue=QUEUE)
    found = messages(redis_url)
    tasks, groups, callbacks = zip(*map(roles, found), strict=True)
    tags = {message["properties"]["delivery_tag"] for message in found}
    assert (len(set(tasks)), len(set(groups)), len(set(callbacks)), len(tags)) == (5, 1, 1, 5)
    assert [message["headers"]["group_index"] for message in found] == list(range(5))
    assert [message["body"][1]["shard"] for message in found] == list(range(5))


def test_two_steps_share_no_id(app: Celery) -> None:
    template = StepTemplate(
        app,
        task=task_names.COMPUTE_GRADIENT,
        kwargs={"run": RUN},
        queue=task_names.GRADIENTS,
        body=task_names.APPLY_UPDATE,
        body_kwargs={"run": RUN},
        body_queue=QUEUE,
    )
    first, second = template.render(1, 1, [0, 1])[1], template.render(2, 1, [0, 1])[1]
    ids = [
        set(UUID.findall(base64.b64decode(json.loads(m)["body"]).decode() + m.decode()))
        for m in first + second
    ]
    assert not (ids[0] | ids[1]) & (ids[2] | ids[3]) - {json.loads(first[0])["properties"]["reply_to"]}


def test_the_chords_size_is_known_before_its_messages_and_expires(app: Celery, redis_url: str) -> None:
    Sender(app).step(RUN, 0, [0, 1, 2], callback_queue=QUEUE)
    client = redis.Redis.from_url(redis_url, decode_responses=True)
    sizes = list(client.scan_iter("celery-taskset-meta-*.s"))
    assert [client.get(key) for key in sizes] == ["3"]
    assert 0 < client.ttl(sizes[0]) <= 3600
    client.delete(task_names.GRADIENTS)


@pytest.mark.parametrize("name", ["7", "shard", "100000000000000001", "@body@"])
def test_a_runs_name_is_never_mistaken_for_a_placeholder(app: Celery, redis_url: str, name: str) -> None:
    Sender(app).step(name, 7, [1], callback_queue=QUEUE)
    [message] = messages(redis_url)
    assert message["body"][1] == {"run": name, "step": 7, "version": 7, "shard": 1}


def test_other_brokers_get_the_chord_from_celerys_canvas(redis_url: str) -> None:
    app = Celery("test", broker=redis_url, backend="cache+memory://", set_as_current=False)
    app.conf.update(task_ignore_result=True)
    app.amqp.autoexchange = nameless_exchange
    Sender(app).step(RUN, 1, [0, 1], callback_queue=QUEUE)
    assert [message["body"][1]["shard"] for message in messages(redis_url)] == [0, 1]


@pytest.mark.parametrize("one_server", [True, False], ids=["template", "canvas"])
def test_the_chord_of_a_step_counts_its_partial_sums(app: Celery, redis_url: str, one_server: bool) -> None:
    sender = Sender(app)
    sender._one_server = one_server
    sender.step(RUN, 12, [0, 1, 2], version=12, callback_queue=QUEUE, joining=2)
    header = messages(redis_url)
    _, group, callback = roles(header[0])
    client = redis.Redis.from_url(redis_url, decode_responses=True)
    assert client.get(f"celery-taskset-meta-{group}.s") == "5"
    client.close()
    sender.partial_sum(RUN, 12, 3, version=12, join=(group, header[0]["body"][2]["chord"]))
    [message] = messages(redis_url)
    assert message["headers"]["task"] == task_names.PARTIAL_SUM
    assert roles(message) == (message["headers"]["id"], group, callback)
    assert message["headers"]["group_index"] == 3, "an index that no header of the chord has"
    assert message["body"][1] == {"run": RUN, "step": 12, "slot": 3, "version": 12, "backup": False}
    assert message["headers"]["ignore_result"]


def test_a_partial_sum_goes_before_the_gradients_that_wait(app: Celery, redis_url: str) -> None:
    sender = Sender(app)
    sender.gradient(RUN, 12, 0)
    sender.gradient(RUN, 12, 1)
    sender.partial_sum(RUN, 12, 3, version=12)
    found = messages(redis_url)
    assert [message["headers"]["task"] for message in found] == [
        task_names.PARTIAL_SUM,
        task_names.COMPUTE_GRADIENT,
        task_names.COMPUTE_GRADIENT,
    ]
    assert found[0]["body"][2]["chord"] is None
    assert set(found[0]) == set(found[1]) - {"rank"}, "the same envelope"
    assert {**found[0]["headers"], **found[1]["headers"]}.keys() == found[0]["headers"].keys()


def test_what_is_sent_stands_where_its_runs_turn_is(app: Celery, redis_url: str) -> None:
    sender, client = Sender(app), redis.Redis.from_url(redis_url)
    client.hset("torchord:{heavy}:head", mapping={"weight": 2.0})
    sender.step("light", 0, range(6), callback_queue=QUEUE, seconds=1.0)
    sender.step("heavy", 0, range(6), callback_queue=QUEUE, seconds=1.0)
    sender.send(task_names.PREDICT, {"run": "heavy", "part": 7}, queue=task_names.GRADIENTS)
    found = [(message["body"][1]["run"], message["headers"]["task"]) for message in messages(redis_url)]
    order = ["light", "heavy", "heavy", "light", "heavy", "heavy", "light", "heavy", "heavy"]
    assert [run for run, task in found if task == task_names.COMPUTE_GRADIENT][:9] == order
    assert found.index(("heavy", task_names.PREDICT)) <= 2, "a question is asked as soon as a worker is free"
    client.delete("torchord:{heavy}:head")
    client.close()
