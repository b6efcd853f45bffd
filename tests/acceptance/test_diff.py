"""`torchord diff`: the first step, shard and tensor in which two runs differ."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import models, recipes_deciding
from tests.support.shuffle import Evaluated
from torchord import Master, Recipe, Run, TrainingConfig
from torchord.cache.settings import Settings
from torchord.coordinator.cli import main
from torchord.coordinator.commands.common import BAD, NOT_FOUND, OK
from torchord.coordinator.master.differing import Difference, differ, parted
from torchord.coordinator.spec.plan import Plan

CONFIG = TrainingConfig(
    epochs=3, batch_size=8, shards=2, seed=3, checkpoint_every=4, audit_fraction=0, probe=False
)
"""Fifteen steps of two shards."""

SGD = partial(torch.optim.SGD, lr=0.05)
RECIPE = models.mlp(optimizer=SGD, evaluation=None, metrics=None)

Done = Callable[..., Run]


@pytest.fixture
def done(redis_url: str, tmp_path: Path) -> Done:
    """A function (name, recipe, changes of the config) -> a run that is done."""

    def make(name: str, recipe: Recipe = RECIPE, **changes: Any) -> Run:
        config = dataclasses.replace(CONFIG, **changes)
        run = Master(redis_url, checkpoint_dir=str(tmp_path)).submit(recipe, config, name=name)
        Evaluated(Settings(url=redis_url, checkpoint_dir=str(tmp_path)), run, None).deliver()
        return run

    return make


def place_of(sample: int) -> tuple[int, int]:
    """The first (step, shard) that has a sample."""
    plan = Plan(40, CONFIG)
    return next(
        (step, shard)
        for step in range(plan.total_steps)
        for shard in range(2)
        if sample in plan.indices(step, shard)
    )


def test_runs_that_are_the_same(done: Done) -> None:
    found = differ(done("a"), done("b", epochs=2))
    assert (found.same, found.compared, found.step) == (True, (1, 10), None)
    assert found.said == ("the same bytes from version 1 to 10", "a has 15 steps and b has 10")


@pytest.mark.parametrize("sample", [0, 7, 25])
def test_one_changed_sample_is_found_in_step_and_shard(done: Done, sample: int) -> None:
    changed = dataclasses.replace(RECIPE, dataset=partial(recipes_deciding.spoilt, size=40, sample=sample))
    found = differ(done("a"), done("b", changed))
    assert (found.same, (found.step, found.shard)) == (False, place_of(sample))
    assert found.tensor == "first.weight"
    assert "the first tensor that differs is 'first.weight'" in found.said[-1]


def test_another_learning_rate_shows_in_the_update(done: Done) -> None:
    run = done("a")
    found = differ(run, done("b", dataclasses.replace(RECIPE, optimizer=partial(torch.optim.SGD, lr=0.06))))
    assert (found.step, found.shard, found.tensor) == (0, None, "first.weight")
    assert "learning rates [0.05] in a and [0.06] in b" in found.said
    assert found.said[-1].startswith("of what the step makes, the first tensor")


def test_a_schedule_shows_in_the_step_that_it_changes(done: Done) -> None:
    later = partial(torch.optim.lr_scheduler.StepLR, step_size=6)
    found = differ(done("a"), done("b", dataclasses.replace(RECIPE, scheduler=later)))
    assert (found.step, found.shard, found.tensor) == (6, None, "first.weight")


def test_other_weights_at_the_start_are_named(done: Done) -> None:
    found = differ(done("a"), done("b", dataclasses.replace(RECIPE, model=recipes_deciding.other_start)))
    assert (found.step, found.tensor) == (0, "second.bias")
    assert found.said[-1].startswith("it starts from other weights: the first tensor that differs")


def test_another_number_of_shards(done: Done) -> None:
    found = differ(done("a"), done("b", shards=3))
    assert (found.step, found.shard) == (0, None)
    assert "it has 2 shards in a and 3 in b" in found.said


def test_a_fork_differs_from_where_it_was_changed(done: Done, redis_url: str, tmp_path: Path) -> None:
    run = done("a")
    fork = run.fork(version=8, optimizer=partial(torch.optim.SGD, lr=0.5), name="b")
    Evaluated(Settings(url=redis_url, checkpoint_dir=str(tmp_path)), fork, None).deliver()
    found = differ(run, fork)
    assert (found.compared, found.step, found.shard, found.tensor) == ((9, 15), 8, None, "first.weight")


def test_a_ledger_that_is_not_what_is_computed_here_is_named(done: Done) -> None:
    one, other = done("a"), done("b")
    entries = [{e.version: e for e in run._entries(run._ledger.head())} for run in (one, other)]
    slots = entries[1][5].slots
    bent = dataclasses.replace(
        entries[1][5], slots=(slots[0], dataclasses.replace(slots[1], digest="0" * 32))
    ).sealed()
    assert parted(entries[0], {**entries[1], 5: bent}, ("a", "b")).shard == 1
    other._ledger.client.hset(other._ledger.keys.ledger, "5", bent.to_json())
    found = differ(one, other)
    assert (found.step, found.shard, found.tensor) == (4, 1, None)
    assert "computed here, both runs' shard has the same bytes" in found.said
    assert "step 4, shard 1: computing it again gives other bytes" in found.said[-1]


def test_no_step_in_common() -> None:
    assert parted({}, {}, ("a", "b")) == Difference(True, None, said=("they have no step in common",))


def test_the_command(done: Done, redis_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done("a")
    done("b", seed=4)
    where = ["--url", redis_url, "--checkpoint-dir", str(tmp_path)]
    assert main(["diff", "a", "a", *where]) == OK
    assert capsys.readouterr().out.startswith("a and a: no difference\n")
    assert main(["diff", "a", "b", *where]) == BAD
    out = capsys.readouterr().out
    assert "the first step that differs is step 0\n" in out
    assert "  config.seed: 3 and 4\n" in out
    assert max(map(len, out.splitlines())) <= 80
    assert main(["diff", "a", "b", "--quick", "--json", *where]) == BAD
    found = json.loads(capsys.readouterr().out)
    assert (found["step"], found["shard"], found["tensor"]) == (0, 0, None)
    assert found["settings"] == [{"name": "config.seed", "values": ["3", "4"]}]
    assert main(["diff", "a", "nobody", *where]) == NOT_FOUND
