"""What a node that stops gives back, and what it leaves to others."""

from __future__ import annotations

from typing import Any, cast

import pytest

from tests.support.control import record, worker
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.testing.memory_ledger import MemoryLedger
from torchord.cache.testing.memory_plane import MemoryPlane
from torchord.cache.testing.memory_registry import MemoryRegistry
from torchord.coordinator.client.slot_lease import hand_back_node

NODE = "celery@pool"


class Bench:
    """Runs of five steps, a pool of two processes and a worker elsewhere."""

    def __init__(self) -> None:
        self.plane = MemoryPlane()
        self.registry = MemoryRegistry(self.plane)
        for id, node in (("child0", NODE), ("child1", NODE), ("other", "celery@other")):
            self.registry.beat(worker(id, node=node))

    def ledger(self, run: str) -> Ledger:
        return MemoryLedger(self.plane, run)

    def submit(self, run: str, *, launched: int = 0) -> Ledger:
        ledger = self.ledger(run)
        ledger.create({}, incarnation="life")
        _, token = ledger.acquire(worker="other", node="celery@other", queue="")
        assert isinstance(token, int)
        ledger.initialise(
            token=token, manifest={}, record=record(0), dataset_size=40, evaluation_size=0, total_steps=5
        )
        ledger.mark_launched(launched, token=token)
        return ledger

    def stop(self) -> None:
        hand_back_node(cast(Any, self), NODE)


def begin(ledger: Ledger, shard: int, id: str, step: int = 0) -> None:
    begun = ledger.begin(step, shard, worker=id, delivery=f"d{shard}", version=0)
    assert begun.verdict == "compute"


def opened(ledger: Ledger, step: int = 0) -> dict[int, str]:
    """Shard -> who is at it."""
    return {lease.shard: lease.worker for lease in ledger.leases(step).values() if lease.open}


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_the_shards_of_all_processes_of_the_node_go_back_and_no_others(bench: Bench) -> None:
    ledger = bench.submit("run-1")
    for shard, id in enumerate(("child0", "other", "child1")):
        begin(ledger, shard, id)
    bench.stop()
    assert opened(ledger) == {1: "other"}
    assert ledger.begin(0, 0, worker="other", delivery="again").attempt == 1, "to stop is no failed try"


def test_every_step_under_way_is_looked_at(bench: Bench) -> None:
    """With staleness several are: from the present one to the last that was launched."""
    ledger = bench.submit("run-1", launched=2)
    for step in range(3):
        begin(ledger, step, "child0", step)
    bench.stop()
    assert [opened(ledger, step) for step in range(3)] == [{}, {}, {}]


def test_every_run_is_looked_at_though_one_has_gone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    ledgers = [bench.submit(name) for name in ("run-1", "run-2")]
    for ledger in ledgers:
        begin(ledger, 0, "child1")
    monkeypatch.setattr(bench.registry, "active_runs", lambda: ["run-0", "run-1", "run-2"])
    bench.stop()
    assert [opened(ledger) for ledger in ledgers] == [{}, {}]


def test_a_shard_that_was_taken_back_already_is_its_new_holders(bench: Bench) -> None:
    ledger = bench.submit("run-1")
    begin(ledger, 0, "child0")
    ledger.end_lease(0, 0, worker="child0", delivery="d0", counts=True)
    begin(ledger, 0, "other")
    bench.stop()
    assert opened(ledger) == {0: "other"}
