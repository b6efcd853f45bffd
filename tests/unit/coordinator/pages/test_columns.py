"""A history in columns says what its ledger entries say."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.support.control import entry, slot
from torchord.cache.ledger.records import LedgerEntry
from torchord.coordinator.pages.columns import Columns, Shard


def step(version: int, **changes: object) -> LedgerEntry:
    slots = [
        slot(version - 1, shard, worker=f"w{(version + shard) % 3}", attempt=shard + 1) for shard in range(2)
    ]
    return entry(version, slots, loss=1 / version, committed_at=1000.0 + version, **changes)


def columns(*entries: LedgerEntry) -> Columns:
    found = Columns()
    for each in entries:
        found.add(each)
    return found


def test_each_row_is_its_entry() -> None:
    found = columns(step(1), step(2, seconds=0.0, lr=()), step(5, server="s1", token=2))
    assert list(found.versions) == [1, 2, 5] and found.last == 5 and len(found) == 3
    assert list(found.values("loss")) == [1.0, 0.5, 0.2]
    assert found.values("rate")[0] == pytest.approx(80.0) and found.values("nbytes")[0] == 16
    assert str(found.values("rate")[1]) == str(found.values("lr")[1]) == "nan"
    assert [found.server(row) for row in range(3)] == ["s0", "s0", "s1"] and found.tokens[2] == 2
    assert list(found.shards(0)) == [
        Shard(0, "w1", pytest.approx(0.01), 1),
        Shard(1, "w2", pytest.approx(0.01), 2),
    ]
    assert [found.row(version) for version in (0, 1, 3, 5, 6)] == [0, 0, 2, 2, 3]


def test_going_back_forgets_what_was_after_and_goes_on() -> None:
    found = columns(step(1), step(2), step(3))
    found.truncate(1)
    found.add(step(2, server="s9"))
    again = columns(step(1), step(2, server="s9"))
    assert list(found.versions) == [1, 2] and found.server(1) == "s9"
    assert list(found.shards(1)) == list(again.shards(1)) and list(found.times) == list(again.times)


def test_an_entry_that_is_none_leaves_nothing() -> None:
    found = columns(step(1))
    with pytest.raises(TypeError):
        found.add(replace(step(2), grad_norm=None))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="comes after"):
        found.add(step(1))
    found.add(step(2))
    assert (
        list(found.versions) == [1, 2] and len(found.values("loss")) == 2 and len(list(found.shards(1))) == 2
    )
