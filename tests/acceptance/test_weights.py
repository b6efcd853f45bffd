"""What a mean is a mean over: recipes give the steps of a plain loop over the whole batches, or are refused.

The loops here are those that everybody writes, and know nothing of shards. What a recipe may be is in
`tests.support.recipes_weights`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import default_collate

from tests.support import models
from tests.support import recipes_backward as backward
from tests.support import recipes_weights as recipes
from tests.support.inprocess import InProcess, resolved
from tests.support.stand_in import StandIn
from torchord import LocalCluster, Master, Recipe, TrainingConfig
from torchord.cache.errors import InvalidInput, NonFinite, RecipeError, RunFailed
from torchord.coordinator.compute.device_memory import DeviceMemory
from torchord.coordinator.compute.gradient import compute
from torchord.coordinator.compute.inference import combine, evaluate
from torchord.coordinator.compute.probe import due, probe
from torchord.coordinator.compute.replica import Replica
from torchord.coordinator.compute.shard import work
from torchord.coordinator.spec.plan import Plan

CONFIG = TrainingConfig(epochs=2, batch_size=8, shards=3, seed=1)
CLOSE = {"rtol": 0.0, "atol": 2e-6}


def plain(
    given: Recipe,
    config: TrainingConfig,
    model: nn.Module,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
) -> list[float]:
    """Train a model on the whole batches of a run; returns their losses."""
    data, collate = given.dataset(), given.collate or default_collate  # type: ignore[operator]
    optimizer = given.optimizer(model.parameters())  # type: ignore[operator]
    plan, losses = Plan(len(data), config), []
    for step in range(plan.total_steps):
        shards = range(plan.shards_in(step))
        batch = collate([data[int(i)] for shard in shards for i in plan.indices(step, shard)])  # type: ignore[operator]
        if loss is not None:
            value = loss(model, batch)
        elif given.step is not None:
            value = given.step(model, batch)  # type: ignore[operator]
        else:
            value = given.loss(model(batch[0]), batch[1])  # type: ignore[operator,misc]
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def start(given: Recipe, config: TrainingConfig = CONFIG) -> tuple[InProcess, nn.Module]:
    """A run in this process, and a model that begins as it does."""
    run = InProcess(resolved(given), config)
    model = given.model()  # type: ignore[operator]
    model.load_state_dict(run.trainer.replica.model.state_dict())
    return run, model.train()


def tried(given: Recipe, config: TrainingConfig = CONFIG, shard: int = 0) -> str:
    """What the probe says of a recipe."""
    run = InProcess(resolved(given), config)
    assert due(run.recipe, run.plan, 0, shard)
    run.replicas[0].load(run.trainer.replica.pack())
    return probe(run.replicas[0], run.recipe, run.plan, run.dataset, 0, shard)


def batch_means() -> dict[str, tuple[Recipe, Callable[[nn.Module, Any], Tensor] | None]]:
    """Recipes that are trained as they are, and the loss of a plain loop where it is written otherwise."""
    language, classes = recipes.language, recipes.classes
    labels, smooth = {"dataset": recipes.partly_labelled}, partial(F.cross_entropy, label_smoothing=0.1)
    one = partial(nn.Linear, models.FEATURES, 1)
    return {
        "a token mean": (language(), None),
        "a token mean, shards without a label": (language(collate=recipes.mostly_unlabelled), None),
        "a token mean by hand, weighed": (language(recipes.masked_mean, weight=recipes.labelled), None),
        "a sum and its weight": (language(recipes.sum_and_weight), recipes.token_mean),
        "a mean over each sentence": (language(recipes.sentence_mean), None),
        "labels that are ignored": (classes(**labels), None),
        "the same, bound": (classes(partial(F.cross_entropy, ignore_index=0)), None),
        "the same, smoothed": (classes(smooth, **labels), None),
        "log-likelihoods": (classes(recipes.likelihood, **labels), None),
        "class weights": (classes(recipes.class_weights, dataset=recipes.skewed), None),
        "class weights that are said": (
            classes(recipes.class_weights_smoothed, weight=recipes.weight_of_classes, dataset=recipes.skewed),
            None,
        ),
        "a sum": (classes(partial(F.cross_entropy, reduction="sum"), optimizer=recipes.slow), None),
        "a sum that is declared": (
            classes(recipes.focal_sum, loss_over="sum", optimizer=recipes.slow),
            None,
        ),
        "squares": (classes(F.mse_loss, dataset=models.curve, model=one), None),
        "a penalty": (classes(step=recipes.penalised), None),
        "a derivative": (classes(step=recipes.slope), None),
        "probabilities": (classes(F.cross_entropy, dataset=recipes.probabilities), None),
        "a second head, in training": (classes(backward.both_heads, model=backward.TwoHeads), None),
        "a hook that holds rows still": (classes(model=partial(backward.Hooked, "rows")), None),
    }


@pytest.mark.parametrize("name", batch_means())
def test_a_step_is_that_of_the_whole_batch(name: str) -> None:
    given, loss = batch_means()[name]
    run, model = start(given)
    assert tried(given) == ""
    losses = plain(given, CONFIG, model, loss)
    run.train()
    torch.testing.assert_close(run.losses, losses, **CLOSE)
    torch.testing.assert_close(run.trainer.replica.model.state_dict(), model.state_dict(), **CLOSE)


def refused() -> dict[str, tuple[Recipe, str]]:
    language, classes = recipes.language, recipes.classes
    return {
        "a token mean by hand": (language(recipes.masked_mean), "weight=..."),
        "the same from a layer of zeros": (language(recipes.masked_mean, zero=True), "weight=..."),
        "the same where shards have no label": (
            language(recipes.masked_mean, collate=recipes.mostly_unlabelled),
            "weight=...",
        ),
        "class weights that do not show": (classes(recipes.class_weights_smoothed), "weight=..."),
        "a wrong weight": (language(weight=recipes.sentences_of), "weight=..."),
        "InfoNCE": (classes(recipes.info_nce), "loss_over='shard'"),
        "pairs": (classes(recipes.pairs), "loss_over='shard'"),
        "a sum": (classes(recipes.focal_sum), "loss_over='sum'"),
        "a random sum": (classes(step=recipes.evidence_sum, model=recipes.Autoencoder), "loss_over='sum'"),
        "no sum": (classes(recipes.class_weights_smoothed, loss_over="sum"), "not the sum of"),
        "a balance of experts, in training": (
            classes(step=backward.balanced_experts, model=backward.Experts),
            "weight=...",
        ),
    }


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (recipes.classes(model=partial(backward.Hooked, "bound")), "linear.weight"),
        (recipes.classes(model=backward.ByFrequency, dataset=backward.words), "embedding.weight"),
    ],
)
def test_a_backward_that_looks_at_the_whole_batch_is_refused(given: Recipe, name: str) -> None:
    with pytest.raises(InvalidInput, match=name) as found:
        tried(given)
    text = str(found.value)
    assert text.count(". ") == 0 and all(way in text for way in ("gradients=", "loss_over='shard'")), text


def test_a_shards_own_statistics_are_no_reason_to_refuse() -> None:
    assert tried(recipes.classes(model=backward.Centred, buffers={"centre": "mean"})) == ""


@pytest.mark.parametrize("name", refused())
def test_what_no_weight_is_known_of_is_refused(name: str) -> None:
    given, words = refused()[name]
    with pytest.raises(InvalidInput) as found:
        tried(given)
    text = str(found.value)
    assert words in text and text.count(". ") == 0, text
    if "sum" not in name:
        assert all(way in text for way in ("weight=", "(sum, weight)", "loss_over='shard'")), text


def unseen() -> dict[str, tuple[Recipe, str]]:
    classes = recipes.classes
    return {
        "noise of numpy in the model": (classes(model=recipes.Shaken), "random"),
        "noise in the collate": (recipes.language(collate=recipes.masked_at_random), "random"),
        "a detector": (classes(step=recipes.detect, model=recipes.Detector), "in training mode"),
        "no running statistics": (
            classes(model=partial(recipes.Normed, running=False)),
            "batch normalisation",
        ),
        "another loss each time": (recipes.classes(recipes.counted), "from call to call"),
        "no label at all": (recipes.language(collate=recipes.unlabelled), "nan"),
        "no memory": (classes(recipes.too_large), "OutOfMemoryError"),
    }


@pytest.mark.parametrize("name", unseen())
def test_what_cannot_be_looked_at_is_said_and_not_refused(name: str) -> None:
    given, words = unseen()[name]
    assert words in tried(given)


@pytest.mark.parametrize("step", [recipes.token_mean, recipes.sentence_mean])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_ordinary_models_pass(step: Any, precision: str) -> None:
    config = TrainingConfig(batch_size=24, shards=6, precision=precision)
    for given in (recipes.language(step, dropout=0.2), recipes.classes(model=recipes.Normed)):
        assert tried(given, config) == ""


def test_equal_shards_alone_show_nothing() -> None:
    """All shards of the first batch have equally many tokens, and later ones need not."""
    given = recipes.language(recipes.masked_mean, dataset=recipes.balanced)
    plan, data = Plan(8, recipes.BALANCED), recipes.balanced()
    assert {sum(len(data[int(i)]) for i in plan.indices(0, shard)) for shard in range(4)} == {14}
    with pytest.raises(InvalidInput, match="in parts of 1, 1 it comes to"):
        tried(given, recipes.BALANCED)


def test_a_shard_that_shows_nothing_has_others_beside_it() -> None:
    given = recipes.classes(recipes.class_weights_smoothed, dataset=recipes.alike)
    assert tried(given, recipes.ALIKE) == ""
    with pytest.raises(InvalidInput, match="weight="):
        tried(given, recipes.ALIKE, shard=1)


def test_what_is_declared_is_not_tried() -> None:
    given = recipes.classes(recipes.info_nce, loss_over="shard")
    plan = Plan(40, CONFIG)
    assert not due(resolved(given), plan, 0, 0)
    asked = resolved(recipes.language(recipes.masked_mean))
    assert [due(asked, plan, step, shard) for step, shard in ((0, 0), (0, 2), (1, 0))] == [True, True, False]
    for config in (
        TrainingConfig(batch_size=8, shards=1),
        TrainingConfig(batch_size=8, shards=3, probe=False),
        TrainingConfig(batch_size=8, shards=3, local_steps=2),
    ):
        assert not due(asked, Plan(40, config), 0, 0)
    # A run that comes to have shards later is tried then, once.
    plan = Plan(40, TrainingConfig(batch_size=8, shards=1), {2: {"shards": 2}, 3: {"shards": 4}})
    assert [step for step in range(5) if due(asked, plan, step, 0)] == [2]
    # What was submitted before there was a probe is what it was: shards by their examples.
    before = Recipe.from_spec({k: v for k, v in given.to_spec().items() if k != "loss_over"})
    assert before.loss_over == "shard"


def test_the_probe_leaves_no_trace() -> None:
    given = recipes.language(dropout=0.2, zero=True)
    untried, run = InProcess(resolved(given), CONFIG), InProcess(resolved(given), CONFIG)
    replica = run.replicas[0]
    replica.attach(run.trainer.replica.pack())
    before = bytes(replica.pack().numpy())
    assert probe(replica, run.recipe, run.plan, run.dataset, 0, 0) == ""
    assert not replica.spoilt() and bytes(replica.pack().numpy()) == before
    assert run.train().bits == untried.train().bits


@pytest.mark.parametrize("way", [recipes.token_mean, recipes.sum_and_weight])
def test_a_weight_comes_from_a_device_with_the_gradients(way: Any) -> None:
    run = InProcess(resolved(recipes.language(way, collate=recipes.mostly_unlabelled)), CONFIG)
    here, there = run.replicas[0], Replica.build(run.recipe, CONFIG)
    there.use(DeviceMemory(StandIn()))
    found, places = [], [(step, shard) for step in range(8) for shard in range(3)]
    for replica in (here, there):
        replica.load(run.trainer.replica.pack())
        for place in places:
            found.append(compute(replica, run.recipe, CONFIG, run.dataset, run.plan.indices(*place), *place))
    half = len(places)
    for one, other in zip(found[:half], found[half:], strict=True):
        assert (one.weight, one.loss, one.examples) == (other.weight, other.loss, other.examples)
        torch.testing.assert_close(one.gradients, other.gradients, rtol=0, atol=0)
    assert any(each.weight == 0 and each.gradients == {} for each in found)
    assert any(each.weight for each in found)


def test_local_steps_are_weighed_and_those_of_nothing_left_out() -> None:
    """Two shards that train by themselves, averaged by their labelled tokens."""
    given = recipes.language(collate=recipes.mostly_unlabelled)
    config = TrainingConfig(batch_size=4, shards=2, local_steps=2, seed=5)
    run, model = start(given, config)
    replica, data = run.replicas[0], recipes.sentences()
    replica.load(run.trainer.replica.pack())
    skipped = 0
    for step in range(run.plan.total_steps):
        for shard in range(2):
            local = given.model()  # type: ignore[operator]
            local.load_state_dict(model.state_dict())
            optimizer, weight = given.optimizer(local.parameters()), 0  # type: ignore[operator]
            for part in run.plan.parts(step, shard):
                batch = recipes.mostly_unlabelled([data[int(i)] for i in part])
                count = recipes.labelled(batch)
                if count:
                    optimizer.zero_grad()
                    recipes.token_mean(local, batch).backward()
                    optimizer.step()
                else:
                    skipped += 1
                weight += count
            found = work(replica, run.recipe, run.plan, run.dataset, step, shard, None)
            assert found.weight == weight or (found.weight is None and weight == found.examples)
            assert math.isfinite(found.loss)
            moved = {n: p - dict(local.named_parameters())[n] for n, p in model.named_parameters()}
            for name, difference in moved.items():
                sent = found.payload.get(name, torch.zeros_like(difference))
                torch.testing.assert_close(sent, difference.detach(), **CLOSE)
    assert skipped


def test_a_slots_memory_outlasts_a_shard_that_weighs_nothing() -> None:
    """What a codec holds back goes into the slot's next step, as the shard of weight 0 would lose it."""
    given = recipes.language(collate=recipes.unlabelled)
    run, _ = start(given, TrainingConfig(batch_size=8, shards=3, compression="topk:0.1"))
    replica = run.replicas[0]
    replica.load(run.trainer.replica.pack())
    kept = {"head.weight": torch.full((11, 8), 0.5)}
    state = {"mode": "plain topk:0.1", "residual": kept}
    found = work(replica, run.recipe, run.plan, run.dataset, 0, 0, state)
    assert (found.weight, found.payload, found.loss, found.grad_norm) == (0.0, {}, 0.0, 0.0)
    assert found.state == state


def test_a_batch_that_weighs_nothing_stops_the_run_or_is_skipped() -> None:
    given = recipes.language(collate=recipes.unlabelled)
    with pytest.raises(NonFinite):
        start(given)[0].train()
    run, model = start(given, TrainingConfig(batch_size=8, shards=3, nonfinite="skip"))
    run.train()
    assert all(report.skipped for report in run.reports)
    torch.testing.assert_close(run.trainer.replica.model.state_dict(), model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("way", [recipes.negative, recipes.not_a_number, recipes.endless])
def test_an_impossible_weight_names_its_shard(way: Any) -> None:
    with pytest.raises(InvalidInput, match=r"shard 2 of step 0 weighs .* finite and at least 0"):
        start(recipes.language(weight=way))[0].train()


@pytest.mark.parametrize(
    ("way", "what"),
    [
        (recipes.truth, "is a bool"),
        (recipes.imaginary, "is a complex"),
        (recipes.word, "is a str"),
        (recipes.each_row, "shape"),
        (recipes.mask, "torch.bool"),
    ],
)
def test_a_weight_is_a_number(way: Any, what: str) -> None:
    with pytest.raises(InvalidInput, match=f"weight= {what}|weight= is a tensor of .*{what}"):
        start(recipes.language(weight=way))[0].train()


def test_shapes_that_do_not_fit_are_the_losss_own_error() -> None:
    given = recipes.classes(F.binary_cross_entropy_with_logits, dataset=models.curve)
    with pytest.raises(ValueError, match=r"Target size .* must be the same as input size"):
        start(given)[0].train()


def test_what_contradicts_itself_is_refused_at_once() -> None:
    with pytest.raises(RecipeError, match="loss_over must be one of 'batch', 'sum', 'shard', not 'token'"):
        recipes.classes(loss_over="token")
    with pytest.raises(RecipeError, match="leave weight= out"):
        recipes.classes(recipes.focal_sum, loss_over="sum", weight=recipes.weight_of_classes)
    with pytest.raises(RecipeError, match="reduction='none'"):
        recipes.classes(partial(F.cross_entropy, reduction="none")).to_spec()
    with pytest.raises(RecipeError, match="reduction='sum'"):
        given = partial(F.cross_entropy, reduction="sum")
        recipes.classes(given, weight=recipes.weight_of_classes).to_spec()
    with pytest.raises(InvalidInput, match="leave one out"):
        start(recipes.language(recipes.sum_and_weight, weight=recipes.labelled))[0].train()


@pytest.mark.parametrize(
    "given",
    [
        recipes.language(),
        recipes.language(recipes.sum_and_weight),
        recipes.language(recipes.masked_mean, weight=recipes.labelled),
        recipes.classes(recipes.class_weights, dataset=recipes.skewed),
        recipes.classes(partial(F.cross_entropy, reduction="sum")),
    ],
)
def test_an_evaluation_is_the_loss_of_its_dataset(given: Recipe) -> None:
    run, model = start(given)
    data, collate = run.dataset, given.collate or default_collate
    halves = [range(len(data) // 2), range(len(data) // 2, len(data))]
    parts = [evaluate(run.trainer.replica, run.recipe, CONFIG, data, list(half)) for half in halves]
    batch = collate([data[i] for i in range(len(data))])  # type: ignore[operator]
    with torch.no_grad():
        if given.step is None:
            expected = given.loss(model(batch[0]), batch[1])  # type: ignore[operator,misc]
        else:
            expected = recipes.token_mean(model, batch)
    assert combine(parts, run.recipe, CONFIG)["loss"] == pytest.approx(expected.item(), rel=1e-6)


def test_metrics_weigh_what_the_recipe_says() -> None:
    metrics = {"loss again": recipes.class_weights_smoothed}
    given = recipes.classes(recipes.class_weights_smoothed, weight=recipes.weight_of_classes, metrics=metrics)
    run, model = start(given)
    inputs, targets = run.dataset.tensors
    found = evaluate(run.trainer.replica, run.recipe, CONFIG, run.dataset, list(range(40)))
    expected = recipes.class_weights_smoothed(model(inputs), targets).item()
    assert found.means == pytest.approx({"loss": expected, "loss again": expected}, rel=1e-6)


@pytest.mark.slow
def test_real_workers(cluster: Callable[..., LocalCluster]) -> None:
    """Through ledger, partial sums and an evaluation; a refusal, and what could not be looked at."""
    made = cluster(2, env={"TORCHORD_ALLOWED_MODULES": "tests,torch"})
    master = Master(made.url, checkpoint_dir=made.checkpoint_dir)
    given = recipes.language(collate=recipes.mostly_unlabelled, evaluation=recipes.sentences)
    config = TrainingConfig(epochs=2, batch_size=10, shards=7, fan_in=2, seed=2, checkpoint_every=3)
    run = master.submit(given, config, name="tokens")
    wrong = master.submit(recipes.language(recipes.masked_mean), config, name="wrong")
    random = recipes.classes(model=recipes.Shaken)
    noisy = master.submit(random, TrainingConfig(batch_size=8, staleness=1, compression="int8"), name="noisy")
    trained = run.wait(timeout=120)
    _, model = start(given, config)
    losses = plain(given, config, model)
    torch.testing.assert_close([report.loss for report in trained.history], losses, **CLOSE)
    torch.testing.assert_close(trained.module.state_dict(), model.state_dict(), **CLOSE)
    whole = recipes.mostly_unlabelled([*recipes.sentences()])
    assert trained.metrics["loss"] == pytest.approx(recipes.token_mean(model, whole).item(), rel=1e-5)
    audit = run.verify(reexecute=[1, 2])
    assert audit.ok, audit.problems
    with pytest.raises(RunFailed, match=r"weight=.*loss_over='shard'"):
        wrong.wait(timeout=60)
    assert wrong.status().version == 0
    with pytest.raises(RunFailed, match="a mean of nothing: all shards weigh 0"):
        master.submit(recipes.language(collate=recipes.unlabelled), config, name="nothing").wait(timeout=60)
    noisy.wait(timeout=60)
    assert [e.data["message"] for e in noisy.events() if e.type == "probe" and "random" in e.data["message"]]
