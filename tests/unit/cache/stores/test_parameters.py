"""What is deleted with a version, and what others still need."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, cast

import pytest

from tests.support.control import blob, record
from torchord.cache.blobs.blob import BlobRef
from torchord.cache.errors import CacheUnreachable
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.ledger.records import StateRecord
from torchord.cache.stores.parameters import ParameterCache
from torchord.cache.testing.memory_ledger import MemoryLedger
from torchord.cache.testing.memory_plane import MemoryPlane


class Chunks:
    """Notes the keys of the blobs that are deleted, and which versions the ledger names by then."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.deleted: list[str] = []
        self.named: list[int] = []
        self.away = False

    def delete(self, blobs: Iterable[BlobRef]) -> None:
        if self.away:
            raise CacheUnreachable("away")
        self.deleted += [each.key for each in blobs]
        self.named = sorted(self.ledger.versions())


class Bench:
    """A run with the versions 1 to 3, each with optimizer state and what three slots keep.

    Shard 2 sat out the step that made version 3: what it keeps is in the versions 2 and 3.
    """

    def __init__(self) -> None:
        self.ledger = MemoryLedger(MemoryPlane(), "run-1")
        self.ledger.create({}, incarnation="life")
        self.token = self.acquired("s0")
        for version in (1, 2, 3):
            made_at = {0: version, 1: version, 2: min(version, 2)}
            slots = {shard: kept(shard, at) for shard, at in made_at.items()}
            made = replace(record(version, state=True), slots=slots)
            assert self.ledger.put_version(made, token=self.token)
        self.chunks = Chunks(self.ledger)
        self.parameters = ParameterCache(cast(Any, self.chunks))

    def acquired(self, id: str) -> int:
        _, token = self.ledger.acquire(worker=id, node=f"celery@{id}", queue="")
        assert isinstance(token, int)
        return token

    def drop(self, *versions: int) -> list[str]:
        """Drop versions; returns the keys of what was deleted."""
        self.parameters.drop(self.ledger, versions, token=self.token)
        return self.chunks.deleted


def kept(shard: int, version: int) -> StateRecord:
    """What a slot kept after the step that made a version."""
    return StateRecord({}, {}, blob(f"kept:{shard}:{version}", "kept", shard, version))


def whole(version: int, *slots: int) -> list[str]:
    """The keys of a version's own bytes and of what some slots kept."""
    beside = [f"parameters:{version}:p", f"state:{version}:p"]
    return [*beside, *(f"kept:{shard}:{version}" for shard in slots)]


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_what_a_slot_keeps_goes_with_the_last_version_that_names_it(bench: Bench) -> None:
    assert bench.drop(1, 2) == [*whole(1, 0, 1, 2), *whole(2, 0, 1)]
    bench.chunks.deleted.clear()
    assert bench.drop(3) == [*whole(3, 0, 1), "kept:2:2"]


def test_what_two_versions_name_goes_when_both_go(bench: Bench) -> None:
    assert sorted(set(bench.drop(2, 3))) == sorted([*whole(2, 0, 1, 2), *whole(3, 0, 1)])


def test_the_ledger_forgets_a_version_before_its_bytes_go(bench: Bench) -> None:
    """Whoever reads the record in between finds the bytes."""
    bench.drop(1)
    assert bench.chunks.named == [2, 3]


def test_who_was_overtaken_deletes_nothing(bench: Bench) -> None:
    """The versions of these numbers may be the successor's by now."""
    bench.acquired("s1")
    assert bench.drop(1, 2) == []
    assert sorted(bench.ledger.versions()) == [1, 2, 3]


def test_versions_that_are_gone_are_passed_over(bench: Bench) -> None:
    assert bench.drop(0, 1, 7) == whole(1, 0, 1, 2)
    assert bench.drop() == whole(1, 0, 1, 2)


def test_a_store_that_is_away_keeps_no_version(bench: Bench) -> None:
    """Its bytes have a TTL, and nobody is to wait for them."""
    bench.chunks.away = True
    assert bench.drop(1) == []
    assert sorted(bench.ledger.versions()) == [2, 3]
