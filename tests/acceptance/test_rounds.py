"""Rounds: the Clients take steps by themselves, with the plain loop's bits, whoever takes part."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from tests.support import models, recipes_impure, recipes_more, recipes_step_metrics, reference
from tests.support.fleet import Fleet, finished, fleet
from tests.support.waiting import PATIENCE_SECONDS, wait_until
from torchord import LocalCluster, Master, NotFinite, Plateau, Recipe, Run, TrainingConfig
from torchord.cache.errors import ConfigError, RunFailed
from torchord.cache.servers.redis_client import connect

pytestmark = pytest.mark.slow

HALF = {"precision": "fp16", "loss_scale": 2.0**18, "loss_scale_interval": 3}
MODELS: dict[str, tuple[Callable[..., Recipe], dict[str, Any]]] = {
    "mlp": (models.mlp, {"shards": 3}),
    "wide": (partial(models.mlp, model=partial(models.Mlp, hidden=8192)), {"shards": 2}),  # shared memory
    "cnn": (models.cnn, {"shards": 2}),  # with running statistics, whose shards are averaged
    "gpt": (partial(recipes_more.tied_gpt, size=32), {"shards": 4}),
    "odd": (models.odd, {"shards": 3}),
    "clipped": (models.mlp, {"shards": 2, "clip_norm": 0.5}),
    "half": (models.mlp, {"shards": 2, **HALF}),
    "local": (  # whose slots keep what lies in shared memory
        partial(models.mlp, model=partial(models.Mlp, hidden=8192)),
        {"shards": 3, "local_steps": 2, "compression": "topk:0.1", "batch_size": 4},
    ),
}
LOOPS_ELSEWHERE = ("half", "gpt", "local")  # in test_exactness.py and test_round_modes.py

_numbers = itertools.count()


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with fleet(tmp_path_factory.mktemp("rounds"), 1) as made:
        yield made


def config(**fields: Any) -> TrainingConfig:
    defaults = {"epochs": 4, "batch_size": 8, "checkpoint_every": 1000, "seed": 3, "audit_fraction": 0.0}
    return TrainingConfig(**{**defaults, **fields})


def submitted(made: Fleet, recipe: Recipe, how: TrainingConfig) -> Run:
    return made.master.submit(recipe, how, name=f"rounds-{next(_numbers)}")


def expected(recipe: Recipe, how: TrainingConfig) -> Any:
    """The bits of a plain loop."""
    exact = how.batch_size % how.shards == 0  # so that each shard's share is a power of two
    return reference.all_bits((reference.accumulate if exact else reference.average)(recipe, how).module)


def participants(run: Run) -> set[str]:
    """Who committed steps."""
    return {entry.server.partition("@")[0] for entry in run._ledger.entries()}


@pytest.mark.parametrize("many", [2, 1, 3])
def test_the_same_bits_however_long_the_rounds_and_whoever_takes_part(clients: Fleet, many: int) -> None:
    clients.resize(many)
    for name, (recipe, fields) in MODELS.items():
        lengths = (1, 3, 16) if many == 2 else (16,)
        found = []
        for length in lengths:
            run = submitted(clients, recipe(), config(round_steps=length, **fields))
            trained = finished(run)
            found.append(reference.all_bits(trained.module))
            by_server = sum(entry.server.startswith("server") for entry in run._ledger.entries())
            steps = run.status().version
            # What is left for a round of one step is a single step, as is one that nobody came to in time.
            assert by_server == steps if length == 1 else by_server <= 2 < steps, name
        if name not in KNOWN:
            plain = name not in LOOPS_ELSEWHERE
            KNOWN[name] = expected(recipe(), config(**fields)) if plain else found[0]
        assert found == [KNOWN[name]] * len(found), name


KNOWN: dict[str, Any] = {}


def test_a_client_joins_and_one_leaves_in_the_middle(clients: Fleet) -> None:
    clients.resize(1)
    how = config(epochs=60, shards=3, round_steps=64)
    bits = expected(models.mlp(), how)
    run = submitted(clients, models.mlp(), how)
    wait_until(lambda: run.status().version > 20, message="the first rounds")
    clients.resize(2)
    wait_until(lambda: len(participants(run)) > 1 or run.status().state == "done", message="the second")
    clients.resize(1)
    assert reference.all_bits(finished(run).module) == bits


def test_a_pause_ends_a_round_and_loses_nothing(clients: Fleet) -> None:
    clients.resize(2)
    how = config(epochs=80, shards=2, round_steps=10_000)
    run = submitted(clients, models.mlp(), how)
    wait_until(lambda: run.status().version > 10, message="a round under way")
    assert run.state_dict().keys() == models.Mlp().state_dict().keys(), "of the newest version that is stored"
    run.pause()
    head = run.status().version
    wait_until(lambda: max(run._ledger.versions(), default=0) >= head, message="the round's end to be stored")
    run.resume()
    assert reference.all_bits(finished(run).module) == expected(models.mlp(), how)
    assert run._ledger.head().replayed == 0


def test_checkpoints_and_evaluations_end_rounds(clients: Fleet) -> None:
    clients.resize(2)
    how = config(shards=2, round_steps=100, checkpoint_every=6, evaluate_every=5)
    plain = submitted(clients, models.mlp(), config(shards=2, checkpoint_every=6, evaluate_every=5))
    run = submitted(clients, models.mlp(), how)
    one, other = finished(plain), finished(run)
    assert one.evaluations == other.evaluations and len(other.evaluations) >= 4
    saved = [event.data["version"] for event in run.events() if event.type == "checkpoint"]
    assert saved == [6, 12, 18, 20]


def test_rules_end_a_run_of_rounds_where_they_end_one_of_single_steps(clients: Fleet) -> None:
    clients.resize(2)
    recipe = models.mlp(optimizer=partial(torch.optim.SGD, lr=0.9))
    rules = (Plateau(patience=3, min_delta=0.01), NotFinite())
    how = config(epochs=8, shards=2, evaluate_every=4, stop_when=rules, keep="best", evaluate_at_start=True)
    found = []
    for length in (1, 100):
        run = submitted(clients, recipe, replace(how, round_steps=length))
        trained, best = finished(run), run.best()
        bits = reference.all_bits(trained.module), reference.all_bits(best.module)
        found.append((trained.reason, trained.version, trained.evaluations, best.version, bits))
    assert found[0] == found[1]
    assert "has not improved by 0.01 in 3 evaluations" in found[1][0]
    over_steps = (Plateau(patience=2, over="steps"),)
    run = submitted(clients, recipe, replace(how, round_steps=100, stop_when=over_steps))
    assert "step loss has not improved in 2 steps" in finished(run).reason
    assert all(entry.server.startswith("server") for entry in run._ledger.entries()), "single steps"
    wild = models.mlp(optimizer=partial(torch.optim.SGD, lr=1e30))
    run = submitted(clients, wild, config(shards=2, round_steps=100, stop_when=NotFinite()))
    assert "has loss nan" in finished(run).reason


def test_a_step_that_diverges_stops_the_run_with_its_sentence(clients: Fleet) -> None:
    clients.resize(2)
    recipe = models.mlp(optimizer=partial(torch.optim.SGD, lr=1e30))
    run = submitted(clients, recipe, config(shards=2, round_steps=16))
    with pytest.raises(RunFailed, match="nonfinite='skip'"):
        run.wait(timeout=PATIENCE_SECONDS)


def test_nothing_is_left_of_a_round(clients: Fleet) -> None:
    clients.resize(2)
    run = submitted(clients, models.mlp(), config(shards=2, round_steps=16))
    finished(run)
    client = connect(clients.cluster.url)
    left = [key for key in client.scan_iter(f"torchord:*{run.name}*") if ":slots:" in key or ":round" in key]
    client.close()
    assert left == []


@pytest.mark.parametrize("value", [0, -1, True, 2.5, "often"])
def test_what_a_round_cannot_last(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"round_steps must be an integer, from 1 to \d+, or 'auto'"):
        TrainingConfig(round_steps=value)


def test_a_participant_whose_update_is_wrong_in_one_bit_is_named(
    cluster: Callable[..., LocalCluster],
) -> None:
    """Whoever of the two reports first: the server makes the version itself, and says who was wrong."""
    made = cluster(0)
    made.add_worker("server", role="server")
    for name, env in (("right", {}), ("bent", {"BENT_STEP": "9"})):
        made.add_worker(name, role="client", env=env)
    made.wait_ready()
    recipe = models.mlp(optimizer=partial(recipes_impure.Bent, lr=0.1, momentum=0.9))
    how = config(epochs=40, shards=2, round_steps=24)
    master = Master(made.url, checkpoint_dir=made.checkpoint_dir)
    first = master.submit(models.mlp(), replace(how, epochs=1000), name="first")
    wait_until(lambda: len(participants(first)) > 1, message="both to have imported what an optimizer needs")
    first.cancel()
    run = master.submit(recipe, how, name="bent")
    assert reference.all_bits(finished(run).module) == expected(recipe, how)
    told = {event.type: event.data for event in run.events() if event.type in ("divergent", "falsified")}
    assert told["falsified"]["worker"].startswith("bent@")
    assert {worker.partition("@")[0] for worker in told["divergent"]["workers"]} == {"right", "bent"}
    last = [entry.server.partition("@")[0] for entry in run._ledger.entries()][-40:]
    assert "bent" not in last and "right" in last


def test_metrics_are_the_same_in_rounds(clients: Fleet) -> None:
    clients.resize(2)
    recipe = recipes_step_metrics.recipe(recipes_step_metrics.accuracy)
    found = [
        [
            step.metrics
            for step in finished(submitted(clients, recipe, config(shards=3, round_steps=n))).history
        ]
        for n in (1, 16)
    ]
    assert found[0] == found[1] and found[0][0].keys() >= {"accuracy", "rms", "seen"}
