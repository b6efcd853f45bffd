"""A few faults of the matrix, by the command that strikes with all: `python -m tests.faults`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.matrix import FAULTS, PHASES
from torchord.coordinator.runtime.faults import ACTIONS, POINTS, parse

ROOT = Path(__file__).resolve().parents[2]
SHORT = ("full", "read-only", "forgets", "link down")
SECONDS = 300.0


@pytest.mark.slow
def test_what_was_seen_of_some_faults() -> None:
    """Each ends in the same bits, or in its sentence, and is said while it lasts."""
    command = [sys.executable, "-m", "tests.faults", "--only", *SHORT]
    done = subprocess.run(
        command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")][2:]
    struck = [fault for fault in FAULTS if any(word in fault.name for word in SHORT)]
    assert len(rows) == len(struck) >= len(SHORT)
    skipped = [row for row in rows if "skipped" in row]
    assert all("no network and mounts of its own" in row for row in skipped)
    assert all("| ok |" in row for row in rows if row not in skipped), done.stdout


def test_every_fault_has_a_name_of_its_own() -> None:
    names = [fault.name for fault in (*FAULTS, *PHASES)]
    assert len(set(names)) == len(names)
    assert {fault.kind for fault in FAULTS} == {"store", "network", "process", "limits", "recipe"}


def test_signals_are_faults_at_each_point() -> None:
    assert {"term", "hup"} <= set(ACTIONS)
    for action in ("term", "hup"):
        (fault,) = parse(f"{POINTS[0]}:2:{action}")
        assert fault.action == action
