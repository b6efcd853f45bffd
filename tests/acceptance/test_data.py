"""Data and its order as people bring them: what a plain loop over the same batches gives, or a refusal.

Each loop is written as one would without torchord: a sampler made once and iterated epoch after epoch, the
generators seeded for each. It knows nothing of shards.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, RandomSampler, WeightedRandomSampler, default_collate

from tests.support import inprocess, models, recipes_data
from tests.support.recipes_data import LENGTHS, SIZE, WEIGHTS
from tests.support.shuffle import Shuffle
from torchord import Master, Recipe, Run, TrainingConfig
from torchord.cache.errors import RecipeError, TorchordError
from torchord.cache.settings import Settings
from torchord.coordinator import orders
from torchord.coordinator.compute import visiting
from torchord.coordinator.runtime.services import Services
from torchord.coordinator.spec.plan import derive_seed, epoch_order

CONFIG = TrainingConfig(epochs=3, batch_size=8, shards=3, seed=4)
Loop = Callable[[Any], Iterable[Iterable[Iterable[int]]]]  # dataset -> epochs of batches of indices


def seeded(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def cut(order: Iterable[Any], size: int = CONFIG.batch_size) -> list[list[int]]:
    indices = [int(index) for index in order]
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def each_epoch(ask: Callable[[int], Any]) -> list[Any]:
    """What an order gives in each epoch, the generators seeded for it as the docs say."""
    found = []
    for epoch in range(CONFIG.epochs):
        seeded(derive_seed(CONFIG.seed, "order", epoch))
        found.append(list(ask(epoch)))
    return found


def plain(recipe: Recipe, epochs: Iterable[Iterable[Iterable[int]]]) -> dict[str, torch.Tensor]:
    """The loop that everybody writes: a batch, its mean loss, a step."""
    seeded(derive_seed(CONFIG.seed, "init"))
    model = recipe.model()  # type: ignore[operator]
    seeded(derive_seed(CONFIG.seed, "dataset"))
    data = recipe.dataset()  # type: ignore[operator]
    optimizer = recipe.optimizer(model.parameters())  # type: ignore[operator]
    for batches in epochs:
        for indices in batches:
            batch = (recipe.collate or default_collate)([data[index] for index in indices])  # type: ignore[operator]
            optimizer.zero_grad()
            if recipe.step is not None:
                loss = recipe.step(model, batch)  # type: ignore[operator]
            else:
                loss = recipe.loss(model(batch[0]), batch[1])  # type: ignore[operator,misc]
            loss.backward()
            optimizer.step()
    return dict(model.state_dict())


def shuffled(config: TrainingConfig = CONFIG) -> list[list[list[int]]]:
    return [cut(epoch_order(config.seed, epoch, SIZE)) for epoch in range(config.epochs)]


def told(epoch: int) -> Any:
    sampler = recipes_data.Told(range(SIZE), CONFIG.seed)
    sampler.set_epoch(epoch)
    return sampler


def balanced_by_hand(epoch: int) -> Any:
    return orders.balanced(SIZE, epoch, CONFIG.seed, models.points(SIZE))


def cases() -> dict[str, tuple[Recipe, TrainingConfig, Any]]:
    mlp = recipes_data.mlp
    remembering = recipes_data.Remembering(range(SIZE))
    sizes = (9, 20, 0, 13)
    streamed = mlp(dataset=partial(recipes_data.streamed, sizes=sizes, kept=1), order=orders.by_parts)
    bucketed = partial(orders.bucketed, lengths=LENGTHS, pool=2)
    words = Recipe(
        model=recipes_data.Speller,
        dataset=recipes_data.Words,
        collate=recipes_data.spelled,
        loss=F.cross_entropy,
        optimizer=partial(torch.optim.SGD, lr=0.1),
        batches=bucketed,
    )
    from_order = {
        "weighted sampler of torch": (
            partial(WeightedRandomSampler, weights=WEIGHTS, num_samples=30),
            lambda _: WeightedRandomSampler(WEIGHTS, 30),
        ),
        "random sampler of torch": (
            partial(RandomSampler, replacement=True, num_samples=20),
            lambda _: RandomSampler(range(SIZE), replacement=True, num_samples=20),
        ),
        "a sampler with a memory": (recipes_data.Remembering, lambda _: remembering),
        "a sampler that is told": (recipes_data.Told, told),
        "a curriculum": (recipes_data.easy_first, lambda e: recipes_data.easy_first(SIZE, e, CONFIG.seed)),
        "repeats and gaps": (
            recipes_data.twice_the_first_half,
            lambda e: recipes_data.twice_the_first_half(SIZE, e, range(SIZE)),
        ),
        "balanced": (orders.balanced, balanced_by_hand),
    }
    found = {
        name: (mlp(order=order), CONFIG, [cut(epoch) for epoch in each_epoch(ask)])
        for name, (order, ask) in from_order.items()
    }
    dropped = [[batch for batch in epoch if len(batch) == 8] for epoch in shuffled()]
    in_order = [cut(range(SIZE))] * CONFIG.epochs
    bucketing = recipes_data.Bucketing(LENGTHS, 8)
    no_shuffle, drop_last = replace(CONFIG, shuffle=False), replace(CONFIG, drop_last=True)
    buckets = [orders.bucketed(SIZE, e, CONFIG.seed, None, 8, lengths=LENGTHS, pool=2) for e in range(3)]
    parts = [cut(orders.by_parts(SIZE, e, CONFIG.seed, recipes_data.streamed(sizes))) for e in range(3)]
    return found | {
        "shuffle=False": (mlp(), no_shuffle, in_order),
        "drop_last": (mlp(), drop_last, dropped),
        "a batch sampler": (
            mlp(batches=partial(recipes_data.Bucketing, lengths=LENGTHS)),
            CONFIG,
            each_epoch(lambda _: bucketing),
        ),
        "batches by tokens": (
            mlp(batches=partial(recipes_data.by_tokens, most=40)),
            CONFIG,
            each_epoch(lambda e: recipes_data.by_tokens(SIZE, e, 40)),
        ),
        "strings, bucketed by length": (words, CONFIG, buckets),
        "a stream of parts": (streamed, CONFIG, parts),
        "samples that cannot be read": (
            mlp(dataset=recipes_data.Broken, collate=recipes_data.present),
            CONFIG,
            shuffled(),
        ),
        "samples that cannot be read, a loss of one's own": (
            mlp(dataset=recipes_data.Broken, collate=recipes_data.present, loss=recipes_data.own_mean),
            CONFIG,
            shuffled(),
        ),
        "a shard of which nothing is left": (
            mlp(dataset=recipes_data.Broken, collate=recipes_data.present, loss=recipes_data.own_mean),
            replace(no_shuffle, batch_size=16, shards=4),
            [cut(range(SIZE), 16)] * CONFIG.epochs,
        ),
        "nested dictionaries with strings": (
            mlp(dataset=recipes_data.Records, loss=None, step=recipes_data.record_step),
            CONFIG,
            shuffled(),
        ),
    }


CASES = cases()


@pytest.mark.parametrize("name", CASES)
def test_it_trains_as_a_plain_loop_does(name: str) -> None:
    recipe, config, epochs = CASES[name]
    one = inprocess.run(recipe, config)
    assert one.bits == inprocess.run(recipe, config, clients=3).bits
    assert one.plan.total_steps == sum(map(len, epochs))
    expected = plain(recipe, epochs)
    for key, tensor in one.trainer.replica.model.state_dict().items():
        assert torch.allclose(tensor, expected[key], rtol=1e-4, atol=1e-6), key


# --- the whole way through the ledger -----------------------------------------------------


def submitted(
    url: str, folder: Path, recipe: Recipe, config: TrainingConfig, name: str
) -> tuple[Run, Shuffle]:
    run = Master(url, checkpoint_dir=folder).submit(recipe, config, name=name)
    return run, Shuffle(Settings(url=url, checkpoint_dir=str(folder)), run, None)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("batches by tokens", {"staleness": 1}),
        ("a batch sampler", {"local_steps": 2, "shards": 2}),
        ("weighted sampler of torch", {"local_steps": 2}),
        ("a sampler with a memory", {"staleness": 2}),
        ("a shard of which nothing is left", {}),
        ("samples that cannot be read, a loss of one's own", {"local_steps": 2}),
    ],
)
def test_the_ledger_knows_every_batch(
    redis_url: str, tmp_path: Path, name: str, fields: dict[str, Any]
) -> None:
    """Processes without the data (an audit, the supervisor) know the sizes; a switch moves the boundaries."""
    recipe, config, epochs = CASES[name]
    run, lab = submitted(redis_url, tmp_path, recipe, replace(config, checkpoint_every=4, **fields), "whole")
    for _ in range(6):
        lab._in_order()
    switched = run.switch(local_steps=1, staleness=0)
    lab.train()
    audit = run.verify(reexecute=[0, run.status().version - 1])
    assert audit.ok, audit.problems
    by_epoch = [sum(map(len, epoch)) for epoch in epochs]
    assert sum(report.examples for report in run.history()) == sum(by_epoch)
    assert run.status().version == run.status().total_steps > switched


REFUSED = {
    "a generator of its own": (recipes_data.unseeded, "two different orders for the same epoch"),
    "epochs of other lengths": (recipes_data.shrinking, "gives 41 indices in epoch 1 and 42 in epoch 0"),
    "an order without an end": (recipes_data.endless, "has no end"),
    "an index outside": (recipes_data.outside, "gave index 42 in epoch 0, outside the dataset's 0 to 41"),
    "a mask": (recipes_data.mask, "array of bool"),
    "lists of indices": (recipes_data.lists, "lists of indices are what batches= gives"),
    "no index": (recipes_data.nothing, "gave no index in epoch 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_order_that_cannot_be_used_is_refused_when_the_run_starts(
    redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(visiting, "_AT_MOST", 10_000)
    order, message = REFUSED[name]
    recipe = recipes_data.mlp(order=order)
    assert message in stopped(*submitted(redis_url, tmp_path, recipe, CONFIG, "refused"))


def stopped(run: Run, lab: Shuffle) -> str:
    """Why the training server stops a run before any shard is computed."""
    with pytest.raises(TorchordError):
        lab.server.advance(run.name)
    assert run.status().state == "failed"
    assert not lab.post.gradients
    return str(run.status().error)


DATA = {
    "an IterableDataset of a function": (
        recipes_data.stream,
        "a Stream, an IterableDataset, whose examples have",
    ),
    "a string to an IterableDataset": ("tests.support.recipes_data:Stream", "a Stream, an IterableDataset"),
    "a DataLoader of a function": (
        recipes_data.loader,
        "a DataLoader, an iterable of batches, whose examples",
    ),
    "a dictionary of splits": (
        recipes_data.splits,
        "a dict with the keys 'train', 'test'; it must return one",
    ),
}


@pytest.mark.parametrize("name", DATA)
def test_data_without_places_is_refused_when_the_run_starts(
    redis_url: str, tmp_path: Path, name: str
) -> None:
    dataset, message = DATA[name]
    recipe = recipes_data.mlp(dataset=dataset)
    assert message in stopped(*submitted(redis_url, tmp_path, recipe, CONFIG, "refused"))


@pytest.mark.parametrize(
    ("entries", "fields", "message"),
    [
        ({"order": recipes_data.easy_first}, {"shuffle": False}, "'order' says itself .* leave shuffle out"),
        ({"batches": recipes_data.lists}, {"shuffle": False}, "'batches' says itself .* leave shuffle out"),
        (
            {"batches": recipes_data.lists},
            {"drop_last": True},
            "'batches' says .* leave drop_last out",
        ),
    ],
)
def test_a_config_that_says_another_order_is_refused_by_submit(
    redis_url: str, tmp_path: Path, entries: dict[str, Any], fields: dict[str, Any], message: str
) -> None:
    master = Master(redis_url, checkpoint_dir=tmp_path)
    with pytest.raises(RecipeError, match=message):
        master.submit(recipes_data.mlp(**entries), replace(CONFIG, **fields), name="twice")
    assert master.runs() == []


def test_drop_last_works_with_an_order() -> None:
    """42 indices in batches of 8: the two that are left over are not visited."""
    recipe, config = recipes_data.mlp(order=recipes_data.easy_first), replace(CONFIG, drop_last=True)
    epochs = each_epoch(lambda epoch: recipes_data.easy_first(SIZE, epoch, CONFIG.seed))
    expected = plain(recipe, [cut(epoch)[:5] for epoch in epochs])
    found = inprocess.run(recipe, config).trainer.replica.model.state_dict()
    assert all(torch.allclose(found[key], expected[key], rtol=1e-4, atol=1e-6) for key in expected)


def test_what_can_be_seen_is_refused_before_anything_is_sent() -> None:
    with pytest.raises(RecipeError, match=r"'dataset' is Stream, an IterableDataset.*Streamed"):
        recipes_data.mlp(dataset=recipes_data.Stream)
    with pytest.raises(RecipeError, match="'evaluation' is generated, a generator function"):
        recipes_data.mlp(evaluation=recipes_data.generated)
    with pytest.raises(RecipeError, match="'dataset' is DataLoader, an iterable of batches"):
        recipes_data.mlp(dataset=DataLoader)
    with pytest.raises(RecipeError, match="'order' needs a value for 'labels'; bind it"):
        recipes_data.mlp(order=recipes_data.needy)
    with pytest.raises(RecipeError, match="at most one of order and batches"):
        recipes_data.mlp(order=recipes_data.easy_first, batches=recipes_data.by_tokens)


# --- what is known of the data before the first step ---------------------------------------


def opened(url: str, folder: Path, recipe: Recipe, name: str) -> tuple[Any, Any]:
    """Training and evaluation dataset as a Client has them, once the training server has begun the run."""
    run, lab = submitted(url, folder, recipe, CONFIG, name)
    lab.server.advance(run.name)
    context = lab.clients[0].contexts.of(run.name, run._ledger.incarnation())
    return context.dataset(), context.dataset("evaluation")


def test_a_random_split_made_twice_is_one_split(redis_url: str, tmp_path: Path) -> None:
    half = recipes_data.half
    recipe = recipes_data.mlp(dataset=partial(half, 0), evaluation=partial(half, 1))
    trained, evaluated = opened(redis_url, tmp_path, recipe, "split")
    assert sorted([*trained.indices, *evaluated.indices]) == list(range(40))


def test_examples_that_are_drawn_are_others_in_the_evaluation(redis_url: str, tmp_path: Path) -> None:
    drawn = recipes_data.drawn
    recipe = recipes_data.mlp(dataset=partial(drawn, 64), evaluation=partial(drawn, 32))
    trained, evaluated = opened(redis_url, tmp_path, recipe, "drawn")
    assert not {tuple(x.tolist()) for x, _ in trained} & {tuple(x.tolist()) for x, _ in evaluated}


def test_a_run_of_before_keeps_its_evaluation(redis_url: str, tmp_path: Path) -> None:
    """Its spec does not say by which seed the dataset is made; it was the entry's own."""
    recipe = recipes_data.mlp(evaluation=partial(recipes_data.half, 1))
    spec = {"recipe": recipe.to_spec(), "config": CONFIG.to_json(), "fingerprint": ""}
    settings = Settings(url=redis_url, checkpoint_dir=str(tmp_path))
    Services(settings).ledger("old").create(spec, incarnation="0123456789ab")
    lab = Shuffle(settings, Master(redis_url, checkpoint_dir=tmp_path).run("old"), None)
    lab.server.advance("old")
    found = lab.clients[0].contexts.of("old", "0123456789ab").dataset("evaluation")
    seeded(derive_seed(CONFIG.seed, "evaluation"))
    assert found.indices == recipes_data.half(1).indices


def lonely(**changes: Any) -> TrainingConfig:
    """41 examples in batches of 8: the last batch has one."""
    return replace(CONFIG, shards=4, **changes)


@pytest.mark.parametrize("local_steps", [1, 4])
def test_a_batch_norm_that_will_meet_one_example_is_refused_at_the_start(
    redis_url: str, tmp_path: Path, local_steps: int
) -> None:
    recipe = recipes_data.mlp(model=recipes_data.normed, dataset=partial(models.points, 41))
    config = lonely(local_steps=local_steps)
    message = stopped(*submitted(redis_url, tmp_path, recipe, config, "lonely"))
    assert "a BatchNorm cannot train on a shard of one example; set drop_last=True" in message
    step = (6 if local_steps == 1 else 2) - 1
    assert f"shard 0 of step {step} would have one alone (sample " in message


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({"model": recipes_data.normed, "dataset": partial(models.points, 41)}, {"drop_last": True}),
        ({"model": recipes_data.normed, "dataset": partial(models.points, 40)}, {}),
        ({"model": recipes_data.evaluating, "dataset": partial(models.points, 41)}, {}),
        ({"model": models.Cnn, "dataset": partial(models.Images, 41)}, {}),
    ],
    ids=["drop_last", "no such shard", "in evaluation mode", "pictures"],
)
def test_a_batch_norm_that_can_train_is_not_refused(
    redis_url: str, tmp_path: Path, changes: dict[str, Any], fields: dict[str, Any]
) -> None:
    recipe = recipes_data.mlp(**changes)
    run, lab = submitted(redis_url, tmp_path, recipe, lonely(epochs=1, **fields), "company")
    lab.train()
    assert run.verify().ok
