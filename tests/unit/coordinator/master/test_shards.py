"""shards="auto": a number by the fleet when a run is submitted, and the same one ever after."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.support import models
from tests.support.control import worker
from torchord import Master, TrainingConfig
from torchord.cache.errors import ConfigError
from torchord.cache.ledger.workers import Registry, WorkerInfo
from torchord.cache.servers.redis_client import connect
from torchord.coordinator.master.shards import fixed
from torchord.coordinator.messages.task_names import GRADIENTS, UPDATES

CONFIG = TrainingConfig(batch_size=64, shards="auto")
SHARED = "torch 2.13, portable x86-64"


@dataclass(frozen=True)
class Starting:
    """A worker of a cluster of this program that is not ready yet."""

    name: str
    queues: tuple[str, ...] = (GRADIENTS,)

    def serves(self, queue: str) -> bool:
        return queue in self.queues

    def ready(self) -> bool:
        return False

    def failure(self) -> str | None:
        return None


def fleet(*clients: tuple[str, str], **more: Any) -> dict[str, WorkerInfo]:
    """Living Clients of (id, environment), and a training server."""
    there = {id: worker(id, queues=(GRADIENTS,), environment=kind, **more) for id, kind in clients}
    return {**there, "s0": worker("s0", queues=(UPDATES,), environment="torch")}


def alike(count: int) -> dict[str, WorkerInfo]:
    return fleet(*((f"w{i}", "torch") for i in range(count)))


@pytest.mark.parametrize(
    ("clients", "fields", "shards"),
    [
        (1, {}, 2),
        (3, {}, 6),
        (4, {}, 8),
        (6, {}, 8),
        (9, {}, 18),
        (6, {"fan_in": 32}, 12),
        (3, {"batch_size": 7}, 3),
        (3, {"batch_size": 1}, 1),
        (0, {}, 4),
        (3, {"shards": 5}, 5),
        (6, {"max_shard_norm": 1.0}, 8),
    ],
)
def test_two_for_each_client(clients: int, fields: dict[str, Any], shards: int) -> None:
    config = replace(CONFIG, **fields)
    assert fixed(config, alike(clients)) == replace(config, shards=shards)


def test_those_count_that_will_compute_it() -> None:
    mixed = fleet(("w0", "a"), ("w1", "b"), ("w2", "b"), ("w3", SHARED), ("parent", ""))
    assert fixed(CONFIG, mixed).shards == 4
    assert fixed(replace(CONFIG, skew="admit"), mixed).shards == 8
    assert fixed(replace(CONFIG, hardware="portable"), mixed).shards == 2


def test_workers_that_are_starting_count_once() -> None:
    started = [Starting("client1"), Starting("w0"), Starting("server", (UPDATES,))]
    assert fixed(CONFIG, {}, started).shards == 4
    there = {"w0": replace(worker("w0", queues=(GRADIENTS,), environment="torch"), node="w0@here")}
    assert fixed(CONFIG, there, started).shards == 4


def test_what_does_not_go_with_so_many_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_shard_norm looks at each shard's gradient"):
        fixed(replace(CONFIG, max_shard_norm=1.0, fan_in=2), alike(3))
    with pytest.raises(ConfigError, match="shards='auto' is a number from when the run is submitted"):
        assert CONFIG.shard_count


def test_a_run_keeps_its_number_whatever_the_fleet_is_then(redis_url: str, tmp_path: Path) -> None:
    registry = Registry(connect(redis_url), redis_url)
    for info in alike(3).values():
        registry.beat(info)
    master = Master(redis_url, checkpoint_dir=tmp_path)
    run = master.submit(models.mlp(), replace(CONFIG, batch_size=16), name="auto")
    assert run._ledger.spec()["config"]["shards"] == 6
    registry.beat(worker("w9", queues=(GRADIENTS,), environment="torch"))
    again = master.submit(models.mlp(), replace(CONFIG, batch_size=16), name="auto")
    assert again._ledger.spec()["config"]["shards"] == 6
