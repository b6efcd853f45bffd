"""Workers that join, leave and lag: nobody waits for one that goes, and a slow one costs its share only."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from celery import Celery

from coordinator import Run
from tests.faults.laboratory import CONFIG, Laboratory, wait_version
from tests.faults.recipes import Slow
from tests.support.waiting import wait_until

ONE_SHARD = dataclasses.replace(CONFIG, shards=1)


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
    lab: Laboratory, tmp_path: Path, leave: Callable[[Laboratory, str], None]
) -> None:
    """It is in the middle of a shard that would take it an hour, and still alive when another has done it.

    Backup tasks do not help here: nothing is known yet of how long a shard takes.
    """
    speeds = tmp_path / "speeds"
    data = partial(Slow, speeds=str(speeds))
    reference = lab.check(lab.submit(ONE_SHARD, dataset=data), reference=None)
    lab.cluster.wait_ready()
    pids = {worker.pid: worker.name for worker in lab.clients()}
    speeds.write_text("".join(f"{pid} 3600\n" for pid in pids))
    run = lab.submit(ONE_SHARD, dataset=data)
    lease = wait_until(lambda: run._ledger.leases(0), message="the shard to be begun")[0]
    pid = next(pid for pid in pids if f"/{pid}-" in lease.worker)
    leaver = lab.cluster.processes[pids[pid]]
    speeds.write_text(f"{pid} 3600\n")
    leave(lab, pids[pid])
    wait_version(run, 3)
    assert leaver.poll() is None
    speeds.unlink()
    assert leaver.wait(60) == 0
    lab.check(run, reference=reference)


def test_workers_join_in_the_middle(lab: Laboratory, tmp_path: Path) -> None:
    speeds = tmp_path / "speeds"
    data = partial(Slow, speeds=str(speeds))
    reference = lab.check(lab.submit(dataset=data), reference=None)
    # A second a shard: time for a worker to start.
    speeds.write_text("".join(f"{worker.pid} 0.3\n" for worker in lab.clients()))
    run = lab.submit(dataset=data)
    joined = lab.cluster.add_worker("joined")
    present = lambda: any(info.pid == joined.pid for info in lab.master._services.registry.alive().values())  # noqa: E731
    wait_until(present, 60, "the new worker")
    version = run.status().version
    assert run.status().state == "running"
    speeds.unlink()
    lab.check(run, reference=reference)
    lab.dismiss("joined")
    assert any(f"/{joined.pid}-" in worker for report in run.history()[version:] for worker in report.workers)


def test_a_straggler_gets_a_backup(lab: Laboratory, tmp_path: Path) -> None:
    """One of the Clients would take an hour for each sample; the step is done by the others."""
    speeds = tmp_path / "speeds"
    data = partial(Slow, speeds=str(speeds))
    reference = lab.check(lab.submit(dataset=data), reference=None)
    run = lab.submit(dataset=data)
    wait_version(run, 1)
    speeds.write_text(f"{lab.clients()[0].pid} 3600")
    lab.check(run, reference=reference)
    speeds.unlink()
    wait_until(lambda: idle(lab, run), message="the straggler to give up")


def idle(lab: Laboratory, run: Run) -> bool:
    """Whether no worker is at the run any more."""
    alive = lab.master._services.registry.alive().values()
    return not any(task.startswith(f"{run.name}:") for info in alive for task in info.tasks)


def test_a_leaving_server_hands_its_runs_over(lab: Laboratory) -> None:
    """It publishes what the standby needs, so that nothing is computed again."""
    config = dataclasses.replace(CONFIG, epochs=12)
    reference = lab.undisturbed(config)
    lab.cluster.wait_ready()
    run = lab.submit(config)
    wait_version(run, 5)
    before = run.status().server
    server = next(w for w in lab.cluster.processes.values() if f"/{w.pid}-" in before)
    server.terminate()
    lab.check(run, reference=reference)
    assert server.wait(30) == 0
    assert run.verify().replayed == 0
    assert len({entry.server for entry in run._entries(run._ledger.head())}) == 2
