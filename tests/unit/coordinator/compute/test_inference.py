from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support import models, recipes_data
from tests.support import recipes_measured as measured
from tests.support.inprocess import resolved, same
from torchord.cache.errors import InvalidInput, RecipeError
from torchord.coordinator.compute.batch import open_dataset
from torchord.coordinator.compute.inference import Measured, combine, evaluate, predict, try_metrics
from torchord.coordinator.compute.probe import probe
from torchord.coordinator.compute.replica import Replica
from torchord.coordinator.spec.config import TrainingConfig
from torchord.coordinator.spec.plan import Plan
from torchord.coordinator.spec.recipe import Recipe

CONFIG = TrainingConfig(batch_size=8, shards=4, seed=3)


class Bench:
    """A recipe's parts in one process, and evaluations in parts of four micro-batches."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = resolved(recipe)
        self.data = open_dataset(self.recipe, CONFIG, "evaluation")
        self.replica = Replica.build(self.recipe, CONFIG)
        self.replica.load(self.replica.pack())

    def evaluate(self, indices: Any) -> Measured:
        return evaluate(self.replica, self.recipe, CONFIG, self.data, indices)

    def whole(self, step: int = 8) -> dict[str, float]:
        starts = range(0, len(self.data), step)
        parts = [self.evaluate(range(start, min(len(self.data), start + step))) for start in starts]
        return combine(parts, self.recipe, CONFIG)

    def predict(self, batch: Any, **how: Any) -> Any:
        return predict(self.replica, self.recipe, batch, **how)

    def outputs(self) -> tuple[Tensor, Tensor]:
        """Of all examples at once, with their targets."""
        inputs, targets = self.data[range(len(self.data))]
        with torch.no_grad():
            return self.replica.eval()(inputs), targets


def test_evaluation_is_the_mean_over_examples() -> None:
    bench = Bench(models.mlp())
    indices = [*range(0, len(bench.data), 2), 1]  # 11 examples in micro-batches of 2
    found = bench.evaluate(indices)
    inputs, targets = bench.data[indices]
    with torch.no_grad():
        outputs = bench.replica.eval()(inputs)
    assert found.examples == 11 and found.states == {}
    assert found.means["loss"] == pytest.approx(F.cross_entropy(outputs, targets).item(), rel=1e-6)
    assert found.means["accuracy"] == pytest.approx((outputs.argmax(1) == targets).double().mean().item())


def test_evaluation_parts_merge_by_examples() -> None:
    recipe = resolved(models.mlp(metrics=None))
    parts = [Measured(3, {"loss": 1.0}, {}), Measured(1, {"loss": 5.0}, {})]
    assert combine(parts, recipe, CONFIG) == {"loss": 2.0}
    assert combine([], recipe, CONFIG) == {}


def test_evaluation_in_parts_at_micro_batch_borders_has_the_same_bits() -> None:
    bench = Bench(models.mlp())
    assert bench.whole(2) == bench.whole(20)


def test_evaluation_by_step_has_a_loss_only() -> None:
    found = Bench(models.gpt()).evaluate(range(12))
    assert found.examples == 12 and list(found.means) == ["loss"]


def test_evaluation_and_prediction_leave_no_trace() -> None:
    bench = Bench(models.cnn(evaluation=models.Images))
    before = bench.replica.pack()
    bench.evaluate(range(4))
    bench.predict(torch.zeros(2, 1, 8, 8))
    assert same(before, bench.replica.pack())


def test_metrics_must_be_numbers() -> None:
    bench = Bench(models.mlp(metrics={"bad": models.vector_loss}))
    with pytest.raises(
        InvalidInput, match=r"metric 'bad' returned a Tensor of shape \(2,\), but must return"
    ):
        bench.evaluate(range(4))


# --- figures that no mean gives -----------------------------------------------------------


def test_a_pair_is_finished_from_the_states_of_all_micro_batches() -> None:
    bench = Bench(
        measured.marked(
            metrics={
                "auroc": (measured.scores, measured.auroc_of),
                "hits": measured.hits,
                "mistakes": [measured.mistakes, measured.mistakes_of],
            }
        )
    )
    outputs, targets = bench.outputs()
    for parts in (8, 24):
        found = bench.whole(parts)
        assert found["auroc"] == pytest.approx(float(measured.auroc(outputs, targets)), abs=1e-6)
        counts = measured.mistakes(outputs, targets)
        assert {name: found[f"mistakes.{name}"] for name in counts} == counts
        assert found["hits"] == pytest.approx(float(measured.hits(outputs, targets)))


def test_objects_are_merged_in_the_order_of_the_parts() -> None:
    bench = Bench(measured.marked(metrics={"score": measured.Extremes}))
    outputs, _ = bench.outputs()
    found = bench.whole()
    assert found["score.low"] == pytest.approx(float(outputs.min()))
    assert found["score.high"] == pytest.approx(float(outputs.max()))


def torchmetrics_class(name: str) -> Callable[..., Any]:
    found: Callable[..., Any] = getattr(pytest.importorskip("torchmetrics"), name)
    return found


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("AUROC", {"task": "binary"}),
        ("F1Score", {"task": "binary"}),
        ("ConfusionMatrix", {"task": "binary"}),
        ("MeanSquaredError", {"squared": False}),
        ("AveragePrecision", {"task": "binary", "thresholds": 5}),
    ],
)
def test_torchmetrics_give_what_they_give_of_all_at_once(name: str, options: dict[str, Any]) -> None:
    make = torchmetrics_class(name)
    probing = {"model": measured.prober, "loss": measured.probability_loss}
    bench = Bench(measured.marked(metrics={"metric": partial(make, **options)}, **probing))
    outputs, targets = bench.outputs()
    expected = make(**options)(outputs, targets)
    if expected.numel() > 1:
        with pytest.raises(InvalidInput, match=r"metric 'metric' returned a Tensor of shape \(2, 2\)"):
            bench.whole()
    else:
        assert bench.whole()["metric"] == pytest.approx(float(expected), rel=1e-6)


# --- tried at the start -----------------------------------------------------------------


def trial(**changes: Any) -> None:
    bench = Bench(measured.marked(**changes))
    try_metrics(bench.replica, bench.recipe, CONFIG, bench.data)


@pytest.mark.parametrize("model", [measured.scorer, measured.constant_scorer])
@pytest.mark.parametrize("metric", [measured.auroc, measured.f1])
def test_a_function_that_is_no_mean_is_refused(metric: Any, model: Any) -> None:
    """Also where the model at its start gives every example the same, so that F1 is 0 of all parts."""
    with pytest.raises(
        InvalidInput, match=r"metric 'own' is .* for a batch of 32 examples and .*, so it would"
    ):
        trial(metrics={"own": metric}, model=model)


def test_a_function_that_raises_for_a_part_is_refused() -> None:
    with pytest.raises(
        InvalidInput, match=r"metric 'own' gives .* and raises ValueError for a part of it .*pair"
    ):
        trial(metrics={"own": all_or_nothing})


def all_or_nothing(outputs: Tensor, targets: Tensor) -> float:
    """Raise for few examples."""
    if len(outputs) < 32:
        raise ValueError("too few")
    return 1.0


def test_what_returns_no_number_is_found_at_the_start() -> None:
    with pytest.raises(InvalidInput, match="metric 'own' returned a Tensor"):
        trial(metrics={"own": measured.pair_of_marks})
    with pytest.raises(InvalidInput, match="metric 'own' returned a Tensor"):
        trial(metrics={"own": (measured.pair_of_marks, torch.cat)})


def test_an_object_that_merges_wrongly_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"metric 'own\.\w+' is .* merged from its parts"):
        trial(metrics={"own": measured.LastBatch})


def test_an_object_that_cannot_be_merged_is_refused() -> None:
    with pytest.raises(RecipeError, match="class Hoarder, which has no merge_state: give a function"):
        measured.marked(metrics={"own": measured.Hoarder})
    spec = measured.marked(metrics={"own": f"{measured.__name__}:Hoarder"})
    bench = Bench(measured.marked())
    with pytest.raises(InvalidInput, match="makes a Hoarder, which has no merge_state and no state_dict"):
        try_metrics(bench.replica, resolved(spec), CONFIG, bench.data)


@pytest.mark.parametrize(
    "metric", [measured.hits, models.undefined, models.unbounded, (measured.scores, measured.auroc_of)]
)
def test_means_pairs_and_figures_that_are_not_finite_pass(metric: Any) -> None:
    trial(metrics={"own": metric})


def test_a_trial_leaves_no_trace() -> None:
    bench = Bench(models.cnn(evaluation=models.Images, metrics={"accuracy": models.accuracy}))
    before = bench.replica.pack()
    try_metrics(bench.replica, bench.recipe, CONFIG, bench.data)
    assert same(before, bench.replica.pack())


def test_without_memory_for_a_copy_the_trials_are_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A model may fill its device: then nothing is looked at, and that is said."""
    bench = Bench(measured.marked(metrics={"own": measured.auroc}))
    plan = Plan(len(bench.data), CONFIG)

    def no_memory(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("no room for 3 GiB")

    monkeypatch.setattr(Replica, "build", no_memory)
    try_metrics(bench.replica, bench.recipe, CONFIG, bench.data)
    assert "not tried before the first step: no room for 3 GiB" in caplog.text
    said = probe(bench.replica, bench.recipe, plan, bench.data, 0, 0)
    assert "could not be looked at: OutOfMemoryError: no room for 3 GiB" in said


def test_metrics_of_a_step_measure_what_predict_returns() -> None:
    bench = Bench(measured.texts(predict=measured.first_logits, metrics={"first": measured.first_right}))
    try_metrics(bench.replica, bench.recipe, CONFIG, bench.data)
    batch = measured.padded([bench.data[index] for index in range(12)])
    with torch.no_grad():
        expected = measured.first_right(measured.first_logits(bench.replica.eval(), batch), batch)
    assert bench.whole()["first"] == pytest.approx(float(expected))


# --- prediction -------------------------------------------------------------------------


def test_prediction_is_the_models_output() -> None:
    bench = Bench(models.mlp())
    inputs = bench.data.tensors[0][:5]
    found = bench.predict(inputs)
    assert not found.requires_grad
    with torch.no_grad():
        assert torch.equal(found, bench.replica.eval()(inputs))


def test_prediction_keeps_the_form_of_nested_outputs() -> None:
    class Nested(nn.Module):
        def forward(self, inputs: dict[str, Tensor]) -> Any:
            return {"a": inputs["x"] + 1, "b": (inputs["x"], [inputs["x"]]), "n": 3}

    recipe = resolved(models.mlp())
    object.__setattr__(recipe, "model", Nested)
    replica = Replica.build(recipe, CONFIG)
    found = predict(replica, recipe, {"x": torch.zeros(2)})
    assert found["a"].tolist() == [1.0, 1.0] and isinstance(found["b"], tuple) and found["n"] == 3


def test_samples_go_through_the_recipes_collate() -> None:
    bench = Bench(measured.texts(predict=measured.first_logits))
    samples = [bench.data[index] for index in range(5)]
    found = bench.predict(samples, samples=True)
    assert torch.equal(found, bench.predict(measured.padded(samples)))
    assert found.shape == (5, 11)


def test_outputs_that_cannot_travel_are_refused_by_name() -> None:
    bench = Bench(measured.texts(predict=measured.unspeakable))
    with pytest.raises(
        InvalidInput, match=r"outputs of the model cannot travel: .*Cache.*predict=\(model, batch\)"
    ):
        bench.predict(measured.padded([bench.data[0]]))


@pytest.mark.parametrize("loss", [F.cross_entropy, recipes_data.own_mean])
def test_what_a_collate_has_left_is_measured(loss: Any) -> None:
    """The first part has nothing left at all, others something of each micro-batch."""
    recipe = recipes_data.mlp(
        evaluation=recipes_data.Broken,
        collate=recipes_data.present,
        loss=loss,
        metrics={"accuracy": recipes_data.correct},
    )
    bench = Bench(recipe)
    try_metrics(bench.replica, bench.recipe, CONFIG, bench.data)
    inputs, targets = recipes_data.present([bench.data[index] for index in range(len(bench.data))])
    with torch.no_grad():
        outputs = bench.replica.eval()(inputs)
    for step in (8, 20, len(bench.data)):
        found = bench.whole(step)
        assert found["loss"] == pytest.approx(loss(outputs, targets).item(), rel=1e-6)
        assert found["accuracy"] == pytest.approx((outputs.argmax(1) == targets).double().mean().item())
