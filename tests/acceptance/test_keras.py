"""Keras models on torch train as torch's do: in training mode, under the same names in every process.

Each is compared with a plain loop that calls the model with `training=True`.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.inprocess import InProcess, resolved
from tests.support.stepping import Stepping
from torchord import TrainingConfig
from torchord.cache.errors import InvalidInput
from torchord.coordinator.compute import inference
from torchord.coordinator.compute.frameworks import first_names
from torchord.coordinator.compute.probe import probe
from torchord.coordinator.compute.replica import Replica
from torchord.coordinator.spec.plan import Plan

if importlib.util.find_spec("keras") is None:
    pytest.skip("NOT TESTED, keras is not installed (pip install '.[models]')", allow_module_level=True)

from tests.support import recipes_keras

ONE = TrainingConfig(epochs=1, batch_size=8, shards=1, seed=3)
TWO = TrainingConfig(epochs=1, batch_size=8, shards=2, seed=3)


class Training(nn.Module):
    """Calls the Keras model as a loop of Keras' own pages does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.model(x, training=True)
        return found


def plainly(given: Any, config: TrainingConfig, call: Any = Training) -> dict[str, Tensor]:
    """A loop over the global batches; only for models that draw nothing."""
    made = resolved(given)
    replica = Replica.build(made, config)
    data = made.dataset()
    plan = Plan(len(data), config)
    model = call(replica.model.train())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(plan.total_steps):
        indices = [int(i) for shard in range(plan.shards_in(step)) for i in plan.indices(step, shard)]
        optimizer.zero_grad()
        F.cross_entropy(model(data.tensors[0][indices]), data.tensors[1][indices]).backward()
        optimizer.step()
    return {name: tensor.clone() for name, tensor in replica.state_tensors().items()}


@pytest.mark.parametrize("name", ["dense", "many", "mixed"])
def test_weights_and_moving_statistics_are_a_plain_loops(name: str) -> None:
    model, call = {
        "dense": (lambda: recipes_keras.recipe(_quiet), Training),
        "many": (lambda: recipes_keras.recipe(recipes_keras.many), Training),
        "mixed": (lambda: recipes_keras.recipe(recipes_keras.Mixed), nn.Sequential),
    }[name]
    found = Stepping(model(), ONE).train().state
    if name == "mixed":  # whose plain loop cannot say training=True: the statistics tell
        moved = [value for key, value in found.items() if key.endswith("moving_mean")]
        assert moved and all(value.abs().sum() > 0 for value in moved)
        return
    expected = plainly(model(), ONE, call)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")
    assert name != "dense" or any(
        "moving_mean" in key and value.abs().sum() > 0 for key, value in found.items()
    )


def _quiet() -> nn.Module:
    model: nn.Module = recipes_keras.dense(0.0)
    return model


def test_shards_of_a_step_average_moving_statistics_and_agree_on_seeds() -> None:
    run = Stepping(recipes_keras.recipe(_seeded), TWO).train()
    rules = run.trainer.replica.rules
    assert {rule for name, rule in rules.items() if "moving_" in name} == {"mean"}
    seeds = [value for name, value in run.state.items() if "seed_generator_state" in name]
    assert [value.tolist() for value in seeds] == [[7, run.plan.total_steps]]


def _seeded() -> nn.Module:
    model: nn.Module = recipes_keras.dense(0.5, seed=7)
    return model


def test_dropout_is_on_in_training_and_off_in_evaluation() -> None:
    run = Stepping(recipes_keras.recipe(recipes_keras.dense), TWO)
    run.replica.load(run.trainer.replica.pack())
    x = run.dataset.tensors[0]
    with torch.no_grad():
        model = run.replica.train()
        assert not torch.equal(model(x), model(x))
        model = run.replica.eval()
        assert torch.equal(model(x), model(x))
        model = run.replica.train()
        assert torch.equal(model(x, training=False), model(x, training=False))
    evaluated = inference.evaluate(run.replica, run.made, TWO, run.dataset, range(8))
    assert evaluated == inference.evaluate(run.replica, run.made, TWO, run.dataset, range(8))


@pytest.mark.parametrize("model", [recipes_keras.dense, recipes_keras.many, recipes_keras.Mixed])
def test_each_model_of_a_process_has_the_names_of_the_first(model: Any) -> None:
    given = resolved(recipes_keras.recipe(model))
    first = Replica.build(given, TWO)
    recipes_keras.dense()  # the process goes on making layers
    second = Replica.build(given, TWO)
    assert first.manifest == second.manifest
    assert torch.equal(first.pack(), second.pack())


def test_the_processs_own_names_go_on() -> None:
    before = recipes_keras.dense().name
    Replica.build(resolved(recipes_keras.recipe(recipes_keras.many)), TWO)
    with first_names():
        assert recipes_keras.dense().name == "sequential"
    after = recipes_keras.dense().name
    assert before != after != "sequential"


def test_what_is_drawn_without_a_seed_depends_on_the_shard_alone() -> None:
    run = Stepping(recipes_keras.recipe(recipes_keras.noisy), TWO)
    run.replica.load(run.trainer.replica.pack())
    first = run.work(0, 0)
    other = run.work(0, 1)
    assert run.work(0, 0).loss == first.loss != other.loss


def test_a_model_that_is_not_built_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"not built.*Input"):
        Replica.build(resolved(recipes_keras.recipe(recipes_keras.unbuilt)), TWO)


def test_a_normalisation_of_its_own_is_no_reason_for_the_probe_to_refuse() -> None:
    run = InProcess(resolved(recipes_keras.recipe(recipes_keras.Mixed)), TWO)
    run.replicas[0].load(run.trainer.replica.pack())
    assert probe(run.replicas[0], run.recipe, run.plan, run.dataset, 0, 0) == ""
