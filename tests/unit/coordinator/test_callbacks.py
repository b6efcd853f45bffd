"""The callbacks that come with torchord: what they write, once each, and nowhere else.

MLflow and Weights & Biases are tried against stand-ins that note the calls.
"""

from __future__ import annotations

import csv
import json
import math
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from torchord.cache.errors import InvalidInput
from torchord.coordinator.callbacks import Csv, JsonLines, MLflow, TensorBoard, WandB
from torchord.coordinator.runtime.happenings import Checkpointed, Evaluated, RunInfo, StepMade, scalars_of
from torchord.coordinator.spec.admission import OWN_TARGETS
from torchord.coordinator.spec.callback_entries import described, resolved

STEPS = [
    StepMade(
        f"{1000 + n}-0", 1.0 + n, n, n + 1, 1 / (n + 1), 2.0, 8, 0.5, 64, (0.1, 0.2), metrics={"acc": 0.5}
    )
    for n in range(3)
]
EVALUATION = Evaluated("1002-5", 3.5, 3, {"loss": math.nan, "accuracy": 0.9})
CHECKPOINT = Checkpointed("1003-0", 4.0, 3, "/checkpoints/3")


@pytest.fixture
def run(tmp_path: Path) -> RunInfo:
    return RunInfo("digits-01", {"epochs": 3}, {}, tmp_path / "run" / "callbacks")


def file_of(run: RunInfo, name: str) -> Path:
    assert run.directory is not None
    return run.directory / name


def told(callback: Any, run: RunInfo, *steps: StepMade) -> Any:
    callback.begin(run)
    for step in steps:
        callback.on_step(step)
    if hasattr(callback, "flush"):
        callback.flush()
    return callback


def test_lines_of_json_are_written_once_each_whatever_is_told_again(run: RunInfo) -> None:
    first = told(JsonLines(), run, *STEPS[:2])
    first.close()
    path = file_of(run, "history.jsonl")
    with path.open("a") as file:
        file.write('{"event": "step", "id": "10')  # the process died here
    again = told(JsonLines(), run, *STEPS)
    again.on_evaluation(EVALUATION)
    again.on_checkpoint(CHECKPOINT)
    again.on_evaluation(EVALUATION)
    again.close()
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [each["event"] for each in found] == ["step", "step", "step", "evaluation", "checkpoint"]
    assert [each["version"] for each in found] == [1, 2, 3, 3, 3]
    assert found[0]["metrics"] == {"acc": 0.5} and found[0]["lr"] == [0.1, 0.2]
    assert found[3]["metrics"] == {"loss": None, "accuracy": 0.9}


def test_a_table_is_written_once_each_whatever_is_told_again(run: RunInfo) -> None:
    told(Csv("steps.csv"), run, *STEPS[:2]).close()
    told(Csv("steps.csv"), run, *STEPS, replace(STEPS[2], id="1005-0", loss=math.inf)).close()
    with file_of(run, "steps.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["version"] for row in rows] == ["1", "2", "3", "3"], (
        "a step that was replayed stands there twice"
    )
    assert [float(row["loss"]) for row in rows] == [1.0, 0.5, 1 / 3, math.inf]
    assert rows[0]["lr"] == "0.1"


@pytest.mark.parametrize("kind", [JsonLines, Csv, TensorBoard, MLflow])
@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/b", "", ".hidden", "x" * 200, "a\0b"])
def test_nothing_is_written_elsewhere(kind: Any, name: str, run: RunInfo, tmp_path: Path) -> None:
    made = MLflow(folder=name) if kind is MLflow else kind(name)
    with pytest.raises(InvalidInput, match="no name of a file"):
        made.begin(run)
    assert list(tmp_path.rglob("*")) == []


def test_without_a_directory_that_is_said() -> None:
    with pytest.raises(InvalidInput, match="TORCHORD_CHECKPOINT_DIR on disk"):
        JsonLines().begin(RunInfo("digits-01", {}, {}, None))


def test_tensorboard_gets_every_number(run: RunInfo) -> None:
    pytest.importorskip("tensorboard")
    made = told(TensorBoard(), run, *STEPS)
    made.on_evaluation(EVALUATION)
    made.close()
    assert all(path.name.startswith("events") for path in file_of(run, "tensorboard").iterdir())


class FakeMlflow:
    """What `MlflowClient` is asked for."""

    made: ClassVar[list[FakeMlflow]] = []

    def __init__(self, tracking_uri: str) -> None:
        self.uri, self.metrics, self.params, self.ended = tracking_uri, [], {}, ""  # type: ignore[var-annotated]
        self.runs = 0
        FakeMlflow.made.append(self)

    def get_experiment_by_name(self, name: str) -> Any:
        return None

    def create_experiment(self, name: str) -> str:
        return f"experiment {name}"

    def create_run(self, experiment: str, *, run_name: str) -> Any:
        self.runs += 1
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=f"{experiment}: {run_name}"))

    def log_param(self, run: str, name: str, value: str) -> None:
        self.params[name] = value

    def log_metric(self, run: str, key: str, value: float, *, timestamp: int, step: int) -> None:
        self.metrics.append((run, key, value, timestamp, step))

    def set_terminated(self, run: str) -> None:
        self.ended = run


def test_mlflow_gets_every_number_in_a_folder_and_one_run(
    run: RunInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeMlflow.made.clear()
    monkeypatch.setitem(sys.modules, "mlflow", types.ModuleType("mlflow"))
    monkeypatch.setitem(sys.modules, "mlflow.tracking", types.SimpleNamespace(MlflowClient=FakeMlflow))  # type: ignore[arg-type]
    told(MLflow(), run, *STEPS[:2]).close()
    told(MLflow(), run, STEPS[2]).close()
    first, second = FakeMlflow.made
    assert first.uri == file_of(run, "mlflow").absolute().as_uri()
    assert (first.runs, second.runs) == (1, 0), "the next server goes on with it"
    assert first.params == {"epochs": "3"}
    assert ("experiment torchord: digits-01", "train/loss", 0.5, 2000, 2) in first.metrics
    assert {value[4] for value in second.metrics} == {3}
    assert first.ended == second.ended == "experiment torchord: digits-01"


@pytest.mark.parametrize("kind", [MLflow, WandB])
def test_what_is_not_installed_is_said(kind: Any, run: RunInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mlflow", "mlflow.tracking", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="is not installed on this training server: pip install"):
        kind().begin(run)


def test_weights_and_biases_gets_every_number_offline(run: RunInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def init(**given: Any) -> Any:
        calls.append(given)
        return types.SimpleNamespace(log=calls.append, finish=lambda: calls.append("finished"))

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))  # type: ignore[arg-type]
    made = told(WandB("shop"), run, STEPS[0])
    made.on_evaluation(EVALUATION)
    made.close()
    began, step, evaluation, ended = calls
    assert (began["mode"], began["project"], began["id"]) == ("offline", "shop", "digits-01")
    assert began["dir"] == str(file_of(run, "wandb"))
    assert step["train/loss"] == 1.0 and step["version"] == 1
    assert evaluation["evaluation/accuracy"] == 0.9
    assert ended == "finished"


@pytest.mark.parametrize("kind", [Csv, JsonLines, MLflow, TensorBoard, WandB])
def test_what_comes_with_torchord_is_admitted_everywhere(kind: type) -> None:
    (entry,) = described([kind])
    assert entry["target"] in OWN_TARGETS
    assert resolved(0, entry, allowed=()) is kind


def test_numbers_have_tensorboards_names() -> None:
    assert [tag for tag, _, _ in scalars_of(STEPS[0])] == [
        "train/loss",
        "train/gradient norm",
        "train/learning rate 0",
        "train/learning rate 1",
        "train/acc",
        "speed/gradient bytes a step",
        "speed/samples a second",
    ]
    assert scalars_of(CHECKPOINT) == []
