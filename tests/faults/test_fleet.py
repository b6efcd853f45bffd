"""Workers that join, leave and lag: nobody waits for one that goes, and a slow one costs its share only."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from celery import Celery

from coordinator import Run
from tests.faults.laboratory import CONFIG, Laboratory, wait_version
from tests.faults.recipes import Slow
from tests.support.waiting import wait_until

ONE_SHARD = dataclasses.replace(CONFIG, shards=1)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laboratory]:
    """A cluster whose Clients come and go."""
    lab = Laboratory(tmp_path_factory.mktemp("fleet"), standby=0, workers=2)
    yield lab
    lab.close()


def terminate(lab: Laboratory, name: str) -> None:
    """SIGTERM, as an init system or a revoked spot instance sends it."""
    lab.cluster.processes[name].terminate()


def control_shutdown(lab: Laboratory, name: str) -> None:
    """What `celery control shutdown` sends."""
    pid = lab.cluster.processes[name].pid
    node = next(info.node for info in lab.master._services.registry.alive().values() if info.pid == pid)
    with Celery("shell", broker=lab.cluster.url) as app:
        app.control.shutdown(destination=[node])


@pytest.mark.parametrize("leave", [terminate, control_shutdown])
def test_a_leaving_worker_hands_its_shard_back_at_once(
    fleet: Laboratory, tmp_path: Path, leave: Callable[[Laboratory, str], None]
) -> None:
    """It is in the middle of a shard that would take it an hour, and still alive when another has done it.

    Backup tasks do not help here: nothing is known yet of how long a shard takes.
    """
    speeds = tmp_path / "speeds"
    data = partial(Slow, speeds=str(speeds))
    reference = fleet.check(fleet.submit(ONE_SHARD, dataset=data), reference=None)
    fleet.cluster.wait_ready()
    pids = {worker.pid: name for name, worker in fleet.cluster.processes.items() if worker.role == "client"}
    speeds.write_text("".join(f"{pid} 3600\n" for pid in pids))
    run = fleet.submit(ONE_SHARD, dataset=data)
    lease = wait_until(lambda: run._ledger.leases(0), message="the shard to be begun")[0]
    pid = next(pid for pid in pids if f"/{pid}-" in lease.worker)
    leaver = fleet.cluster.processes[pids[pid]]
    speeds.write_text(f"{pid} 3600\n")
    leave(fleet, pids[pid])
    wait_version(run, 3)
    assert leaver.poll() is None
    speeds.unlink()
    assert leaver.wait(60) == 0
    fleet.check(run, reference=reference)


def test_workers_join_in_the_middle(fleet: Laboratory, tmp_path: Path) -> None:
    speeds = tmp_path / "speeds"
    data = partial(Slow, speeds=str(speeds))
    reference = fleet.check(fleet.submit(dataset=data), reference=None)
    pids = [worker.pid for worker in fleet.cluster.processes.values() if worker.role == "client"]
    speeds.write_text("".join(f"{pid} 0.3\n" for pid in pids))  # a second a shard: time for a worker to start
    run = fleet.submit(dataset=data)
    joined = fleet.cluster.add_worker("joined")
    present = lambda: any(info.pid == joined.pid for info in fleet.master._services.registry.alive().values())  # noqa: E731
    wait_until(present, 60, "the new worker")
    version = run.status().version
    assert run.status().state == "running"
    speeds.unlink()
    fleet.check(run, reference=reference)
    assert any(f"/{joined.pid}-" in worker for report in run.history()[version:] for worker in report.workers)


def test_a_straggler_gets_a_backup(fleet: Laboratory, tmp_path: Path) -> None:
    """One of the Clients would take an hour for each sample; the step is done by the others."""
    speeds = tmp_path / "speeds"
    data = partial(Slow, speeds=str(speeds))
    reference = fleet.check(fleet.submit(dataset=data), reference=None)
    clients = [worker for worker in fleet.cluster.processes.values() if worker.role == "client"]
    assert len(clients) >= 2
    run = fleet.submit(dataset=data)
    wait_version(run, 1)
    speeds.write_text(f"{clients[0].pid} 3600")
    fleet.check(run, reference=reference)
    speeds.unlink()
    wait_until(lambda: idle(fleet, run), message="the straggler to give up")


def idle(lab: Laboratory, run: Run) -> bool:
    """Whether no worker is at the run any more."""
    alive = lab.master._services.registry.alive().values()
    return not any(task.startswith(f"{run.name}:") for info in alive for task in info.tasks)
