"""Callbacks for tests: they note what they are called with in a file, or fail."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Any

from torchord.coordinator.callbacks import Checkpointed, Evaluated, RunInfo, StepMade, VersionStored

HELD = threading.Event()


class Noted:
    """Notes each call as a line of a file."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)

    def _note(self, what: str, value: Any) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps([what, value]) + "\n")

    def begin(self, run: RunInfo) -> None:
        self._note("begin", [run.name, run.config["epochs"], str(run.directory)])

    def on_step(self, step: StepMade) -> None:
        self._note("step", [step.version, step.loss])

    def on_version(self, version: VersionStored) -> None:
        self._note("version", [version.version, sorted(version.load())])

    def on_evaluation(self, evaluation: Evaluated) -> None:
        self._note("evaluation", [evaluation.version, dict(evaluation.metrics)])

    def on_checkpoint(self, checkpoint: Checkpointed) -> None:
        self._note("checkpoint", checkpoint.version)

    def close(self) -> None:
        self._note("close", None)


class Failing:
    """Fails at each step, and notes its evaluations."""

    def __init__(self, path: str, error: str = "ValueError") -> None:
        self._error = error
        self._noted = Noted(path)
        self.on_evaluation = self._noted.on_evaluation

    def on_step(self, step: StepMade) -> None:
        if self._error == "exit":
            sys.exit(3)
        raise ValueError(f"step {step.step} is not to my taste")


class Unmakeable:
    """Cannot be made."""

    def __init__(self) -> None:
        raise RuntimeError("no such luck")


class Held:
    """Never returns from its first step, until it is let go."""

    def on_step(self, step: StepMade) -> None:
        HELD.wait(60)


def noted(path: Path) -> list[tuple[str, Any]]:
    """What was noted so far."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [tuple(json.loads(line)) for line in lines]
