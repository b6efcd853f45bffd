"""`torchord demo` outside of a checkout's examples: trains, kills, audits, and leaves what it made."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_demo_survives_its_kill_and_leaves_a_report(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torchord", "demo", "--epochs", "4", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    folder = Path(said["directory"])
    assert said["audit"]["ok"] and said["audit"]["steps"] == 32 and folder == tmp_path / "torchord-demo"
    assert len({worker.partition("@")[0] for worker in said["audit"]["workers"]}) == 2
    assert said["name"] in (folder / "report.html").read_text()
    assert (folder / "torchord_demo.py").exists()
