"""What a forward writes where autograd does not look: carried as a plain loop has it, or refused by name."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.support import recipes_hidden as hidden
from tests.support.inprocess import resolved, run
from tests.support.reference import large_batch
from torchord import Recipe, TrainingConfig
from torchord.cache.errors import InvalidInput
from torchord.coordinator.compute import inner_steps
from torchord.coordinator.compute.batch import open_dataset
from torchord.coordinator.compute.forward_watch import due
from torchord.coordinator.compute.gradient import resizing
from torchord.coordinator.compute.inference import evaluate, predict
from torchord.coordinator.compute.probe import probe
from torchord.coordinator.compute.replica import Replica
from torchord.coordinator.spec.plan import Plan

CONFIG = TrainingConfig(epochs=2, batch_size=16, shards=4, seed=1)


def recipe(model: Any, **entries: Any) -> Recipe:
    given: dict[str, Any] = {
        "dataset": hidden.points,
        "optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        **entries,
    }
    if "step" not in given:
        given["loss"] = torch.nn.functional.cross_entropy
    return Recipe(model=model, **given)


def bounded(way: str) -> Recipe:
    return recipe(partial(hidden.Bounded, way))


WAYS_OUT = "parametrization|model function"
LOST: dict[str, tuple[Recipe, str, str]] = {
    "data =": (bounded("data ="), "parameter 'weight'", WAYS_OUT),
    "data.copy_": (bounded("data.copy_"), "parameter 'weight'", WAYS_OUT),
    "copy_": (bounded("copy_"), "parameter 'weight'", WAYS_OUT),
    "another dtype": (bounded("half"), "parameter 'weight'", WAYS_OUT),
    "another parameter": (bounded("new"), "another parameter in the place of 'weight'", WAYS_OUT),
    "max_norm": (
        recipe(partial(hidden.Embedded, 1.0), dataset=hidden.words),
        r"'table\.weight' of 'table' \(Embedding\)",
        "without max_norm",
    ),
    "weight noise": (recipe(hidden.parametrized, step=hidden.noisy_step), "parameter", WAYS_OUT),
    "sharpness": (
        recipe(partial(nn.Linear, hidden.FEATURES, hidden.CLASSES), step=hidden.sharp_step),
        "parameter",
        WAYS_OUT,
    ),
    "first batch": (recipe(hidden.ActNorm), "parameter 'shift'", "model function"),
    "late buffer": (recipe(partial(hidden.Late, "buffer")), "buffer 'mean'", "register_buffer"),
    "late buffer, not persistent": (
        recipe(partial(hidden.Late, "memory")),
        "each forward changes the buffer 'mean'",
        "register_buffer",
    ),
    "registered late": (recipe(partial(hidden.Late, "registered")), "buffer 'seen'", "register_buffer"),
    "late parameter": (recipe(partial(hidden.Late, "parameter")), "made the parameter 'bias'", "constructor"),
    "late layer": (recipe(partial(hidden.Late, "layer")), r"made the parameter 'first\.", "constructor"),
    "resized": (recipe(partial(hidden.Resizing, in_place=True)), "buffer 'least'", "keep its layout"),
    "another shape": (recipe(partial(hidden.Resizing, in_place=False)), "buffer 'least'", "keep its layout"),
    "extra state": (
        recipe(partial(hidden.Counted, counts=True)),
        r"the model \(Counted\)",
        "register_buffer",
    ),
    "frozen, past the count": (
        recipe(partial(hidden.Teacher, "data.mul_")),
        r"frozen parameter 'teacher\.weight'",
        "torch.no_grad()",
    ),
}


@pytest.mark.parametrize("kind", LOST)
def test_what_no_version_holds_is_refused_by_name(kind: str) -> None:
    made, named, way_out = LOST[kind]
    with pytest.raises(InvalidInput, match=named) as caught:
        run(made, CONFIG)
    assert any(word in str(caught.value) for word in way_out.split("|"))


@pytest.mark.parametrize("step", [5, 11, 13, 20])
def test_a_small_model_is_watched_in_every_step(step: int) -> None:
    assert not due((step, 0))
    with pytest.raises(InvalidInput, match="trained parameter 'bias'"):
        run(recipe(partial(hidden.Once, step)), TrainingConfig(epochs=8, batch_size=16, shards=4, seed=1))


@pytest.mark.parametrize("change", ["mul_", "sub_", "fill_"])
@pytest.mark.parametrize("step", [5, 11, 13, 14])
def test_of_a_large_model_elements_are_watched_in_every_step(step: int, change: str) -> None:
    assert not any(due((step, shard)) for shard in range(4))
    with pytest.raises(
        InvalidInput, match=r"trained parameter 'layers\.2\.weight' of 'layers\.2' \(Linear\)"
    ):
        run(
            recipe(partial(hidden.OnceInMany, step, change)),
            TrainingConfig(epochs=8, batch_size=16, shards=4, seed=1),
        )


def test_a_buffer_that_cannot_be_resized_where_it_lies_is_named() -> None:
    replica = Replica.build(resolved(LOST["resized"][0]), CONFIG)
    buffer = replica.buffers["least"]
    with torch.no_grad():
        buffer.set_(torch.from_numpy(np.zeros(0, dtype=np.float32)))  # type: ignore[call-overload]
    with pytest.raises(InvalidInput, match=r"buffer 'least' .* keep its layout"), resizing(replica):
        buffer.resize_(3)
    with pytest.raises(RuntimeError, match="their own"), resizing(replica):
        raise RuntimeError("their own")


@pytest.mark.parametrize("kind", ["late buffer", "late buffer, not persistent", "late layer", "extra state"])
def test_the_probe_of_the_loss_leaves_it_to_the_shard_to_say(kind: str) -> None:
    made, named, _ = LOST[kind]
    given = resolved(made)
    data, replica = open_dataset(given, CONFIG), Replica.build(given, CONFIG)
    told = probe(replica, given, Plan(len(data), CONFIG), data, 0, 0)
    assert re.search(rf"could not be looked at: .*{named}", told)


@pytest.mark.parametrize("kind", ["data =", "data.copy_", "copy_", "another parameter", "late layer"])
def test_between_local_steps_it_is_refused_as_well(kind: str) -> None:
    made, named, _ = LOST[kind]
    given, config = resolved(made), TrainingConfig(batch_size=16, shards=4, seed=1, local_steps=2)
    data = open_dataset(given, config)
    plan, replica = Plan(len(data), config), Replica.build(given, config)
    replica.load(replica.pack())
    with pytest.raises(InvalidInput, match=named):
        inner_steps.compute(replica, given, config, data, plan.parts(0, 0), 0, 0)


KEPT: dict[str, Recipe] = {
    "a parametrization": recipe(hidden.parametrized),
    "first values in the model function": recipe(hidden.started),
    "a norm that no row reaches": recipe(partial(hidden.Embedded, 1e9), dataset=hidden.words),
    "the same bytes, and a functional call": recipe(hidden.Idle),
    "a weight that is an attribute": recipe(partial(hidden.normed, hidden.old_weight_norm)),
    "weight_norm": recipe(partial(hidden.normed, nn.utils.parametrizations.weight_norm)),
    "a frozen average by .data =": recipe(partial(hidden.Teacher, "data =")),
    "a frozen average in place": recipe(partial(hidden.Teacher, "in place")),
    "a table that grows": recipe(partial(hidden.Rotary, late=False)),
    "a table that comes late": recipe(partial(hidden.Rotary, late=True)),
    "a module without state, made late": recipe(partial(hidden.Late, "activation")),
    "extra state that stays": recipe(partial(hidden.Counted, counts=False)),
    "weights folded for evaluation": recipe(hidden.Folding, evaluation=hidden.points),
}


@pytest.mark.parametrize("kind", KEPT)
def test_what_only_seems_so_gives_what_a_plain_loop_gives(kind: str) -> None:
    ours, plain = run(KEPT[kind], CONFIG, clients=3), large_batch(KEPT[kind], CONFIG)
    assert run(KEPT[kind], CONFIG, clients=1).bits == ours.bits
    state = ours.trainer.replica.state_tensors()
    for name, tensor in (*plain.module.named_parameters(), *plain.module.named_buffers()):
        if name in state and name != "table":  # a cache, which is in no version
            torch.testing.assert_close(state[name], tensor.detach(), rtol=1e-5, atol=1e-6, msg=name)


# --- evaluation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [evaluate, predict])
@pytest.mark.parametrize("attach", [True, False])
def test_an_evaluation_that_writes_to_a_trained_parameter_is_refused_and_leaves_nothing(
    way: Any, attach: bool
) -> None:
    replica, ask = evaluated(hidden.Writer, way)
    version = replica.pack()
    (replica.attach if attach else replica.load)(version.clone())
    with pytest.raises(InvalidInput, match=r"trained parameter 'layer\.weight'"):
        ask()
    replica.load(version)
    assert torch.equal(replica.pack(), version) and replica.model.training


@pytest.mark.parametrize("way", [evaluate, predict])
@pytest.mark.parametrize("in_place", [True, False])
def test_a_buffer_that_an_evaluation_resizes_is_refused_and_put_back(way: Any, in_place: bool) -> None:
    model = partial(hidden.Resizing, in_place=in_place, evaluation_only=True)
    replica, ask = evaluated(model, way)
    version = replica.pack()
    replica.load(version)
    for _ in range(2):
        with pytest.raises(InvalidInput, match="turned buffer 'least'"):
            ask()
    replica.reset_buffers()
    assert torch.equal(replica.pack(), version)


def test_weights_that_evaluation_folds_are_those_of_the_version_afterwards() -> None:
    replica, ask = evaluated(hidden.Folding, evaluate)
    version = replica.pack()
    replica.load(version)
    ask()
    assert torch.equal(replica.pack(), version) and not replica.model.folded


def evaluated(model: Any, way: Any) -> tuple[Replica, Any]:
    """A replica, and what evaluates it or predicts with it."""
    given = resolved(recipe(model, evaluation=hidden.points))
    replica = Replica.build(given, CONFIG)
    data = open_dataset(given, CONFIG)
    if way is evaluate:
        return replica, lambda: evaluate(replica, given, CONFIG, data, range(8))
    return replica, lambda: predict(replica, given, data.tensors[0][:8], CONFIG)
