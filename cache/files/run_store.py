"""`RunStore`: what is known of all runs, in an SQL database that outlives Redis.

It is filled by the training server (`torchord.coordinator.server.supervisor.recorder`) and holds nothing that
runs need: a lost one is made again from the checkpoints. By default it is an SQLite file beside them; any
other database is named by a URL of SQLAlchemy's, which is then to be installed.

    runs      one row a run: name, incarnation, state, version, total_steps, submitted_at, changed_at, loss,
              error, notes
    metrics   run, metric, value: of the last evaluation, and of the last step what that has not
    tags      run, tag
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torchord.cache.errors import CheckpointError, InvalidInput
from torchord.cache.settings import Settings

FILE = "runs.sqlite"
OFF = "off"
_PATIENCE_SECONDS = 5.0

_COLUMNS = {
    "name": "VARCHAR(100) NOT NULL PRIMARY KEY",
    "incarnation": "VARCHAR(100) NOT NULL",
    "state": "VARCHAR(20) NOT NULL",
    "version": "BIGINT NOT NULL",
    "total_steps": "BIGINT",
    "submitted_at": "DOUBLE PRECISION NOT NULL",
    "changed_at": "DOUBLE PRECISION NOT NULL",
    "loss": "DOUBLE PRECISION",
    "error": "TEXT NOT NULL",
    "notes": "TEXT NOT NULL",
}
_TABLES = (
    f"CREATE TABLE IF NOT EXISTS runs ({', '.join(f'{name} {kind}' for name, kind in _COLUMNS.items())})",
    "CREATE TABLE IF NOT EXISTS metrics (run VARCHAR(100) NOT NULL, metric VARCHAR(200) NOT NULL, "
    "value DOUBLE PRECISION, PRIMARY KEY (run, metric))",
    "CREATE TABLE IF NOT EXISTS tags (run VARCHAR(100) NOT NULL, tag VARCHAR(100) NOT NULL, "
    "PRIMARY KEY (run, tag))",
)


@dataclass(frozen=True)
class RunRecord:
    """What is known of one run.

    Attributes:
        name: of the run.
        incarnation: of the present life of the name.
        state: pending, running, paused, failed, cancelled, done, or "on disk" where its checkpoints alone are
            left.
        version: committed global steps.
        total_steps: of the whole run; None before a training server has seen the data.
        submitted_at, changed_at: Unix times (s) of its submission, and of its last step.
        loss: of the last step; None before the first, and of a run whose checkpoints alone are left.
        error: why it failed, "" otherwise.
        notes: what people have written of it.
        tags: sorted.
        metrics: of its last evaluation, and of its last step what that has not. NaN where one was.
    """

    name: str
    incarnation: str = ""
    state: str = "pending"
    version: int = 0
    total_steps: int | None = None
    submitted_at: float = 0.0
    changed_at: float = 0.0
    loss: float | None = None
    error: str = ""
    notes: str = ""
    tags: tuple[str, ...] = ()
    metrics: dict[str, float] = field(default_factory=dict)


def store_of(settings: Settings) -> RunStore | None:
    """The store that the settings name; None for none, as beside checkpoints in an object store.

    Raises:
        InvalidInput: the URL is none that can be opened here.
    """
    url = settings.runs_url
    if url.lower() == OFF:
        return None
    if url:
        return RunStore(url)
    return None if "://" in settings.checkpoint_dir else RunStore(str(Path(settings.checkpoint_dir) / FILE))


class RunStore:
    """Reads and writes records of runs.

    Args:
        place: path of an SQLite file, or a URL of SQLAlchemy's.

    Raises:
        InvalidInput: the URL needs SQLAlchemy or a driver that is not installed.
        CheckpointError: from any method, the database does not answer or is none.
    """

    def __init__(self, place: str) -> None:
        self.place = place
        self._engine = _engine(place) if "://" in place else None
        self._made = False

    def exists(self) -> bool:
        """Whether there is one already."""
        return self._engine is not None or Path(self.place).exists()

    def put(self, records: Sequence[RunRecord]) -> None:
        """Write records, each in its run's place."""
        if self._engine is None:
            try:
                Path(self.place).parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise CheckpointError(f"no database of runs can be made at {self.place}: {error}") from error
        with self._open() as execute:
            for record in records:
                for table, column in (("metrics", "run"), ("tags", "run"), ("runs", "name")):
                    execute(f"DELETE FROM {table} WHERE {column} = :name", {"name": record.name})
                names = list(_COLUMNS)
                marks = ", ".join(f":{name}" for name in names)
                row = {name: _plain(getattr(record, name)) for name in names}
                execute(f"INSERT INTO runs ({', '.join(names)}) VALUES ({marks})", row)
                for metric, value in record.metrics.items():
                    of = {"run": record.name, "metric": metric[:200], "value": _plain(value)}
                    execute("INSERT INTO metrics (run, metric, value) VALUES (:run, :metric, :value)", of)
                for tag in record.tags:
                    execute(
                        "INSERT INTO tags (run, tag) VALUES (:run, :tag)", {"run": record.name, "tag": tag}
                    )

    def records(self) -> dict[str, RunRecord]:
        """All records by name."""
        with self._open() as execute:
            rows = execute(f"SELECT {', '.join(_COLUMNS)} FROM runs", {})
            metrics = execute("SELECT run, metric, value FROM metrics", {})
            tags = execute("SELECT run, tag FROM tags ORDER BY tag", {})
        found = {row[0]: RunRecord(**dict(zip(_COLUMNS, row, strict=True))) for row in rows}
        for run, metric, value in metrics:
            if run in found:
                found[run].metrics[metric] = math.nan if value is None else value
        for run, tag in tags:
            if run in found:
                found[run] = replace(found[run], tags=(*found[run].tags, tag))
        return found

    def set_aside(self) -> None:
        """Put an SQLite file that is none out of the way, so that another is made in its place."""
        if self._engine is None:
            with suppress(OSError):
                Path(self.place).replace(f"{self.place}.damaged")
        self._made = False

    @contextmanager
    def _open(self) -> Iterator[Any]:
        """One transaction, as (statement, values) -> rows."""
        try:
            if self._engine is None:
                with (
                    closing(sqlite3.connect(self.place, timeout=_PATIENCE_SECONDS)) as connection,
                    connection,
                ):

                    def execute(statement: str, values: dict[str, Any]) -> list[Any]:
                        return connection.execute(statement, values).fetchall()

                    yield self._with_tables(execute)
            else:
                with self._engine.begin() as connection:
                    yield self._with_tables(_alchemys(connection))
        except sqlite3.Error as error:
            raise CheckpointError(f"the database of runs, {self.place}, does not answer: {error}") from error
        except Exception as error:
            if self._engine is not None and type(error).__module__.startswith("sqlalchemy"):
                where = self._engine.url.render_as_string(hide_password=True)
                raise CheckpointError(f"the database of runs, {where}, does not answer: {error}") from error
            raise

    def _with_tables(self, execute: Any) -> Any:
        if not self._made:
            for statement in _TABLES:
                execute(statement, {})
            self._made = self._engine is not None  # a file may be deleted
        return execute


def _plain(value: Any) -> Any:
    """A value as databases take it: NaN, which some of them do not have, as nothing."""
    return None if isinstance(value, float) and math.isnan(value) else value


def _engine(url: str) -> Any:
    try:
        import sqlalchemy
    except ImportError:
        raise InvalidInput(
            "TORCHORD_RUNS_URL needs SQLAlchemy: run pip install 'torchord[store]', or leave it out for an "
            "SQLite file beside the checkpoints"
        ) from None
    try:
        return sqlalchemy.create_engine(url, pool_pre_ping=True)
    except Exception as error:
        raise InvalidInput(f"TORCHORD_RUNS_URL cannot be opened: {type(error).__name__}: {error}") from error


def _alchemys(connection: Any) -> Any:
    from sqlalchemy import text

    def execute(statement: str, values: dict[str, Any]) -> list[Any]:
        found = connection.execute(text(statement), values)
        return list(found.fetchall()) if found.returns_rows else []

    return execute
