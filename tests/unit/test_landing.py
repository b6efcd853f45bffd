"""A training server adds slots up as they land, while nobody updates."""

from __future__ import annotations

import threading
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cache.chunks import MemoryChunkStore
from cache.errors import ChunkMissing
from cache.gradients import GradientStore
from cache.memory import MemoryLedger, MemoryPlane
from cache.parameters import FetchCounters
from cache.records import SlotRecord
from cache.tiered import TieredStore
from coordinator.config import TrainingConfig
from coordinator.fan_in import FanIn
from coordinator.optimize import Trainer
from coordinator.server import TrainingServer
from coordinator.step_sum import StepSum
from coordinator.task_names import GRADIENTS, UPDATES
from tests.support import models
from tests.support.control import slot as any_slot
from tests.support.inprocess import resolved

SLOTS = 4


class Server(TrainingServer):
    """A training server that holds one run at its first step, of slots of one example."""

    def __init__(self) -> None:
        tiered = TieredStore(MemoryChunkStore(), None)
        self.services: Any = SimpleNamespace(
            chunks=tiered,
            gradients=GradientStore(tiered),
            parameters=SimpleNamespace(counters=FetchCounters()),
        )
        self.heartbeat: Any = SimpleNamespace(info=SimpleNamespace(queues=(UPDATES,)))
        self._lock = threading.RLock()
        wide = partial(models.Mlp, hidden=512)  # too large to travel inside a slot's record
        trainer = Trainer.build(resolved(models.mlp(size=8, model=wide)), TrainingConfig())
        gradients = self.services.gradients
        self.warm: Any = Held(trainer, gradients)
        self._warm = {"r": self.warm}  # type: ignore[assignment]
        ledger = MemoryLedger(MemoryPlane(), "r")
        self.slots = []
        for shard in range(SLOTS):
            tensors = {name: torch.randn(p.shape) for name, p in trainer.replica.parameters.items()}
            stored = gradients.put(ledger, 0, shard, tensors)
            self.slots.append(
                any_slot(
                    0, shard, stored.nonce, digest=stored.digest, blob=stored.blob, manifest=stored.manifest,
                    examples=1,
                )
            )  # fmt: skip

    def landed(self, *shards: int) -> dict[int, SlotRecord]:
        return {shard: self.slots[shard] for shard in shards}


class Held:
    """What of a `WarmRun` the sum needs."""

    run, version = "r", 0

    def __init__(self, trainer: Trainer, gradients: GradientStore) -> None:
        self.trainer = trainer
        self.early: dict[str, Any] = {}
        self.sum: StepSum | None = StepSum(0, FanIn(SLOTS, SLOTS), SLOTS, trainer, gradients, allowed=("*",))


def test_slots_are_added_in_slot_order_as_far_as_they_have_landed() -> None:
    server = Server()
    add = server._adder(server.warm)
    assert add is not None
    assert add(server.landed(1, 2)) == 0
    assert add(server.landed(0, 1, 3)) == 2
    assert add(server.landed(0, 1, 3)) == 2
    assert add(server.landed(0, 1, 2, 3)) == 4
    assert server.warm.sum.complete
    assert server.warm.early["store"]["nbytes"] == sum(slot.blob.nbytes for slot in server.slots)


def test_nothing_is_added_while_somebody_updates() -> None:
    server = Server()
    add = server._adder(server.warm)
    assert add is not None
    found: list[int] = []
    with server._lock:
        other = threading.Thread(target=lambda: found.append(add(server.landed(0))))
        other.start()
        other.join(60)
    assert found == [0] and server.warm.sum.taken == 0
    assert add(server.landed(0)) == 1


def test_nothing_is_added_to_another_step_or_a_run_that_was_let_go() -> None:
    server = Server()
    add = server._adder(server.warm)
    assert add is not None
    server.warm.version = 1
    assert add(server.landed(0)) == 0
    server.warm.version = 0
    server._warm.clear()
    assert add(server.landed(0)) == 0
    assert server.warm.sum.taken == 0
    server.warm = None
    assert add(server.landed(0)) == 0


def test_a_slot_that_is_lost_is_the_updates_business() -> None:
    """It opens the slot again; here the sum is given up, and nothing is reported."""
    server = Server()
    add = server._adder(server.warm)
    assert add is not None
    add(server.landed(0))
    server.services.chunks.delete([server.slots[1].blob])
    with pytest.raises(ChunkMissing):
        add(server.landed(0, 1))
    assert server.warm.sum is None
    assert server._lock.acquire(blocking=False)


def test_who_computes_gradients_too_adds_up_when_it_is_called() -> None:
    server = Server()
    server.heartbeat.info.queues = (GRADIENTS, UPDATES)
    assert server._adder(server.warm) is None
