"""What a worker imports before it begins, and when it hands back what it is at: at its end, and not when it
only connects anew.
"""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from celery import bootsteps

from tests.support.waiting import wait_until
from torchord.cache.errors import CacheUnreachable
from torchord.tasks import worker


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was handed back, and by whom: this process's own Client, or for the pool of a node."""
    found: list[str] = []
    own = SimpleNamespace(
        pid=os.getpid(),
        heartbeat=SimpleNamespace(rests=lambda: None),
        client=SimpleNamespace(lease=SimpleNamespace(hand_back=lambda: found.append("own"))),
    )
    monkeypatch.setattr(worker, "_process", own)
    monkeypatch.setattr(worker, "_parent_services", None)
    monkeypatch.setattr(worker, "_node", "celery@here")
    monkeypatch.setattr(
        "torchord.coordinator.client.slot_lease.hand_back_node",
        lambda services, node: found.append(f"pool {node}"),
    )
    return found


def stop(state: Any) -> None:
    """Celery stops the consumer's steps, in a worker that is in some state."""
    parent = SimpleNamespace(blueprint=SimpleNamespace(state=state))
    worker.TorchordStep.stop(worker.TorchordStep.__new__(worker.TorchordStep), parent)


@pytest.mark.parametrize(
    ("state", "expected"),
    [(bootsteps.CLOSE, ["own"]), (bootsteps.TERMINATE, ["own"]), (bootsteps.RUN, [])],
    ids=["warm shutdown", "cold shutdown", "the connection was lost"],
)
def test_what_a_worker_is_at_goes_back_when_it_ends(
    handed: list[str], state: Any, expected: list[str]
) -> None:
    stop(state)
    assert handed == expected


def test_at_the_signal_it_goes_back_from_a_thread(handed: list[str]) -> None:
    """The handler of a signal must not wait for Redis."""
    worker._stopping()
    wait_until(lambda: handed, message="the hand-back")
    assert handed == ["own"]


def test_the_parent_of_a_pool_speaks_for_its_children(
    handed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "_process", None)
    stop(bootsteps.CLOSE)
    assert handed == []
    monkeypatch.setattr(worker, "_parent_services", object())
    stop(bootsteps.CLOSE)
    assert handed == ["pool celery@here"]


def test_a_forked_child_does_not_hand_back_what_its_parent_is_at(
    handed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker._process, "pid", os.getpid() + 1)
    stop(bootsteps.CLOSE)
    assert handed == []


def test_a_worker_ends_though_redis_is_away(
    handed: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def away(services: Any, node: str) -> None:
        raise CacheUnreachable("away")

    monkeypatch.setattr(worker, "_process", None)
    monkeypatch.setattr(worker, "_parent_services", object())
    monkeypatch.setattr("torchord.coordinator.client.slot_lease.hand_back_node", away)
    stop(bootsteps.CLOSE)
    assert [record.message for record in caplog.records] == ["what the pool is at was not handed back: away"]


PRELOADING = """
import gc, sys
from types import SimpleNamespace

from tests.support import models
from tests.support.inprocess import resolved
from torchord import TrainingConfig
from torchord.coordinator.compute.batch import open_dataset
from torchord.coordinator.compute.gradient import compute
from torchord.coordinator.compute.replica import Replica
from torchord.tasks import worker

app = SimpleNamespace(amqp=SimpleNamespace(queues=SimpleNamespace(consume_from=sys.argv[1:])))
worker.app = app
worker._preload(SimpleNamespace(app=app))
assert gc.isenabled() and gc.get_freeze_count() > 100_000, gc.get_freeze_count()
recipe, config = resolved(models.mlp()), TrainingConfig(batch_size=8)
replica = Replica.build(recipe, config)
compute(replica, recipe, config, open_dataset(recipe, config), [0, 1, 2], 0, 0)
print("torch._dynamo" in sys.modules)
"""


@pytest.mark.parametrize(
    ("queues", "compiler"),
    [(["torchord.gradients"], False), (["torchord.gradients", "torchord.updates"], True)],
    ids=["a Client", "a training server"],
)
def test_torchs_compiler_is_imported_by_who_has_an_optimizer(queues: list[str], compiler: bool) -> None:
    """It takes half of a process's start, and a Client needs it neither to begin nor to compute a shard."""
    program = [sys.executable, "-c", PRELOADING, *queues]
    done = subprocess.run(program, capture_output=True, text=True, timeout=90)
    assert done.stdout == f"{compiler}\n", done.stderr
