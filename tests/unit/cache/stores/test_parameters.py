"""What is deleted with a version, and what others still need."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from tests.support.control import blob, record
from torchord.cache.blobs.blob import BlobRef
from torchord.cache.blobs.host_tier import HostTier
from torchord.cache.blobs.tiered_store import TieredStore
from torchord.cache.errors import CacheUnreachable, ManifestMismatch, VersionMissing
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.ledger.records import StateRecord, VersionRecord
from torchord.cache.ledger.rest_record import RestRecord
from torchord.cache.stores.parameters import ParameterCache
from torchord.cache.tensors.codec import layout, pack
from torchord.cache.tensors.halves import Halves
from torchord.cache.testing.memory_chunks import MemoryChunkStore
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


# --- what rests ---------------------------------------------------------------------------------------------


def resting(version: int, digest: str) -> VersionRecord:
    """A version that shares what rests with others."""
    return replace(record(version), rest=RestRecord(blob(f"rest:{digest}", digest), 1))


@pytest.fixture
def sharing() -> Bench:
    """The versions 1 to 3 share one rest, 4 and 5 another; 6 is whole."""
    bench = Bench()
    for version, digest in ((1, "a"), (2, "a"), (3, "a"), (4, "b"), (5, "b")):
        bench.ledger.put_version(resting(version, digest), token=bench.token)
    bench.ledger.put_version(record(6), token=bench.token)
    return bench


def test_what_rests_goes_with_the_last_version_that_names_it(sharing: Bench) -> None:
    assert sharing.drop(1, 3) == ["parameters:1:p", "parameters:3:p"]
    sharing.chunks.deleted.clear()
    assert sharing.drop(4) == ["parameters:4:p"]
    sharing.chunks.deleted.clear()
    assert sorted(sharing.drop(2, 5)) == ["parameters:2:p", "parameters:5:p", "rest:a", "rest:b"]


@pytest.mark.parametrize(
    ("dropped", "present", "gone"),
    [
        ([3], 5, ["parameters:3:p"]),  # 1 and 2 are kept, and name it
        ([1, 2, 3], 5, ["parameters:1:p", "parameters:2:p", "parameters:3:p", "rest:a"]),
        ([4], 5, ["parameters:4:p"]),
        ([4, 5], 6, ["parameters:4:p", "parameters:5:p", "rest:b"]),
    ],
)
def test_what_a_commit_dropped_leaves_what_others_name(
    sharing: Bench, dropped: list[int], present: int, gone: list[str]
) -> None:
    stored = sharing.ledger.versions()
    sharing.ledger.drop_versions(dropped, token=sharing.token)  # as the commit's script does
    records = [stored[version] for version in dropped]
    found = sharing.parameters.outlived(sharing.ledger, records, stored[present])
    assert [each.key for each in found] == gone


def test_a_run_whose_rest_stays_asks_nothing_more(sharing: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does one without a rest: the ledger is looked through only where what rests has changed."""
    stored = sharing.ledger.versions()
    monkeypatch.setattr(type(sharing.ledger), "versions", lambda self: pytest.fail("asked"))
    for dropped, present in ((4, 5), (2, 3), (6, 6)):
        sharing.parameters.outlived(sharing.ledger, [stored[dropped]], stored[present])


def test_records_without_a_rest_are_what_they_were() -> None:
    text = record(1).to_json()
    assert "rest" not in json.loads(text)
    assert VersionRecord.from_json(text) == record(1)
    assert VersionRecord.from_json(resting(1, "a").to_json()) == resting(1, "a")


class Stored:
    """Two processes, on one host or on two, and a version of theirs in two halves."""

    def __init__(self, folders: list[Path | None]) -> None:
        generator = torch.Generator().manual_seed(0)
        self.state = {n: torch.randn(200, 200, generator=generator) for n in ("w", "frozen", "x", "still")}
        self.manifest = layout(self.state)
        self.ledger = MemoryLedger(MemoryPlane(), "run-1")
        self.ledger.create({}, incarnation="life")
        self.ledger.plane.put(self.ledger.keys.manifest, json.dumps(self.manifest.to_json()), 60)
        _, self.token = self.ledger.acquire(worker="s0", node="celery@s0", queue="")
        self.store = MemoryChunkStore()
        tiers = [None if each is None else HostTier(each) for each in folders]
        self.processes = [ParameterCache(TieredStore(self.store, tier)) for tier in tiers]

    def put(self, version: int, names: tuple[str, ...] = ("frozen", "still")) -> VersionRecord:
        """Store the state as a version by the first process."""
        halves, cache = Halves.of(self.manifest, names), self.processes[0]
        beside, own = halves.resting_layout, halves.moving_layout
        buffer = pack({s.name: self.state[s.name] for s in beside.tensors}, beside)
        rest = cache.publish_rest(self.ledger, buffer, halves.resting, stored=None)
        flat = pack({s.name: self.state[s.name] for s in own.tensors}, own)
        made = cache.publish(self.ledger, version, flat, chain="", rest=rest, digest="d")
        assert self.ledger.put_version(made, token=self.token)
        return made

    def flat(self) -> torch.Tensor:
        return pack(self.state, self.manifest)


def test_what_rests_is_fetched_once(tmp_path: Path) -> None:
    """By a process that holds it not again, and by the second one of a host from the host."""
    stored = Stored([None, tmp_path, tmp_path])
    made = stored.put(1)
    assert made.rest is not None
    held, read = [], []
    for cache in stored.processes[1:]:
        _, found, _ = cache.fetch_bytes(stored.ledger, 1)
        assert torch.equal(found.flat(), stored.flat())
        held.append(found.rest)
        read.append(cache.chunks.counters.store_nbytes)
    assert read == [made.rest.blob.nbytes + made.blob.nbytes, 0]
    stored.state["w"] += 1
    made = stored.put(2)
    for cache, before, rest in zip(stored.processes[1:], read, held, strict=True):
        _, found, _ = cache.fetch_bytes(stored.ledger, 2, rest=rest)
        assert found.rest is rest and torch.equal(found.flat(), stored.flat())
        assert cache.chunks.counters.store_nbytes - before in (0, made.blob.nbytes)


def test_what_rests_of_what_rested_is_not_fetched() -> None:
    """A tensor moves from now on: the others are here already, which their checksums show."""
    stored = Stored([None, None])
    cache = stored.processes[1]
    stored.put(1)
    _, first, _ = cache.fetch_bytes(stored.ledger, 1)
    before = cache.chunks.counters.store_nbytes
    stored.state["still"] += 1
    made = stored.put(2, ("frozen",))
    _, found, _ = cache.fetch_bytes(stored.ledger, 2, rest=first.rest)
    assert torch.equal(found.flat(), stored.flat())
    assert cache.chunks.counters.store_nbytes - before == made.blob.nbytes
    stored.state["frozen"] += 1  # the same tensors, other bytes
    made = stored.put(3, ("frozen",))
    _, found, _ = cache.fetch_bytes(stored.ledger, 3, rest=found.rest)
    assert torch.equal(found.flat(), stored.flat()) and torch.equal(
        cache.fetch(stored.ledger, 3)[1], stored.flat()
    )


def test_a_rest_that_is_lost_or_does_not_fit_is_told() -> None:
    stored = Stored([None, None])
    made = stored.put(1)
    assert made.rest is not None
    other = layout({**stored.state, "y": torch.zeros(40, 40)})
    with pytest.raises(ManifestMismatch, match=r"version 1 of run 'run-1': .*other code than the run's"):
        stored.processes[1].fetch_bytes(stored.ledger, 1, manifest=other)
    again = stored.processes[0].publish_rest(
        stored.ledger, stored.processes[0].chunks.get(made.rest.blob), made.rest.tensors, stored=made.rest
    )
    assert again is made.rest
    del stored.store.chunks[f"{made.rest.blob.key}:0"]
    with pytest.raises(VersionMissing, match="version 1 of run 'run-1'"):
        stored.processes[1].fetch_bytes(stored.ledger, 1)
    stored.put(1)  # under the same key
    assert torch.equal(stored.processes[1].fetch(stored.ledger, 1, record=made)[1], stored.flat())


def test_a_store_that_is_away_keeps_no_version(bench: Bench) -> None:
    """Its bytes have a TTL, and nobody is to wait for them."""
    bench.chunks.away = True
    assert bench.drop(1) == []
    assert sorted(bench.ledger.versions()) == [2, 3]
