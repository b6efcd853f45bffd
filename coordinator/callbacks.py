"""Callbacks that `submit(..., callbacks=[...])` may name, and what those of your own are called with.

A callback is an object with any of these methods; the training server makes it and calls it beside the steps:

    begin(run: RunInfo)
    on_step(step: StepMade)
    on_version(version: VersionStored)
    on_evaluation(evaluation: Evaluated)
    on_checkpoint(checkpoint: Checkpointed)
    flush()             after each batch of calls, before it is noted that they were made
    close()             the run rests, or another server has it

What is here writes below `RunInfo.directory` and nowhere else.
"""

from __future__ import annotations

import csv
import importlib
import json
import re
from pathlib import Path
from typing import IO, Any

from torchord.cache.errors import InvalidInput
from torchord.cache.ledger.figures import for_others
from torchord.coordinator.runtime.happenings import (
    Checkpointed,
    Evaluated,
    Happening,
    RunInfo,
    StepMade,
    VersionStored,
    scalars_of,
)

__all__ = [
    "Checkpointed",
    "Csv",
    "Evaluated",
    "JsonLines",
    "MLflow",
    "RunInfo",
    "StepMade",
    "TensorBoard",
    "VersionStored",
    "WandB",
]

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,99}")
_COLUMNS = ("id", "at", "step", "version", "loss", "grad_norm", "examples", "seconds", "nbytes", "skipped")


def _place(run: RunInfo, name: str) -> Path:
    """A file or folder of a run's own directory, which is made.

    Raises:
        InvalidInput: the name leads elsewhere, or there is no directory.
    """
    if not _NAME.fullmatch(name):
        raise InvalidInput(f"{name!r:.120} is no name of a file: give letters, digits, '.', '_' and '-'")
    if run.directory is None:
        raise InvalidInput(
            "checkpoints go to a URL here, so there is no directory for files about a run; give the training "
            "servers a TORCHORD_CHECKPOINT_DIR on disk, or use a callback that writes elsewhere"
        )
    run.directory.mkdir(parents=True, exist_ok=True)
    return run.directory / name


def _installed(module: str) -> Any:
    """A module of a package that is no dependency of torchord's: whoever names the callback has it.

    Raises:
        InvalidInput: it is not installed here.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        raise InvalidInput(
            f"{package} is not installed on this training server: pip install {package}"
        ) from error


def _order(id: str) -> tuple[int, int]:
    """An event's id as what can be compared; of what is none, before all others."""
    milliseconds, _, number = id.partition("-")
    return (int(milliseconds), int(number)) if milliseconds.isdigit() and number.isdigit() else (0, 0)


class _Lines:
    """A file of lines that is gone on with: half a line at its end goes, what it has is not written again."""

    def __init__(self, path: Path, last: tuple[int, int]) -> None:
        self.last = last
        self.file: IO[str] = path.open("a", encoding="utf-8", newline="")

    def has(self, id: str) -> bool:
        """Whether an event is in it; else it is about to be."""
        if (order := _order(id)) <= self.last:
            return True
        self.last = order
        return False


def _whole_lines(path: Path) -> list[bytes]:
    """The lines of a file, without half a line at its end, which is cut off; its last one alone is needed."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        path.write_bytes(whole)
    return whole.splitlines()


class _InLines:
    """What writes a line an event into one file; `begin` opens it."""

    _lines: _Lines | None = None

    def flush(self) -> None:
        """Hand what is written to the system."""
        if self._lines is not None:
            self._lines.file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._lines is not None:
            self._lines.file.close()


class JsonLines(_InLines):
    """Writes each step, evaluation and checkpoint as a line of JSON; NaN and infinity are null.

    Args:
        file: its name, in the run's own directory (`CHECKPOINT_DIR/RUN/callbacks`).
    """

    def __init__(self, file: str = "history.jsonl") -> None:
        self._name = file

    def begin(self, run: RunInfo) -> None:
        """Open the file, and go on after its last line."""
        path = _place(run, self._name)
        lines = _whole_lines(path)
        last = json.loads(lines[-1])["id"] if lines else ""
        self._lines = _Lines(path, _order(last))

    def _write(self, kind: str, found: Happening) -> None:
        assert self._lines is not None
        if not self._lines.has(found.id):
            self._lines.file.write(for_others({"event": kind, **vars(found)}) + "\n")

    def on_step(self, step: StepMade) -> None:
        """Write a step."""
        self._write("step", step)

    def on_evaluation(self, evaluation: Evaluated) -> None:
        """Write an evaluation."""
        self._write("evaluation", evaluation)

    def on_checkpoint(self, checkpoint: Checkpointed) -> None:
        """Write a checkpoint."""
        self._write("checkpoint", checkpoint)


class Csv(_InLines):
    """Writes the steps as comma-separated values, with a head line; learning rate is the first group's.

    Args:
        file: its name, in the run's own directory (`CHECKPOINT_DIR/RUN/callbacks`).
    """

    def __init__(self, file: str = "history.csv") -> None:
        self._name = file

    def begin(self, run: RunInfo) -> None:
        """Open the file, and go on after its last line."""
        path = _place(run, self._name)
        lines = _whole_lines(path)
        self._lines = _Lines(path, _order(lines[-1].partition(b",")[0].decode() if lines else ""))
        if not lines:
            csv.writer(self._lines.file).writerow([*_COLUMNS, "lr"])

    def on_step(self, step: StepMade) -> None:
        """Write a step."""
        assert self._lines is not None
        if not self._lines.has(step.id):
            found = [getattr(step, column) for column in _COLUMNS]
            csv.writer(self._lines.file).writerow([*found, step.lr[0] if step.lr else ""])


class _Scalars:
    """What writes numbers by tag and step."""

    def put(self, tag: str, value: float, step: int, at: float) -> None:
        """Write one number.

        Args:
            at: Unix time (s).
        """
        raise NotImplementedError

    def on_step(self, step: StepMade) -> None:
        """Write a step's numbers."""
        self._all(step)

    def on_evaluation(self, evaluation: Evaluated) -> None:
        """Write an evaluation's metrics."""
        self._all(evaluation)

    def _all(self, found: Happening) -> None:
        for tag, value, step in scalars_of(found):
            self.put(tag, value, step, found.at)


class TensorBoard(_Scalars):
    """Writes TensorBoard's summaries; needs tensorboard (`pip install 'torchord[tensorboard]'`).

    Args:
        folder: its name, in the run's own directory (`CHECKPOINT_DIR/RUN/callbacks`).
    """

    def __init__(self, folder: str = "tensorboard") -> None:
        self._folder = folder
        self._writer: Any = None

    def begin(self, run: RunInfo) -> None:
        """Open the folder."""
        place = _place(run, self._folder)
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(place))

    def put(self, tag: str, value: float, step: int, at: float) -> None:
        """Write one number."""
        self._writer.add_scalar(tag, value, step, at)

    def flush(self) -> None:
        """Hand what is written to the system."""
        self._writer.flush()

    def close(self) -> None:
        """Close the files."""
        self._writer.close()


class MLflow(_Scalars):
    """Logs to MLflow offline, in a folder; needs mlflow. `mlflow ui --backend-store-uri FOLDER` shows it.

    Args:
        experiment: its name.
        folder: its name, in the run's own directory (`CHECKPOINT_DIR/RUN/callbacks`).
    """

    def __init__(self, experiment: str = "torchord", folder: str = "mlflow") -> None:
        self._experiment = experiment
        self._folder = folder
        self._client: Any = None
        self._id = ""

    def begin(self, run: RunInfo) -> None:
        """Make the run in MLflow, or go on with it."""
        place = _place(run, self._folder)
        place.mkdir(exist_ok=True)
        self._client = _installed("mlflow.tracking").MlflowClient(tracking_uri=place.absolute().as_uri())
        noted = place / "torchord-run.txt"
        if noted.exists():
            self._id = noted.read_text()
            return
        found = self._client.get_experiment_by_name(self._experiment)
        experiment = (
            self._client.create_experiment(self._experiment) if found is None else found.experiment_id
        )
        self._id = self._client.create_run(experiment, run_name=run.name).info.run_id
        noted.write_text(self._id)
        for name, value in run.config.items():
            self._client.log_param(self._id, name, str(value)[:250])

    def put(self, tag: str, value: float, step: int, at: float) -> None:
        """Log one number."""
        self._client.log_metric(self._id, tag, value, timestamp=int(at * 1000), step=step)

    def close(self) -> None:
        """Say that the run has ended, as far as this server goes."""
        self._client.set_terminated(self._id)


class WandB:
    """Logs to Weights & Biases offline, in a folder; needs wandb. `wandb sync` takes it online.

    Args:
        project: its name.
    """

    def __init__(self, project: str = "torchord") -> None:
        self._project = project
        self._run: Any = None

    def begin(self, run: RunInfo) -> None:
        """Begin a run of W&B under the run's name."""
        place = _place(run, "wandb")
        place.mkdir(exist_ok=True)
        self._run = _installed("wandb").init(
            mode="offline",
            project=self._project,
            name=run.name,
            id=run.name,
            dir=str(place),
            config=dict(run.config),
            resume="allow",
        )

    def on_step(self, step: StepMade) -> None:
        """Log a step's numbers."""
        self._log(step)

    def on_evaluation(self, evaluation: Evaluated) -> None:
        """Log an evaluation's metrics."""
        self._log(evaluation)

    def _log(self, found: Happening) -> None:
        numbers = {tag: value for tag, value, _ in scalars_of(found)}
        self._run.log({**numbers, "version": found.version})

    def close(self) -> None:
        """End the run of W&B."""
        self._run.finish()
