"""Partial sums on the workers: the bits of a plain loop that adds in the same order, on any fleet."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import pytest
import redis
import torch

from tests.support import models, recipes_more, reference
from tests.support.fleet import Fleet, finished, fleet
from tests.support.waiting import wait_until
from torchord import Recipe, TrainingConfig


def _config(shards: int, **changes: object) -> TrainingConfig:
    fields: dict[str, Any] = {"epochs": 2, "batch_size": 2 * shards, "shards": shards, "seed": 3, **changes}
    return TrainingConfig(**fields)


def _mlp(size: int, **changes: object) -> Recipe:
    return models.mlp(size, evaluation=None, metrics=None, **changes)


CASES: dict[str, tuple[Recipe, TrainingConfig]] = {
    "9, two sums": (_mlp(36), _config(9)),
    "17, three sums, uneven shards, ragged end": (_mlp(77), _config(17, batch_size=40)),
    "20 under BatchNorm": (models.cnn(80), _config(20)),
    "64, eight sums of eight": (_mlp(256), _config(64, epochs=1)),
    "64 under BatchNorm, three levels": (models.cnn(128), _config(64, epochs=1, fan_in=4)),
    "20, AdamW, clipping": (
        recipes_more.tied_gpt(size=80),
        _config(20, clip_norm=0.5),
    ),
    "20 in bfloat16 autocast": (models.gpt(80), _config(20, precision="bf16")),
    "20, unused, frozen, integer, bool, non-persistent": (models.odd(80), _config(20)),
    "20, parameters that some shards do not reach": (
        _mlp(
            80,
            model=models.Branching,
            optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9),
            loss_over="shard",
        ),
        _config(20),
    ),
    "BatchNorm that counts its batches": (recipes_more.cumulative_norm(), _config(10, fan_in=3)),
    "a NaN that is skipped": (
        _mlp(80, dataset=partial(models.poisoned, at=11, size=80)),
        _config(20, nonfinite="skip"),
    ),
}


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """One fleet for the module; each test sets the number of its Clients."""
    with fleet(tmp_path_factory.mktemp("tree"), workers=1) as one:
        yield one


@cache
def expected(case: str) -> reference.Reference:
    """What the plain loop gives."""
    return reference.average(*CASES[case])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("workers", (1, 2, 3))
def test_the_bits_of_a_plain_loop(grown: Fleet, workers: int, case: str) -> None:
    grown.resize(workers)
    recipe, config = CASES[case]
    run, trained = grown.train(recipe, config, f"tree-{list(CASES).index(case)}-{workers}")
    plain = expected(case)
    assert reference.all_bits(trained.module) == reference.all_bits(plain.module)
    assert [report.loss for report in trained.history] == pytest.approx(plain.losses, rel=1e-12, nan_ok=True)
    assert [report.step for report in trained.history if report.skipped] == plain.skipped
    audit, plan = run.verify(), run._standing.plan(run._ledger.head())
    assert plan is not None
    assert audit.partial_sums == sum(len(plan.fan_in(step).partials) for step in range(plan.total_steps)) > 0


def test_the_order_of_the_sums_is_not_that_of_one_chain() -> None:
    """Else the cases would prove nothing: the same shards in one sum round elsewhere."""
    recipe, config = CASES["9, two sums"]
    chain = reference.average(recipe, TrainingConfig(**{**config.to_json(), "fan_in": 64}))
    assert chain.bits != expected("9, two sums").bits


MODES: dict[str, dict[str, Any]] = {
    "int8": {"compression": "int8"},
    "powersgd": {"compression": "powersgd:2"},
    "local steps": {"local_steps": 2},
    "stale": {"staleness": 2},
    "all": {"local_steps": 2, "staleness": 1, "compression": "topk:0.1"},
}


def replayed(grown: Fleet, name: str) -> reference.Bits:
    """The bits of a mode on the present fleet, which are those of a replay of every step in one process."""
    recipe = _mlp(96, optimizer=partial(torch.optim.AdamW, lr=1e-2))
    config = _config(10, batch_size=12, fan_in=3, checkpoint_every=100, **MODES[name])
    run, trained = grown.train(recipe, config, f"{name.replace(' ', '-')}-{len(grown.clients)}")
    steps = range(run.status().version)
    audit = run.verify(reexecute=steps)
    assert audit.ok and audit.reexecuted == tuple(steps), audit.problems
    return reference.bits(trained.module)


@pytest.fixture(scope="module")
def alone(grown: Fleet) -> dict[str, reference.Bits]:
    """The bits of each mode with one Client; then there are three."""
    grown.resize(1)
    found = {name: replayed(grown, name) for name in MODES}
    grown.resize(3)
    return found


@pytest.mark.parametrize("name", MODES)
def test_a_mode_has_the_same_bits_on_any_fleet(
    grown: Fleet, alone: dict[str, reference.Bits], name: str
) -> None:
    assert replayed(grown, name) == alone[name]


def test_a_run_is_switched_into_a_tree_and_out_of_it(grown: Fleet) -> None:
    grown.resize(2)
    run = grown.master.submit(_mlp(60), _config(4, epochs=8, batch_size=12, fan_in=3), name="switched")
    wait_until(lambda: run.status().version >= 3, 60, "the third step")
    into = run.switch(shards=12)
    wait_until(lambda: run.status().version >= into + 2, 60, "the tree")
    out = run.switch(shards=2)
    trained = finished(run)
    sizes = [len(report.workers) for report in trained.history]
    assert (sizes[into - 1], sizes[into], sizes[out - 1], sizes[out]) == (4, 12, 12, 2)
    assert run.verify(reexecute=range(run.status().version)).ok


def test_one_worker_that_serves_every_queue(tmp_path: Any) -> None:
    """A partial sum never waits for its inputs, so nothing waits for nothing (and nothing is left)."""
    case = "64 under BatchNorm, three levels"
    with fleet(tmp_path, workers=1, layout="single") as one:
        _, trained = one.train(*CASES[case], "alone")
        assert reference.bits(trained.module) == expected(case).bits
        client = redis.Redis.from_url(one.cluster.url, decode_responses=True)
        left = [key for key in client.scan_iter(count=1000) if "gradient" in key or "slots" in key]
        client.close()
        assert not left


def test_large_sums_pass_through_the_hosts_tier(tmp_path: Any) -> None:
    """Inputs go through the store, for Clients anywhere; what the training server reads is on its host."""
    recipe, config = _mlp(40, model=partial(models.Mlp, hidden=20_000)), _config(10, epochs=1)
    with fleet(tmp_path, workers=2) as one:
        _, trained = one.train(recipe, config, "wide")
    assert reference.bits(trained.module) == reference.average(recipe, config).bits
