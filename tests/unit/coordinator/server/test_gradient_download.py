"""Blobs that are read while they are on their way: never other bytes than the record names."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from tests.support.control import slot as any_slot
from tests.support.waiting import wait_until
from torchord.cache import keys
from torchord.cache.blobs.blob import BlobRef
from torchord.cache.blobs.notice import Notice
from torchord.cache.blobs.read_ahead import ReadAhead
from torchord.cache.blobs.tiered_store import TieredStore
from torchord.cache.errors import ChunkCorrupt, ChunkMissing, InvalidInput
from torchord.cache.ledger.records import SlotRecord
from torchord.cache.testing.memory_chunks import MemoryChunkStore
from torchord.cache.testing.memory_ledger import MemoryLedger
from torchord.cache.testing.memory_plane import MemoryPlane
from torchord.coordinator.server.gradient_download import GradientDownload

SIZE = 4
BYTES = torch.arange(18, dtype=torch.uint8)


class Counting(MemoryChunkStore):
    """Notes which chunks were read."""

    def __init__(self) -> None:
        super().__init__(chunk_nbytes=SIZE)
        self.read: list[str] = []

    def read_parts(self, key: str, view: memoryview, sums: Any, size: int | None = None) -> None:
        self.read += [f"{key}:{i}" for i in sums]
        super().read_parts(key, view, sums, size)


def stored(store: MemoryChunkStore, key: str = "k", value: torch.Tensor = BYTES) -> BlobRef:
    return store.put(key, value, ttl_seconds=60)


def some(ref: BlobRef, *numbers: int, number: int = 1) -> Notice:
    """A notice of a blob of which only these chunks are stored."""
    return Notice.of(number, ref.key, ref.nbytes, SIZE, {i: ref.checksums[i] for i in numbers})


def test_a_notice_survives_its_text_and_nothing_else_does() -> None:
    notice = some(stored(Counting()), 0, 3)
    assert Notice.from_json(notice.to_json()) == notice
    assert [bool(each) for each in notice.checksums] == [True, False, False, True, False]
    for text in (
        "",
        "{}",
        "[1]",
        '[1, "k", 18, 4, "0123"]',
        '[1, "k", -4, 4, ""]',
        '[1, "k", 4, 0, ""]',
        "7",
    ):
        with pytest.raises(InvalidInput):
            Notice.from_json(text)


def test_what_was_read_ahead_is_not_read_again() -> None:
    store = Counting()
    ref = stored(store)
    ahead = ReadAhead(store, ref.nbytes, SIZE)
    assert ahead.follow(some(ref, 0, 2)) and not ahead.follow(some(ref, 0, 2))
    assert ahead.follow(some(ref, 0, 1, 2, 4)) and ahead.read_nbytes == 3 * SIZE  # the last one waits
    assert torch.equal(ahead.complete(ref) if ahead else BYTES, BYTES)
    assert store.read == ["k:0", "k:2", "k:1", "k:3", "k:4"]


def test_chunks_of_another_attempt_count_if_their_bytes_are_the_same() -> None:
    store = Counting()
    first, second = (
        stored(store, "first"),
        stored(store, "second", BYTES.clone().index_fill_(0, torch.tensor(5), 9)),
    )
    ahead = ReadAhead(store, first.nbytes, SIZE)
    ahead.follow(some(first, 0, 1, 2))
    store.delete([first])
    found = ahead.complete(second)
    assert found is not None and found[5] == 9
    assert torch.equal(found, store.get(second))
    assert store.read == ["first:0", "first:1", "first:2", "second:1", "second:3", "second:4"]


def test_a_damaged_chunk_is_noticed_and_read_anew() -> None:
    store = Counting()
    ref = stored(store)
    ahead = ReadAhead(store, ref.nbytes, SIZE)
    good, deadline = store.chunks["k:1"]
    store.chunks["k:1"] = (b"XXXX", deadline)
    with pytest.raises(ChunkCorrupt):
        ahead.follow(some(ref, 0, 1))
    with pytest.raises(ChunkCorrupt):
        ahead.complete(ref)
    store.chunks["k:1"] = (good, deadline)
    assert torch.equal(ahead.complete(ref), BYTES)  # type: ignore[arg-type]


def test_a_blob_that_does_not_fit_is_left_to_the_store() -> None:
    store = Counting()
    ref = stored(store)
    ahead = ReadAhead(store, 8, SIZE)
    assert not ahead.follow(some(ref, 0)) and ahead.complete(ref) is None
    assert ReadAhead(store, 18, 2).complete(ref) is None


class Server:
    """One step of two slots, and a collector of it."""

    def __init__(self, most_nbytes: int = 1000) -> None:
        self.store = Counting()
        self.ledger = MemoryLedger(MemoryPlane(), "r")
        self.chunks = TieredStore(self.store, None)
        self.wanted = True
        self.collector = GradientDownload(
            self.ledger, 1, range(2), self.chunks,
            most_nbytes=most_nbytes, step_seconds=0.0, wanted=lambda: self.wanted,
        )  # fmt: skip

    def slot(self, shard: int, ref: BlobRef) -> SlotRecord:
        """A slot that is written, as the update sees it."""
        record = any_slot(1, shard, blob=ref)
        self.ledger.plane.hset(self.ledger.keys.slots(1), {str(shard): record.to_json()})
        return record

    def tell(self, shard: int, notice: Notice) -> None:
        self.ledger.announce(keys.slot_underway(shard), notice)

    @property
    def thread(self) -> threading.Thread:
        return self.collector._thread


def test_slots_are_read_as_they_come_and_land() -> None:
    server = Server()
    told, landed = stored(server.store, "told"), stored(server.store, "landed")
    server.collector.start()
    server.tell(0, some(told, 1, 2))
    server.tell(1, some(landed, 0, number=0))  # of another step
    server.slot(1, landed)
    wait_until(lambda: len(server.store.read) >= 7, message="both to be read")
    assert set(server.store.read) == {"told:1", "told:2", *(f"landed:{i}" for i in range(5))}
    first = server.slot(0, told)
    assert torch.equal(server.collector.read(first), BYTES)
    assert torch.equal(server.collector.read(server.slot(1, landed)), BYTES)
    server.thread.join(60)
    assert not server.thread.is_alive(), "all of the step is here"
    counters = server.chunks.counters
    assert (counters.store_reads, counters.store_nbytes) == (2, 36)
    assert counters.ahead_nbytes == 2 * SIZE + 18


def test_the_record_decides_and_not_what_was_told() -> None:
    """A slot opened again, or an attempt that was overtaken: what was read ahead is of no use then."""
    server = Server()
    told, other = stored(server.store, "told"), stored(server.store, "other", BYTES + 100)
    server.collector.start()
    server.tell(0, some(told, 0, 1, 2, 3))
    wait_until(lambda: len(server.store.read) == 4, message="the notice to be followed")
    assert torch.equal(server.collector.read(server.slot(0, other)), BYTES + 100)
    server.collector.stop()


def test_bytes_that_are_lost_are_found_by_the_update_alone() -> None:
    server = Server()
    told = stored(server.store, "told")
    server.store.delete([told])
    server.collector.start()
    record = server.slot(0, told)
    wait_until(lambda: bool(server.store.read), message="the slot to be tried")
    with pytest.raises(ChunkMissing):
        server.collector.read(record)
    assert server.thread.is_alive(), "the other slot may still come"
    server.wanted = False
    server.thread.join(60)
    assert not server.thread.is_alive()


@pytest.mark.parametrize("most", [0, 18, 36])
def test_its_memory_is_bounded(most: int) -> None:
    server = Server(most)
    refs = [stored(server.store, f"slot{shard}") for shard in range(2)]
    records = [server.slot(shard, ref) for shard, ref in enumerate(refs)]
    server.collector.start()
    server.thread.join(60)
    assert len({key.partition(":")[0] for key in server.store.read}) == most // 18
    assert all(torch.equal(server.collector.read(record), BYTES) for record in records)


def test_it_ends_when_it_is_stopped() -> None:
    server = Server()
    server.collector.start()
    server.collector.stop()
    server.thread.join(60)
    assert not server.thread.is_alive()
