from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from tests.support import models, recipes_impure
from tests.support.inprocess import resolved, same
from torchord.coordinator.compute.batch import open_dataset
from torchord.coordinator.compute.first_shard import FirstShard, batch_of, digest_of, first_shard
from torchord.coordinator.compute.replica import Replica
from torchord.coordinator.compute.shard import work
from torchord.coordinator.spec.config import TrainingConfig
from torchord.coordinator.spec.plan import Plan

CONFIG = TrainingConfig(batch_size=8, shards=2)


def found(config: TrainingConfig = CONFIG, **changes: Any) -> FirstShard:
    """What a process makes of the first shard."""
    recipe = resolved(recipes_impure.recipe(**changes))
    data = open_dataset(recipe, config)
    return first_shard(Replica.build(recipe, config), recipe, Plan(len(data), config), data)


@pytest.mark.parametrize(
    "changes",
    [{}, {"local_steps": 2, "compression": "int8", "staleness": 1}, {"precision": "fp16"}, {"threads": 2}],
    ids=["plain", "local, compressed, stale", "half precision", "two threads"],
)
def test_two_processes_find_the_same(changes: dict[str, Any]) -> None:
    config = replace(CONFIG, **changes)
    one = found(config)
    assert one.difference(found(config)) == ""
    assert one.weights.keys() >= {"first.weight", "first.bias"}
    assert one.batch.keys() == {"0", "1"}
    assert one.gradient.keys() >= {"first.weight", "the loss"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": partial(models.Mlp, hidden=8)}, "the initial value of 'first.weight' differs"),
        ({"dataset": partial(models.points, 64, 3)}, "of the first batch, '0' differs"),
        ({"loss": recipes_impure.salted}, "the first shard's gradient of 'first.weight' differs"),
    ],
    ids=["weights", "data", "loss"],
)
def test_the_first_tensor_that_differs_is_named(changes: dict[str, Any], said: str) -> None:
    assert found().difference(found(**changes)) == said


def test_what_only_one_has_looked_at_is_no_difference() -> None:
    one = found()
    assert one.difference(FirstShard(one.weights)) == FirstShard().difference(one) == ""


def test_the_replica_computes_afterwards_as_if_nothing_had_been() -> None:
    recipe = resolved(replace(models.cnn(32), evaluation=None))
    data = open_dataset(recipe, CONFIG)
    plan = Plan(len(data), CONFIG)
    used, fresh = Replica.build(recipe, CONFIG), Replica.build(recipe, CONFIG)
    before = {name: digest_of(tensor) for name, tensor in used.state_tensors().items()}
    version = fresh.pack()
    first_shard(used, recipe, plan, data)
    assert used.loaded is None
    done = []
    for replica in (used, fresh):
        replica.attach(version.clone())
        assert {name: digest_of(tensor) for name, tensor in replica.state_tensors().items()} == before
        done.append(work(replica, recipe, plan, data, 1, 0, None))
    assert all(same(value, done[1].payload[name]) for name, value in done[0].payload.items())


@dataclass
class Sample:
    numbers: Any
    note: str = "one"


def test_a_batch_is_looked_into_and_what_is_no_number_is_left_out() -> None:
    """A path or a time of a sample may well differ from machine to machine."""
    batch = {
        "ids": [torch.arange(3), np.ones(2)],
        "path": "/tmp/a",
        "sample": Sample(torch.zeros(2)),
        "words": np.array(["a"]),
        "sparse": torch.eye(2).to_sparse(),
    }
    recipe = replace(resolved(recipes_impure.recipe()), collate=lambda samples: batch)
    data = models.points(16)
    digests = batch_of(recipe, Plan(16, CONFIG), data)
    assert digests.keys() == {"ids.0", "ids.1", "sample.numbers"}


def test_a_digest_covers_dtype_shape_and_bits_and_no_layout() -> None:
    value = torch.arange(6.0).reshape(2, 3)
    same_values = value.t().contiguous().t()
    assert digest_of(value) == digest_of(same_values)
    others = (value.reshape(3, 2), value.int(), value.double(), value + 1e-7, -value * 0)
    assert len({digest_of(value), *map(digest_of, others), digest_of(value * 0)}) == 7
    assert digest_of(torch.tensor(1.0, dtype=torch.bfloat16)) != digest_of(torch.tensor([1.0]))
    assert digest_of(torch.empty(0)) == digest_of(torch.empty(0))
