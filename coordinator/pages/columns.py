"""A run's history in memory, one column a quantity: a hundred thousand steps take some megabytes."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torchord.cache.ledger.records import LedgerEntry

SERIES = ("loss", "grad_norm", "lr", "rate", "nbytes")
"""What there is a value of at each step: `rate` is examples a second, `lr` that of the first group."""


METRICS_MOST = 64
"""So many metrics of a run's steps have a column, those that come first."""


@dataclass(frozen=True)
class Shard:
    """Who computed a shard of a step.

    Attributes:
        shard: its number in the step.
        worker: id of the worker process.
        seconds: compute time.
        attempt: 1 for the first try.
    """

    shard: int
    worker: str
    seconds: float
    attempt: int


class Columns:
    """The committed steps of one run, oldest first. Entries are added in order of version.

    Attributes:
        versions: of each row; strictly ascending, though some may be missing.
        times: Unix time (s) of each commit.
        tokens: fencing token of each commit: another one is another server.
    """

    def __init__(self) -> None:
        self.versions = array("q")
        self.times = array("d")
        self.seconds = array("d")
        self.tokens = array("q")
        self.skipped = array("b")
        self._values = {name: array("d") for name in SERIES}
        self._metrics: dict[str, tuple[array[int], array[float]]] = {}
        self._servers = array("L")
        self._firsts = array("Q", [0])  # where the shards of each row begin; one more than there are rows
        self._shards, self._workers = array("L"), array("L")
        self._shard_seconds, self._attempts = array("f"), array("B")
        self._names: list[str] = []
        self._numbers: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self.versions)

    @property
    def last(self) -> int:
        """The newest version that is there, 0 if none is."""
        return self.versions[-1] if self.versions else 0

    def add(self, entry: LedgerEntry) -> None:
        """Append the step that made a version newer than all that are there.

        Raises:
            ValueError, TypeError: there is a newer one, or the entry holds what is none.
        """
        if entry.version <= self.last:
            raise ValueError(f"version {entry.version} comes after {self.last}")
        # Everything is read before anything is written: an entry that is no entry leaves no half of a row.
        rate = entry.examples / entry.seconds if entry.seconds > 0 else math.nan
        lr = entry.lr[0] if entry.lr else math.nan
        nbytes = sum(slot.nbytes for slot in entry.slots)
        found = [float(value) for value in (entry.loss, entry.grad_norm, lr, rate, nbytes)]
        metrics = {name: float(value) for name, value in entry.metrics.items()}
        committed_at, seconds = float(entry.committed_at), float(entry.seconds)
        token, skipped = int(entry.token), bool(entry.skipped)
        slots = [
            (int(slot.shard), self._number(slot.worker), float(slot.seconds), min(int(slot.attempt), 255))
            for slot in entry.slots
        ]
        server = self._number(entry.server)
        for name, value in zip(SERIES, found, strict=True):
            self._values[name].append(value)
        for name, value in metrics.items():
            if name not in self._metrics and len(self._metrics) < METRICS_MOST:
                self._metrics[name] = array("q"), array("d")
            if name in self._metrics:
                rows, values = self._metrics[name]
                rows.append(len(self.versions))
                values.append(value)
        for shard, worker, took, attempt in slots:
            self._shards.append(shard)
            self._workers.append(worker)
            self._shard_seconds.append(took)
            self._attempts.append(attempt)
        self._firsts.append(len(self._shards))
        self._servers.append(server)
        self.times.append(committed_at)
        self.seconds.append(seconds)
        self.tokens.append(token)
        self.skipped.append(skipped)
        self.versions.append(entry.version)

    def truncate(self, version: int) -> None:
        """Forget what is newer than a version: the run went back to it."""
        rows = self.row(version + 1)
        shards = self._firsts[rows]
        of_steps: tuple[array[Any], ...] = (
            self.versions,
            self.times,
            self.seconds,
            self.tokens,
            self.skipped,
            self._servers,
        )
        for column in (*of_steps, *self._values.values()):
            del column[rows:]
        for places, values in self._metrics.values():
            del values[(kept := bisect_left(places, rows)) :], places[kept:]
        del self._firsts[rows + 1 :]
        of_shards: tuple[array[Any], ...] = (self._shards, self._workers, self._shard_seconds, self._attempts)
        for column in of_shards:
            del column[shards:]

    def row(self, version: int) -> int:
        """The first row of a version or of one after it; the number of rows if there is none."""
        return bisect_left(self.versions, version)

    def values(self, name: str) -> array[float]:
        """The column of one of `SERIES`."""
        return self._values[name]

    def metrics(self) -> dict[str, tuple[array[int], array[float]]]:
        """What steps measured beside their losses: name -> (rows of those that did, values)."""
        return self._metrics

    def server(self, row: int) -> str:
        """Worker id of the training server that committed a row."""
        return self._names[self._servers[row]]

    def shards(self, row: int) -> Iterator[Shard]:
        """Who computed the shards of a row, in order."""
        for place in range(self._firsts[row], self._firsts[row + 1]):
            yield Shard(
                self._shards[place],
                self._names[self._workers[place]],
                self._shard_seconds[place],
                self._attempts[place],
            )

    def _number(self, name: str) -> int:
        if name not in self._numbers:
            self._numbers[name] = len(self._names)
            self._names.append(name)
        return self._numbers[name]
