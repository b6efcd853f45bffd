"""Garbage in queues and in the control plane stops nobody: it is set aside, or costs its own run."""

from __future__ import annotations

import base64
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.support import models, reference
from tests.support.shuffle import Shuffle
from tests.support.waiting import wait_until
from torchord import LocalCluster, Master, TrainingConfig
from torchord.cache import keys
from torchord.cache.errors import CacheError, RecordDamaged, RunFailed
from torchord.cache.ledger.workers import Registry, new_info, read
from torchord.cache.servers.redis_client import connect
from torchord.cache.settings import Settings
from torchord.coordinator import cli
from torchord.coordinator.client.slot_lease import SlotTask
from torchord.coordinator.messages.inspection import fault_of
from torchord.coordinator.messages.task_names import COMPUTE_GRADIENT, EVALUATE, GRADIENTS

CONFIG = TrainingConfig(batch_size=8, shards=2, seed=3, audit_fraction=0.0)
RECIPE = models.mlp(evaluation=None)

# --- queues -----------------------------------------------------------------------------------


def body(keywords: Any = None, embedded: Any = None, positional: Any = None) -> str:
    """A message's body with these parts."""
    keywords = {"run": "x", "step": 0, "shard": 0, "version": 0} if keywords is None else keywords
    found = [[] if positional is None else positional, keywords, {} if embedded is None else embedded]
    return base64.b64encode(json.dumps(found).encode()).decode()


def message(headers: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """A message as Celery sends it."""
    sent = {"lang": "py", "task": COMPUTE_GRADIENT, "id": "an-id", "root_id": "r", "parent_id": None}
    sent |= {"group": None, "argsrepr": "()", "kwargsrepr": "{}", "retries": 0, "timelimit": [None, None]}
    sent |= {"eta": None, "expires": None, "ignore_result": True}
    properties = {"correlation_id": "x", "delivery_tag": "t", "priority": 0, "body_encoding": "base64"}
    properties["delivery_info"] = {"exchange": "", "routing_key": GRADIENTS}
    found = {"body": body(), "content-encoding": "utf-8", "content-type": "application/json"}
    return {**found, "headers": {**sent, **(headers or {})}, "properties": properties, **changes}


def without(*path: str) -> dict[str, Any]:
    """A message that lacks something."""
    found = message()
    inner = found
    for name in path[:-1]:
        inner = inner[name]
    del inner[path[-1]]
    return found


def with_property(**changes: Any) -> dict[str, Any]:
    """A message with other properties."""
    return message(properties={**message()["properties"], **changes})


GARBAGE: dict[str, Any] = {
    "a number": 5,
    "null": None,
    "a list": [],
    "an empty object": {},
    "no properties": without("properties"),
    "no body": without("body"),
    "no headers": without("headers"),
    "no delivery tag": without("properties", "delivery_tag"),
    "no delivery info": without("properties", "delivery_info"),
    "no content type": without("content-type"),
    "headers that are null": message(headers=None) | {"headers": None},
    "headers that are a list": message() | {"headers": []},
    "no task": without("headers", "task"),
    "no id": without("headers", "id"),
    "a task that is a number": message({"task": 5}),
    "a task that is a list": message({"task": []}),
    "an unknown task": message({"task": "os.system"}),
    "a body that is a number": message(body=5),
    "a body that is no base64": message(body="!!!"),
    "a body of another encoding": with_property(body_encoding="nope"),
    "a nested body": message(body=base64.b64encode(b"[" * 100_000 + b"]" * 100_000).decode()),
    "a body that is an object": message(body=base64.b64encode(b'{"a":1}').decode()),
    "arguments that are a list": message(body=body(keywords=[])),
    "no run": message(body=body(keywords={"step": 0})),
    "a run that is a number": message(body=body(keywords={"run": 5})),
    "a step that is a text": message(body=body(keywords={"run": "x", "step": "zero"})),
    "a step that is true": message(body=body(keywords={"run": "x", "step": True})),
    "a step below 0": message(body=body(keywords={"run": "x", "step": -1})),
    "a shard without end": message(body=body(keywords={"run": "x", "shard": 10**30})),
    "an embedded number": message(body=body(embedded=5)),
    "a chord that is none": message(body=body(embedded={"chord": {"task": 5}})),
    "callbacks that are none": message(body=body(embedded={"callbacks": "x"})),
    "an estimated time": message({"eta": "nonsense"}),
    "an end": message({"expires": "nonsense"}),
    "a time limit that is a text": message({"timelimit": "x"}),
    "a time limit that is a number": message({"timelimit": 5}),
    "time limits that are texts": message({"timelimit": ["x", "y"]}),
    "retries that are a text": message({"retries": "x"}),
    "a compression": message({"compression": "application/x-gzip"}),
    "stamps that are a number": message({"stamped_headers": ["x"], "stamps": 5}),
    "a group index that is a text": message({"group": "g", "group_index": "x"}),
    "a priority that is a text": with_property(priority="high"),
    "a reply_to that is a list": with_property(reply_to=[]),
    "pickle": message() | {"content-type": "application/x-python-serialize"},
}


def test_a_message_of_ours_is_none_of_it() -> None:
    assert fault_of(message()) is None
    assert fault_of(message({"task": "tasks.compute_gradient"})) is None, "of a release before"
    assert fault_of(message({"group": "g", "group_index": 1})) is None


@pytest.mark.parametrize("kind", GARBAGE)
def test_garbage_is_known_before_celery_sees_it(kind: str) -> None:
    assert fault_of(GARBAGE[kind])


@pytest.mark.slow
def test_a_worker_outlives_what_is_no_message(
    cluster: Callable[..., LocalCluster], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every kind at once, and what is no JSON; then a run trains, and a person finds the entries."""
    made = cluster(1)
    entries: list[Any] = [json.dumps(each) for each in GARBAGE.values()]
    entries += ["garbage", "", b"\xff\xfe\x00", "[" * 100_000 + "]" * 100_000]
    with redis.Redis.from_url(made.url) as client:
        client.lpush(GRADIENTS, *entries)
        broadcast = [b"garbage", b"5", b"[" * 100_000, b"{}", json.dumps(message()).encode()]
        assert [client.publish("/0.celery.pidbox", each) for each in broadcast] == [2] * len(broadcast)
        wait_until(lambda: client.llen(GRADIENTS) == 0, message="the queue to be empty")
        run = Master(made.url, checkpoint_dir=made.checkpoint_dir).submit(models.mlp(), CONFIG, name="fine")
        run.wait(timeout=90)
        assert made.processes["client1"].poll() is None
        kept = client.lrange(keys.QUARANTINE, 0, -1)
        told = len(entries) + 2 * len(broadcast)  # each worker's own
        assert len(kept) == int(client.get(keys.QUARANTINED)) == told and b"os.system" in b"".join(kept)
        assert 0 < client.ttl(keys.QUARANTINE) <= keys.QUARANTINE_TTL_SECONDS
        assert max(map(len, kept)) <= 4096
    assert cli.main(["health", "--url", made.url]) == 0
    assert f"{told} entries of queues set aside as no message of torchord's" in capsys.readouterr().out
    log = made.processes["client1"].log.read_text(errors="replace")
    assert "was set aside" in log and "its task 'os.system' is none of torchord's" in log


# --- the registry of workers ------------------------------------------------------------------

HEARTBEATS = {
    "no JSON": "garbage",
    "no fields": "{}",
    "a list": "[]",
    "a number": "5",
    "deep": '{"queues":' + "[" * 50_000 + "]" * 50_000 + "}",
    "an id that is a number": json.dumps({"id": 5, "node": "n", "host": "h", "pid": 1, "queues": []}),
    "a process without end": json.dumps({"id": "i", "node": "n", "host": "h", "pid": 1 << 70, "queues": []}),
    "queues that are numbers": json.dumps({"id": "i", "node": "n", "host": "h", "pid": 1, "queues": [1]}),
    "a pace that is a text": json.dumps(
        {"id": "i", "node": "n", "host": "h", "pid": 1, "queues": [], "pace": {"run": "fast"}}
    ),
    "refusals that are a text": json.dumps(
        {"id": "i", "node": "n", "host": "h", "pid": 1, "queues": [], "refuses": "x"}
    ),
}


@pytest.mark.parametrize("kind", HEARTBEATS)
def test_a_heartbeat_that_is_none_hides_no_other(
    redis_url: str, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    with pytest.raises(RecordDamaged, match="a heartbeat"):
        read(HEARTBEATS[kind])
    with connect(redis_url) as client:
        registry = Registry(client, redis_url)
        registry.beat(new_info("fine@here", (GRADIENTS,)))
        client.set(keys.worker("odd"), HEARTBEATS[kind], ex=60)
        client.zadd(keys.WORKERS, {"odd": time.time() * 1000})
        with caplog.at_level(logging.ERROR):
            assert [info.node for info in registry.alive().values()] == ["fine@here"]
        assert "worker 'odd' in the registry is passed over" in caplog.text
        assert registry.worker("odd") is None
        caplog.clear()
        registry.alive()
        assert caplog.text == "", "said once"


# --- a run's records --------------------------------------------------------------------------


@pytest.fixture
def lab(redis_url: str, tmp_path: Path) -> Shuffle:
    """A run whose first step is launched, and none of its shards computed."""
    run = Master(redis_url, checkpoint_dir=str(tmp_path)).submit(RECIPE, CONFIG, name="damaged")
    found = Shuffle(Settings(url=redis_url, checkpoint_dir=str(tmp_path)), run, None)
    found.server.advance(run.name)
    return found


RECORDS: dict[str, Callable[[Any, Any], Any]] = {
    "a slot that is no JSON": lambda client, own: client.hset(own.slots(0), "1", "garbage"),
    "a slot that is no text": lambda client, own: client.hset(own.slots(0), "1", b'"\xff\xfe"'),
    "a version that is no text": lambda client, own: client.hset(own.versions, "0", b'{"\xff": 5}'),
    "a lease that is no text": lambda client, own: client.hset(own.leases(0), "0", b"\xff"),
    "a slot without fields": lambda client, own: client.hset(own.slots(0), "1", "{}"),
    "a slot whose number is none": lambda client, own: client.hset(own.slots(0), "x", "{}"),
    "a slot that nests": lambda client, own: client.hset(own.slots(0), "1", "[" * 5000 + "]" * 5000),
    "a slot that says another number": lambda client, own: client.hset(
        own.slots(0), "1", client.hget(own.slots(0), "0") or "{}"
    ),
    "a slot of another step's number": lambda client, own: client.hset(
        own.slots(0), "77", (client.hget(own.slots(0), "0") or "{}").replace('"shard":0', '"shard":77')
    ),
    "slots that are no hash": lambda client, own: (
        client.delete(own.slots(0)),
        client.set(own.slots(0), "x", ex=9),
    ),
    "a version that is no JSON": lambda client, own: client.hset(own.versions, "0", "garbage"),
    "a version without fields": lambda client, own: client.hset(own.versions, "0", "{}"),
    "a version that says another number": lambda client, own: client.hset(
        own.versions, "0", client.hget(own.versions, "0").replace('"version":0', '"version":3')
    ),
    "a head whose version is none": lambda client, own: client.hset(own.head, "version", "x"),
    "a head without an incarnation": lambda client, own: client.hdel(own.head, "incarnation"),
    "a head whose time is none": lambda client, own: client.hset(own.head, "committed_at", "noon"),
    "a spec without a recipe": lambda client, own: client.set(own.spec, '{"config": {}}', keepttl=True),
    "a lease whose attempt is a text": lambda client, own: client.hset(
        own.leases(0), "0", '{"worker": "w", "attempt": "1", "open": true}'
    ),
    "an evaluation that is a list": lambda client, own: client.hset(own.evaluations, "0", "[1]"),
    "an evaluation of a text": lambda client, own: client.hset(own.evaluations, "0", '{"loss": "low"}'),
    "an evaluation under way that is none": lambda client, own: client.hset(
        own.pending_evaluations, "0", "many"
    ),
    "a spec that is no JSON": lambda client, own: client.set(own.spec, "garbage", keepttl=True),
    "a lease that is no JSON": lambda client, own: client.hset(own.leases(0), "0", "garbage"),
    "an evaluation that is no JSON": lambda client, own: client.hset(own.evaluations, "0", "garbage"),
    "an entry that is no JSON": lambda client, own: client.hset(own.ledger, "1", "garbage"),
}
LOOKS = ("head", "spec", "entries", "evaluations", "versions", "pending_evaluations")


@pytest.mark.parametrize("kind", RECORDS)
def test_a_record_that_is_none_is_one_clear_error(lab: Shuffle, kind: str) -> None:
    """Whatever reads it says so in torchord's words, which name the run."""
    ledger = lab.run._ledger
    RECORDS[kind](ledger.client, ledger.keys)
    for name in ledger.client.keys("torchord:{damaged}:*"):
        ledger.client.expire(name, 60, nx=True)
    reads: list[Callable[[], Any]] = [getattr(ledger, name) for name in LOOKS]
    reads += [lambda: ledger.slots(0), lambda: ledger.leases(0), lambda: ledger.version(0)]
    for read_it in reads:
        try:
            read_it()
        except RecordDamaged as error:
            assert "'damaged'" in str(error) and "what is stored there is no record" in str(error)
        except CacheError as error:  # the server's own refusal
            assert "WRONGTYPE" in str(error)


@pytest.mark.parametrize("kind", [kind for kind in RECORDS if kind.startswith(("a slot ", "a lease"))])
def test_a_slot_or_lease_that_is_none_is_computed_anew(
    lab: Shuffle, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = lab.run._ledger
    for shard in (0, 1):
        lab.clients[0].shards.compute_gradient(SlotTask(lab.run.name, 0, shard, 0, f"d{shard}"))
    RECORDS[kind](ledger.client, ledger.keys)
    present = ledger.slots_present(0)
    assert present <= {0, 1, 77}
    ledger.leases(0)
    found = ledger.slots(0)
    if 77 in found:  # a record, of a slot that the step does not have
        lab.server.advance(lab.run.name)
        assert lab.run.status().version == 1 and "step 0 has no slot 77: deleted" in caplog.text
        return
    assert "is no record: deleted" in caplog.text
    caplog.clear()
    assert ledger.slots(0) == found and ledger.leases(0).keys() <= {0, 1} and caplog.text == "", "said once"
    for shard in {0, 1} - set(found):
        lab.clients[1].shards.compute_gradient(SlotTask(lab.run.name, 0, shard, 0, f"again{shard}"))
    lab.server.advance(lab.run.name)
    assert lab.run.status().version == 1


@pytest.mark.parametrize("kind", [kind for kind in RECORDS if kind.startswith("a version")])
@pytest.mark.parametrize("warm", [True, False])
def test_a_version_that_is_none_is_written_or_computed_anew(lab: Shuffle, kind: str, warm: bool) -> None:
    """By the server that holds it, else by the one that takes the run over."""
    lab.train()
    expected = lab.run.status().version
    settings, name = lab.run._services.settings, lab.run.name + "-again"
    run = Master(settings.url, checkpoint_dir=settings.checkpoint_dir).submit(RECIPE, CONFIG, name=name)
    again = Shuffle(settings, run, None)
    again.server.advance(name)
    RECORDS[kind](run._ledger.client, run._ledger.keys)
    if not warm:
        again.server.leave()
    again.train()
    assert run.status().version == expected
    assert reference.bits(run.model()) == reference.bits(lab.run.model())


@pytest.mark.parametrize("kind", [kind for kind in RECORDS if kind.startswith("a spec")])
def test_a_record_that_cannot_be_made_anew_ends_its_run_with_the_reason(lab: Shuffle, kind: str) -> None:
    ledger = lab.run._ledger
    RECORDS[kind](ledger.client, ledger.keys)
    lab.server.leave()
    for process in (lab.server, *lab.clients):
        process.contexts.forget(lab.run.name)
    with pytest.raises(RecordDamaged):
        lab.server.advance(lab.run.name)
    status = lab.run.status()
    assert status.state == "failed" and "what is stored there is no record" in str(status.error)
    with pytest.raises(RunFailed, match="no record"):
        lab.run.wait(timeout=20)


def test_a_client_that_cannot_read_what_it_computes_from_ends_the_run(lab: Shuffle) -> None:
    ledger = lab.run._ledger
    RECORDS["a spec without a recipe"](ledger.client, ledger.keys)
    receipt = lab.clients[0].shards.compute_gradient(SlotTask(lab.run.name, 0, 0, 0, "d"))
    assert receipt["status"] == "failed"
    assert "has no field 'recipe'" in str(lab.run.status().error)


@pytest.mark.parametrize(("step", "slot"), [(0, 2), (0, 10**9), (10**12, 0), (1, 5)])
def test_a_message_for_a_slot_that_there_is_not_changes_nothing(lab: Shuffle, step: int, slot: int) -> None:
    task = SlotTask(lab.run.name, step, slot, 0, "forged")
    assert lab.clients[0].shards.compute_gradient(task)["status"] == "no such slot"
    assert lab.clients[0].sums.partial_sum(task)["status"] == "no such slot"
    lab.train()
    assert lab.run.status().state == "done"


def test_an_event_that_is_none_is_told_and_passed(lab: Shuffle) -> None:
    ledger = lab.run._ledger
    first = ledger.read_events()
    ledger.client.xadd(ledger.keys.events, {"type": "step", "data": "garbage"})
    ledger.client.xadd(ledger.keys.events, {"type": "step"})
    ledger.emit("fine", {"n": 1})
    told = ledger.read_events(first[-1].id)
    assert [event.type for event in told] == ["unreadable", "unreadable", "fine"]
    assert "is no JSON" in told[0].data["message"] and "'data'" in told[1].data["message"]


def test_a_run_that_cannot_be_read_hides_no_other(lab: Shuffle, capsys: pytest.CaptureFixture[str]) -> None:
    ledger = lab.run._ledger
    settings = lab.run._services.settings
    master = Master(settings.url, checkpoint_dir=settings.checkpoint_dir)
    master.submit(models.mlp(), CONFIG, name="fine")
    RECORDS["a head whose version is none"](ledger.client, ledger.keys)
    ledger.client.zadd(keys.RUNS, {"../no name": 0, "": 1})
    assert master.runs() == ["damaged", "fine"]
    assert cli.main(["list", "--url", settings.url]) == 0
    shown = capsys.readouterr().out
    assert "fine" in shown and "unreadable" in shown and "field 'version' of a run's head is x" in shown


def test_the_message_for_evaluations_is_read_as_well() -> None:
    given = message({"task": EVALUATE}, body=body({"run": "x", "version": 0, "part": 0, "parts": 1}))
    assert fault_of(given) is None
