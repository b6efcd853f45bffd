"""A short storm: see benchmarks/chaos.py for the long one."""

from __future__ import annotations

from pathlib import Path

from benchmarks.chaos import storm


def test_random_kills(tmp_path: Path) -> None:
    found = storm(kills=10, seed=3, folder=tmp_path, say=print, clients=2, calm=3)
    assert sum(found["kills"].values()) == 10
    assert found["state"] == "done"
    assert found["bits_equal"], found["audit"]
    assert found["audit_clean"], found["audit"]
    assert found["servers_in_order"]
