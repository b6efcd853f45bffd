"""Batches that are read ahead, while the update runs, change nothing but the time."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from tests.support import models, reference
from tests.support.fleet import fleet
from torchord import TrainingConfig

RECIPE = models.cnn(dataset=partial(models.SlowImages, size=32))
READ_AHEAD = "'batch': 'read ahead'"


@pytest.mark.parametrize("workers", [1, 2])
def test_augmented_batches_that_were_read_ahead(tmp_path: Path, workers: int) -> None:
    """As many shards as Clients, each of which is idle during the update; and fewer Clients than shards."""
    with fleet(tmp_path, workers=workers) as one:
        for shards in (2, 3):
            config = TrainingConfig(epochs=4, batch_size=8, shards=shards, seed=3)
            run, trained = one.train(RECIPE, config, f"ahead-{shards}")
            assert reference.bits(trained.module) == reference.average(RECIPE, config).bits
            assert run.verify().ok
            receipts = [line for name in one.clients for line in one.log(name).splitlines()]
            read = sum(READ_AHEAD in line and f"'run': 'ahead-{shards}'" in line for line in receipts)
            assert 0 < read < len(run.history()) * shards
