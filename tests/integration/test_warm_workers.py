"""A worker that is a fork of a warm process is a process as any other, and ends with its cluster."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.support.processes import guardian_pid
from tests.support.waiting import PATIENCE_SECONDS, wait_until
from torchord.coordinator.local_cluster.cluster import LocalCluster

Start = Callable[..., LocalCluster]
STUB = "tests.support.stub_app"


def gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_a_warm_worker_has_what_another_has_and_ends_with_its_own_code(cluster: Start) -> None:
    made = cluster(2, app=STUB, pool="solo")
    pids = [worker.pid for worker in made.processes.values()]
    parents = {psutil.Process(pid).ppid() for pid in pids}
    assert len(parents) == len(pids), "they take turns"
    assert guardian_pid(made) not in parents
    for worker in made.processes.values():
        assert os.getsid(worker.pid) == os.getpgid(worker.pid) == worker.pid
        assert Path(f"/proc/{worker.pid}/cwd").resolve() == Path.cwd()
        assert Path(f"/proc/{worker.pid}/fd/1").resolve() == worker.log.resolve()
    server, first, second = made.processes.values()
    server.terminate()
    first.kill()
    assert (server.wait(PATIENCE_SECONDS), first.wait(PATIENCE_SECONDS)) == (0, -signal.SIGKILL)
    assert second.poll() is None
    again = made.restart("client1")
    made.wait_ready()
    assert again.pid != first.pid and again.poll() is None


@pytest.mark.parametrize("end", ["guardian", "cluster"])
def test_warm_workers_end_with_their_cluster(cluster: Start, end: str) -> None:
    made = cluster(1, app=STUB, pool="solo")
    workers = [psutil.Process(worker.pid) for worker in made.processes.values()]
    if end == "guardian":
        guardian = guardian_pid(made)
        assert guardian is not None
        os.kill(guardian, signal.SIGKILL)
    else:
        made.stop()
    wait_until(lambda: all(map(gone, workers)), message="the end of the workers")


def test_what_a_process_reads_at_its_start_makes_a_start_of_its_own(cluster: Start) -> None:
    made = cluster(1, app=STUB, pool="solo", env={"PYTHONHASHSEED": "7"})
    assert {psutil.Process(worker.pid).ppid() for worker in made.processes.values()} == {guardian_pid(made)}
