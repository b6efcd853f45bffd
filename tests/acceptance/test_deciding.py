"""Runs that end by their own rules and keep their best versions: the same whoever dies, as in plain loops."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F

from tests.support import inprocess, models
from tests.support import recipes_step_metrics as stepping
from tests.support.one_process import DECIDING, RUN, Fleet, Outcome
from tests.support.shuffle import Evaluated
from torchord import (
    Keep,
    Master,
    MaxSeconds,
    MaxSteps,
    NotFinite,
    Plateau,
    Recipe,
    Threshold,
    TrainingConfig,
)
from torchord.cache.errors import InvalidInput, RunError
from torchord.cache.files.checkpoint import CheckpointStore
from torchord.cache.settings import Settings
from torchord.coordinator.averages import ema, swa
from torchord.coordinator.master.extending import extend
from torchord.coordinator.master.verdicts import unfounded

CONFIG = TrainingConfig(
    epochs=8,
    batch_size=8,
    shards=2,
    seed=3,
    evaluate_every=2,
    checkpoint_every=5,
    keep_checkpoints=1,
    audit_fraction=0,
)
"""Forty steps."""

RECIPE = models.mlp(optimizer=partial(torch.optim.SGD, lr=0.9))
"""Whose evaluations get better and worse."""


@dataclass
class Trial:
    """What a run came to, and what it decided."""

    outcome: Outcome
    stopped: dict[str, Any] | None
    evaluations: dict[int, dict[str, float]]
    checkpoints: list[int]
    events: list[str]

    @property
    def decided(self) -> tuple[Any, ...]:
        """What has to be the same whatever happened."""
        return self.outcome.bits, self.outcome.losses, self.stopped, self.evaluations, self.checkpoints


def trial(folder: Path, recipe: Recipe, config: TrainingConfig, **options: Any) -> Trial:
    """One run with two Clients."""
    fleet = Fleet(str(folder), 2, **options)
    outcome = fleet.run(recipe, config)
    assert outcome.state == "done", outcome.error
    head = fleet.ledger.head()
    assert head.version == head.total_steps
    store = CheckpointStore(str(folder), RUN, head.incarnation)
    events = [event.type for event in fleet.ledger.read_events("0-0")]
    return Trial(outcome, head.stopped, fleet.ledger.evaluations(), store.versions(), events)


def evaluated(model: torch.nn.Module) -> dict[str, float]:
    """What the whole evaluation dataset measures of a model, in plain PyTorch."""
    inputs, targets = models.points(20, seed=1).tensors
    judged = copy.deepcopy(model).eval()
    with torch.no_grad():
        outputs = judged(inputs)
    hits = (outputs.argmax(1) == targets).float().mean()
    return {"loss": float(F.cross_entropy(outputs, targets)), "accuracy": float(hits)}


def plainly(recipe: Recipe, config: TrainingConfig, every: int = 2) -> dict[int, dict[str, float]]:
    """The figures of a plain loop that never stops, at each version that is evaluated."""
    run = inprocess.InProcess(inprocess.resolved(recipe), config)
    found = {0: evaluated(run.trainer.replica.model)}
    for step in range(run.plan.total_steps):
        run.step(step)
        if (step + 1) % every == 0:
            found[step + 1] = evaluated(run.trainer.replica.model)
    return found


def plain_plateau(figures: dict[int, float], patience: int, min_delta: float) -> int:
    """Where a plain loop with early stopping ends."""
    best, waited = math.inf, 0
    for version, value in figures.items():
        if value < best - min_delta:
            best, waited = value, 0
        elif (waited := waited + 1) == patience:
            return version
    raise AssertionError("it never stops")


def test_plateau_stops_where_a_plain_loop_does_and_its_bits_are_that_loops(tmp_path: Path) -> None:
    figures = {v: each["loss"] for v, each in plainly(RECIPE, CONFIG).items() if v > 0}
    stop = plain_plateau(figures, 3, 0.01)
    assert 6 < stop < 40
    config = dataclasses.replace(CONFIG, stop_when=Plateau(patience=3, min_delta=0.01))
    found = trial(tmp_path, RECIPE, config)
    assert found.stopped is not None
    assert found.stopped["version"] == stop
    assert len(found.outcome.losses) == stop
    assert "eval loss has not improved by 0.01 in 3 evaluations; best" in found.stopped["reason"]
    plain = inprocess.InProcess(inprocess.resolved(RECIPE), CONFIG).train(stop=stop)
    expected = plain.trainer.replica.state_tensors()
    assert all(inprocess.same(expected[name], tensor) for name, tensor in found.outcome.tensors.items())
    assert found.events.count("stopped") == 1
    assert found.events[-1] == "done"


@pytest.mark.parametrize(
    ("rule", "version", "reason"),
    [
        (Threshold("accuracy", 0.7, mode="max"), None, "eval accuracy is"),
        (Plateau("loss", patience=2, over="steps"), None, "step loss has not improved in 2 steps"),
        (MaxSteps(7), 7, "7 steps are taken, of 40"),
        (MaxSeconds(1e-9), 1, "s have passed"),
        ((MaxSteps(9), Threshold("loss", 1e9)), 2, "eval loss is"),
        (Threshold("loss", 1e9, over="steps"), 1, "step loss is"),
    ],
    ids=["threshold", "plateau of steps", "steps", "seconds", "the first of several", "at once"],
)
def test_each_rule_ends_the_run_where_it_says(
    tmp_path: Path, rule: Any, version: int | None, reason: str
) -> None:
    found = trial(tmp_path, RECIPE, dataclasses.replace(CONFIG, stop_when=rule))
    assert found.stopped is not None
    assert reason in found.stopped["reason"]
    if version is None and "accuracy" in reason:
        accuracies = {v: each["accuracy"] for v, each in plainly(RECIPE, CONFIG).items() if v > 0}
        version = next(v for v, accuracy in accuracies.items() if accuracy >= 0.7)
    elif version is None:
        losses = inprocess.InProcess(inprocess.resolved(RECIPE), CONFIG).train(stop=20).losses
        version = plain_plateau(dict(enumerate(losses, 1)), 2, 0.0)
    assert found.stopped["version"] == version == len(found.outcome.losses)


@pytest.mark.parametrize("over", ["evaluations", "steps"])
def test_rules_read_what_steps_measure(tmp_path: Path, over: str) -> None:
    recipe = stepping.recipe(stepping.accuracy, evaluation=models.points)
    rule = Threshold("of class 0", 0.0, mode="max", over=over)  # met as soon as it is measured
    keep = Keep("accuracy", mode="max")
    config = dataclasses.replace(CONFIG, stop_when=rule, keep=keep)
    fleet = Fleet(str(tmp_path), 2)
    fleet.run(recipe, config)
    head = fleet.ledger.head()
    assert head.stopped is not None
    assert head.stopped["version"] == {"steps": 1, "evaluations": 2}[over]
    assert f"{over[:4]} of class 0 is" in head.stopped["reason"]
    entries = fleet.ledger.entries(1, head.version)
    assert unfounded(head, config, fleet.ledger.evaluations(), entries) == []
    later = dataclasses.replace(head, stopped={**head.stopped, "version": head.version + 1})
    assert unfounded(later, config, fleet.ledger.evaluations(), entries) != []


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"stop_when": Plateau("f1")}, "Plateau reads 'f1', which no evaluation measures: there are"),
        ({"stop_when": Plateau("f1", over="steps")}, "Plateau reads 'f1', which no step measures: there are"),
        ({"keep": Keep("f1")}, "keep reads 'f1', which no evaluation measures: there are"),
    ],
    ids=["evaluations", "steps", "keep"],
)
def test_a_rule_over_what_nothing_measures_ends_the_run_with_a_sentence(
    tmp_path: Path, given: dict[str, Any], sentence: str
) -> None:
    recipe = stepping.recipe(stepping.accuracy, evaluation=models.points)
    fleet = Fleet(str(tmp_path), 2)
    outcome = fleet.run(recipe, dataclasses.replace(CONFIG, **given))
    assert outcome.state == "failed"
    assert sentence in outcome.error
    assert len(outcome.losses) <= CONFIG.evaluate_every


def test_a_run_whose_rules_are_never_met_has_the_bits_of_one_without(tmp_path: Path) -> None:
    rules = (Plateau(patience=99), Threshold("loss", -1.0), MaxSteps(999), MaxSeconds(1e9), NotFinite())
    plain = trial(tmp_path / "plain", RECIPE, CONFIG)
    found = trial(tmp_path / "ruled", RECIPE, dataclasses.replace(CONFIG, stop_when=rules))
    assert found.stopped is None
    assert found.decided == plain.decided


def test_version_0_is_evaluated_and_may_be_the_last(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, evaluate_at_start=True, stop_when=Threshold("loss", 1e9))
    found = trial(tmp_path, RECIPE, config)
    assert found.stopped is not None
    assert found.stopped["version"] == 0
    assert found.evaluations[0]["loss"] == pytest.approx(
        plainly(RECIPE, CONFIG, every=99)[0]["loss"], rel=1e-5
    )


def test_a_step_that_is_not_finite_ends_the_run_with_the_version_before(tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, optimizer=partial(torch.optim.SGD, lr=1e30))
    found = trial(tmp_path, recipe, dataclasses.replace(CONFIG, evaluate_every=None, stop_when=NotFinite()))
    assert found.stopped is not None
    assert "has loss nan" in found.stopped["reason"]
    assert all(map(math.isfinite, found.outcome.losses))
    assert len(found.outcome.losses) == found.stopped["version"]


@pytest.mark.parametrize("n", [1, 2])
def test_the_best_versions_are_kept_beside_the_newest(tmp_path: Path, n: int) -> None:
    figures = {v: each["accuracy"] for v, each in plainly(RECIPE, CONFIG).items() if v > 0}
    best = sorted(figures, key=lambda version: (-figures[version], version))[:n]
    found = trial(tmp_path, RECIPE, dataclasses.replace(CONFIG, keep=Keep("accuracy", mode="max", n=n)))
    assert found.checkpoints == sorted({*best, 40})
    assert found.outcome.losses == trial(tmp_path / "plain", RECIPE, CONFIG).outcome.losses


KILLS = [
    *itertools.product(DECIDING[:3], (1, 3)),
    *itertools.product(DECIDING[3:], (1,)),
    *itertools.product(("server.after_commit", "server.before_launch"), (2, 6)),
    *itertools.product(
        ("server.before_checkpoint", "server.mid_checkpoint", "server.after_checkpoint"), (1, 3)
    ),
    ("server.before_finish", 1),
    ("server.after_finish", 1),
]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Trial:
    """The run that nothing disturbs."""
    found = trial(tmp_path_factory.mktemp("undisturbed"), RECIPE, DECIDED)
    assert found.stopped is not None
    (best,) = Keep().best(found.evaluations)
    assert 0 < best < found.stopped["version"] - 2
    assert {best, found.stopped["version"]} <= set(found.checkpoints)
    return found


DECIDED = dataclasses.replace(
    CONFIG, stop_when=Plateau(patience=3, min_delta=0.01), keep="best", evaluate_at_start=True
)


@pytest.mark.parametrize(("point", "count"), KILLS)
def test_whoever_is_killed_the_verdict_the_kept_version_and_the_bits_are_the_same(
    tmp_path: Path, undisturbed: Trial, point: str, count: int
) -> None:
    found = trial(tmp_path, RECIPE, DECIDED, kill=(point, count), seed=count)
    assert found.outcome.kills == (point,)
    assert found.decided == undisturbed.decided
    assert found.events.count("stopped") == 1


@pytest.mark.parametrize("staleness", [0, 2])
def test_no_step_behind_the_verdict_is_committed_whatever_is_under_way(
    tmp_path: Path, staleness: int
) -> None:
    config = dataclasses.replace(DECIDED, staleness=staleness)
    found = trial(tmp_path / "one", RECIPE, config, seed=4)
    assert found.decided == trial(tmp_path / "other", RECIPE, config, seed=9).decided
    assert found.stopped is not None
    assert found.stopped["version"] == len(found.outcome.losses) == max(found.evaluations)


# --- through Redis, as a person uses them -------------------------------------------------------------------


@pytest.fixture
def submit(redis_url: str, tmp_path: Path) -> Callable[..., Evaluated]:
    """A function (config, name, recipe) -> a run that is submitted and not begun."""

    def make(config: TrainingConfig, name: str = "decided", recipe: Recipe = RECIPE) -> Evaluated:
        run = Master(redis_url, checkpoint_dir=str(tmp_path)).submit(recipe, config, name=name)
        return Evaluated(Settings(url=redis_url, checkpoint_dir=str(tmp_path)), run, None)

    return make


def test_the_reason_is_told_and_the_best_version_given_back(submit: Callable[..., Evaluated]) -> None:
    lab = submit(dataclasses.replace(CONFIG, stop_when=Plateau(patience=3, min_delta=0.01), keep="best"))
    trained = lab.end()
    status = lab.run.status()
    assert trained.reason == status.reason
    assert status.reason in repr(status)
    assert status.reason.startswith("stopped: eval loss has not improved by 0.01 in 3 evaluations; best")
    stopped = [event for event in lab.run.events() if event.type == "stopped"]
    assert [event.data["version"] for event in stopped] == [trained.version]
    best = lab.run.best()
    losses = {version: found["loss"] for version, found in trained.evaluations.items()}
    assert best.version == min(losses, key=losses.__getitem__) < trained.version
    assert best.metrics == trained.evaluations[best.version]
    plain = inprocess.InProcess(inprocess.resolved(RECIPE), CONFIG).train(stop=best.version)
    expected = plain.trainer.replica.model.state_dict()
    for state in (best.module.state_dict(), lab.run.state_dict("best")):
        assert all(inprocess.same(expected[name], tensor) for name, tensor in state.items())
    assert {best.version, trained.version} <= set(lab.run._ledger.versions()), "predict has them, too"
    lab.run._ledger.client.hset(lab.run._ledger.keys.evaluations, str(best.version), '{"loss": 1e9}')
    (problem,) = lab.run.verify().problems
    assert "which its figures do not say" in problem or "went on behind version" in problem


@pytest.mark.parametrize("average", [partial(ema, decay=0.8), partial(swa, start=4)], ids=["ema", "swa"])
def test_the_best_version_is_the_best_by_its_averaged_weights(
    submit: Callable[..., Evaluated], average: Any
) -> None:
    recipe = dataclasses.replace(RECIPE, average=average)
    config = dataclasses.replace(CONFIG, epochs=4, keep="best", evaluate_at_start=True)
    lab = submit(config, recipe=recipe)
    trained = lab.end()
    losses = {version: found["loss"] for version, found in trained.evaluations.items()}
    best = lab.run.best()
    assert best.version == min(losses, key=losses.__getitem__)
    assert evaluated(best.module)["loss"] == pytest.approx(losses[best.version], rel=1e-5)
    plain = inprocess.InProcess(inprocess.resolved(recipe), config).train(stop=best.version)
    weights = plain.trainer.replica.model.state_dict()
    trained_ones = lab.run.state_dict("best", averaged=False)
    assert all(inprocess.same(weights[name], tensor) for name, tensor in trained_ones.items())
    plain.trainer.replica.put_average()
    averaged = plain.trainer.replica.model.state_dict()
    assert all(inprocess.same(averaged[name], t) for name, t in best.module.state_dict().items())


def test_a_run_that_keeps_nothing_says_how_it_would(submit: Callable[..., Evaluated]) -> None:
    lab = submit(dataclasses.replace(CONFIG, epochs=1))
    lab.end()
    with pytest.raises(InvalidInput, match=r"submit it with TrainingConfig\(keep='best'\)"):
        lab.run.best()


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        (RECIPE, {}),
        (models.mlp(), {"compression": "topk:0.1"}),
        (models.cnn(), {"precision": "fp16", "loss_scale": 8.0}),
        (models.mlp(average=partial(ema, decay=0.5)), {"keep": "best", "evaluate_every": 3}),
    ],
    ids=["sgd", "error feedback", "loss scale and scheduler", "an average"],
)
def test_a_run_that_is_extended_ends_with_the_bits_of_a_longer_one(
    submit: Callable[..., Evaluated], recipe: Recipe, changes: dict[str, Any]
) -> None:
    config = dataclasses.replace(CONFIG, **{"evaluate_every": None, "epochs": 3, **changes})
    longer = submit(config, "longer", recipe).end()
    lab = submit(dataclasses.replace(config, epochs=1), "extended", recipe)
    lab.end()
    lab.run.extend(epochs=2)
    assert lab.run.status().state == "pending"
    lab.post.callbacks += 1
    extended = lab.end()
    assert [report.loss for report in extended.history] == [report.loss for report in longer.history]
    expected = longer.module.state_dict()
    assert all(inprocess.same(expected[name], t) for name, t in extended.module.state_dict().items())
    assert "extended" in [event.type for event in lab.run.events()]
    assert submit(config, "extended", recipe).run.status().state == "done", "it is that run now"
    with pytest.raises(RunError, match="at least 1"):
        lab.run.extend(epochs=0)


def test_what_cannot_be_extended_says_why(submit: Callable[..., Evaluated]) -> None:
    lab = submit(dataclasses.replace(CONFIG, stop_when=MaxSteps(3)))
    with pytest.raises(RunError, match="is pending; only a run that is done is extended"):
        lab.run.extend(epochs=1)
    lab.end()
    with pytest.raises(RunError, match=r"ended by one of its rules \(3 steps are taken, of 40\).*fork"):
        lab.run.extend(epochs=1)


def test_a_schedule_that_knows_its_length_is_named(
    submit: Callable[..., Evaluated], caplog: pytest.LogCaptureFixture
) -> None:
    scheduler = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=5)
    recipe = dataclasses.replace(RECIPE, scheduler=scheduler)
    lab = submit(dataclasses.replace(CONFIG, epochs=1), recipe=recipe)
    lab.end()
    lab.run.extend(epochs=1)
    assert "its scheduler has T_max=5, which stays" in caplog.text


@pytest.mark.parametrize(
    "point",
    ["server.after_acquire", "server.before_initialise", "server.after_initialise", "server.after_commit"],
)
def test_a_kill_while_a_run_is_extended_changes_nothing(tmp_path: Path, point: str) -> None:
    config = dataclasses.replace(CONFIG, evaluate_every=None, epochs=2)
    longer = trial(tmp_path / "longer", RECIPE, config)
    fleet = Fleet(str(tmp_path / "extended"), 2, kill=(point, 7 if point == "server.after_commit" else 2))
    assert fleet.run(RECIPE, dataclasses.replace(config, epochs=1)).kills == ()
    fleet._over.clear()
    extend(fleet.ledger, 1)
    fleet.post.advance(RUN)
    with patch("torchord.coordinator.runtime.context.fingerprint", return_value=""):
        fleet._until_rest()
    fleet._over.set()
    found = fleet._outcome()
    assert found.kills == (point,)
    assert (found.bits, found.losses) == (longer.outcome.bits, longer.outcome.losses)
