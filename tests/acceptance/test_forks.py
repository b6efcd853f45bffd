"""Runs that begin at another run's version: its bits where nothing is changed, chained to its ledger."""

from __future__ import annotations

import dataclasses
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import inprocess, models
from tests.support.shuffle import Evaluated
from tests.support.waiting import PATIENCE_SECONDS
from torchord import Master, Plateau, Recipe, Run, TrainingConfig
from torchord.cache.errors import ConfigError, ConfigMismatch, InvalidInput, RecipeError, VersionMissing
from torchord.cache.settings import Settings
from torchord.coordinator.averages import ema

CONFIG = TrainingConfig(
    epochs=3,
    batch_size=8,
    shards=2,
    seed=3,
    checkpoint_every=4,
    keep_checkpoints=9,
    audit_fraction=0,
    probe=False,
)
"""Fifteen steps, with checkpoints at 4, 8, 12 and 15."""

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)


@dataclasses.dataclass
class Laboratory:
    """Runs in this process."""

    url: str
    folder: str

    def run(self, recipe: Recipe, config: TrainingConfig = CONFIG, name: str = "parent") -> Run:
        """A run that is done."""
        return self.end(Master(self.url, checkpoint_dir=self.folder).submit(recipe, config, name=name))

    def end(self, run: Run) -> Run:
        """Let a run come to its end; its audit is clean."""
        Evaluated(Settings(url=self.url, checkpoint_dir=self.folder), run, None).deliver()
        assert run.status().state == "done", run.status().error
        audit = run.verify()
        assert audit.ok, audit.problems
        return run


@pytest.fixture
def lab(redis_url: str, tmp_path: Path) -> Laboratory:
    """Where runs are submitted and done."""
    return Laboratory(redis_url, str(tmp_path))


def entries(run: Run) -> dict[int, Any]:
    """The run's ledger by version."""
    return {entry.version: entry for entry in run._entries(run._ledger.head())}


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        (models.mlp(), {}),
        (models.mlp(average=partial(ema, decay=0.5)), {"compression": "topk:0.1"}),
        (models.mlp(), {"staleness": 2}),
        (models.cnn(size=40), {"precision": "fp16", "loss_scale": 8.0}),
    ],
    ids=["adam", "error feedback and an average", "staleness", "loss scale and scheduler"],
)
def test_a_fork_without_a_change_has_its_parents_chain(
    lab: Laboratory, recipe: Recipe, changes: dict[str, Any]
) -> None:
    parent = lab.run(recipe, dataclasses.replace(CONFIG, **changes))
    fork = lab.end(parent.fork(version=8, name="fork"))
    assert [report.version for report in fork.history()] == list(range(9, 16))
    ours, theirs = entries(fork), entries(parent)
    assert {v: entry.chain for v, entry in ours.items()} == {v: theirs[v].chain for v in ours}
    assert ours[9].notes["fork"] == {"run": "parent", "version": 8, "chain": theirs[8].chain}
    assert fork.verify(reexecute=[12]).ok


def test_a_fork_with_another_optimizer_is_a_plain_loop_that_changes_it(lab: Laboratory) -> None:
    parent = lab.run(models.mlp())
    fork = lab.end(parent.fork(version=8, optimizer=SGD, name="fork", epochs=4))
    plain = inprocess.InProcess(inprocess.resolved(models.mlp()), CONFIG).train(stop=8)
    after = inprocess.InProcess(
        inprocess.resolved(models.mlp(optimizer=SGD)), dataclasses.replace(CONFIG, epochs=4)
    )
    after.trainer.replica.load_tensors(plain.trainer.replica.state_tensors())
    after.train(start=8)
    expected = after.trainer.replica.model.state_dict()
    assert all(inprocess.same(expected[name], tensor) for name, tensor in fork.state_dict().items())
    assert fork.status().version == 20
    assert parent.status().version == 15


def test_a_run_that_a_rule_has_ended_goes_on_as_a_fork(lab: Laboratory) -> None:
    stops = dataclasses.replace(CONFIG, evaluate_every=3, stop_when=Plateau(patience=1, min_delta=1e6))
    parent = lab.run(models.mlp(), stops)
    assert parent.status().version == 6
    fork = lab.end(parent.fork(name="fork", stop_when=None, evaluate_every=None))
    plain = lab.run(models.mlp(), CONFIG, name="plain")
    assert fork._ledger.head().chain == plain._ledger.head().chain


def test_the_same_fork_again_is_the_one_that_is_there(lab: Laboratory) -> None:
    parent = lab.run(models.mlp())
    lab.end(parent.fork(version=8, name="fork"))
    assert parent.fork(version=8, name="fork").status().state == "done"
    for changed in ({"version": 4}, {"version": 8, "optimizer": SGD}, {"version": 8, "epochs": 9}):
        with pytest.raises(ConfigMismatch, match="exists with another"):
            parent.fork(name="fork", **changed)
    with pytest.raises(ConfigMismatch):
        Master(lab.url, checkpoint_dir=lab.folder).submit(models.mlp(), CONFIG, name="fork")


def test_a_fork_whose_parents_entry_is_another_is_found(lab: Laboratory) -> None:
    parent = lab.run(models.mlp())
    fork = lab.end(parent.fork(version=8, name="fork"))
    keys, client = parent._ledger.keys, parent._ledger.client
    text = client.hget(keys.ledger, "8")
    client.hset(keys.ledger, "8", text.replace('"examples":8', '"examples":9'))
    assert fork.verify().ok, "the one on disk is right"
    for segment in Path(lab.folder, "parent").rglob("ledger-*"):
        segment.unlink()
    assert fork.verify().problems == (
        "version 8 of run 'parent' is not the one that this run was forked from",
    )
    client.delete(keys.ledger)
    (problem,) = fork.verify().problems
    assert "is neither in Redis nor beside the checkpoints" in problem


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"version": 0}, InvalidInput, "no step that made version 0; a fork begins at 1 to 15"),
        ({"version": 16}, InvalidInput, "no step that made version 16"),
        ({"version": 7}, VersionMissing, "version 7"),
        ({"version": "best"}, InvalidInput, "keeps no best version"),
        (
            {"version": 8, "batch_size": 4},
            InvalidInput,
            "batch_size would move its examples: submit a new run",
        ),
        ({"version": 8, "batchsize": 4}, InvalidInput, "batchsize is no field of TrainingConfig"),
        ({"version": 8, "epochs": 0}, ConfigError, "epochs must be"),
        ({"version": 8, "optimizer": lambda p: None}, RecipeError, "optimizer"),
        ({"version": 8, "stop_when": Plateau()}, RecipeError, "set evaluate_every"),
    ],
    ids=["none made it", "ahead", "not stored", "no best", "examples", "no field", "value", "lambda", "rule"],
)
def test_what_cannot_be_forked_says_why(
    lab: Laboratory, arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    parent = lab.run(models.mlp())
    with pytest.raises(error, match=words):
        parent.fork(name="fork", **arguments)


def test_the_version_that_a_fork_begins_with_is_not_pruned(lab: Laboratory) -> None:
    config = dataclasses.replace(CONFIG, keep_checkpoints=1, checkpoint_every=2)
    parent = lab.run(models.mlp(), config)
    fork = lab.end(parent.fork(optimizer=SGD, name="fork", epochs=6))
    assert fork._checkpoints(fork._ledger.head().incarnation).versions() == [15, 30]


def test_a_version_that_only_the_cache_has_is_forked_with_an_optimizer_of_its_own(lab: Laboratory) -> None:
    parent = lab.run(models.mlp())
    checkpoints = parent._checkpoints(parent._ledger.head().incarnation)
    with_it = lab.end(parent.fork(optimizer=SGD, name="one", epochs=4))
    for path in Path(lab.folder, "parent").rglob("version-000000015*"):
        path.unlink()
    assert 15 not in checkpoints.versions()
    without = lab.end(parent.fork(optimizer=SGD, name="other", epochs=4))
    assert without._ledger.head().chain == with_it._ledger.head().chain
    record = parent._ledger.version(15)
    assert record is not None
    token = parent._ledger.head().token
    parent._ledger.put_version(dataclasses.replace(record, state=None), token=token)
    with pytest.raises(VersionMissing, match=r"without its optimizer's state.*\[4, 8, 12\]"):
        parent.fork(name="third", epochs=4)


class Dying(Evaluated):
    """A training server that does nothing more once it comes to a point, as if it were killed there."""

    def __init__(self, lab: Laboratory, run: Run, point: str) -> None:
        self.point = point
        self.dead = threading.Event()
        super().__init__(Settings(url=lab.url, checkpoint_dir=lab.folder), run, None)

    def _meanwhile(self, busy: int, point: str) -> None:
        if point == self.point:
            self.dead.set()
            threading.Event().wait()

    def die(self) -> None:
        """Come to the point."""
        threading.Thread(target=self.deliver, daemon=True).start()
        assert self.dead.wait(PATIENCE_SECONDS), f"{self.point} was not reached"
        self.server.services.registry.leave(self.server.heartbeat.info)


@pytest.mark.parametrize(
    "point",
    ["server.after_acquire", "server.mid_checkpoint", "server.before_initialise", "server.after_initialise"],
)
def test_a_kill_while_a_fork_begins_changes_nothing(lab: Laboratory, point: str) -> None:
    parent = lab.run(models.mlp())
    fork = parent.fork(version=8, name="fork")
    Dying(lab, fork, point).die()
    assert lab.end(fork)._ledger.head().chain == parent._ledger.head().chain
