"""What a step measures beside its loss is what a plain loop over the whole batches measures, on any fleet."""

from __future__ import annotations

import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import default_collate

from tests.support import recipes_step_metrics as recipes
from tests.support.inprocess import InProcess, resolved
from tests.support.one_process import Fleet
from torchord import Recipe, TrainingConfig
from torchord.cache.errors import InvalidInput
from torchord.coordinator.compute.inference import combine, evaluate
from torchord.coordinator.compute.probe import probe
from torchord.coordinator.compute.shard import work
from torchord.coordinator.compute.step_metrics import Measure, combined
from torchord.coordinator.master.reports import StepReport
from torchord.coordinator.runtime.step_result import event_of
from torchord.coordinator.spec.plan import Plan

CONFIG = TrainingConfig(epochs=2, batch_size=8, shards=3, seed=1)


def metrics_of(value: Any) -> dict[str, float]:
    """What a step returned beside its loss, as a plain loop reads it."""
    found = {}
    for name, each in value[1].items():
        if isinstance(each, tuple):
            each = Measure(*each)
        if not isinstance(each, Measure):
            each = Measure(each)
        number = torch.as_tensor(each.value).detach().double()
        if each.weight is not None:
            number = number / torch.as_tensor(each.weight)
        found[name] = float({"exp": torch.exp, "sqrt": torch.sqrt}.get(each.how, torch.clone)(number))
    return found


def plain(given: Recipe, config: TrainingConfig, model: nn.Module) -> list[dict[str, float]]:
    """Train a model on the whole batches of a run; returns what each measured."""
    data, collate = given.dataset(), given.collate or default_collate  # type: ignore[operator]
    optimizer, found = given.optimizer(model.parameters()), []  # type: ignore[operator]
    plan = Plan(len(data), config)
    for step in range(plan.total_steps):
        batch = collate(  # type: ignore[operator]
            [data[int(i)] for shard in range(plan.shards_in(step)) for i in plan.indices(step, shard)]
        )
        value = given.step(model, batch) if given.step else given.loss(model(batch[0]), batch[1])  # type: ignore[operator,misc]
        loss = value[0][0] / value[0][1] if isinstance(value[0], tuple) else value[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(metrics_of(value))
    return found


RECIPES: dict[str, Recipe] = {
    "accuracy": recipes.recipe(recipes.accuracy),
    "a perplexity": recipes.language(),
    "a perplexity beside (sum, weight)": recipes.language(recipes.summed),
    "two losses of a GAN": recipes.recipe(recipes.gan, model=recipes.Gan),
    "a reward": recipes.recipe(recipes.reward),
    "beside a loss": recipes.recipe(None, loss=recipes.beside_a_loss),
}


@pytest.mark.parametrize("name", RECIPES)
def test_metrics_are_those_of_the_whole_batch(name: str, tmp_path: Path) -> None:
    given = RECIPES[name]
    start = InProcess(resolved(given), CONFIG).trainer.replica.model.state_dict()
    model = given.model()  # type: ignore[operator]
    model.load_state_dict({key: value.clone() for key, value in start.items()})
    expected = plain(given, CONFIG, model.train())
    found = []
    for clients, fan_in in ((1, 8), (3, 8), (3, 2)):  # the last by partial sums
        fleet = Fleet(str(tmp_path / f"{clients}-{fan_in}"), clients, seed=clients)
        config = TrainingConfig(**{**CONFIG.to_json(), "fan_in": fan_in})
        assert fleet.run(given, config).state == "done"
        reports = [StepReport.of(entry) for entry in fleet.ledger.entries()]
        found.append([report.metrics for report in reports])
        assert [event_of(entry)["metrics"] for entry in fleet.ledger.entries()] == found[-1]
        if "same" in expected[0]:
            assert [report.metrics["same"] for report in reports] == [report.loss for report in reports]
    assert found[0] == found[1] == found[2], "the same bits on any fleet"
    assert [each.keys() for each in found[0]] == [each.keys() for each in expected]
    for step, (one, other) in enumerate(zip(found[0], expected, strict=True)):
        assert one == pytest.approx(other, rel=2e-5, abs=2e-6, nan_ok=True), step


def tried(given: Recipe, config: TrainingConfig = CONFIG) -> str:
    run = InProcess(resolved(given), config)
    run.replicas[0].load(run.trainer.replica.pack())
    return probe(run.replicas[0], run.recipe, run.plan, run.dataset, 0, 0)


@pytest.mark.parametrize("name", [*RECIPES, "now and then", "a maximum"])
def test_what_is_a_mean_is_not_refused(name: str) -> None:
    more = {"now and then": recipes.now_and_then, "a maximum": recipes.maximum}
    assert tried(RECIPES[name] if name in RECIPES else recipes.recipe(more[name])) == ""


@pytest.mark.parametrize("what", ["an exp", "a maximum", "a count", "a root"])
def test_what_is_no_mean_is_refused_by_name(what: str) -> None:
    name = {"an exp": "perplexity", "a maximum": "confidence", "a count": "right", "a root": "rms"}[what]
    with pytest.raises(
        InvalidInput, match=rf"metric '{name}' beside the loss is .* Measure\(sum, weight, 'exp'\)"
    ):
        tried(recipes.recipe(partial(recipes.returning, what=what)))


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("a text", "metric 'accuracy' that step returned is a str, but must be a number"),
        ("outputs", r"metric 'logits' that step returned is a tensor of torch.float32 and shape \("),
        ("complex", "metric 'spectrum' that step returned is a complex"),
        ("a list", "metric 'accuracies' that step returned is a list"),
        ("nothing", "metric 'accuracy' that step returned is a NoneType"),
        ("a number for a name", "a metric with the name 7; a name is a printable text of 1 to 64"),
        ("a long name", "a metric with the name 'xxx"),
        ("an unprintable name", r"a metric with the name 'a\\nb'"),
        ("too many", "33 metrics beside its loss; at most 32"),
        ("a weight of text", "the weight of metric 'accuracy' that step returned is a str"),
    ],
)
def test_what_cannot_be_logged_is_one_sentence_before_the_first_step(
    what: str, said: str, tmp_path: Path
) -> None:
    outcome = Fleet(str(tmp_path), 1).run(recipes.recipe(partial(recipes.returning, what=what)), CONFIG)
    assert outcome.state == "failed" and re.search(said, outcome.error), outcome.error


def test_nan_and_infinity_stop_nothing(tmp_path: Path) -> None:
    fleet = Fleet(str(tmp_path), 2)
    assert fleet.run(recipes.recipe(recipes.now_and_then), CONFIG).state == "done"
    reports = [StepReport.of(entry).metrics for entry in fleet.ledger.entries()]
    assert all(math.isnan(each["nan"]) and each["inf"] == math.inf for each in reports)
    assert all(math.isnan(each["nothing"]) for each in reports)
    assert sum("of some" in each for each in reports) > 0


def test_local_steps_measure_over_all_of_them() -> None:
    given, config = (
        recipes.recipe(recipes.accuracy),
        TrainingConfig(batch_size=8, shards=2, local_steps=3, seed=1),
    )
    run = InProcess(resolved(given), config)
    replica = run.replicas[0]
    replica.load(run.trainer.replica.pack())
    found = work(replica, run.recipe, run.plan, run.dataset, 0, 0, None)
    sizes = [len(part) for part in run.plan.parts(0, 0)]
    metrics = combined([(found.metrics, found.examples, found.weight)])
    assert metrics["same"] == found.loss and metrics["seen"] == sum(sizes)
    # A plain loop of local steps
    model = given.model()  # type: ignore[operator]
    model.load_state_dict(run.trainer.replica.model.state_dict())
    optimizer, seen = given.optimizer(model.parameters()), []  # type: ignore[operator]
    for part in run.plan.parts(0, 0):
        loss, measured = recipes.accuracy(model, default_collate([run.dataset[int(i)] for i in part]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(float(measured["accuracy"]))
    expected = sum(each * size for each, size in zip(seen, sizes, strict=True)) / sum(sizes)
    assert metrics["accuracy"] == pytest.approx(expected)


def test_what_is_measured_is_of_its_own_local_step() -> None:
    given = recipes.recipe(recipes.view_of_a_weight)
    config = TrainingConfig(batch_size=8, shards=2, local_steps=2)
    run = InProcess(resolved(given), config)
    run.replicas[0].load(run.trainer.replica.pack())
    found = work(run.replicas[0], run.recipe, run.plan, run.dataset, 0, 0, None)
    model, seen = run.trainer.replica.model.train(), []
    optimizer = given.optimizer(model.parameters())  # type: ignore[operator]
    for part in run.plan.parts(0, 0):
        loss, measured = recipes.view_of_a_weight(model, default_collate([run.dataset[int(i)] for i in part]))
        seen.append(measured["weight"].item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert seen[0] != seen[1] and found.metrics is not None
    assert found.metrics["weight"][0] == pytest.approx(sum(seen) / 2)


def test_an_evaluation_measures_what_the_step_does() -> None:
    given = recipes.recipe(recipes.accuracy, evaluation=recipes.held_out)
    run = InProcess(resolved(given), CONFIG)
    replica, data = run.replicas[0], recipes.held_out()
    replica.load(run.trainer.replica.pack())
    parts = [evaluate(replica, run.recipe, CONFIG, data, list(part)) for part in (range(7), range(7, 20))]
    figures = combine(parts, run.recipe, CONFIG)
    with torch.no_grad():
        model = run.trainer.replica.model.eval()
        loss, _ = value = recipes.accuracy(model, default_collate([data[i] for i in range(20)]))
    assert figures == pytest.approx({"loss": float(loss), **metrics_of(value)}, rel=1e-5)
