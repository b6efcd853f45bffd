"""Workers that join, leave and lag: nobody waits for one that goes, and a slow one costs its share only."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from celery import Celery

from tests.faults.laboratory import CONFIG, HOURS, Laboratory, wait_version
from tests.support.waiting import PATIENCE_SECONDS, wait_until
from torchord import Run

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
    lab: Laboratory, leave: Callable[[Laboratory, str], None]
) -> None:
    """It is in the middle of a shard that would take it hours, and still alive when another has done it.

    Backup tasks do not help here: nothing is known yet of how long a shard takes.
    """
    reference = lab.undisturbed(ONE_SHARD)
    lab.cluster.wait_ready()
    pids = {worker.pid: worker.name for worker in lab.clients()}
    lab.slow(HOURS)
    run = lab.submit(ONE_SHARD)
    lease = wait_until(lambda: run._ledger.leases(0).get(0), message="the shard to be begun")
    pid = next(pid for pid in pids if f"/{pid}-" in lease.worker)
    leaver = lab.cluster.processes[pids[pid]]
    lab.slow(HOURS, leaver.name)
    leave(lab, pids[pid])
    wait_version(run, 3)
    assert leaver.poll() is None
    lab.fast()
    assert leaver.wait(PATIENCE_SECONDS) == 0
    lab.check(run, reference=reference)


def test_a_leaving_pool_hands_back_what_its_processes_are_at(tmp_path: Path) -> None:
    """As above; the signal reaches the parent, and its child is at the shard."""
    lab = Laboratory(tmp_path / "lab", standby=0, pool="prefork")
    try:
        reference = lab.undisturbed(ONE_SHARD)
        lab.slow(HOURS)
        run = lab.submit(ONE_SHARD)
        lease = wait_until(lambda: run._ledger.leases(0).get(0), message="the shard to be begun")
        child = wait_until(
            lambda: lab.master._services.registry.worker(lease.worker), message="its heartbeat"
        )
        leaver = lab.cluster.processes[child.node.partition("@")[0]]
        lab.slow(HOURS, child.pid)
        leaver.terminate()
        wait_version(run, 3)
        assert leaver.poll() is None and child.pid != leaver.pid
        lab.fast()
        assert leaver.wait(PATIENCE_SECONDS) == 0
        lab.check(run, reference=reference)
    finally:
        lab.close()


def test_workers_join_in_the_middle(lab: Laboratory) -> None:
    """Those that are there hold two of the three shards of the first step; the third is the newcomer's."""
    reference = lab.reference
    lab.cluster.wait_ready()
    lab.slow(HOURS, *(worker.name for worker in lab.clients()))
    run = lab.submit()
    wait_until(lambda: len(run._ledger.leases(0)) == 2, message="the shards to be begun")
    joined = lab.cluster.add_worker("joined")
    wait_until(lambda: run._ledger.slots_present(0), message="the new worker's shard")
    lab.check(run, reference=reference)
    lab.dismiss("joined")
    assert any(f"/{joined.pid}-" in worker for worker in run.history()[0].workers)


def test_a_straggler_gets_a_backup(lab: Laboratory) -> None:
    """One of the Clients would take hours for each sample; every step is done by the others."""
    reference = lab.reference
    lab.cluster.wait_ready()
    lab.slow(0.05)
    run = lab.submit()
    wait_version(run, 2)
    lab.slow(HOURS, lab.clients()[0].name)
    wait_version(run, run.status().total_steps)
    lab.check(run, reference=reference)
    wait_until(lambda: idle(lab, run), message="the straggler to give up")


def idle(lab: Laboratory, run: Run) -> bool:
    """Whether no worker is at the run any more."""
    alive = lab.master._services.registry.alive().values()
    return not any(task.startswith(f"{run.name}:") for info in alive for task in info.tasks)


def test_a_leaving_server_hands_its_runs_over(lab: Laboratory) -> None:
    """It publishes what the standby needs, so that nothing is computed again."""
    reference = lab.reference
    lab.cluster.wait_ready()
    lab.slow(0.1)
    run = lab.submit()
    wait_version(run, 2)
    before = run.status().server
    server = next(w for w in lab.cluster.processes.values() if f"/{w.pid}-" in before)
    server.terminate()
    wait_until(lambda: run.status().server not in ("", before), message="another server")
    lab.check(run, reference=reference)
    assert server.wait(PATIENCE_SECONDS) == 0
    assert run.verify().replayed == 0
    assert len({entry.server for entry in run._entries(run._ledger.head())}) == 2
