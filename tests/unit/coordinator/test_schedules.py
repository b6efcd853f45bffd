"""Schedulers by epochs step where a loop over epochs steps them, and nowhere else."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, ReduceLROnPlateau

from tests.support import models
from tests.support.inprocess import InProcess, resolved
from torchord.cache.errors import InvalidInput
from torchord.coordinator.compute.optimizer_trial import try_optimizers
from torchord.coordinator.compute.trainer import Trainer
from torchord.coordinator.schedules import each_epoch, warmup
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


@pytest.mark.parametrize("following", [None, partial(CosineAnnealingLR, T_max=9)], ids=["alone", "cosine"])
def test_a_warm_up_rises_linearly_and_hands_over(following: Any) -> None:
    made = partial(warmup, steps=4, start_factor=0.2, scheduler=following)
    given = models.mlp(size=40, optimizer=partial(torch.optim.SGD, lr=0.5), scheduler=made)
    run = InProcess(resolved(given), TrainingConfig(epochs=2, batch_size=8, shards=2)).train()
    after = [
        0.5 if following is None else 0.25 * (1 + math.cos(math.pi * step / 9))
        for step in range(len(run.reports))
    ]
    rising = [0.5 * (0.2 + 0.8 * step / 4) for step in range(4)]
    assert [report.lr[0] for report in run.reports] == pytest.approx([*rising, *after][: len(run.reports)])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"steps": 0}, "number of steps from 1, not 0"),
        ({"start_factor": 0.0}, "factor above 0 and up to 1, not 0.0"),
        ({"scheduler": ReduceLROnPlateau}, "ReduceLROnPlateau cannot follow a warm-up"),
        ({"scheduler": partial(each_epoch, scheduler=partial(ExponentialLR, gamma=0.5))}, "EachEpoch cannot"),
    ],
)
def test_what_cannot_follow_a_warm_up_is_refused(arguments: dict[str, Any], text: str) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(InvalidInput, match=text):
        warmup(optimizer, **{"steps": 3, **arguments})
