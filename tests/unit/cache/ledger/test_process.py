"""A process of this machine that has ended is known to have ended, and no other is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.waiting import wait_until
from torchord.cache.ledger import process
from torchord.cache.ledger.workers import new_info

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    made = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    yield made
    made.kill()
    made.wait()


def test_a_living_process_has_not_ended(child: subprocess.Popen[bytes]) -> None:
    began = process.started(child.pid)
    assert began > 0
    assert not process.ended(process.place(), child.pid, began)
    child.send_signal(signal.SIGSTOP)
    assert not process.ended(process.place(), child.pid, began), "it is only stopped"


def test_a_killed_process_has_ended_before_and_after_its_parent_asks(child: subprocess.Popen[bytes]) -> None:
    began = process.started(child.pid)
    child.kill()
    wait_until(lambda: process.ended(process.place(), child.pid, began), message="the zombie to be seen")
    child.wait()
    assert process.ended(process.place(), child.pid, began)


def test_another_process_with_the_same_id_is_another() -> None:
    assert process.ended(process.place(), os.getpid(), process.started(os.getpid()) - 1)


@pytest.mark.parametrize("where", ["", "another machine"])
def test_nothing_is_known_of_processes_elsewhere(where: str) -> None:
    assert not process.ended(where, 2**22 + 1, 1)


def test_nothing_is_known_of_a_process_that_does_not_say_since_when() -> None:
    assert not process.ended(process.place(), 2**22 + 1, 0)
    assert process.ended(process.place(), 2**22 + 1, 1)


def test_a_process_that_is_hidden_has_not_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The mount option `hidepid` hides the processes of other users, or what is in their folders."""
    where, began = process.place(), process.started(os.getpid())
    monkeypatch.setattr("torchord.cache.ledger.process._PROC", tmp_path)
    assert not process.ended(where, os.getpid(), began)
    (tmp_path / str(os.getpid())).mkdir()
    (tmp_path / str(os.getpid()) / "stat").write_text("")
    assert not process.ended(where, os.getpid(), began)


def test_a_worker_says_which_process_it_is() -> None:
    info = new_info("celery@here", ["gradients"])
    assert (info.place, info.started) == (process.place(), process.started(os.getpid()))
    assert info.place and not info.ended
