"""Redis dies: with its data kept, with an older copy, and with nothing left."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.faults.laboratory import (
    CONFIG,
    WAIT_SECONDS,
    Laboratory,
    Outcome,
    assert_clean,
    outcome,
    wait_version,
)
from tests.support.waiting import wait_until
from torchord import TrainingConfig

LONGER = TrainingConfig(**{**CONFIG.to_json(), "epochs": 8})  # 40 steps: the loss comes in the middle


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laboratory]:
    """A cluster whose Redis writes everything to its append-only file at once."""
    folder = tmp_path_factory.mktemp("lab")
    lab = Laboratory(folder, standby=0, persistence_dir=folder / "redis")
    yield lab
    lab.close()


def restart_empty(lab: Laboratory) -> None:
    """Kill Redis, and bring it back without any of its data."""
    data = lab.cluster.broker._persistence_dir
    assert data is not None
    lab.cluster.broker.kill()
    shutil.rmtree(data)
    data.mkdir()
    lab.cluster.broker.restart()


def assert_same_training(found: Outcome, reference: Outcome) -> None:
    """The same bits and losses; an evaluation that was not on disk yet when Redis was lost may be missing."""
    assert (found.bits, found.losses) == (reference.bits, reference.losses)
    assert all(reference.evaluations[version] == metrics for version, metrics in found.evaluations.items())
    assert max(found.evaluations) == max(reference.evaluations)


def test_a_restart_with_its_data(lab: Laboratory) -> None:
    """Nobody is started again and nobody calls resume(): every process waits and reconnects."""
    reference = lab.undisturbed(LONGER)
    lab.slow(0.03)
    run = lab.submit(LONGER)
    waiter = ThreadPoolExecutor(1).submit(run.wait, timeout=WAIT_SECONDS)
    wait_version(run, 12)
    logs = [worker.log for worker in lab.cluster.processes.values()]
    before = [log.stat().st_size for log in logs]
    lab.cluster.broker.kill()
    waiting = b"Trying again in 1.50 seconds"
    wait_until(
        lambda: all(waiting in log.read_bytes()[size:] for log, size in zip(logs, before, strict=True)),
        message="every worker to wait for the broker",
    )
    lab.cluster.broker.restart()
    lab.check(run, reference=reference)
    assert waiter.result().version == 40


def test_an_older_copy_of_the_data(lab: Laboratory, tmp_path: Path) -> None:
    """As after a power loss: Redis has lost its last second, and every process is ahead of it."""
    reference = lab.undisturbed(LONGER)
    lab.slow(0.03)
    run = lab.submit(LONGER)
    wait_version(run, 12)
    data = lab.cluster.broker._persistence_dir
    assert data is not None
    shutil.copytree(data, tmp_path / "copy")
    older = run.status().version
    wait_version(run, older + 8)
    lab.cluster.broker.kill()
    shutil.rmtree(data)
    shutil.copytree(tmp_path / "copy", data)
    lab.cluster.broker.restart()
    lab.check(run, reference=reference)


def test_nothing_left_and_the_workers_live(lab: Laboratory) -> None:
    """The supervisor knows the run still and creates it again from its newest checkpoint."""
    reference = lab.undisturbed(LONGER)
    lab.slow(0.03)
    run = lab.submit(LONGER)
    waiter = ThreadPoolExecutor(1).submit(run.wait, timeout=WAIT_SECONDS)
    wait_version(run, 14)
    restart_empty(lab)
    wait_until(lambda: run.name in lab.master.runs(), message="the run to be known again")
    assert_same_training(lab.check(run, reference=None), reference)
    assert len(run.history()) == waiter.result().version == 40


def test_nothing_left_at_all(lab: Laboratory) -> None:
    """Nobody who knew the run is left: `resume()` creates it from the checkpoint."""
    reference = lab.undisturbed(LONGER)
    lab.slow(0.03)
    run = lab.submit(LONGER)
    wait_version(run, 14)
    for worker in lab.cluster.processes.values():
        worker.kill()
    restart_empty(lab)
    lab.revive()
    run.resume()
    assert_same_training(lab.check(run, reference=None), reference)


def test_resume_is_for_any_process(lab: Laboratory) -> None:
    """A run that is done, and was forgotten since, is whole again after `resume()`."""
    run = lab.submit()
    reference = lab.check(run, reference=None)
    restart_empty(lab)
    run.resume()
    lab.check(run, reference=None)
    assert outcome(run).bits == reference.bits
    assert_clean(run.verify())
