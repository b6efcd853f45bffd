"""Averaged weights, changed gradients, two networks, layers that thaw: a plain loop's, or refused."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from tests.support import models, reference
from tests.support import recipes_optim as R
from tests.support.fleet import finished, fleet
from tests.support.inprocess import InProcess, resolved, run
from tests.support.waiting import wait_until
from torchord import Recipe, TrainingConfig
from torchord.cache.errors import InvalidInput, NonFinite, TorchordError
from torchord.coordinator.averages import Average, ema
from torchord.coordinator.compute import inner_steps
from torchord.coordinator.compute.averaging import ENTRY
from torchord.coordinator.compute.batch import open_dataset
from torchord.coordinator.compute.gradient_rule import change
from torchord.coordinator.compute.inference import evaluate
from torchord.coordinator.compute.replica import Replica
from torchord.coordinator.compute.shard import work
from torchord.coordinator.compute.trainer import Trainer
from torchord.coordinator.spec.plan import Plan

CONFIG = TrainingConfig(epochs=3, batch_size=8, shards=2, seed=4)


def after_each_step(one: InProcess) -> list[nn.Module]:
    """The trained weights of each version from 1 on, while a run is trained to its end."""
    found = []
    for step in range(one.plan.total_steps):
        one.step(step)
        found.append(copy.deepcopy(one.trainer.replica.model))
    return found


def judged(one: InProcess) -> nn.Module:
    """The model that the run gives back."""
    replica = Replica.build(one.recipe, one.config)
    replica.load(one.trainer.replica.pack())
    replica.put_average()
    return replica.model.eval()


# --- averages ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rule", "taken"),
    [
        ("ema", get_ema_multi_avg_fn(0.8), range(1, 99)),
        ("ema of torch", get_ema_multi_avg_fn(0.8), range(1, 99)),
        ("ema, every second", get_ema_multi_avg_fn(0.8), range(2, 99, 2)),
        ("ema with buffers", get_ema_multi_avg_fn(0.8), range(1, 99)),
        ("swa", get_swa_multi_avg_fn(), range(4, 99)),
        ("swa, every third", get_swa_multi_avg_fn(), range(6, 99, 3)),
        ("own", R.warm_ema().update, range(2, 99)),
    ],
)
def test_an_average_is_the_one_that_torch_keeps(name: str, rule: Any, taken: range) -> None:
    one = InProcess(resolved(R.normed(average=R.AVERAGES[name])), CONFIG)
    versions = after_each_step(one)
    whole = one.trainer.replica.average
    assert whole is not None
    buffers = whole.rule.buffers
    theirs = AveragedModel(versions[0], multi_avg_fn=rule, use_buffers=buffers)
    for version, model in enumerate(versions, 1):
        if version in taken:
            theirs.update_parameters(model)
    found, expected, last = judged(one).state_dict(), theirs.module.state_dict(), versions[-1].state_dict()
    trained = dict(theirs.module.named_parameters(remove_duplicate=False))
    for key, value in found.items():
        average = (key in trained and not key.startswith("frozen")) or (buffers and value.is_floating_point())
        torch.testing.assert_close(value, (expected if average else last)[key], rtol=0, atol=0)
    assert not torch.equal(found["first.weight"], last["first.weight"])
    assert found["second.weight"].data_ptr() == found["third.weight"].data_ptr()


def test_an_average_beside_a_plain_loop_over_the_whole_batch() -> None:
    given = models.mlp(model=partial(nn.Linear, models.FEATURES, models.CLASSES), optimizer=R.SGD,
                       average=partial(ema, decay=0.9))  # fmt: skip
    one = run(given, CONFIG)
    recipe = resolved(given)
    model, data = Replica.build(recipe, CONFIG).model, recipe.dataset()
    optimizer, mean, plan = R.SGD(model.parameters()), None, Plan(len(data), CONFIG)
    for step in range(plan.total_steps):
        batch = [int(i) for shard in range(plan.shards_in(step)) for i in plan.indices(step, shard)]
        inputs, targets = data[batch]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        mean = mean or AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        mean.update_parameters(model)
    torch.testing.assert_close(judged(one).state_dict(), mean.module.state_dict(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("config", [
    CONFIG,
    TrainingConfig(**{**vars(CONFIG), "local_steps": 2}),
    TrainingConfig(**{**vars(CONFIG), "parameter_compression": "int8"}),
], ids=["plain", "local steps", "compressed parameters"])  # fmt: skip
def test_an_average_goes_on_bit_for_bit_on_any_fleet_and_after_a_death(config: TrainingConfig) -> None:
    recipe = resolved(R.normed(average=R.AVERAGES["swa"]))
    if config.local_steps > 1:
        undisturbed, restored = trainers_of_local_steps(recipe, config)
        assert undisturbed == restored
        return
    whole = InProcess(recipe, config).train()
    assert InProcess(recipe, config, clients=3).train().bits == whole.bits
    for stop in (0, 3, 4, 7):
        first = InProcess(recipe, config).train(0, stop)
        heir = InProcess(recipe, config)
        heir.trainer.replica.load_tensors(
            {n: t.clone() for n, t in first.trainer.replica.state_tensors().items()}
        )
        heir.trainer.load_state(first.trainer.state())
        assert heir.train(stop).bits == whole.bits


def trainers_of_local_steps(recipe: Any, config: TrainingConfig) -> list[bytes]:
    """The end of an undisturbed trainer, and of one that died half-way, given the same gradients."""

    def feed(trainer: Trainer, steps: range) -> Trainer:
        for step in steps:
            given = {n: torch.full_like(p, 0.01 * (step + 1)) for n, p in trainer.replica.parameters.items()}
            trainer.apply(given, {}, step=step, loss=1.0)
        return trainer

    whole, first = (Trainer.build(recipe, config) for _ in range(2))
    feed(whole, range(9)), feed(first, range(6))
    heir = Trainer.build(recipe, config)
    heir.replica.load(first.replica.pack())
    heir.load_state(first.state())
    return [bytes(feed(t, r).replica.pack().numpy()) for t, r in ((whole, range(0)), (heir, range(6, 9)))]


def test_who_asks_for_no_average_has_none() -> None:
    trainer = InProcess(resolved(R.normed()), CONFIG).trainer
    assert trainer.replica.average is None
    assert not any(name.startswith(ENTRY) for name in trainer.replica.state_tensors())


def test_an_evaluation_is_of_the_average_and_leaves_the_version_as_it_was() -> None:
    recipe = resolved(R.normed(average=R.AVERAGES["ema with buffers"]))
    one = InProcess(recipe, CONFIG).train()
    replica = Replica.build(recipe, CONFIG, computing=True)
    flat = one.trainer.replica.pack()
    before = flat.clone()
    replica.attach(flat)
    data = recipe.dataset()
    found = evaluate(replica, recipe, CONFIG, data, range(40)).means["loss"]
    inputs, targets = data[:]
    with torch.no_grad():
        expected = nn.functional.cross_entropy(judged(one)(inputs), targets)
        trained = nn.functional.cross_entropy(one.trainer.replica.model.eval()(inputs), targets)
    assert found == pytest.approx(float(expected), rel=1e-5)
    assert found != pytest.approx(float(trained), rel=1e-3)
    assert torch.equal(flat, before) and not replica.spoilt()
    assert bytes(replica.pack().numpy()) == bytes(flat.numpy())


@pytest.mark.parametrize("entry", [R.no_average, models.Mlp])
def test_what_is_no_average_is_refused(entry: Any) -> None:
    with pytest.raises(InvalidInput, match=r"average entry returned a .*ema"):
        InProcess(resolved(R.normed(average=entry)), CONFIG)


@pytest.mark.parametrize("given", [{"start": -1}, {"every": 0}, {"every": True}, {"start": 1.5}])
def test_an_average_that_cannot_be_made_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match=next(iter(given))):
        Average(get_ema_multi_avg_fn(0.9), **given)


# --- gradients --------------------------------------------------------------------------


@pytest.mark.parametrize("clip_norm", [None, 0.1])
@pytest.mark.parametrize("name", R.RULES)
def test_gradients_are_changed_as_in_a_plain_loop(name: str, clip_norm: float | None) -> None:
    config = TrainingConfig(**{**vars(CONFIG), "clip_norm": clip_norm})
    given = models.mlp(optimizer=R.SGD, gradients=R.RULES[name], model=partial(nn.Linear, models.FEATURES, 3))
    one = run(given, config)
    recipe = resolved(given)
    model, data = Replica.build(recipe, config).model, recipe.dataset()
    optimizer, plan, norms = R.SGD(model.parameters()), Plan(len(data), config), []
    for step in range(plan.total_steps):
        batch = [int(i) for shard in range(plan.shards_in(step)) for i in plan.indices(step, shard)]
        inputs, targets = data[batch]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        parameters = dict(model.named_parameters())
        gradients: dict[str, Tensor | None] = {n: p.grad for n, p in parameters.items()}
        with torch.no_grad():
            returned = R.RULES[name](gradients, parameters)
        for key, parameter in parameters.items():
            parameter.grad = (gradients if returned is None else returned).get(key)
        norms.append(
            float(nn.utils.get_total_norm([p.grad for p in parameters.values() if p.grad is not None]))
        )
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
    torch.testing.assert_close(
        one.trainer.replica.model.state_dict(), model.state_dict(), rtol=1e-5, atol=1e-6
    )
    assert [report.grad_norm for report in one.reports] == pytest.approx(norms, rel=1e-4)


def test_noise_on_gradients_is_seeded_by_the_step() -> None:
    given = R.normed(gradients=R.noisy)
    one, three = run(given, CONFIG), run(given, CONFIG, clients=3)
    assert one.bits == three.bits != run(R.normed(), CONFIG).bits


def test_local_steps_change_the_gradient_of_each_of_their_steps() -> None:
    given = resolved(models.mlp(optimizer=partial(torch.optim.SGD, lr=0.1), gradients=R.RULES["clip_each"],
                                model=partial(nn.Linear, models.FEATURES, 3)))  # fmt: skip
    config = TrainingConfig(**{**vars(CONFIG), "local_steps": 3})
    data, replica = open_dataset(given, config), Replica.build(given, config)
    replica.load(replica.pack())
    parts = Plan(len(data), config).parts(0, 0)
    found = inner_steps.compute(replica, given, config, data, parts, 0, 0).gradient.gradients
    model = Replica.build(given, config).model
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    for part in parts:
        model.zero_grad()
        inputs, targets = given.dataset()[list(part)]
        nn.functional.cross_entropy(model(inputs), targets).backward()
        with torch.no_grad():
            R.clip_each({n: p.grad for n, p in model.named_parameters()}, {}, 0.05)  # type: ignore[misc]
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad  # type: ignore[operator]
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(found[key], start[key] - parameter.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        (R.of_nothing, "'nothing', which is no parameter"),
        (R.doubles, "torch.float64.*where the parameter has torch.float32"),
        (R.a_number, "returned a int; it must change the gradients in place"),
    ],
)
def test_what_are_no_gradients_is_refused(rule: Any, told: str) -> None:
    with pytest.raises(InvalidInput, match=f"step 0: the recipe's gradients entry .*{told}"):
        run(R.normed(gradients=rule), CONFIG)


def test_a_rule_that_makes_gradients_nan_stops_the_run() -> None:
    with pytest.raises(NonFinite, match="step 0"):
        run(R.normed(gradients=R.to_nan), CONFIG)


def test_a_rule_sees_the_gradients_that_are_there() -> None:
    replica = Replica.build(resolved(R.normed()), CONFIG)
    replica.parameters["first.bias"].grad = torch.ones(8)
    seen: list[str] = []
    change(lambda gradients, parameters: seen.extend(gradients), replica, "step 0")
    assert seen == ["first.bias"]


# --- two networks, layers that thaw -------------------------------------------------------


def test_a_gan_with_one_loss_is_the_loop_with_two() -> None:
    given = Recipe(model=R.Gan, dataset=partial(models.points, size=40), step=R.gan_step,
                   optimizer=torch.optim.Adam, parameter_groups=R.gan_groups)  # fmt: skip
    one = run(given, CONFIG)
    recipe = resolved(given)
    model, data = Replica.build(recipe, CONFIG).model, recipe.dataset()
    assert isinstance(model, R.Gan)
    makes, judges = (torch.optim.Adam([group]) for group in R.gan_groups(model))
    plan, softplus = Plan(len(data), CONFIG), nn.functional.softplus
    for step in range(plan.total_steps):
        batch = [int(i) for shard in range(plan.shards_in(step)) for i in plan.indices(step, shard)]
        real = data[batch][0]
        fake = model.generator(real[:, :4].cos())
        judge = model.discriminator
        model.zero_grad()
        (softplus(-judge(real)).mean() + softplus(judge(fake.detach())).mean()).backward()
        found = [p.grad for p in judge.parameters()]
        model.zero_grad()
        softplus(-judge(fake)).mean().backward()
        for parameter, gradient in zip(judge.parameters(), found, strict=True):
            parameter.grad = gradient
        makes.step(), judges.step()
    torch.testing.assert_close(
        one.trainer.replica.model.state_dict(), model.state_dict(), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("entry", [R.two, R.two_by_name])
def test_several_optimizers_are_refused_by_what_they_are(entry: Any) -> None:
    with pytest.raises(InvalidInput, match=r"returned several optimizers .*parameter_groups"):
        InProcess(resolved(R.normed(optimizer=entry)), CONFIG)


def test_one_optimizer_that_steps_two_without_keeping_their_state_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"Careless holds other optimizers.*load_state_dict"):
        InProcess(resolved(R.normed(optimizer=R.Careless)), CONFIG)


def test_one_optimizer_that_steps_two_survives_a_death() -> None:
    recipe = resolved(R.normed(optimizer=R.Both))
    whole = InProcess(recipe, CONFIG).train()
    first = InProcess(recipe, CONFIG).train(0, 5)
    heir = InProcess(recipe, CONFIG)
    heir.trainer.replica.load(first.trainer.replica.pack())
    heir.trainer.load_state(first.trainer.state())
    assert heir.train(5).bits == whole.bits


@pytest.mark.parametrize("local_steps", [1, 2])
@pytest.mark.parametrize(("way", "told"), [("forward", "unfrozen"), ("freezes", "frozen")])
def test_a_layer_that_a_forward_thaws_or_freezes_is_refused(way: str, told: str, local_steps: int) -> None:
    recipe = resolved(models.mlp(model=partial(R.Thawing, way=way), optimizer=R.SGD))
    config = TrainingConfig(**{**vars(CONFIG), "local_steps": local_steps})
    replica = Replica.build(recipe, config)
    with torch.no_grad():
        replica.buffers["seen"].fill_(2)
    replica.load(replica.pack())
    data = open_dataset(recipe, config)
    with pytest.raises(InvalidInput, match=rf"step 0, shard 1: parameter .* was {told} .*lr=0"):
        work(replica, recipe, Plan(len(data), config), data, 0, 1, None)


def test_a_layer_that_is_put_back_within_the_step_is_not() -> None:
    given = models.mlp(model=partial(R.Thawing, way="puts back"), optimizer=R.SGD)
    one = run(given, CONFIG)
    assert len(one.reports) == one.plan.total_steps


def test_a_scheduler_that_thaws_a_layer_is_refused() -> None:
    given = models.mlp(model=R.half_frozen, optimizer=R.SGD, scheduler=R.ThawingLR)
    with pytest.raises(InvalidInput, match=r"step 2: parameter .* was unfrozen"):
        run(given, CONFIG)


# --- with workers -----------------------------------------------------------------------


@pytest.mark.slow
def test_an_averaged_run_survives_its_server_and_is_judged_by_its_average(tmp_path: Path) -> None:
    config = TrainingConfig(epochs=8, batch_size=8, shards=2, seed=4, checkpoint_every=7, evaluate_every=20)
    given = R.normed(average=R.AVERAGES["ema"], gradients=R.RULES["clip_each"],
                     evaluation=partial(models.points, size=40), metrics=None)  # fmt: skip
    calm = run(given, config)
    with fleet(tmp_path, workers=2, env={"TORCHORD_ALLOWED_MODULES": "tests,torch"}) as one:
        live = one.master.submit(given, config, name="averaged")
        wait_until(lambda: live.status().version >= 9, message="version 9")
        one.cluster.processes["server"].kill()
        one.cluster.processes["server"].wait()
        one.cluster.restart("server")
        trained = finished(live)
        assert reference.bits(trained.module) == reference.bits(judged(calm))
        raw = live.state_dict(averaged=False)
        assert reference.bits(raw) == reference.bits(calm.trainer.replica.model)
        assert reference.bits(raw) != reference.bits(trained.module)
        inputs, targets = models.points(40)[:]
        with torch.no_grad():
            outputs = trained.module(inputs)
        assert torch.allclose(live.predict(inputs), outputs, atol=1e-6)
        loss = float(nn.functional.cross_entropy(outputs, targets))
        assert trained.metrics["loss"] == pytest.approx(loss, rel=1e-5)
        assert live.verify(reexecute=[11]).ok
        refused = one.master.submit(R.normed(optimizer=R.two), config, name="two")
        with pytest.raises(TorchordError, match="returned several optimizers"):
            refused.wait(timeout=60)
