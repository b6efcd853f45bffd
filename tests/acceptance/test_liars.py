"""A worker that lies about one gradient in twenty is named, and the run ends with an honest run's bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support import models, recipes_impure, reference
from tests.support.fleet import WAIT_SECONDS, fleet
from tests.support.liars import LyingFleet, doubled, scaled
from tests.support.waiting import wait_until
from torchord import Master, Recipe, TrainingConfig
from torchord.cache.errors import CacheUnreachable, ConfigError, Impure, InvalidInput, RecipeError
from torchord.cache.ledger.distrusted import Distrusted
from torchord.coordinator.cli import main
from torchord.coordinator.compute.shard import ShardWork
from torchord.coordinator.server.jury import Jury
from torchord.coordinator.spec.plan import Plan

CONFIG = TrainingConfig(epochs=1, batch_size=8, shards=4, seed=2, audit_fraction=1.0)


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchord.coordinator.client.slot_lease._REFUSAL_SECONDS", (0.0, 0.0))
    monkeypatch.setattr("torchord.coordinator.client.check_turn._PAUSE_SECONDS", 0.0)
    monkeypatch.setattr("torchord.cache.keys.WORKER_LEASE_MS", 600_000)


@pytest.fixture
def submitted(redis_url: str, tmp_path: Path) -> Callable[..., LyingFleet]:
    def submit(recipe: Recipe, config: TrainingConfig) -> LyingFleet:
        master = Master(redis_url, checkpoint_dir=str(tmp_path))
        return LyingFleet(master.submit(recipe, config, name="lied-to"), tmp_path)

    return submit


def plain(recipe: Recipe) -> Recipe:
    return replace(recipe, evaluation=None, metrics=None)


KINDS: dict[str, tuple[Recipe, dict[str, Any]]] = {
    "batch norm, dropout, augmentation": (plain(models.cnn(32)), {}),
    "partial sums": (plain(models.cnn(32)), {"shards": 8, "fan_in": 2}),
    "half precision": (recipes_impure.recipe(), {"precision": "fp16"}),
    "local steps, stale, compressed": (
        recipes_impure.recipe(),
        {"local_steps": 2, "staleness": 1, "compression": "powersgd:1,values=int8"},
    ),
}


def honest_bits(url: str, folder: Path, recipe: Recipe, config: TrainingConfig) -> reference.Bits:
    """Those of the loop in one process, or of a run whose Clients are honest, where there is no such loop."""
    if config.local_steps == 1:
        return reference.average(recipe, config).bits
    run = Master(url, checkpoint_dir=str(folder)).submit(recipe, config, name="honest")
    return LyingFleet(run, folder).train()


@cache
def small_bits() -> reference.Bits:
    return reference.average(recipes_impure.recipe(), CONFIG).bits


def quarantined(fleet: LyingFleet) -> list[str]:
    return sorted(fleet.server.heartbeat.registry.distrusted())


def said(fleet: LyingFleet, kind: str) -> list[dict[str, Any]]:
    return [event.data for event in fleet.run._ledger.read_events() if event.type == kind]


@pytest.mark.parametrize("kind", KINDS)
def test_who_lies_is_named_and_the_bits_are_an_honest_run_s(
    submitted: Callable[..., LyingFleet], redis_url: str, tmp_path: Path, kind: str
) -> None:
    """Wherever a lie is about a shard that is computed twice, in that or in the check."""
    recipe, changes = KINDS[kind]
    config = replace(CONFIG, **changes)
    fleet = submitted(recipe, config)
    fleet.lies(doubled, once_in=1 if kind == "partial sums" else 2)
    assert fleet.bits() == honest_bits(redis_url, tmp_path, recipe, config)
    (found,) = fleet.server.heartbeat.registry.distrusted().values()
    assert fleet.told and (found.node, found.run) == ("client1@here", "lied-to")
    assert "torchord readmit client1@here" in found.said() and "differs by" in found.said()
    assert [event["node"] for event in said(fleet, "quarantined")] == ["client1@here"]
    assert fleet.liar.heartbeat.info.id not in {
        worker for report in fleet.run.history()[found.step :] for worker in report.workers
    }


def test_one_in_twenty_is_found_and_what_was_used_before_is_said(
    submitted: Callable[..., LyingFleet],
) -> None:
    """A check looks at one shard of a step: what a liar got through before is in the weights, and is told."""
    fleet = submitted(recipes_impure.recipe(), replace(CONFIG, epochs=4))
    fleet.lies(doubled, once_in=20, checked=False)
    fleet.bits()
    assert quarantined(fleet) == ["client1@here"]
    audit = fleet.run.verify()
    assert not audit.ok and len(audit.problems) == 1
    assert "is quarantined" in audit.problems[0]
    assert "shards that it computed were used and not computed twice, the first of them" in audit.problems[0]


FIGURES: dict[str, tuple[dict[str, Any], str]] = {
    "a number of examples": ({"examples": 10**6}, "examples"),
    "a norm that is far from the others'": ({"grad_norm": 1e9}, "norm"),
    "a NaN, which would stop the run": ({"loss": float("nan")}, "loss"),
    "no gradient of a parameter": ({"payload": {}}, "second time only"),
}


@pytest.mark.parametrize("kind", FIGURES)
def test_figures_that_cannot_be_right_are_refused(submitted: Callable[..., LyingFleet], kind: str) -> None:
    changed, what = FIGURES[kind]
    fleet = submitted(recipes_impure.recipe(), CONFIG)
    fleet.lies(lambda done: replace(done, **changed), once_in=3, checked="examples" not in changed)
    assert fleet.bits() == small_bits()
    (found,) = fleet.server.heartbeat.registry.distrusted().values()
    assert what in found.what


def test_a_tensor_of_another_shape_names_worker_shard_and_tensor(
    submitted: Callable[..., LyingFleet],
) -> None:
    def flat(done: ShardWork) -> ShardWork:
        return replace(done, payload={name: each.reshape(-1) for name, each in done.payload.items()})

    fleet = submitted(recipes_impure.recipe(), CONFIG)
    fleet.lies(flat, once_in=3, checked=False)
    assert fleet.bits() == small_bits()
    assert quarantined(fleet) == ["client1@here"]


def test_a_gradient_above_the_bound_is_refused(submitted: Callable[..., LyingFleet]) -> None:
    """Whether or not its worker says how long it is."""
    config = replace(CONFIG, max_shard_norm=50.0)
    fleet = submitted(recipes_impure.recipe(), config)

    def long(done: ShardWork) -> ShardWork:
        return replace(done, payload={name: each * 1e4 for name, each in done.payload.items()})

    fleet.lies(long, once_in=3, checked=False)
    assert fleet.bits() == small_bits()
    (found,) = fleet.server.heartbeat.registry.distrusted().values()
    assert "the gradient of" in found.what


def test_without_checks_it_is_refused_and_nobody_is_accused(submitted: Callable[..., LyingFleet]) -> None:
    config = replace(CONFIG, audit_fraction=0.0, max_shard_norm=50.0)
    fleet = submitted(recipes_impure.recipe(), config)

    def long(done: ShardWork) -> ShardWork:
        return replace(done, payload={name: each * 1e4 for name, each in done.payload.items()})

    fleet.lies(long, once_in=3, checked=False)
    assert fleet.bits() == small_bits()
    assert quarantined(fleet) == []
    message = said(fleet, "slot refused")[0]["message"]
    assert "client1@here" in message and "max_shard_norm is 50" in message


def test_an_honest_gradient_above_the_bound_stops_the_run_with_both_figures(
    submitted: Callable[..., LyingFleet],
) -> None:
    fleet = submitted(recipes_impure.recipe(), replace(CONFIG, max_shard_norm=1e-6))
    with pytest.raises(InvalidInput, match=r"shard 0 of step 0: .* norm of .* and max_shard_norm is 1e-06"):
        fleet.train()
    assert quarantined(fleet) == [] and fleet.run.status().state == "failed"


def test_who_was_let_back_in_computes_again(submitted: Callable[..., LyingFleet]) -> None:
    fleet = submitted(recipes_impure.recipe(), CONFIG)
    registry = fleet.server.heartbeat.registry
    registry.distrust(Distrusted.now(fleet.liar.heartbeat.info.id, "another", 0, 0, "differs by 1"))
    while fleet.run.status().version < 1:
        fleet._in_order()
    assert fleet.verdicts["refused"] and "client1@here" in fleet.run.status().refused[0]
    assert registry.readmit("client1@here") and not registry.readmit("client1@here")
    fleet.bits()
    workers = {worker for report in fleet.run.history() for worker in report.workers}
    assert fleet.liar.heartbeat.info.id in workers


def test_a_run_without_checks_takes_everybody(submitted: Callable[..., LyingFleet]) -> None:
    fleet = submitted(recipes_impure.recipe(), replace(CONFIG, audit_fraction=0.0))
    liar = fleet.liar.heartbeat.info.id
    fleet.server.heartbeat.registry.distrust(Distrusted.now(liar, "another", 0, 0, "differs by 1"))
    fleet.train()
    assert not fleet.verdicts["refused"]


def test_a_recipe_that_makes_liars_of_too_many_is_at_fault(submitted: Callable[..., LyingFleet]) -> None:
    """It bars no second node of three, and lets the first one go: other runs are not to pay for it."""
    fleet = submitted(recipes_impure.recipe(), CONFIG)
    registry = fleet.server.heartbeat.registry
    registry.distrust(Distrusted.now("client0@here/1-a", "lied-to", 0, 0, "differs by 1"))
    fleet.lies(doubled, once_in=1)
    with pytest.raises(Impure, match="it was said of too many workers of this run"):
        fleet.train()
    assert quarantined(fleet) == []


def test_a_server_that_dies_when_it_has_named_a_liar_leaves_the_same_bits(
    submitted: Callable[..., LyingFleet], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its slots are thrown away by whoever takes the run over."""
    fleet = submitted(recipes_impure.recipe(), CONFIG)
    fleet.lies(doubled, once_in=3)

    def lost(*_: Any) -> None:
        raise CacheUnreachable("the server is dead by now")

    with monkeypatch.context() as there:
        there.setattr(Jury, "_open", lost)
        while not quarantined(fleet):
            fleet._in_order()
    fleet.another_server()
    assert fleet.bits() == small_bits()


def test_a_process_that_lies_is_named_and_the_run_goes_on_without_it(tmp_path: Path) -> None:
    """Real workers; one shard a step, and each is checked."""
    recipe = recipes_impure.recipe(loss=recipes_impure.loss_of_a_liar)
    config = replace(CONFIG, shards=1, probe=False, epochs=2)
    with fleet(tmp_path, workers=1) as one:
        one.cluster.add_worker("liar", env={"TESTS_LIAR": "1"})
        one.resize(2)
        run = one.master.submit(recipe, config, name="lied-to")
        registry = run._services.registry
        wait_until(registry.distrusted, message="the liar to be named")
        one.cluster.processes["liar"].kill()  # who is quarantined hands on what it gets, at its leisure
        trained = run.wait(timeout=WAIT_SECONDS)
        audit = run.verify()
        assert audit.ok, audit.problems
        assert reference.bits(trained.module) == reference.average(recipe, config).bits
        (node,) = registry.distrusted()
        assert node.startswith("liar@")
        said = [event for event in run._ledger.read_events() if event.type == "quarantined"]
        assert [event.data["node"] for event in said] == [node]
        assert "is quarantined" in one.log("server")
        assert main(["readmit", node, "--url", one.cluster.url]) == 0
        assert registry.distrusted() == {}


def shard_gradients(config: TrainingConfig) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """The initial weights, and each shard's gradient in the first step, by a plain loop."""
    recipe = recipes_impure.recipe(model=partial(models.Mlp, dropout=0.0))
    model, data, *_ = reference._parts(recipe, config)
    plan, found = Plan(len(data), config), []
    weights = {name: each.detach().clone() for name, each in model.named_parameters()}
    for shard in range(plan.shards_in(0)):
        inputs, targets = reference._read(recipe, data, [int(i) for i in plan.indices(0, shard)])
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs), targets).backward()
        found.append(
            {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
        )
    return weights, found


@pytest.mark.parametrize("aggregation", ["mean", "median", "trimmed_mean", "krum"])
def test_robust_averages_bound_what_one_liar_can_do(
    submitted: Callable[..., LyingFleet], aggregation: str
) -> None:
    """Nothing is checked, and a shard is a million times what it should be.

    Under SGD each weight moves by the learning rate times something between the least and the largest honest
    gradient of it, and under the mean it does not.
    """
    config = replace(
        CONFIG, batch_size=40, shards=5, audit_fraction=0.0, aggregation=aggregation, max_shard_norm=None
    )
    recipe = recipes_impure.recipe(
        model=partial(models.Mlp, dropout=0.0), optimizer=partial(torch.optim.SGD, lr=0.5)
    )
    fleet = submitted(recipe, config)
    fleet.lies(lambda done: scaled(done, 1e6), once_in=1, checked=False, only=(0, 1))
    while fleet.run.status().version < 1:
        fleet._in_order()
    assert fleet.told == 1
    before, gradients = shard_gradients(config)
    honest = [gradient for shard, gradient in enumerate(gradients) if shard != 1]
    after, within = fleet.run.state_dict(), True
    for name, weight in before.items():
        rows = torch.stack([gradient[name] for gradient in honest])
        moved = (weight - after[name]) / 0.5
        within &= bool(
            (moved >= rows.min(0).values - 1e-5).all() and (moved <= rows.max(0).values + 1e-5).all()
        )
    assert within == (aggregation != "mean")


def test_a_robust_run_has_the_same_bits_on_any_fleet_and_in_a_replay(redis_url: str, tmp_path: Path) -> None:
    config = replace(CONFIG, shards=5, batch_size=16, aggregation="median")
    bits = []
    for turn in (0, 1):
        master = Master(redis_url, checkpoint_dir=str(tmp_path))
        run = master.submit(recipes_impure.recipe(), config, name=f"robust-{turn}")
        one = LyingFleet(run, tmp_path)
        one.turn = turn
        bits.append(one.train())
    assert bits[0] == bits[1] != reference.average(recipes_impure.recipe(), config).bits
    audit = run.verify(reexecute=[0, 2])
    assert audit.ok and audit.reexecuted, audit.problems


def test_what_a_robust_average_cannot_go_with_is_refused_at_submit(redis_url: str, tmp_path: Path) -> None:
    for changes, said in (
        ({"shards": 2}, "takes at least 3 shards, not 2"),
        ({"shards": 16}, "added up on the way: set fan_in to 16"),
        ({"compression": "int8"}, "use compression='none' in place of 'int8'"),
        ({"aggregation": "krum"}, "aggregation_faults=1 takes at least 5 shards, not 4"),
        ({"aggregation": "average"}, "must be one of 'mean', 'median', 'trimmed_mean', 'krum'"),
    ):
        with pytest.raises(ConfigError, match=said):
            TrainingConfig(**{"shards": 4, "aggregation": "median", **changes})
    recipe = recipes_impure.recipe(loss_over="batch", weight=recipes_impure.recipe)
    with pytest.raises(RecipeError, match="weight: a shard would weigh what its loss says"):
        Master(redis_url, checkpoint_dir=str(tmp_path)).submit(recipe, TrainingConfig(aggregation="median"))
