"""The database of runs gives back what was written, whatever kind it is."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from torchord.cache.errors import CheckpointError, InvalidInput
from torchord.cache.files.run_store import RunRecord, RunStore, store_of
from torchord.cache.settings import Settings

RECORDS = [
    RunRecord("a", "life", "done", 12, 12, 100.5, 200.25, 0.5, "", "a note", ("x", "y"), {"accuracy": 0.9}),
    RunRecord("b", "life", "failed", 3, None, 101.0, 150.0, math.nan, "a NaN; '); DROP TABLE runs; --"),
    RunRecord("c", metrics={"loss": math.nan, "reward": -math.inf}),
]  # fmt: skip


def alchemy(folder: Path) -> RunStore:
    pytest.importorskip("sqlalchemy")
    return RunStore(f"sqlite:///{folder}/other.db")


@pytest.mark.parametrize("made", [lambda folder: RunStore(str(folder / "runs.sqlite")), alchemy])
def test_what_is_written_is_read(made: Callable[[Path], RunStore], tmp_path: Path) -> None:
    store = made(tmp_path)
    store.put(RECORDS)
    assert str(store.records()["b"].loss) == "None", "databases have no NaN"
    assert store.records()["a"] == RECORDS[0] and math.isnan(store.records()["c"].metrics["loss"])
    again = RunRecord("a", "life.1", "running", 1, tags=("z",))
    store.put([again])
    assert made(tmp_path).records() | {"b": RECORDS[1]} == {**made(tmp_path).records(), "b": RECORDS[1]}
    assert made(tmp_path).records()["a"] == again and set(store.records()) == {"a", "b", "c"}


def test_people_may_ask_it_in_sql(tmp_path: Path) -> None:
    RunStore(str(tmp_path / "runs.sqlite")).put(RECORDS)
    with sqlite3.connect(tmp_path / "runs.sqlite") as connection:
        rows = connection.execute(
            "SELECT name, value FROM runs JOIN metrics ON run = name WHERE metric = 'accuracy'"
        ).fetchall()
    connection.close()
    assert rows == [("a", 0.9)]


def test_a_file_that_is_none_is_said_and_set_aside(tmp_path: Path) -> None:
    place = tmp_path / "runs.sqlite"
    place.write_bytes(b"no database" * 100)
    store = RunStore(str(place))
    with pytest.raises(CheckpointError, match="does not answer: file is not a database"):
        store.records()
    store.set_aside()
    store.put(RECORDS[:1])
    assert set(store.records()) == {"a"} and place.with_name("runs.sqlite.damaged").exists()


def test_where_it_is_follows_the_settings(tmp_path: Path) -> None:
    made = store_of(Settings(checkpoint_dir=str(tmp_path)))
    assert made is not None and made.place == str(tmp_path / "runs.sqlite") and not made.exists()
    assert store_of(Settings(checkpoint_dir="s3://bucket/runs")) is None
    assert store_of(Settings(runs_url="off")) is None
    pytest.importorskip("sqlalchemy")
    with pytest.raises(InvalidInput, match="TORCHORD_RUNS_URL cannot be opened"):
        store_of(Settings(runs_url="nothing://here"))
