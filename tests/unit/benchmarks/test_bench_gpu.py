"""The GPU benchmark where there is no GPU: it says so, its loop trains, figures are of the right steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import bench_gpu, gpu_loop
from benchmarks.gpu_loop import Busy, Trace
from benchmarks.workloads import recipe
from tests.support import reference
from torchord import TrainingConfig


def test_without_a_gpu_it_is_skipped_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_gpu.main([]) == 0
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("skipped: no CUDA device")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_plain_loop_is_the_loop_that_a_run_is_compared_with(precision: str) -> None:
    steps, examples = 6, 16
    trace = gpu_loop.train("gpt-tiny", steps, examples, precision, "cpu")
    config = TrainingConfig(batch_size=4, shards=1, epochs=2, precision=precision)
    expected = reference.accumulate(recipe("gpt-tiny", examples=examples), config)
    assert trace.losses == expected.losses[:steps]


def test_a_figure_leaves_the_first_steps_out() -> None:
    trace = Trace([9.0, 0.5, 0.25, 0.75], [4.0, 3.0, 2.0, 1.0], [9.0, 9.5, 9.75, 10.5])
    samples = Busy([(8.9, 0.0), (9.2, 90.0), (10.0, 100.0), (11.0, 0.0)])
    found = bench_gpu.measured(trace, 1, samples, each=2)
    assert found.milliseconds == 250.0 and found.busy == 95.0
    assert bench_gpu.measured(trace, 1, Busy()).busy is None


def test_nothing_is_kept_of_a_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = bench_gpu.Measured(1.0, None, [3.0])
    rounds = {"gpt-tiny": [{"loop": one, "1 worker": one}]}
    monkeypatch.setattr(bench_gpu, "RESULTS", tmp_path)
    options = bench_gpu.argparse.Namespace(output="", small=True, precision="fp32")
    bench_gpu.write(options, {"name": "CPU"}, rounds)
    assert not list(tmp_path.iterdir())
    options.small = False
    bench_gpu.write(options, {"name": "a GPU"}, rounds)
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["milliseconds"] == {"gpt-tiny": {"loop": [1.0], "1 worker": [1.0]}}
    assert found["device"] == {"name": "a GPU"}
