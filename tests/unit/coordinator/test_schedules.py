"""Schedulers by epochs step where a loop over epochs steps them, and nowhere else."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR, ReduceLROnPlateau

from tests.support import models
from tests.support.inprocess import InProcess, resolved
from torchord.cache.errors import InvalidInput
from torchord.coordinator.compute.optimizer_trial import try_optimizers
from torchord.coordinator.compute.trainer import Trainer
from torchord.coordinator.schedules import each_epoch
from torchord.coordinator.spec.config import TrainingConfig
from torchord.coordinator.spec.recipe import Recipe

CONFIG = TrainingConfig(epochs=5, batch_size=8, shards=2, seed=5)


def recipe(size: int = 20, **arguments: Any) -> Recipe:
    made = partial(each_epoch, **{"scheduler": partial(ExponentialLR, gamma=0.5), **arguments})
    return models.mlp(size=size, optimizer=partial(torch.optim.SGD, lr=0.1), scheduler=made)


@pytest.mark.parametrize("frequency", [1, 2])
@pytest.mark.parametrize("size", [16, 20, 5])
def test_it_steps_where_a_plain_loop_does(frequency: int, size: int) -> None:
    run = InProcess(resolved(recipe(size, frequency=frequency)), CONFIG).train()
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = ExponentialLR(optimizer, gamma=0.5)
    expected = []
    for epoch in range(CONFIG.epochs):
        for _ in range(0, size, CONFIG.batch_size):
            expected.append((optimizer.param_groups[0]["lr"],))
            optimizer.step()
        if (epoch + 1) % frequency == 0:
            scheduler.step()
    assert [report.lr for report in run.reports] == expected
    assert run.trainer.scheduler is not None
    assert run.trainer.scheduler.get_last_lr() == scheduler.get_last_lr()


@pytest.mark.parametrize(
    ("arguments", "config", "text"),
    [
        ({"scheduler": ReduceLROnPlateau}, CONFIG, "cannot step at the end of an epoch"),
        ({"frequency": 0}, CONFIG, "number of epochs from 1, not 0"),
        ({}, TrainingConfig(local_steps=2), "no place in local steps"),
    ],
)
def test_what_cannot_step_by_epochs_is_refused(
    arguments: dict[str, Any], config: TrainingConfig, text: str
) -> None:
    given = recipe(**arguments)
    with pytest.raises(InvalidInput, match=text):
        if config.local_steps > 1:
            try_optimizers(given, config)
        Trainer.build(resolved(given), config)
