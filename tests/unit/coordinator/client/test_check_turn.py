"""A check goes to others than who computed its shard, if there are any, and is computed in any case."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.support.control import SPEC, record, slot, worker, write
from torchord.cache.testing.memory_ledger import MemoryLedger
from torchord.cache.testing.memory_plane import MemoryPlane
from torchord.cache.testing.memory_registry import MemoryRegistry
from torchord.coordinator.client import check_turn
from torchord.coordinator.client.check_turn import PASSES, CheckTurns
from torchord.coordinator.client.slot_lease import SlotTask
from torchord.coordinator.messages.task_names import GRADIENTS, UPDATES

CHECK = SlotTask("r", 0, 4, 0, "d")


class Laboratory:
    """A step whose shard 1 was computed by w0, and w0's turns."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.plane = MemoryPlane()
        self.registry = MemoryRegistry(self.plane)
        self.ledger = MemoryLedger(self.plane, "r")
        self.ledger.create(SPEC, incarnation="life")
        _, token = self.ledger.acquire(worker="s0", node="n", queue="")
        assert isinstance(token, int)
        self.ledger.initialise(
            token=token, manifest={}, record=record(0), dataset_size=8, evaluation_size=0, total_steps=2
        )
        write(self.ledger, 0, slot(0, 1, seconds=4.0))
        self.slept: list[float] = []
        self.done: list[str] = []
        monkeypatch.setattr(check_turn.time, "sleep", self.slept.append)
        lease = SimpleNamespace(
            worker="w0",
            end=lambda task: self.done.append(f"ended {task.slot}"),
            sender=SimpleNamespace(gradient=self._sent),
        )
        self.turns = CheckTurns(cast(Any, lease))
        self.there("w0")

    def _sent(self, run: str, step: int, slot: int, *, version: int) -> None:
        self.done.append(f"sent {slot}")

    def there(self, id: str, *queues: str, environment: str = "cpu", **more: Any) -> None:
        """A worker that lives."""
        self.registry.beat(worker(id, queues=queues or (GRADIENTS,), environment=environment, **more))

    def left(self, shard: int = 1) -> bool:
        context = SimpleNamespace(
            run="r", ledger=self.ledger, services=SimpleNamespace(registry=self.registry)
        )
        return self.turns.left(cast(Any, context), CHECK, shard)


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> Laboratory:
    return Laboratory(monkeypatch)


def test_who_computed_the_shard_leaves_it_to_others_a_few_times(lab: Laboratory) -> None:
    lab.there("w1")
    assert [lab.left() for _ in range(PASSES + 1)] == [True] * PASSES + [False]
    assert lab.done == ["ended 4", "sent 4"] * PASSES, "the lease has ended when the message is out"
    assert 0 < sum(lab.slept) <= 4.0
    assert lab.left(), "a later try of the same check begins anew"


def test_the_pause_is_no_longer_than_the_shard(lab: Laboratory) -> None:
    lab.there("w1")
    quick = slot(0, 2, seconds=0.004)
    write(lab.ledger, 0, quick)
    while lab.left(2):
        pass
    assert sum(lab.slept) == pytest.approx(0.004)


def test_another_ones_shard_is_checked_at_once(lab: Laboratory) -> None:
    lab.there("w1")
    write(lab.ledger, 0, slot(0, 3, worker="w1"))
    assert not lab.left(3)
    assert not lab.left(0), "nor does it wait for a shard that is not written yet"


def test_nobody_else_is_there_who_could(lab: Laboratory) -> None:
    assert not lab.left()
    lab.there("s0", UPDATES)
    lab.there("w1", environment="")
    lab.there("w2", refuses={"r": "other code"})
    assert not lab.left()
    assert lab.done == lab.slept == []
