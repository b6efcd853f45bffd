"""The table of all benchmarks' figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.summary import TABLES, table

MACHINE = {"processor": "a processor", "cores": 2, "capability": "AVX2", "torch": "2.13", "python": "3.11"}


def test_each_figure_stands_beside_its_anchor_and_target(tmp_path: Path) -> None:
    milliseconds = {
        "2": {"torchord": [{"median": 4.0}, {"median": 6.0}, {"median": 5.0}], "floor": [0.5, 0.25, 1.0]},
        "8": {"torchord": [{"median": 11.0}], "floor": [1.0]},
    }
    (tmp_path / "step.json").write_text(json.dumps({"machine": MACHINE, "milliseconds": milliseconds}))
    lines = table(tmp_path).splitlines()
    assert lines[2:5] == [
        "| step | no-op step, K=2 | 5.00 ms | 6.00 ms | by hand in redis-py 0.50 ms | 3 ms |",
        "| step | no-op step, K=8 | 11.00 ms | 11.00 ms | by hand in redis-py 1.00 ms | 6 ms |",
        "| step | each further task | 1.00 ms |  |  | 0.6 ms |",
    ]
    assert "step: a processor, 2 cores, AVX2, torch 2.13, Python 3.11" in lines
    assert [line for line in lines if line.endswith("not measured yet")] == [
        f"{name}: not measured yet" for name in TABLES if name != "step"
    ]


def test_a_ratio_to_ddp_is_of_medians(tmp_path: Path) -> None:
    rows = {"limit": [9.0], "ddp": [10.0, 30.0, 20.0], "torchord": [10.0, 25.0, 16.0], "local16": [10.0]}
    (tmp_path / "ddp.json").write_text(json.dumps({"machine": MACHINE, "milliseconds": {"cnn": rows}}))
    assert table(tmp_path).splitlines()[2:4] == [
        "| ddp | cnn: torchord | 16.0 ms | 25.0 ms | 1.25 x DDP; 0.56 of no communication | 1.00; 0.90 |",
        "| ddp | cnn: torchord, H=16 | 10.0 ms | 10.0 ms | 2.00 x DDP; 0.90 of no communication | ; 0.97 |",
    ]


def test_overlap_stands_beside_no_overlap_and_no_limit(tmp_path: Path) -> None:
    rounds = {"off": [2.0, 3.0, 4.0], "on": [1.5], "unlimited": [1.0]}
    modes = {name: [{"seconds": [value, value]} for value in values] for name, values in rounds.items()}
    (tmp_path / "overlap.json").write_text(json.dumps({"machine": MACHINE, "rounds": {"gpt 200": modes}}))
    where = "| overlap | gpt, links of 200 Mbit/s:"
    assert table(tmp_path).splitlines()[2:4] == [
        f"{where} off | 3,000 ms | 4,000 ms | no limit 1,000 ms |  |",
        f"{where} on | 1,500 ms | 1,500 ms | 0.50 of off; no limit 1,000 ms |  |",
    ]


def test_seconds_to_an_accuracy_stand_beside_ddp_at_the_same_batch_and_at_its_best(tmp_path: Path) -> None:
    rows = {
        name: {"seconds": seconds, "worst_seconds": 2 * seconds, "megabytes": 1000.0}
        for name, seconds in {"ddp 256": 40.0, "ddp 64": 20.0, "local 256": 30.0}.items()
    }
    found = {
        "machine": MACHINE, "to_target": rows, "best": {"ddp": "ddp 64"},
        "diloco": {"0": {"sync": 0.91, "diloco": 0.905}, "1": {"diloco": 0.9}},
    }  # fmt: skip
    (tmp_path / "accuracy.json").write_text(json.dumps(found))
    lines = table(tmp_path).splitlines()[2:]
    where = "| accuracy | 90 % on Fashion-MNIST, local 256 |"
    assert lines[2] == f"{where} 30.0 s, 1,000 MB | 60.0 s | 0.75 of ddp 256; 1.50 of ddp 64 | 0.70 |"
    named = [line for line in lines if "DiLoCo" in line]
    assert named == [
        "| accuracy | DiLoCo at H=50, seed 0 | 90.50% |  | sync 91.00%: -0.50 points | -0.5 points |"
    ]


@pytest.mark.parametrize("equal", [True, False])
def test_a_chaos_run_that_lost_its_bits_says_so(tmp_path: Path, equal: bool) -> None:
    recovery = {"n": 3, "median": 1.0, "max": 2.0}
    seconds = {kind: {"recovery": recovery} for kind in ("all", "spare ready", "no spare")}
    found = {
        "machine": MACHINE, "steps": 9, "kills": {"client": 2, "redis": 1}, "bits_equal": equal,
        "audit_clean": True, "seconds": seconds,
    }  # fmt: skip
    (tmp_path / "chaos.json").write_text(json.dumps(found))
    line = table(tmp_path).splitlines()[2]
    ended = "the same bits" if equal else "NOT the same bits or audit"
    assert (
        line == f"| chaos | recovery, 3 kills: all (3) | 1.00 s | 2.00 s | 9 steps ended with {ended} | 3 s |"
    )
