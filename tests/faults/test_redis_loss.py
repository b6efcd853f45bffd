"""Redis dies: with its data kept, with an older copy, and with nothing left."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator import TrainingConfig
from tests.faults.laboratory import CONFIG, Laboratory, Outcome, assert_clean, outcome, wait_version
from tests.support.waiting import wait_until

LONGER = TrainingConfig(**{**CONFIG.to_json(), "epochs": 12})  # 60 steps: the loss comes in the middle


@pytest.fixture(scope="module")
def durable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laboratory]:
    """A cluster whose Redis writes everything to its append-only file at once."""
    folder = tmp_path_factory.mktemp("durable")
    lab = Laboratory(folder, standby=0, persistence_dir=folder / "redis")
    yield lab
    lab.close()


@pytest.fixture(scope="module")
def forgetful(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laboratory]:
    """A cluster whose Redis keeps nothing over a restart."""
    lab = Laboratory(tmp_path_factory.mktemp("forgetful"), standby=0)
    yield lab
    lab.close()


_undisturbed: dict[int, Outcome] = {}


def undisturbed(lab: Laboratory) -> Outcome:
    """The outcome of `LONGER`, made once a laboratory."""
    if id(lab) not in _undisturbed:
        _undisturbed[id(lab)] = lab.check(lab.submit(LONGER), reference=None)
    return _undisturbed[id(lab)]


def assert_same_training(found: Outcome, reference: Outcome) -> None:
    """The same bits and losses; an evaluation that was not on disk yet when Redis was lost may be missing."""
    assert (found.bits, found.losses) == (reference.bits, reference.losses)
    assert all(reference.evaluations[version] == metrics for version, metrics in found.evaluations.items())
    assert max(found.evaluations) == max(reference.evaluations)


def test_a_restart_with_its_data(durable: Laboratory) -> None:
    """Nobody is started again and nobody calls resume(): every process waits and reconnects."""
    reference = undisturbed(durable)
    run = durable.submit(LONGER)
    wait_version(run, 20)
    logs = [worker.log for worker in durable.cluster.processes.values()]
    before = [log.stat().st_size for log in logs]
    durable.cluster.broker.kill()
    waiting = b"Trying again in 2.00 seconds"
    wait_until(
        lambda: all(waiting in log.read_bytes()[size:] for log, size in zip(logs, before, strict=True)),
        message="every worker to wait for the broker",
    )
    durable.cluster.broker.restart()
    durable.check(run, reference=reference)


def test_an_older_copy_of_the_data(durable: Laboratory, tmp_path: Path) -> None:
    """As after a power loss: Redis has lost its last second, and every process is ahead of it."""
    reference = undisturbed(durable)
    run = durable.submit(LONGER)
    wait_version(run, 12)
    data = durable.cluster.broker._persistence_dir
    assert data is not None
    shutil.copytree(data, tmp_path / "copy")
    older = run.status().version
    wait_version(run, older + 10)
    durable.cluster.broker.kill()
    shutil.rmtree(data)
    shutil.copytree(tmp_path / "copy", data)
    durable.cluster.broker.restart()
    durable.check(run, reference=reference)


def test_nothing_left_and_the_workers_live(forgetful: Laboratory) -> None:
    """The supervisor knows the run still and creates it again from its newest checkpoint."""
    reference = undisturbed(forgetful)
    run = forgetful.submit(LONGER)
    wait_version(run, 22)
    forgetful.cluster.broker.kill()
    forgetful.cluster.broker.restart()
    wait_until(lambda: run.name in forgetful.master.runs(), message="the run to be known again")
    assert_same_training(forgetful.check(run, reference=None), reference)
    assert len(run.history()) == 60


def test_nothing_left_at_all(forgetful: Laboratory) -> None:
    """Nobody who knew the run is left: `resume()` creates it from the checkpoint."""
    reference = undisturbed(forgetful)
    run = forgetful.submit(LONGER)
    wait_version(run, 22)
    for worker in forgetful.cluster.processes.values():
        worker.kill()
    forgetful.cluster.broker.kill()
    forgetful.cluster.broker.restart()
    forgetful.revive()
    run.resume()
    assert_same_training(forgetful.check(run, reference=None), reference)


def test_resume_is_for_any_process(forgetful: Laboratory) -> None:
    """A run that is done, and was forgotten since, is whole again after `resume()`."""
    run = forgetful.submit()
    reference = forgetful.check(run, reference=None)
    forgetful.cluster.broker.kill()
    forgetful.cluster.broker.restart()
    run.resume()
    forgetful.check(run, reference=None)
    assert outcome(run).bits == reference.bits
    assert_clean(run.verify())
