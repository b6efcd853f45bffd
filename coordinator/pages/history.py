"""A run's steps and events as they come: each look reads what is new, and no look takes long."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from torchord.cache.errors import CheckpointError, RecordDamaged
from torchord.cache.keyring import bare
from torchord.cache.ledger.answers import Event
from torchord.cache.ledger.incarnation import life
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.ledger.records import LedgerEntry
from torchord.cache.reading import FOREIGN
from torchord.coordinator.pages.columns import Columns

BATCH = 500
EVENTS_KEPT = 1000
_READ_SECONDS = 1.0  # of one look, then it answers with what it has

_NO_RECORD = (RecordDamaged, *FOREIGN)

OnDisk = Callable[[str, int, int], dict[int, str]]
"""(incarnation, first version, last version) -> the entries on disk, as text by version."""


class History:
    """The steps and events of one run as this process has read them.

    Args:
        ledger: of the run.
        on_disk: reads the ledger's segments beside the checkpoints.
        clock: seconds that only grow, replaced in tests.

    Attributes:
        columns: the steps.
        events: those that are no step's, oldest first, the newest `EVENTS_KEPT`.
        loaded: up to which version the steps have been read.
        problem: why something could not be read, "" if everything could.
    """

    def __init__(
        self, ledger: Ledger, on_disk: OnDisk, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._ledger = ledger
        self._on_disk = on_disk
        self._clock = clock
        self._life = ""
        self._after = "0-0"
        self.loaded = 0
        self.columns = Columns()
        self.events: deque[Event] = deque(maxlen=EVENTS_KEPT)
        self.problem = ""

    def look(self, incarnation: str, version: int) -> None:
        """Read what is new up to a version, for a second at the most: a long history comes in several looks.

        Args:
            incarnation: of the run now.
            version: of its head.
        """
        until = self._clock() + _READ_SECONDS
        if life(incarnation) != self._life:
            self._begin(life(incarnation))
        self._read_events(until)
        self._back_to(version)
        while self.loaded < version:
            self._read(incarnation, self.loaded + 1, min(self.loaded + BATCH, version))
            if self._clock() > until:
                break

    def _begin(self, life: str) -> None:
        self._life, self.loaded, self._after, self.problem = life, 0, "0-0", ""
        self.columns = Columns()
        self.events.clear()

    def _back_to(self, version: int) -> None:
        if version < self.loaded:
            self.columns.truncate(version)
            self.loaded = version

    def _read_events(self, until: float) -> None:
        try:
            while found := self._ledger.read_events(self._after, count=BATCH):
                self._after = found[-1].id
                for event in found:
                    if event.type == "rollback":
                        self._back_to(int(event.data["version"]))
                    if event.type != "step":
                        self.events.append(event)
                if self._clock() > until:
                    return
        except _NO_RECORD as error:
            self.problem = f"events after {self._after} cannot be read: {error}"

    def _read(self, incarnation: str, first: int, last: int) -> None:
        found = {entry.version: entry for entry in self._entries(first, last)}
        lacking = [version for version in range(first, last + 1) if version not in found]
        if lacking:
            try:
                for version, text in self._on_disk(incarnation, lacking[0], lacking[-1]).items():
                    if version not in found:
                        found[version] = LedgerEntry.from_json(bare(text))
            except (CheckpointError, *_NO_RECORD) as error:
                self.problem = f"entries {lacking[0]} to {lacking[-1]} cannot be read from disk: {error}"
        for version in sorted(found):
            try:
                self.columns.add(found[version])
            except _NO_RECORD as error:
                self.problem = f"the entry of version {version} cannot be read: {error}"
        self.loaded = last

    def _entries(self, first: int, last: int) -> list[LedgerEntry]:
        """Entries in Redis; one that is none costs itself alone."""
        try:
            return self._ledger.entries(first, last)
        except _NO_RECORD as error:
            if first == last:
                self.problem = f"the entry of version {first} cannot be read: {error}"
                return []
        middle = (first + last) // 2
        return [*self._entries(first, middle), *self._entries(middle + 1, last)]
