"""A compiled Keras model trains as Keras' own `train_on_batch` trains it, from the same batches."""

from __future__ import annotations

import importlib.util
import sys
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import torchord
from tests.support import models
from tests.support.inprocess import InProcess, resolved
from torchord import Recipe, TrainingConfig
from torchord.cache.errors import InvalidInput, NotAllowed, RecipeError
from torchord.coordinator.compute import inference
from torchord.coordinator.compute.batch import load_batch
from torchord.coordinator.compute.gradient import compute
from torchord.coordinator.compute.optimizer_trial import try_optimizers
from torchord.coordinator.compute.probe import probe
from torchord.coordinator.compute.replica import Replica
from torchord.coordinator.compute.step_metrics import combined
from torchord.coordinator.spec.resolving import resolve

if importlib.util.find_spec("keras") is None:
    pytest.skip("NOT TESTED, keras is not installed (pip install '.[models]')", allow_module_level=True)

from examples import keras_digits
from tests.support import recipes_compiled as compiled

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Keras' own, of numpy
SHARDS = TrainingConfig(epochs=5, batch_size=8, shards=2, seed=3)
WHOLE = TrainingConfig(epochs=5, batch_size=8, shards=1, seed=3)
LARGE = TrainingConfig(epochs=8, batch_size=keras_digits.BATCH, shards=4, seed=3)
DATA, HELD_OUT = partial(models.points, size=44), partial(models.points, size=24, seed=2)


def of(build: Any, data: Any = DATA, held_out: Any = HELD_OUT) -> Recipe:
    return torchord.keras(build, data, evaluation=held_out)


MEMBERS: dict[str, tuple[Any, TrainingConfig]] = {
    **{
        name: (of(partial(compiled.optimized, name, **arguments)), SHARDS)
        for name, arguments in {
            "SGD": {"learning_rate": 0.1, "momentum": 0.9, "weight_decay": 0.01},
            "Adam": {"learning_rate": 0.02, "amsgrad": True},
            "Adagrad": {"learning_rate": 0.1, "clipvalue": 0.1},
            "Nadam": {"learning_rate": 0.02},
            "Lion": {"learning_rate": 0.002},
            "Adafactor": {"learning_rate": 0.02},
            "RMSprop": {"learning_rate": 0.01, "gradient_accumulation_steps": 2},
        }.items()
    },
    "a schedule": (of(compiled.scheduled), SHARDS),
    "batch statistics": (of(compiled.normed), WHOLE),  # a shard has statistics of its own
    "inputs and targets by name": (of(compiled.forked, compiled.Two, partial(compiled.Two, 24)), SHARDS),
    "a loss of its own": (of(compiled.contrasting), SHARDS),
    "the example": (keras_digits.recipe(rate=0.0), LARGE),
}


def keras_own(run: InProcess) -> Any:
    """The model that Keras makes of the run's first weights and batches."""
    model: Any = Replica.build(run.recipe, run.config).model
    for step in range(run.plan.total_steps):
        shards = range(run.plan.shards_in(step))
        indices = [int(i) for shard in shards for i in run.plan.indices(step, shard)]
        model.train_on_batch(*load_batch(run.dataset, indices))
    return model


def numbers(found: Any) -> dict[str, float]:
    return {name: float(value) for name, value in found.items()}


def figures(run: InProcess, cut: int) -> dict[str, float]:
    """The evaluation of the newest version, by two workers."""
    assert run.recipe.evaluation is not None
    data, replica = run.recipe.evaluation(), Replica.build(run.recipe, run.config)
    replica.load(run.trainer.replica.pack())
    inference.try_metrics(replica, run.recipe, run.config, data)
    parts = [
        inference.evaluate(replica, run.recipe, run.config, data, part)
        for part in (range(cut), range(cut, len(data)))
    ]
    return inference.combine(parts, run.recipe, run.config)


@pytest.mark.parametrize("name", MEMBERS)
def test_it_trains_as_train_on_batch_does(name: str, record_property: Any) -> None:
    given, config = MEMBERS[name]
    run = InProcess(resolved(given), config).train()
    model = keras_own(run)
    expected, found = model.state_dict(), run.trainer.replica.model.state_dict()
    assert found.keys() == expected.keys()
    apart = max(float((found[key] - value).abs().max()) for key, value in expected.items())
    steps = run.plan.total_steps
    record_property("summary", f"{name}: {apart:.1e} from Keras' train_on_batch after {steps} steps")
    assert apart < 1e-4
    assert run.recipe.evaluation is not None
    held_out = run.recipe.evaluation()
    batch = load_batch(held_out, range(len(held_out)))
    model.reset_metrics()
    theirs = numbers(model.test_on_batch(*batch, return_dict=True))
    for output in ("kind_loss", "sum_loss"):  # of each output, which the recipe does not tell
        theirs.pop(output, None)
    for cut in (1, 10):
        ours = figures(run, cut)
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)
    if name == "the example":
        assert ours["accuracy"] > 0.93


def test_the_optimizers_state_goes_on_bit_for_bit() -> None:
    for name in ("a schedule", "RMSprop"):
        given = resolved(MEMBERS[name][0])
        whole = InProcess(given, SHARDS).train()
        first = InProcess(given, SHARDS).train(0, 11)
        other = InProcess(given, SHARDS)
        other.trainer.replica.load(first.trainer.replica.pack())
        other.trainer.load_state(first.trainer.state())
        assert other.train(11).bits == whole.bits, name
        assert [report.lr for report in other.reports] == [report.lr for report in whole.reports[11:]]
    scheduled = InProcess(resolved(MEMBERS["a schedule"][0]), SHARDS).train()
    assert {round(report.lr[0], 6) for report in scheduled.reports} == {0.02, 0.01, 0.002}


def test_a_scheduler_of_torch_may_set_its_rate() -> None:
    scheduler = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
    given = torchord.keras(partial(compiled.optimized, "SGD", learning_rate=0.5), DATA, scheduler=scheduler)
    try_optimizers(given, SHARDS)
    run = InProcess(resolved(given), SHARDS).train(0, 3)
    assert [report.lr[0] for report in run.reports] == pytest.approx([0.5, 0.25, 0.125])
    plain = torchord.keras(partial(compiled.optimized, "SGD", learning_rate=0.5), DATA)
    assert run.bits != InProcess(resolved(plain), SHARDS).train(0, 3).bits


def test_an_optimizer_of_torch_goes_before() -> None:
    given = torchord.keras(compiled.scheduled, DATA, optimizer=partial(torch.optim.SGD, lr=0.1))
    assert type(InProcess(resolved(given), SHARDS).train(0, 2).trainer.optimizer) is torch.optim.SGD


def test_a_step_measures_the_compiled_metrics() -> None:
    given = resolved(MEMBERS["a schedule"][0])
    run = InProcess(given, SHARDS)
    run.replicas[0].load(run.trainer.replica.pack())
    parts = []
    for shard in range(2):
        found = compute(run.replicas[0], given, SHARDS, run.dataset, run.plan.indices(0, shard), 0, shard)
        parts.append((found.metrics, found.examples, found.weight))
    indices = [int(i) for shard in range(2) for i in run.plan.indices(0, shard)]
    model: Any = Replica.build(given, SHARDS).model
    theirs = numbers(model.test_on_batch(*load_batch(run.dataset, indices), return_dict=True))
    assert combined(parts) == pytest.approx({name: theirs[name] for name in ("accuracy", "top2")})


def test_predictions_are_its_outputs() -> None:
    run = InProcess(resolved(MEMBERS["a schedule"][0]), SHARDS)
    x, y = run.dataset.tensors
    run.replicas[0].load(run.trainer.replica.pack())
    for given in (x[:5], [x[:5], y[:5]]):
        found = inference.predict(run.replicas[0], run.recipe, given)
        torch.testing.assert_close(found, run.trainer.replica.eval()(x[:5]).detach())


def test_a_loss_that_is_a_sum_says_so() -> None:
    for options in ({}, {"loss_over": "sum"}):
        given = resolved(torchord.keras(compiled.summed, DATA, **options))
        run = InProcess(given, SHARDS)
        run.replicas[0].load(run.trainer.replica.pack())
        if options:
            assert probe(run.replicas[0], given, run.plan, run.dataset, 0, 0) == ""
        else:
            with pytest.raises(InvalidInput, match="loss_over='sum'"):
                probe(run.replicas[0], given, run.plan, run.dataset, 0, 0)


@pytest.mark.parametrize(
    ("build", "text"),
    [
        ("uncompiled", r"is not compiled; call its compile\(\)"),
        ("stepping", "Stepping has a train_step of its own.*compute_loss"),
        ("averaged", r"Adam\(use_ema=True\).*give average="),
        ("scaled", "LossScaleOptimizer scales losses.*precision='fp16'"),
        ("no_keras", "needs a keras.Model, and the build function made a Linear"),
    ],
)
def test_what_it_cannot_is_refused_when_the_run_starts(build: str, text: str) -> None:
    with pytest.raises(InvalidInput, match=text) as told:
        InProcess(resolved(torchord.keras(getattr(compiled, build), DATA)), SHARDS)
    assert "\n" not in str(told.value)


def test_a_batch_that_is_none_of_keras_is_refused() -> None:
    run = InProcess(resolved(torchord.keras(compiled.scheduled, compiled.four_parts)), SHARDS)
    with pytest.raises(InvalidInput, match="a batch of 4 parts"):
        run.step(0)


def test_without_keras_or_on_another_backend_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "keras.src.backend.config", SimpleNamespace(backend=lambda: "jax"))
        with pytest.raises(RecipeError, match=r"computes with jax .*KERAS_BACKEND=torch"):
            torchord.keras(compiled.scheduled, DATA)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"pip install 'torchord\[models\]'"):
        torchord.keras(compiled.scheduled, DATA)


def test_a_build_function_is_admitted_like_any_entry() -> None:
    spec = torchord.keras(compiled.scheduled, "torch.utils.data:TensorDataset").to_spec()
    with pytest.raises(NotAllowed, match=r"tests\.support\.recipes_compiled"):
        resolve(spec, allowed=("torch",))
