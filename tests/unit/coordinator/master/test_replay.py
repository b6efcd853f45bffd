"""Steps computed again from a checkpoint, wherever its reader has put the bytes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support import models
from tests.support.inprocess import resolved, same
from torchord.cache.files.checkpoint import Checkpoint
from torchord.cache.tensors.codec import starts_aligned
from torchord.coordinator.compute.shard import ShardWork
from torchord.coordinator.compute.trainer import Trainer
from torchord.coordinator.master.replay import Replay
from torchord.coordinator.spec.config import TrainingConfig
from torchord.coordinator.spec.plan import Plan

CONFIG = TrainingConfig(epochs=2, batch_size=8, shards=2, staleness=1)
STEP = 3


def shifted(flat: Tensor, nbytes: int) -> Tensor:
    """The same bytes, so far behind a boundary of 64 bytes."""
    room = torch.empty(flat.numel() + 64, dtype=torch.uint8)
    start = (nbytes - room.data_ptr()) % 64
    return room[start : start + flat.numel()].copy_(flat)


def shard(nbytes: int) -> ShardWork:
    """One shard of a stale step, computed at a version that comes from a checkpoint's window."""
    recipe = resolved(models.mlp(24))
    trainer = Trainer.build(recipe, CONFIG)
    flat = shifted(trainer.replica.pack(None), nbytes)
    assert starts_aligned(flat) is (nbytes == 0)
    window = {STEP - 1: {"flat": flat, "slots": {}}}
    kept = Checkpoint(STEP, trainer.replica.state_tensors(), {**trainer.state(), "window": window}, {})
    checkpoints: Any = SimpleNamespace(versions=lambda: [STEP], load=lambda version: kept)
    replay = Replay(recipe, Plan(24, CONFIG), checkpoints, {})
    replay._go_back(STEP)
    return replay._shard(STEP, 0)


@pytest.mark.parametrize("nbytes", [8, 16, 40])
def test_a_version_of_the_window_may_lie_anywhere(nbytes: int) -> None:
    there, here = shard(0), shard(nbytes)
    assert here.payload.keys() == there.payload.keys()
    assert all(same(here.payload[name], there.payload[name]) for name in there.payload)
