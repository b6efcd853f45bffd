"""A history is read as it comes: from Redis and disk, past what is damaged, and back again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.control import SPEC, history
from torchord.cache.errors import CheckpointError
from torchord.cache.keyring import Keyring, write_local
from torchord.cache.testing.memory_ledger import MemoryLedger
from torchord.cache.testing.memory_plane import MemoryPlane
from torchord.coordinator.pages.history import BATCH, History

ENTRIES = history(12, 2)


class Disk:
    """Entries on disk, noting what is asked for."""

    def __init__(self, versions: range = range(0)) -> None:
        self.entries = {version: ENTRIES[version - 1].to_json() for version in versions}
        self.asked: list[tuple[int, int]] = []
        self.error: Exception | None = None

    def __call__(self, incarnation: str, first: int, last: int) -> dict[int, str]:
        self.asked.append((first, last))
        if self.error is not None:
            raise self.error
        return {version: text for version, text in self.entries.items() if first <= version <= last}


def ledger(versions: range = range(1, 13)) -> MemoryLedger:
    """A ledger whose Redis has these entries."""
    made = MemoryLedger(MemoryPlane(), "run-1")
    made.create(SPEC, incarnation="life")
    put(made, versions)
    return made


def put(made: MemoryLedger, versions: range) -> None:
    for version in versions:
        made.plane.hset(made.keys.ledger, {str(version): ENTRIES[version - 1].to_json()})


def of(made: MemoryLedger, disk: Disk | None = None, **more: Any) -> History:
    return History(made, disk or Disk(), **more)  # type: ignore[arg-type]


def test_each_look_reads_what_is_new() -> None:
    made, disk = ledger(range(1, 6)), Disk()
    found = of(made, disk)
    found.look("life", 5)
    put(made, range(6, 13))
    found.look("life+1", 12)  # a switch is the same life
    assert list(found.columns.versions) == list(range(1, 13)) and found.loaded == 12
    assert not disk.asked and not found.problem


def test_what_redis_has_no_more_comes_from_disk() -> None:
    disk = Disk(range(1, 9))
    found = of(ledger(range(6, 13)), disk)
    found.look("life", 12)
    assert list(found.columns.versions) == list(range(1, 13)) and disk.asked == [(1, 5)]


def test_entries_on_disk_may_have_seals(tmp_path: Path) -> None:
    write_local(tmp_path / "keys.json")
    keys, disk = Keyring(tmp_path / "keys.json"), Disk(range(1, 13))
    disk.entries = {at: keys.sealed("server", "an entry", text) for at, text in disk.entries.items()}
    found = of(ledger(range(0)), disk)
    found.look("life", 12)
    assert list(found.columns.versions) == list(range(1, 13)) and not found.problem


def test_a_long_history_comes_in_several_looks() -> None:
    times = iter(range(0, 100, 2))
    found = of(ledger(), clock=lambda: float(next(times)))
    found.look("life", BATCH + 12)
    assert found.loaded == BATCH
    found.look("life", BATCH + 12)
    assert found.loaded == BATCH + 12 and len(found.columns) == 12  # the others are nowhere


def test_a_run_that_went_back_is_read_again_from_there() -> None:
    made = ledger()
    found = of(made)
    found.look("life", 12)
    made.emit("rollback", {"version": 4, "from": 12})
    found.look("life", 12)  # and came as far again between two looks
    assert list(found.columns.versions) == list(range(1, 13))
    assert [event.type for event in found.events] == ["rollback"]
    found.look("life", 3)
    assert list(found.columns.versions) == [1, 2, 3]


def test_another_life_of_the_name_begins_anew() -> None:
    found = of(ledger())
    found.look("life", 12)
    found.look("other", 2)
    assert list(found.columns.versions) == [1, 2]


def test_a_damaged_entry_costs_itself_alone() -> None:
    made, disk = ledger(), Disk()
    made.plane.hset(made.keys.ledger, {"7": "{nonsense"})
    made.plane.hset(made.keys.ledger, {"9": ENTRIES[8].to_json().replace('"loss":0.5', '"loss":"high"')})
    disk.error = CheckpointError("the segment is damaged")
    found = of(made, disk)
    found.look("life", 12)
    assert list(found.columns.versions) == [1, 2, 3, 4, 5, 6, 8, 10, 11, 12]
    assert "cannot be read" in found.problem and found.loaded == 12


def test_events_of_steps_are_left_out() -> None:
    made = ledger()
    for number in range(BATCH + 10):
        made.emit("step", {"version": number})
    made.emit("paused", {})
    found = of(made)
    found.look("life", 0)
    found.look("life", 0)
    assert [event.type for event in found.events] == ["paused"]
