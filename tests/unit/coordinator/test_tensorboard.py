"""Events become TensorBoard's summaries, through outages and restarts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from torchord.cache.errors import CacheUnreachable, RunNotFound
from torchord.cache.ledger.answers import Event
from torchord.cache.ledger.records import Head
from torchord.cache.testing.memory_ledger import MemoryLedger
from torchord.cache.testing.memory_plane import MemoryPlane
from torchord.coordinator.master import follower
from torchord.coordinator.master.follower import Follower
from torchord.coordinator.tensorboard import Summaries, copy_all, scalars


class Writer:
    """Notes what is written to it."""

    def __init__(self) -> None:
        self.scalars: list[tuple[str, float, int]] = []
        self.closed = False

    def add_scalar(self, tag: str, value: float, step: int, walltime: float) -> None:
        self.scalars.append((tag, value, step))

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


class Watched:
    """A run as `Summaries` follows it, on a ledger that fails on demand."""

    def __init__(self) -> None:
        self.ledger = MemoryLedger(MemoryPlane(), "run-1")
        self.ledger.create({}, incarnation="life")
        self.error: Exception | None = None

    def follow(self, after: str = "0-0") -> Follower:
        return Follower(cast(Any, self), after)

    @property
    def run(self) -> str:
        return "run-1"

    def head(self) -> Head:
        if self.error is not None:
            raise self.error
        return self.ledger.head()

    def read_events(self, after: str, *, block_seconds: float) -> list[Event]:
        return self.ledger.read_events(after)

    def evaluated(self, version: int) -> None:
        self.ledger.emit("evaluation", {"version": version, "metrics": {"loss": version / 10}})


@pytest.fixture(autouse=True)
def without_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follower, "_PAUSE_SECONDS", 0.0)


def summaries(run: Watched, directory: Path) -> Summaries:
    return Summaries(cast(Any, run), directory, Writer())


def written(of: Summaries) -> list[tuple[str, float, int]]:
    return cast(Writer, of.writer).scalars


def test_each_event_is_written_once_by_all_that_ever_follow(tmp_path: Path) -> None:
    run = Watched()
    run.evaluated(1)
    first = summaries(run, tmp_path)
    assert first.copy() == 1
    assert first.copy() == 0
    run.evaluated(2)
    second = summaries(run, tmp_path)  # started again
    assert second.copy() == 1
    assert written(first) == [("evaluation/loss", 0.1, 1)]
    assert written(second) == [("evaluation/loss", 0.2, 2)]


def test_an_outage_is_waited_for(tmp_path: Path) -> None:
    run = Watched()
    of = summaries(run, tmp_path)
    run.evaluated(1)
    assert of.copy() == 1
    run.error = CacheUnreachable("away")
    assert of.copy() == 0
    run.error = None
    run.evaluated(2)
    assert of.copy() == 1
    assert [step for _, _, step in written(of)] == [1, 2]


def test_a_run_that_is_gone_does_not_end_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follower, "UNKNOWN_SECONDS", -1.0)
    gone, there = Watched(), Watched()
    places = [tmp_path / name for name in ("gone", "there")]
    for place in places:
        place.mkdir()
    followed = {"gone": summaries(gone, places[0]), "there": summaries(there, places[1])}
    lost = followed["gone"]
    copy_all(followed)
    gone.error = RunNotFound("expired")
    there.evaluated(1)
    assert copy_all(followed) == 1
    assert list(followed) == ["there"]
    assert cast(Writer, lost.writer).closed


def test_metrics_of_a_step_are_scalars_of_their_own() -> None:
    data = {
        "version": 3,
        "loss": 0.5,
        "grad_norm": 1.0,
        "lr": [0.1],
        "nbytes": 8,
        "seconds": 0.0,
        "examples": 4,
    }
    found = scalars(Event("1-0", "step", {**data, "metrics": {"accuracy": 0.9, "loss": 0.4}}))
    assert ("train/accuracy", 0.9, 3) in found and ("train/metric loss", 0.4, 3) in found
    assert ("train/loss", 0.5, 3) in found and len(found) == len(scalars(Event("1-0", "step", data))) + 2
