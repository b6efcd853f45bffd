"""Rounds in every mode, whoever takes part: the bits of single steps, which are those of a plain loop.

Each fleet here is in one process, in which one participant goes on at a time: who, is drawn, and so is who
comes late. Processes and their deaths are in test_rounds.py and tests/faults.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support import models, recipes_more, reference
from tests.support.one_process import Fleet, Outcome
from torchord import Recipe, TrainingConfig
from torchord.cache.blobs.host_tier import HostTier
from torchord.cache.keyring import Keyring
from torchord.cache.ledger.records import CONTENT
from torchord.coordinator.averages import ema
from torchord.coordinator.local_steps import diloco
from torchord.coordinator.runtime import faults, key_files
from torchord.coordinator.server import rounds
from torchord.coordinator.spec.plan import Plan

HALF = {"precision": "fp16", "loss_scale": 2.0**18, "loss_scale_interval": 3}
MODES: dict[str, dict[str, Any]] = {
    "local": {"local_steps": 3},
    "diloco": {"local_steps": 2},
    "half-local": {**HALF, "local_steps": 2},
    "int8": {"compression": "int8"},
    "no memory": {"compression": "topk:0.1,feedback=off"},
    "topk": {"compression": "topk:0.1"},
    "powersgd": {"compression": "powersgd:1,values=int8,memory=int8"},
    "own codec": {"compression": "tests.support.codecs:EveryNth:3"},
    "half-topk": {**HALF, "compression": "topk:0.1"},
    "local-topk": {"local_steps": 2, "compression": "topk:0.1"},
    "deltas": {"parameter_compression": "topk:0.2", "local_steps": 2},
    "a last step of fewer shards": {"compression": "topk:0.1", "batch_size": 10},
    "median": {"aggregation": "median"},
    "krum": {"aggregation": "krum", "shards": 5, "batch_size": 20},
    "bounded": {"max_shard_norm": 1e6},
    "clipped": {"clip_norm": 0.5},
    "averaged deltas": {"parameter_compression": "int8"},
    "skipped": {"nonfinite": "skip", "compression": "topk:0.1,minimum=4"},
    "skipped local": {"nonfinite": "skip", "local_steps": 2},
    "micro-batches": {"micro_batch_size": 2},
}
RECIPES: dict[str, dict[str, Any]] = {
    "diloco": {"outer_optimizer": diloco},
    "averaged deltas": {"average": partial(ema, 0.9)},
    "skipped": {"dataset": partial(models.poisoned, 7)},
    "skipped local": {"dataset": partial(models.poisoned, 7)},
}
MODELS: dict[str, Callable[..., Recipe]] = {
    "mlp": models.mlp,
    "cnn": models.cnn,
    "gpt": models.gpt,
    "odd": models.odd,
    "tied": partial(recipes_more.tied_gpt, size=24),
    "groups": partial(models.mlp, parameter_groups=models.decay_groups),
    "scheduled": partial(models.mlp, scheduler=models.warmup_then_cosine),
}


POINTS = [
    *(point for point in faults.POINTS if point.startswith("round.")),
    "client.after_put",
    "server.after_open",
    "server.before_adopt",
]


def recipe(mode: str = "", **changes: Any) -> Recipe:
    """An MLP with dropout under AdamW, whose state has to come along everywhere."""
    model = partial(models.Mlp, hidden=200)
    return alone(models.mlp(model=model, **RECIPES.get(mode, {}), **changes))


def alone(given: Recipe) -> Recipe:
    """Without evaluations, for which this fleet has no tasks."""
    return replace(given, evaluation=None, metrics=None)


def config(**fields: Any) -> TrainingConfig:
    usual = {"epochs": 2, "batch_size": 8, "shards": 3, "checkpoint_every": 1000, "audit_fraction": 0.0}
    return TrainingConfig(**{**usual, "seed": 3, **fields})


def trained(folder: Path, given: Recipe, how: TrainingConfig, clients: int, **options: Any) -> Outcome:
    """Train; with rounds most steps are the Clients', but for those that a death has lost."""
    fleet = Fleet(str(folder), clients, **options)
    found = fleet.run(given, how)
    assert found.state == "done", found.error
    served = [entry.server.startswith("server") for entry in fleet.ledger.entries()]
    most = len(served) - 1 if "kill" in options else len(served) / 2
    assert all(served) if how.round_steps == 1 else sum(served) <= most, served
    return found


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_has_the_bits_of_single_steps(tmp_path: Path, mode: str) -> None:
    given, how = recipe(mode), MODES[mode]
    expected = trained(tmp_path / "1", given, config(**how), 1)
    found = trained(tmp_path / "2", given, config(**how, round_steps=16), 3, seed=1, leave=[9, 17])
    assert found.bits == expected.bits and found.losses == expected.losses
    kill = (POINTS[list(MODES).index(mode) % len(POINTS)], 1)
    killed = trained(tmp_path / "3", given, config(**how, round_steps=4), 2, seed=2, kill=kill)
    assert killed.kills and killed.bits == expected.bits


@pytest.mark.parametrize("name", MODELS)
def test_a_model_has_the_bits_of_single_steps(tmp_path: Path, name: str) -> None:
    given = alone(MODELS[name]())
    expected = trained(tmp_path / "1", given, config(), 1)
    for number, (steps, clients) in enumerate([(3, 1), (16, 2), (3, 3), (16, 5)]):
        how = config(round_steps=steps)
        found = trained(tmp_path / f"r{number}", given, how, clients, seed=number, leave=[6])
        assert found.bits == expected.bits, (steps, clients)


@pytest.mark.parametrize("mode", ["local", "topk", "local-topk"])
def test_what_slots_keep_may_lie_in_the_hosts_memory(tmp_path: Path, mode: str) -> None:
    """It is handed from one participant to the next there, and stored for everybody at the round's end."""
    given = alone(models.mlp(model=partial(models.Mlp, hidden=8192)))
    how = config(**MODES[mode], epochs=4)
    expected = trained(tmp_path / "1", given, how, 1)
    tier = HostTier(tmp_path / "tier")
    found = trained(
        tmp_path / "2", given, replace(how, round_steps=3), 3, host=tier, kill=("round.after_report", 2)
    )
    assert tier.counters.hits and found.kills and found.bits == expected.bits


@pytest.mark.parametrize("mode", ["local", "topk", "clipped"])
def test_nothing_is_left_but_what_versions_have(tmp_path: Path, mode: str) -> None:
    """Neither of the steps that rounds pass through, nor of the last ones."""
    given = alone(models.mlp(model=partial(models.Mlp, hidden=1024)))
    fleet = Fleet(str(tmp_path), 3, seed=4)
    assert fleet.run(given, config(**MODES[mode], round_steps=5, epochs=4)).state == "done"
    stored = [record for _, record in sorted(fleet.ledger.versions().items())]
    ours = {key for record in stored for blob in record.blobs() for key in blob.chunk_keys()}
    assert set(cast(Any, fleet.services.chunks.chunks).chunks) <= ours


def test_each_version_of_a_round_has_the_digest_of_its_content(tmp_path: Path) -> None:
    """Though only the last of a round is stored."""
    given, how = recipe(), config(digest="sha256", round_steps=5)
    fleet = Fleet(str(tmp_path), 3)
    assert fleet.run(given, how).bits == trained(tmp_path / "1", given, config(), 1).bits
    entries = fleet.ledger.entries()
    assert len({entry.notes[CONTENT][0] for entry in entries}) == len(entries) == 10
    _, flat, _ = fleet.services.parameters.fetch(fleet.ledger, 10)
    assert entries[-1].notes[CONTENT] == [f"sha256:{hashlib.sha256(flat.numpy()).hexdigest()}"]


@pytest.mark.parametrize(
    "signs", [("worker",), ("worker", "server")], ids=["Clients' keys", "a fleet's keys"]
)
def test_who_cannot_sign_a_version_gets_no_seat(tmp_path: Path, signs: tuple[str, ...]) -> None:
    fleet = Fleet(str(tmp_path), 2)
    key_files.new(tmp_path / "keys", "blake2b")
    cast(Any, fleet.services).keyring = Keyring(tmp_path / "keys" / "fleet.json")
    for client in fleet.clients:
        heartbeat = cast(Any, client.heartbeat)
        heartbeat.info = replace(heartbeat.info, signs=signs)
    assert fleet.run(recipe(), config(round_steps=5)).state == "done"
    by_server = [entry.server.startswith("server") for entry in fleet.ledger.entries()]
    assert all(by_server) if "server" not in signs else not any(by_server)


@pytest.mark.parametrize(("seconds", "drafts"), [(0.0, 9), (1e9, 0)], ids=["long steps", "short steps"])
def test_a_single_step_is_launched_within_the_commit_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, drafts: int
) -> None:
    """Where "auto" comes to single steps, they cost what they cost without it: no round trip more."""
    monkeypatch.setattr(rounds, "ROUND_SECONDS", seconds)
    fleet = Fleet(str(tmp_path), 2)
    drafted: list[int] = []
    monkeypatch.setattr(fleet.post, "drafted", lambda run, step, *args, **options: drafted.append(step))
    assert fleet.run(recipe(), config(round_steps="auto")).state == "done"
    assert len(drafted) == drafts


@pytest.mark.parametrize(
    ("factor", "shared", "rest"),
    [(1e-9, False, True), (1e9, False, False), (1e-9, True, False)],
    ids=["slower between hosts", "faster between hosts", "on one host"],
)
def test_automatic_rounds_that_do_not_pay_between_hosts_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float, shared: bool, rest: bool
) -> None:
    """The first one is not looked at: it has imports in it."""
    monkeypatch.setattr(rounds, "_SLOWER", factor)
    monkeypatch.setattr(rounds, "ROUND_SECONDS", 1e9)
    fleet = Fleet(str(tmp_path / "run"), 2, host=HostTier(tmp_path / "tier") if shared else None)
    assert fleet.run(recipe(), config(round_steps="auto", checkpoint_every=3)).state == "done"
    by_server = [entry.server.startswith("server") for entry in fleet.ledger.entries()]
    assert by_server == [True, *[False] * 5, *[rest] * 3, True]


# --- plain loops ------------------------------------------------------------------------


def local_sgd(given: Recipe, how: TrainingConfig) -> dict[str, Tensor]:
    """Each shard goes on from the version with its own optimizer; the shards' weights are averaged."""
    model, data, _, _ = reference._parts(given, how)
    plan, names = Plan(len(data), how), [name for name, _ in model.named_parameters()]
    weights = list(model.parameters())
    own = [given.optimizer(model.parameters()) for _ in range(how.shards)]  # type: ignore[operator]
    with reference._pinned(1):
        for step in range(plan.total_steps):
            version = [weight.detach().clone() for weight in weights]
            total = [torch.zeros_like(weight) for weight in weights]
            for shard in range(how.shards):
                for part in plan.parts(step, shard):
                    inputs, targets = reference._read(given, data, [int(i) for i in part])
                    own[shard].zero_grad()
                    F.cross_entropy(model(inputs), targets).backward()
                    own[shard].step()
                with torch.no_grad():
                    for before, weight, moved in zip(version, weights, total, strict=True):
                        moved.add_(before - weight, alpha=1 / how.shards)
                        weight.copy_(before)
            with torch.no_grad():
                for weight, moved in zip(weights, total, strict=True):
                    weight.sub_(moved)
    return dict(zip(names, weights, strict=True))


def largest_with_memory(given: Recipe, how: TrainingConfig) -> dict[str, Tensor]:
    """Each shard sends the largest tenth of each tensor (of a small one all), and keeps the rest."""
    model, data, optimizer, _ = reference._parts(given, how)
    plan, weights = Plan(len(data), how), dict(model.named_parameters())
    kept = [{name: torch.zeros_like(w) for name, w in weights.items()} for _ in range(how.shards)]
    with reference._pinned(1):
        for step in range(plan.total_steps):
            total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
            for shard in range(how.shards):
                inputs, targets = reference._read(given, data, [int(i) for i in plan.indices(step, shard)])
                model.zero_grad()
                F.cross_entropy(model(inputs), targets).backward()
                for name, weight in weights.items():
                    assert weight.grad is not None
                    whole = (kept[shard][name] + weight.grad).flatten()
                    sent = torch.zeros_like(whole)
                    count = whole.numel() if whole.numel() < 100 else math.ceil(whole.numel() / 10)
                    places = whole.abs().topk(count).indices
                    sent[places] = whole[places]
                    kept[shard][name] = (whole - sent).view_as(weight)
                    total[name].add_(sent.view_as(weight), alpha=1 / how.shards)
            for name, weight in weights.items():
                weight.grad = total[name]
            optimizer.step()
    return dict(weights)


@pytest.mark.parametrize(
    ("loop", "how"),
    [
        (local_sgd, {"local_steps": 2, "batch_size": 4}),
        (local_sgd, {"local_steps": 5, "batch_size": 4, "shards": 4}),
        (largest_with_memory, {"compression": "topk:0.1,values=fp32,minimum=100"}),
    ],
    ids=["local steps", "more local steps", "error feedback"],
)
@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_the_bits_of_a_plain_loop(
    tmp_path: Path, loop: Callable[..., dict[str, Tensor]], how: dict[str, Any], optimizer: str
) -> None:
    make = {"momentum": models._SGD, "adam": models._ADAM}[optimizer]
    given = recipe(optimizer=make)
    given = replace(given, model=partial(models.Mlp, hidden=40, dropout=0.0))
    given_config = config(**{"shards": 2, **how, "round_steps": 5})
    found = trained(tmp_path, given, given_config, 3)
    expected = loop(given, given_config)
    assert found.tensors.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found.tensors[name], weight.detach()), name
