"""Who can publish on the broker may ask torchord's workers anything, and tell them nothing."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from celery import Celery
from celery.worker.control import Panel

import torchord
from tests.support import models
from tests.support.fleet import Fleet, finished, fleet
from torchord import TrainingConfig
from torchord.cache.errors import InvalidInput
from torchord.cache.settings import REMOTE_CONTROL_ALL, from_environment
from torchord.coordinator.messages.task_names import GRADIENTS, OUR_TASKS
from torchord.tasks.remote_control import ANSWERED, obeyed, restrict

ORDERS: dict[str, dict[str, Any]] = {
    "add_consumer": {"queue": "elsewhere"},
    "autoscale": {"max": 3, "min": 1},
    "cancel_consumer": {"queue": GRADIENTS},
    "disable_events": {},
    "election": {"id": "one", "topic": "task", "action": {"task": "x", "options": {"queue": "elsewhere"}}},
    "memdump": {},
    "memsample": {},
    "objgraph": {"type": "dict"},
    "pool_grow": {"n": 3},
    "pool_restart": {"modules": ["this"], "reload": True},
    "pool_shrink": {"n": 1},
    "rate_limit": {"task_name": min(OUR_TASKS), "rate_limit": "1/h"},
    "revoke": {"task_id": ["some-task"], "terminate": True},
    "revoke_by_stamped_headers": {"headers": {"a": ["b"]}},
    "terminate": {"signal": "KILL", "task_id": ["some-task"]},
    "time_limit": {"task_name": min(OUR_TASKS), "hard": 1},
    "shutdown": {},
}


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """`celery -A torchord worker`."""
    with fleet(tmp_path_factory.mktemp("app"), workers=1, layout="single") as one:
        yield one


@pytest.fixture
def shell(single: Fleet) -> Iterator[Celery]:
    """Somebody with the broker's URL, and no more."""
    with Celery("shell", broker=single.cluster.url) as app:
        yield app


def test_all_that_celery_knows_is_tried_or_answered() -> None:
    assert set(ORDERS) | ANSWERED >= set(Panel.data), "Celery has a new command: which is it?"
    assert not set(ORDERS) & ANSWERED


def test_orders_are_refused_and_change_nothing(single: Fleet, shell: Celery) -> None:
    def state() -> Any:
        inspect = shell.control.inspect(timeout=5, limit=1)
        [(node, stats)] = inspect.stats().items()
        queues = inspect.active_queues()[node]
        return (
            stats["pid"],
            stats["pool"]["max-concurrency"],
            stats["prefetch_count"],
            queues,
            inspect.revoked(),
        )

    before = state()
    for name, arguments in ORDERS.items():
        [answer] = shell.control.broadcast(name, arguments=arguments, reply=True, timeout=5, limit=1)
        [said] = answer.values()
        assert f"TORCHORD_REMOTE_CONTROL={name} has a worker obey it" in said["error"]
    # A greeting is answered, and revokes nothing.
    greeting = {"from_node": "me", "revoked": {"another-task": 1.0}}
    [answer] = shell.control.broadcast("hello", arguments=greeting, reply=True, timeout=5, limit=1)
    assert next(iter(answer.values()))["revoked"] in ({}, [])
    assert state() == before
    with redis.Redis.from_url(single.cluster.url) as client:
        assert not client.exists("elsewhere")
    config = TrainingConfig(epochs=1, batch_size=20, shards=2)
    finished(single.master.submit(models.mlp(size=20), config))


def test_questions_are_answered_without_passwords(single: Fleet, shell: Celery) -> None:
    inspect = shell.control.inspect(timeout=5, limit=1)
    found = {
        name: getattr(inspect, name)()
        for name in (
            "ping",
            "conf",
            "report",
            "stats",
            "registered",
            "active",
            "reserved",
            "scheduled",
            "clock",
        )
    }
    assert all(len(answer) == 1 for answer in found.values())
    password = single.cluster.url.partition("@")[0].rpartition(":")[2]
    assert len(password) > 20 and password not in repr(found)


def of_worker(opened: set[str]) -> dict[str, Any]:
    """What a worker does at each command."""
    return obeyed(Panel.data, frozenset(opened))


def test_orders_can_be_opened_one_by_one_or_all() -> None:
    kept = of_worker({"shutdown", "revoke"})
    assert {name for name in ORDERS if kept[name] is Panel.data[name]} == {"shutdown", "revoke"}
    assert kept["hello"] is Panel.data["hello"], "who may revoke may do so in a greeting"
    assert of_worker({REMOTE_CONTROL_ALL}) == dict(Panel.data)
    with pytest.raises(
        InvalidInput, match=r"names 'shutdwn', which is no remote command; name some of .*shutdown"
    ):
        of_worker({"shutdwn"})


@pytest.mark.parametrize(
    ("value", "meant"),
    [
        (None, frozenset()),
        ("", frozenset()),
        ("off", None),
        ("on", frozenset({"*"})),
        ("shutdown, Revoke", {"shutdown", "revoke"}),
    ],
)
def test_the_setting_says_which(value: str | None, meant: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHORD_REMOTE_CONTROL", raising=False)
    if value is not None:
        monkeypatch.setenv("TORCHORD_REMOTE_CONTROL", value)
    assert from_environment().remote_control == meant


@pytest.mark.parametrize(("opened", "left"), [(set(), 0), ({"election"}, 2), ({REMOTE_CONTROL_ALL}, 2)])
def test_no_election_ends_with_a_task_of_its_caller(opened: set[str], left: int) -> None:
    """Gossip's votes are events, which everybody may send who may listen to them."""
    gossip = SimpleNamespace(event_handlers={"worker.elect": print, "worker.elect.ack": print})
    restrict(SimpleNamespace(steps=[], gossip=gossip), frozenset(opened))
    assert len(gossip.event_handlers) == left


def test_the_workers_of_an_app_of_ones_own_obey_as_before() -> None:
    with Celery("shop", broker=from_environment().url) as app:
        before = app.conf.worker_consumer, app.conf.worker_enable_remote_control
        torchord.install(app)
        assert (app.conf.worker_consumer, app.conf.worker_enable_remote_control) == before
