"""Purity is checked: a gradient that depends on more than run, version and shard stops its run and says so.

- moving: what changes within a process; one Client and two in this process, one message at a time.
- by process: what differs between processes only; real workers.
- pure: what merely looks so passes every check, and the checks change no bit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support import models, recipes_impure, recipes_more, reference
from tests.support.fleet import WAIT_SECONDS, Fleet, fleet
from tests.support.shuffle import Shuffle
from torchord import Master, Recipe, Run, TrainingConfig
from torchord.cache.errors import Impure, RunFailed, ShardFailed
from torchord.cache.settings import Settings

CONFIG = TrainingConfig(epochs=3, batch_size=8, shards=4, seed=2)


class Laboratory(Shuffle):
    """Deals the messages to its first Clients in turn."""

    workers = 1

    def train(self) -> Any:
        """Deliver messages until the run has ended."""
        turn = 0
        while self.run.status().state in ("pending", "running"):
            self.post.arrived(self.run._ledger.client)
            if self.post.callbacks:
                self.post.callbacks -= 1
                self.server.advance(self.run.name)
            else:
                client = self.clients[turn % self.workers]
                self._deliver(self.post.gradients.pop(0), client, "once", backup=False)
                turn += 1


def trained(url: str, folder: Path, recipe: Recipe, config: TrainingConfig, workers: int) -> Run:
    """A run of so many Clients in this process, at its end."""
    run = Master(url, checkpoint_dir=str(folder)).submit(recipe, config, name=f"run-{workers}")
    lab = Laboratory(Settings(url=url, checkpoint_dir=str(folder)), run, None)
    lab.workers = workers
    with suppress(Impure, ShardFailed):  # which have stopped the run
        lab.train()
    return run


# --- moving ---------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", (1, 2))
@pytest.mark.parametrize("kind", recipes_impure.MOVING)
def test_what_changes_within_a_process_is_refused(
    redis_url: str, tmp_path: Path, kind: str, workers: int
) -> None:
    """Before anything counts: no step is committed, but where only a second epoch shows it."""
    run = trained(redis_url, tmp_path, recipes_impure.MOVING[kind], CONFIG, workers)
    status = run.status()
    seen = status.version
    assert (status.state, seen) == ("failed", 0) or kind == "samples that keep their first augmentation"
    assert seen in (0, 2), "the second epoch begins with a check"
    checked = r".* and once more, in fresh copies .*: the gradient of '\w+\.weight' differs by \d"
    joined = r".* at the initial weights, worker .* does not make the same as worker .* differs"
    told = rf"run 'run-\d' is not pure: .*shard [0-3] of step {seen},({checked}|{joined})"
    assert re.match(told, str(status.error))
    for cause in ("an unseeded generator", "an attribute or a global", "the clock", "the order of a set"):
        assert cause in str(status.error)
    audit = run.verify()
    assert not audit.ok and audit.problems == (status.error,)


def test_a_difference_stays_in_the_audit_when_the_run_is_resumed(
    redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step is open again: a worker whose memory failed once does not end a run, but is not forgotten."""
    ticks = iter([1, 1, 1, 500])
    monkeypatch.setattr(recipes_impure.time, "perf_counter_ns", lambda: next(ticks, 1))
    config = replace(CONFIG, probe=False)
    run = trained(redis_url, tmp_path, recipes_impure.MOVING["the clock"], config, 1)
    assert "did not come out the same" in str(run.status().error)
    assert run._ledger.slots_present(0) == set()
    run.resume()
    lab = Laboratory(Settings(url=redis_url, checkpoint_dir=str(tmp_path)), run, None)
    lab.train()
    assert run.status().state == "done"
    audit = run.verify()
    assert not audit.ok and audit.divergent == 1
    assert audit.checked > 0


def test_a_shard_below_a_partial_sum_is_compared_before_its_bytes_go(redis_url: str, tmp_path: Path) -> None:
    config = replace(CONFIG, shards=8, fan_in=2)
    run = trained(redis_url, tmp_path, recipes_impure.MOVING["a counter in an attribute"], config, 1)
    assert "the gradient of 'layer.weight' differs by" in str(run.status().error)
    assert run.status().version == 0
    assert run._ledger.slots_present(0) == set()


# --- pure -----------------------------------------------------------------------------------

PURE: dict[str, tuple[Recipe, dict[str, Any]]] = {
    "batch norm, dropout, augmentation": (models.cnn(32), {}),
    "tied weights under AdamW": (recipes_more.tied_gpt(size=32), {"clip_norm": 0.5}),
    "unused, frozen, integer, bool, non-persistent": (models.odd(32), {}),
    "sentences in bfloat16": (models.gpt(32), {"precision": "bf16"}),
    "local steps": (recipes_impure.recipe(), {"local_steps": 2}),
    "a codec with memory": (recipes_impure.recipe(), {"compression": "topk:0.2"}),
    "local steps, stale, compressed": (
        recipes_impure.recipe(),
        {"local_steps": 2, "staleness": 1, "compression": "powersgd:1,values=int8"},
    ),
    "parameters as deltas": (recipes_impure.recipe(), {"parameter_compression": "int8"}),
    "partial sums": (models.cnn(32), {"fan_in": 2}),
    "a NaN that is skipped": (
        recipes_impure.recipe(dataset=partial(models.poisoned, at=11)),
        {"nonfinite": "skip"},
    ),
    "half precision with a loss scale": (recipes_impure.recipe(), {"precision": "fp16"}),
}


@pytest.mark.parametrize("kind", PURE)
def test_what_is_pure_passes_a_check_in_every_step(redis_url: str, tmp_path: Path, kind: str) -> None:
    recipe, changes = PURE[kind]
    recipe = replace(recipe, evaluation=None, metrics=None)
    config = replace(CONFIG, epochs=1, audit_fraction=1.0, **changes)
    checked = trained(redis_url, tmp_path, recipe, config, 2)
    assert (checked.status().state, checked.status().error) == ("done", None)
    audit = checked.verify()
    assert audit.ok, audit.problems
    steps = checked.status().total_steps
    assert steps is not None and audit.checked == 4 + (steps - 1)
    assert audit.duplicates_ignored == audit.divergent == 0


def test_checks_change_no_bit(redis_url: str, tmp_path: Path) -> None:
    recipe = models.cnn(32)
    bits = {}
    for workers, fraction in ((1, 0.0), (2, 1.0)):
        config = replace(CONFIG, audit_fraction=fraction)
        run = trained(redis_url, tmp_path, recipe, config, workers)
        bits[fraction] = reference.bits(run.model())
        assert bool(run.verify().checked) == bool(fraction)
    assert bits[0.0] == bits[1.0] == reference.average(recipe, CONFIG).bits


def test_a_run_from_before_there_were_checks_goes_on_without(redis_url: str, tmp_path: Path) -> None:
    """Its config has no such field; who submits the same again is given that run."""
    master, recipe = Master(redis_url, checkpoint_dir=str(tmp_path)), recipes_impure.recipe()
    run = master.submit(recipe, CONFIG, name="old")
    ledger = run._ledger
    spec = ledger.spec()
    del spec["config"]["audit_fraction"]
    ledger.client.set(ledger.keys.spec, json.dumps(spec), keepttl=True)
    again = master.submit(recipe, CONFIG, name="old")
    Laboratory(Settings(url=redis_url, checkpoint_dir=str(tmp_path)), again, None).train()
    audit = again.verify()
    assert audit.ok and audit.checked == 0


# --- by process -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A training server and one Client; the last test starts a second one."""
    with fleet(tmp_path_factory.mktemp("purity"), workers=1) as started:
        yield started


def unlike(run: Run) -> str:
    """What is said of a run whose workers find other first shards, mostly before its first commit."""
    with suppress(RunFailed):  # it goes on without a worker that comes later
        run.wait(timeout=WAIT_SECONDS)
    audit = run.verify()
    assert not audit.ok and len(audit.problems) == 1
    assert re.match(
        r"run '\S+' is not pure: .* worker \S+ does not make the same as worker \S+: ", audit.problems[0]
    )
    assert "the order of a set or another hash, or the process or machine" in audit.problems[0]
    return audit.problems[0]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("the order of a set in the data", "of the first batch, '0' differs"),
        ("the order of a set in the weights", "the initial value of 'layers."),
        ("a salt at import", "the first shard's gradient of 'first.weight' differs"),
        ("the process", "the first shard's gradient of 'first.weight' differs"),
    ],
)
def test_the_training_server_shows_what_differs_by_process(one: Fleet, kind: str, said: str) -> None:
    """With one Client there is one process only that computes; the server is another."""
    run = one.master.submit(recipes_impure.BY_PROCESS[kind], CONFIG, name=f"alone-{kind[-4:]}")
    assert said in unlike(run)


def test_arguments_of_the_command_line_are_the_workers(one: Fleet) -> None:
    one.train(recipes_impure.recipe(dataset=recipes_impure.of_the_command_line), CONFIG, "arguments")


def test_a_client_that_dies_in_a_check_leaves_the_same_bits(one: Fleet, tmp_path: Path) -> None:
    """The check is sent again like any shard."""
    one.resize(2)
    recipe = recipes_impure.recipe(dataset=partial(recipes_impure.Deadly, str(tmp_path / "died")))
    run, trained = one.train(recipe, CONFIG, "deadly")
    assert (tmp_path / "died").exists()
    assert run.verify().checked > 0
    assert reference.bits(trained.module) == reference.average(recipes_impure.recipe(), CONFIG).bits


def test_a_worker_that_comes_later_and_differs_takes_no_part(
    redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run goes on without it, and its audit tells of it."""
    monkeypatch.setattr("torchord.coordinator.client.slot_lease._REFUSAL_SECONDS", (0.0, 0.0))
    recipe = recipes_impure.BY_PROCESS["a salt at import"]
    run = Master(redis_url, checkpoint_dir=str(tmp_path)).submit(recipe, CONFIG, name="later")
    lab = Laboratory(Settings(url=redis_url, checkpoint_dir=str(tmp_path)), run, None)
    while run.status().version < 2 or not lab.post.gradients:
        lab._in_order()
    monkeypatch.setattr("torchord.cache.keys.WORKER_LEASE_MS", 600_000)
    first = lab.clients[0].heartbeat
    first.registry.beat(replace(first.info, pace={"later": 0.1}))  # it computes for the run
    with monkeypatch.context() as there:
        there.setattr(recipes_impure, "_SALT", 0.5)
        for _ in range(3):
            lab._deliver(lab.post.gradients.pop(0), lab.clients[1], "later", backup=False)
    assert lab.verdicts["refused"] == 3
    while run.status().state == "running":
        lab._in_order()
    assert run.status().state == "done"
    problem = unlike(run)
    assert lab.clients[1].heartbeat.info.id in problem and lab.clients[0].heartbeat.info.id in problem
