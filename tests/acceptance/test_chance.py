"""Training that is random in ways of its own: means are trained, what looks at the whole batch is refused."""

from __future__ import annotations

import tempfile
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from tests.support import recipes_chance as recipes
from tests.support import reference
from tests.support.inprocess import InProcess, resolved
from tests.support.one_process import Fleet, Outcome
from tests.support.recipes_chance import Perturbed, chance
from torchord import Recipe, TrainingConfig
from torchord.coordinator.compute.aligned_chance import AlignedChance
from torchord.coordinator.compute.determinism import seed_everything
from torchord.coordinator.compute.probe import probe

CONFIG = TrainingConfig(epochs=1, batch_size=8, shards=3, seed=1)
WAYS = (
    "dropout",
    "noise",
    "mask",
    "depth",
    "rarely",
    "layer",
    "weight",
    "generator",
    "checkpoint",
    "transposed",
)
"""Each of torch's or Python's random numbers, which an example can be made to draw alike in every batch."""


def run(recipe: Recipe, clients: int) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        return Fleet(folder, clients, seed=clients).run(recipe, CONFIG)


def said(recipe: Recipe) -> str:
    """What the probe says of a recipe's first shard."""
    made = InProcess(resolved(recipe), CONFIG)
    return probe(made.replicas[0], made.recipe, made.plan, made.dataset, 0, 0)


PASSING = {
    **{way: chance(partial(Perturbed, way)) for way in (*WAYS, "numpy")},
    "in evaluation, too": chance(partial(Perturbed, "noise", always=True)),
    "an autoencoder": chance(recipes.Autoencoder, recipes.evidence),
    "a diffusion model": chance(recipes.Denoiser, recipes.denoised),
    "packed sequences": chance(recipes.Recurrent, dataset=recipes.Sequences, collate=recipes.packed),
    "padded sequences": chance(recipes.Summed, dataset=recipes.Sequences, collate=recipes.padded),
    "attention over padded sequences": chance(
        recipes.Attending, dataset=recipes.Sequences, collate=recipes.padded
    ),
    "mixup in collate": chance(partial(Perturbed, "dropout"), recipes.mixed_loss, collate=recipes.mixed_up),
}


@pytest.mark.parametrize("name", PASSING)
def test_a_mean_over_the_examples_is_trained_as_it_is(name: str) -> None:
    one, three = run(PASSING[name], 1), run(PASSING[name], 3)
    assert one.state == "done", one.error
    assert one.bits == three.bits
    module = reference.average(PASSING[name], CONFIG).module
    assert {n: found for n, (_, _, found) in reference.bits(module).items()} == one.bits


REFUSED = {
    **{way: (chance(partial(Perturbed, way), recipes.with_spread), "loss") for way in WAYS},
    "backward": (chance(partial(Perturbed, "dropout"), recipes.with_normalised_gradient), "gradient"),
    "a sum beside a mean": (chance(recipes.Autoencoder, recipes.mixed_evidence), "loss"),
    "parts of one example raise": (chance(partial(nn.Linear, 6, 3), recipes.hardest), "loss"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_looks_at_the_whole_batch_is_refused(name: str) -> None:
    recipe, what = REFUSED[name]
    one, three = run(recipe, 1), run(recipe, 3)
    assert one.state == three.state == "failed"
    assert f"the {what} of a batch is not the mean of its parts'" in one.error
    assert "loss_over='shard'" in one.error


@pytest.mark.parametrize("step", [recipes.mean, recipes.with_spread])
def test_chance_that_cannot_be_held_is_said(step: object) -> None:
    assert "could not be looked at in training mode: it is random" in said(
        chance(partial(Perturbed, "numpy"), step)
    )


def test_pairs_of_a_shards_examples_are_what_a_recipe_may_mean() -> None:
    recipe = chance(partial(nn.Linear, 6, 3), recipes.flipped, loss_over="shard")
    one, three = run(recipe, 1), run(recipe, 3)
    assert one.state == "done", one.error
    assert one.bits == three.bits


@pytest.mark.parametrize("way", [way for way in WAYS if way not in ("layer", "rarely")])
def test_an_example_draws_the_same_in_every_batch(way: str) -> None:
    model, inputs = Perturbed(way, always=True), torch.randn(7, recipes.FEATURES)
    held = AlignedChance()

    def outputs(numbers: list[int]) -> Tensor:
        seed_everything(3)
        with held.drawn(numbers):
            return model(inputs[numbers])  # type: ignore[no-any-return]

    whole = outputs([*range(7)])
    outputs([*range(6)])
    held.settle()
    whole = outputs([*range(7)])
    for numbers in ([0, 1, 2], [3, 4, 5, 6], [6, 2, 0], [4]):
        torch.testing.assert_close(outputs(numbers), whole[numbers])
    assert not torch.equal(whole, model(inputs))
