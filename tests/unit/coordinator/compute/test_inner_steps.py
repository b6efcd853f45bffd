"""Local steps: the pseudo-gradient, the state that a slot keeps, and the outer optimizer."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from tests.support import models
from tests.support.inprocess import resolved
from tests.unit.coordinator.compute.test_trainer import moving
from torchord.cache.errors import InvalidInput
from torchord.cache.tensors import tree
from torchord.coordinator.compute import inner_steps as local_steps
from torchord.coordinator.compute.batch import open_dataset
from torchord.coordinator.compute.determinism import seed_everything
from torchord.coordinator.compute.gradient import compute
from torchord.coordinator.compute.replica import Replica
from torchord.coordinator.compute.trainer import Trainer
from torchord.coordinator.spec.config import TrainingConfig
from torchord.coordinator.spec.plan import Plan, derive_seed
from torchord.coordinator.spec.recipe import Recipe
from torchord.coordinator.spec.resolving import ResolvedRecipe

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


class Bench:
    """A replica at version 0 and all that a shard needs."""

    def __init__(self, recipe: Recipe, **fields: Any) -> None:
        self.config = TrainingConfig(batch_size=8, shards=2, **fields)
        self.recipe: ResolvedRecipe = resolved(recipe)
        self.dataset = open_dataset(self.recipe, self.config)
        self.plan = Plan(len(self.dataset), self.config)
        self.replica = Replica.build(self.recipe, self.config)
        self.replica.load(self.replica.pack())

    def shard(self, step: int, shard: int, state: Any = None) -> local_steps.LocalSteps:
        parts = self.plan.parts(step, shard)
        return local_steps.compute(
            self.replica, self.recipe, self.config, self.dataset, parts, step, shard, state
        )


def test_the_pseudo_gradient_is_the_way_a_plain_loop_goes() -> None:
    bench = Bench(models.mlp(optimizer=SGD), local_steps=3)
    found = bench.shard(0, 1)
    model = Replica.build(bench.recipe, bench.config).model.train()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = SGD(model.parameters())
    losses = []
    for number, part in enumerate(bench.plan.parts(0, 1)):
        inputs, targets = (
            torch.stack(column) for column in zip(*(bench.dataset[i] for i in part), strict=True)
        )
        seed_everything(derive_seed(0, "model", 0, 1, number))
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    for name, parameter in model.named_parameters():
        assert torch.equal(found.gradient.gradients[name], start[name] - parameter.detach()), name
    assert found.gradient.loss == pytest.approx(sum(losses) / 3)
    assert found.gradient.examples == 12


def test_one_local_step_of_plain_sgd_moves_by_the_gradient() -> None:
    bench = Bench(models.mlp(optimizer=partial(torch.optim.SGD, lr=0.5)), local_steps=2)
    part = bench.plan.parts(0, 0)[:1]
    moved = local_steps.compute(bench.replica, bench.recipe, bench.config, bench.dataset, part, 0, 0)
    for name, difference in moved.gradient.gradients.items():
        assert difference.shape == bench.replica.parameters[name].shape
    plain = compute(bench.replica, bench.recipe, bench.config, bench.dataset, part[0], 0, 0)
    assert moved.gradient.gradients.keys() == plain.gradients.keys()


def test_the_replica_is_back_at_its_version_afterwards_and_after_an_error() -> None:
    bench = Bench(models.cnn(optimizer=SGD), local_steps=2)
    before = bytes(bench.replica.pack().numpy())
    bench.shard(0, 0)
    assert bytes(bench.replica.pack().numpy()) == before
    broken = Bench(models.mlp(loss=models.vector_loss), local_steps=2)
    before = bytes(broken.replica.pack().numpy())
    with pytest.raises(Exception, match="scalar"):
        broken.shard(0, 0)
    assert bytes(broken.replica.pack().numpy()) == before


@pytest.mark.parametrize("make", [models.mlp, models.cnn, models.gpt, models.odd])
def test_the_same_shard_and_state_give_the_same_bytes_anywhere(make: Any) -> None:
    optimizer = partial(torch.optim.AdamW, lr=1e-2)
    scheduler = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    first, second = (Bench(make(optimizer=optimizer, scheduler=scheduler), local_steps=2) for _ in range(2))
    kept = first.shard(0, 0)
    second.shard(0, 1)  # another slot before, which must not show
    skeleton, tensors = tree.flatten(kept.state)
    for state in (kept.state, tree.unflatten(skeleton, {name: t.clone() for name, t in tensors.items()})):
        one, other = first.shard(1, 0, state), second.shard(1, 0, state)
        assert tree.flatten(one.state)[0] == tree.flatten(other.state)[0]
        for name, value in one.gradient.gradients.items():
            assert torch.equal(value, other.gradient.gradients[name])


@pytest.mark.parametrize(
    "recipe", [models.mlp(optimizer=SGD), models.odd(), models.cnn(24)], ids=["mlp", "odd", "cnn"]
)
def test_a_version_in_the_hosts_memory_is_left_alone(recipe: Recipe) -> None:
    """The steps are taken on a copy; afterwards the parameters lie in the version again."""
    loaded, attached = Bench(recipe, local_steps=2), Bench(recipe, local_steps=2)
    version = attached.replica.pack()
    kept = version.clone()
    attached.replica.attach(version)
    for shard in (0, 1, 0):
        one, other = loaded.shard(0, shard), attached.shard(0, shard)
        assert one.gradient.gradients.keys() == other.gradient.gradients.keys()
        for name, value in one.gradient.gradients.items():
            assert torch.equal(value, other.gradient.gradients[name])
        for name, value in one.gradient.buffers.items():
            assert torch.equal(value, other.gradient.buffers[name])
        assert torch.equal(version, kept) and torch.equal(attached.replica.pack(), kept)
        first = next(p for p in attached.replica.parameters.values() if p.requires_grad)
        assert first.data_ptr() in range(version.data_ptr(), version.data_ptr() + version.numel())


def test_gradients_below_the_clip_norm_keep_their_bits() -> None:
    plain, clipped = Bench(models.mlp(), local_steps=3), Bench(models.mlp(), local_steps=3, clip_norm=1e9)
    for name, value in plain.shard(0, 0).gradient.gradients.items():
        assert torch.equal(value, clipped.shard(0, 0).gradient.gradients[name])


def test_the_slots_state_matters_and_its_scheduler_steps_once_a_global_step() -> None:
    scheduler = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    bench = Bench(models.mlp(optimizer=SGD, scheduler=scheduler), local_steps=2)
    kept = bench.shard(0, 0).state
    assert kept["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.05)
    fresh, warm = bench.shard(1, 0), bench.shard(1, 0, kept)
    assert any(
        not torch.equal(fresh.gradient.gradients[name], value)
        for name, value in warm.gradient.gradients.items()
    )


def test_a_plateau_is_that_of_the_slots_own_loss() -> None:
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
    recipe = models.mlp(optimizer=SGD, scheduler=partial(plateau, patience=0, threshold=0.5, factor=0.5))
    bench = Bench(recipe, local_steps=2)
    by_hand = plateau(SGD([torch.nn.Parameter(torch.ones(1))]), patience=0, threshold=0.5, factor=0.5)
    kept = None
    for step in range(3):
        found = bench.shard(step, 0, kept)
        kept = tree.unflatten(*tree.flatten(found.state))  # as it travels
        by_hand.step(found.gradient.loss)
        assert kept["scheduler"]["best"] == by_hand.best
        assert kept["optimizer"]["param_groups"][0]["lr"] == by_hand.optimizer.param_groups[0]["lr"]
    assert by_hand.optimizer.param_groups[0]["lr"] < 0.1


def test_a_group_that_joins_in_a_slot_goes_on_there() -> None:
    bench = Bench(moving("join"), local_steps=2, epochs=2)
    kept, sizes = None, []
    for step in range(4):
        found = bench.shard(step, 0, kept)
        kept = tree.unflatten(*tree.flatten(found.state))  # as it travels
        sizes.append([len(group["params"]) for group in kept["optimizer"]["param_groups"]])
        assert ("first.bias" in found.gradient.gradients) == (step > 1)
    assert sizes == [[2], [2, 2], [2, 2], [2, 2]]


def test_groups_that_a_shard_cannot_keep_are_refused() -> None:
    bench = Bench(moving("leave"), local_steps=2)
    kept = bench.shard(0, 0).state
    before = bytes(bench.replica.pack().numpy())
    with pytest.raises(InvalidInput, match=r"step 1: the parameter groups of SGD changed.*'first.bias' left"):
        bench.shard(1, 0, kept)
    assert bytes(bench.replica.pack().numpy()) == before


def test_the_default_outer_optimizer_averages_the_shards_weights() -> None:
    bench = Bench(models.mlp(optimizer=SGD), local_steps=2)
    trainer = Trainer.build(bench.recipe, bench.config)
    deltas = [bench.shard(0, shard).gradient.gradients for shard in (0, 1)]
    start = {name: tensor.clone() for name, tensor in trainer.replica.state_tensors().items()}
    mean = {name: 0.5 * deltas[0][name] + 0.5 * deltas[1][name] for name in deltas[0]}
    trainer.apply(mean, {}, step=0, loss=1.0)
    for name, value in trainer.replica.state_tensors().items():
        expected = (start[name] - deltas[0][name]) * 0.5 + (start[name] - deltas[1][name]) * 0.5
        torch.testing.assert_close(value, expected)


def test_diloco_is_nesterov_momentum_on_the_mean_with_the_papers_values() -> None:
    recipe = models.mlp(optimizer=SGD, outer_optimizer="torchord.coordinator.local_steps:diloco")
    trainer = Trainer.build(resolved(recipe), TrainingConfig(local_steps=50))
    [group] = trainer.optimizer.param_groups
    assert (group["lr"], group["momentum"], group["nesterov"]) == (0.7, 0.9, True)


def test_clipping_is_the_shards_and_not_the_servers() -> None:
    loose, tight = Bench(models.mlp(), local_steps=2), Bench(models.mlp(), local_steps=2, clip_norm=1e-6)
    assert tight.shard(0, 0).gradient.grad_norm != loose.shard(0, 0).gradient.grad_norm
    trainer = Trainer.build(tight.recipe, tight.config)
    huge = {name: torch.full_like(p, 10.0) for name, p in trainer.replica.parameters.items()}
    assert not trainer.apply(huge, {}, step=0, loss=1.0).clipped


def test_a_step_that_is_not_finite_is_reported() -> None:
    plan = Plan(40, TrainingConfig(batch_size=8, shards=2, local_steps=2))
    at = int(plan.parts(0, 0)[0][0])
    bench = Bench(models.mlp(dataset=partial(models.poisoned, at=at)), local_steps=2)
    assert not bench.shard(0, 0).gradient.finite


OPTIMIZERS = [
    "ASGD",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "SGD",
]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(
    ("name", "lr"), [*((name, 0.01) for name in OPTIMIZERS), ("SGD", 0.0), ("AdamW", 0.0)]
)
def test_a_gradient_that_is_not_finite_is_reported_though_no_loss_is(
    name: str, lr: float, value: str
) -> None:
    optimizer = partial(getattr(torch.optim, name), lr=lr)
    bench = Bench(models.mlp(optimizer=optimizer, loss=partial(models.bent_loss, value=value)), local_steps=2)
    last = bench.plan.parts(0, 0)[-1:]
    found = local_steps.compute(bench.replica, bench.recipe, bench.config, bench.dataset, last, 0, 0)
    assert torch.isfinite(torch.tensor(found.gradient.loss))
    assert not found.gradient.finite


def test_optimizers_that_may_hide_a_gradient_have_each_looked_at() -> None:
    assert {kind.__name__ for kind in local_steps._TELLING} == set(OPTIMIZERS) - {"Rprop"}


def test_a_switch_to_local_steps_gives_the_server_its_outer_optimizer() -> None:
    recipe = resolved(models.mlp(optimizer=partial(torch.optim.AdamW, lr=1e-3)))
    trainer = Trainer.build(recipe, TrainingConfig())
    trainer.adopt(recipe, TrainingConfig(shards=8))
    assert isinstance(trainer.optimizer, torch.optim.AdamW)
    trainer.adopt(recipe, TrainingConfig(local_steps=4))
    assert isinstance(trainer.optimizer, torch.optim.SGD)
