"""The guardian ends what it started: the stubborn, the grandchildren, and in the right order."""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.waiting import wait_until
from torchord.coordinator.local_cluster.guardian import Child, Guardian, GuardianLost

STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up'); time.sleep(600)"
POLITE = "import time; print('up'); time.sleep(600)"
PARENT = """
import subprocess, sys, time
print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid, "up")
time.sleep(600)
"""
LATE = """
import signal, sys, time
def end(*_): print("ended", time.monotonic()); sys.exit()
signal.signal(signal.SIGTERM, end)
print("up"); time.sleep(600)
"""


@pytest.fixture
def guardian(tmp_path: Path) -> Iterator[Guardian]:
    (tmp_path / "scratch").mkdir()
    one = Guardian(scratch=tmp_path / "scratch", grace_seconds=0.2)
    yield one
    one.close()


@pytest.fixture
def run(guardian: Guardian, tmp_path: Path) -> Callable[..., tuple[Child, Path]]:
    """Start a Python program under the guardian and wait until it says that it is up."""
    number = iter(range(100))

    def start(code: str, *, last: bool = False) -> tuple[Child, Path]:
        log = tmp_path / f"{next(number)}.log"
        child = guardian.spawn([sys.executable, "-u", "-c", code], log=log, last=last)
        wait_until(lambda: log.exists() and "up" in log.read_text(), message="the child")
        return child, log

    return start


Run = Callable[..., tuple[Child, Path]]


def test_close_ends_the_stubborn_too_and_removes_the_scratch(
    guardian: Guardian, run: Run, tmp_path: Path
) -> None:
    stubborn, _ = run(STUBBORN)
    polite, _ = run(POLITE)
    guardian.close()
    guardian.close()
    assert not psutil.pid_exists(stubborn.pid) and not psutil.pid_exists(polite.pid)
    assert not psutil.pid_exists(guardian.pid)
    assert not (tmp_path / "scratch").exists()
    assert polite.poll() is not None
    polite.kill()
    with pytest.raises(GuardianLost):
        guardian.spawn(["true"])


def test_close_lets_a_paused_child_end_by_itself(guardian: Guardian, run: Run) -> None:
    child, log = run(LATE)
    child.pause()
    guardian.close(grace_seconds=10)
    assert not psutil.pid_exists(child.pid)
    assert "ended" in log.read_text()


def test_last_children_end_after_the_others(guardian: Guardian, run: Run) -> None:
    _, server_log = run(LATE, last=True)
    _, worker_log = run(LATE)
    guardian.close(grace_seconds=10)
    server, worker = (float(log.read_text().split()[-1]) for log in (server_log, worker_log))
    assert worker < server


@pytest.mark.parametrize("end", ["kill", "terminate", "crash", "close"])
def test_grandchildren_end_with_their_parent(guardian: Guardian, run: Run, end: str) -> None:
    child, log = run(PARENT)
    grandchild = psutil.Process(int(log.read_text().split()[0]))
    {
        "kill": child.kill,
        "terminate": child.terminate,
        "crash": lambda: os.kill(child.pid, signal.SIGKILL),  # the leader alone
        "close": guardian.close,
    }[end]()
    wait_until(
        lambda: not grandchild.is_running() or grandchild.status() == psutil.STATUS_ZOMBIE,
        message="the grandchild's end",
    )


def test_exit_codes_and_stop(guardian: Guardian, run: Run) -> None:
    assert guardian.spawn([sys.executable, "-c", "raise SystemExit(3)"]).wait(20) == 3
    polite, _ = run(POLITE)
    assert polite.poll() is None
    with pytest.raises(TimeoutError):
        polite.wait(0)
    assert polite.stop(20) == -signal.SIGTERM
    stubborn, _ = run(STUBBORN)
    assert stubborn.stop(0.1) == -signal.SIGKILL
    assert stubborn.poll() == -signal.SIGKILL


def test_a_program_with_many_open_files_has_a_guardian(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        (tmp_path / "scratch").mkdir()
        one = Guardian(scratch=tmp_path / "scratch", grace_seconds=0.2)
        assert one.spawn([sys.executable, "-c", "raise SystemExit(3)"]).wait(20) == 3
        one.close()
    finally:
        for each in opened:
            os.close(each)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_environment_directory_and_signals_of_a_child(
    guardian: Guardian, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import os, signal; print(os.environ.get('HOME'), os.environ['NEW'], os.getcwd(),"
        " signal.getsignal(signal.SIGINT) is signal.default_int_handler, os.getpgid(0) == os.getpid())"
    )
    log = tmp_path / "log"
    child = guardian.spawn(
        [sys.executable, "-c", code], env={"HOME": None, "NEW": "a b"}, cwd=tmp_path, log=log
    )
    assert child.wait(20) == 0
    assert log.read_text() == f"None a b {tmp_path} True True\n"


def test_a_program_that_cannot_be_started(guardian: Guardian) -> None:
    with pytest.raises(OSError, match="no-such-program"):
        guardian.spawn(["no-such-program"])
    assert guardian.spawn(["true"]).wait(20) == 0


def test_signals_reach_only_the_living(guardian: Guardian) -> None:
    child = guardian.spawn(["true"])
    wait_until(lambda: guardian.call("poll", pid=child.pid)["code"] == 0)
    assert guardian.call("signal", pid=child.pid, signal=int(signal.SIGTERM), group=False)["sent"] is False
    assert guardian.call("signal", pid=os.getpid(), signal=int(signal.SIGCONT), group=False)["sent"] is False
    assert "error" in guardian.call("nonsense")


def test_interrupts_do_not_reach_the_guardian(guardian: Guardian) -> None:
    guardian.call("poll", pid=0)  # it has come up
    for number in (signal.SIGINT, signal.SIGHUP):
        os.kill(guardian.pid, number)
    assert guardian.spawn(["true"]).wait(20) == 0
    assert os.getsid(guardian.pid) == guardian.pid


def test_sigterm_to_the_guardian_ends_its_children(guardian: Guardian, run: Run) -> None:
    child, _ = run(STUBBORN)
    process = psutil.Process(child.pid)
    os.kill(guardian.pid, signal.SIGTERM)
    wait_until(lambda: not process.is_running(), message="the child's end")
    assert child.poll() == -signal.SIGKILL
