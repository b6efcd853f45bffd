"""What a training server stores of a version: what moves; what rests once; all where all moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.support import resting
from tests.support.inprocess import resolved
from torchord import TrainingConfig
from torchord.cache.blobs.blob import BlobRef
from torchord.cache.blobs.tiered_store import TieredStore
from torchord.cache.errors import CacheError
from torchord.cache.ledger.records import VersionRecord
from torchord.cache.stores.parameters import ParameterCache
from torchord.cache.tensors.codec import as_bytes
from torchord.cache.testing.memory_chunks import MemoryChunkStore
from torchord.cache.testing.memory_ledger import MemoryLedger
from torchord.cache.testing.memory_plane import MemoryPlane
from torchord.coordinator.compute.replica import Replica
from torchord.coordinator.runtime.version_writer import VersionWriter

CONFIG = TrainingConfig(epochs=1, batch_size=8)


def normalised(width: int, layers: int) -> nn.Module:
    """A model whose buffers are small beside what is trained."""
    return nn.Sequential(nn.Linear(width, 2000), nn.BatchNorm1d(2000))


class Server:
    """A run's writer and the versions that its ledger names."""

    def __init__(self, model: Callable[..., nn.Module] = resting.adapters) -> None:
        self.replica = Replica.build(resolved(resting.recipe(model)), CONFIG)
        self.store = MemoryChunkStore()
        self.parameters = ParameterCache(TieredStore(self.store, None))
        self.ledger: Any = MemoryLedger(MemoryPlane(), "run-1")
        self.ledger.create({}, incarnation="life")
        _, self.token = self.ledger.acquire(worker="s0", node="celery@s0", queue="")
        self.writer = VersionWriter(self.parameters, self.ledger, self.replica)
        self.version = -1

    def step(self) -> VersionRecord:
        """Move what is trained, store that as the next version, and drop the one before the one before."""
        with torch.no_grad():
            for parameter in self.replica.parameters.values():
                if parameter.requires_grad:
                    parameter += 1e-3
        return self.put()

    def put(self) -> VersionRecord:
        self.version += 1
        record = self.writer.store(self.version, chain="c")
        assert record.digest == self.whole().digest, "of the state in one buffer"
        assert self.ledger.put_version(record, token=self.token)
        self.parameters.drop(self.ledger, [self.version - 2], token=self.token)
        manifest = self.replica.manifest
        found = self.parameters.fetch_bytes(self.ledger, self.version, manifest=manifest)[1]
        assert torch.equal(found.flat(), self.replica.pack())
        return record

    def whole(self) -> BlobRef:
        """The reference of the state in one buffer."""
        return BlobRef.of("", as_bytes(self.replica.pack()), self.store.chunk_nbytes)

    @property
    def rests(self) -> set[str]:
        """Blobs of what rests in the store."""
        return {key.rpartition(":")[0] for key in self.store.chunks if ":rest:" in key}

    def wrote(self, act: Callable[[], Any]) -> int:
        """Bytes that go to the store meanwhile."""
        before = self.parameters.chunks.counters.written_nbytes
        act()
        return self.parameters.chunks.counters.written_nbytes - before


@pytest.fixture
def server() -> Server:
    return Server()


def test_only_what_moves_is_stored_again(server: Server) -> None:
    whole, trained = server.replica.nbytes(), server.writer.nbytes
    assert server.wrote(server.step) == whole
    keys = []
    for _ in range(20):
        assert server.wrote(server.step) == trained < whole / 10
        keys.append(len(server.store.chunks))
    assert len(set(keys[1:])) == 1, "nothing accumulates"
    assert len(server.rests) == 1


def test_what_is_found_changed_moves_from_then_on(server: Server) -> None:
    """Also where no counter of autograd's shows it; what rests is stored anew without it."""
    first = server.step()
    server.replica.parameters["2.base.weight"].data[3, 5] += 1
    second = server.step()
    assert first.rest is not None and second.rest is not None
    names = [spec.name for spec in server.replica.manifest.tensors]
    gone = [n for i, n in enumerate(names) if (first.rest.tensors ^ second.rest.tensors) >> i & 1]
    assert gone == ["2.base.weight"]
    third = server.step()
    assert third.rest == second.rest
    assert server.rests == {second.rest.blob.key}, "the last version with the other one is gone"


def test_where_all_begins_to_move_versions_are_whole(server: Server) -> None:
    server.step()
    for name in server.replica.may_rest():
        state = server.replica.state_tensors()
        state[name].add_(1)
    record = server.step()
    assert record.rest is None and record.blob.digest == record.digest
    assert server.writer.nbytes == server.replica.nbytes()
    server.step()
    server.step()
    assert server.rests == set()


def test_a_model_of_which_little_rests_pays_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its state is packed and stored in one blob, and nothing is compared."""
    server = Server(normalised)
    monkeypatch.setattr(VersionWriter, "_strike_changed", lambda self, state: pytest.fail("compared"))
    record = server.step()
    assert record.rest is None and record.blob == BlobRef(
        record.blob.key, server.whole().nbytes, server.whole().chunk_nbytes, server.whole().checksums
    )


def test_a_successor_stores_what_rests_only_if_it_is_lost(server: Server) -> None:
    record = server.step()
    server.writer = VersionWriter(server.parameters, server.ledger, server.replica, record.rest)
    assert server.wrote(server.step) == server.writer.nbytes
    server.store.chunks.pop(f"{next(iter(server.rests))}:0")
    server.writer = VersionWriter(server.parameters, server.ledger, server.replica, record.rest)
    assert server.wrote(server.step) == server.replica.nbytes()
    assert len(server.rests) == 1


def test_what_rests_is_prolonged_day_by_day(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that outlives a blob's life finds it still there; and again, if it did not."""
    now = [0.0]
    monkeypatch.setattr("torchord.coordinator.runtime.version_writer.time.monotonic", lambda: now[0])
    server.step()
    touched: list[str] = []
    touch = server.store.touch
    monkeypatch.setattr(server.store, "touch", lambda ref, ttl: (touched.append(ref.key), touch(ref, ttl)))
    server.step()
    assert touched == []
    now[0] += 25 * 3600
    assert server.wrote(server.step) == server.writer.nbytes
    assert touched == list(server.rests)
    server.step()
    assert len(touched) == 1
    now[0] += 25 * 3600
    server.store.chunks.pop(f"{touched[0]}:0")
    assert server.wrote(server.step) == server.replica.nbytes()


def test_bytes_that_may_be_lost_are_stored_again_under_their_key(server: Server) -> None:
    """So the versions before that name them are whole again, too."""
    server.step()
    first = server.step()
    before = server.replica.pack()
    assert first.rest is not None
    server.parameters.chunks.delete([first.rest.blob])
    server.writer.doubt()
    server.step()
    found = server.parameters.fetch_bytes(server.ledger, 1, manifest=server.replica.manifest)[1]
    assert torch.equal(found.flat(), before) and server.rests == {first.rest.blob.key}


def test_a_store_that_fails_in_between_leaves_nothing_half(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What rests is there before what moves, and both before anybody is told; the next attempt is whole."""
    server.step()
    server.replica.buffers["table"].add_(1)
    put, failing = server.store.put, [":rest:", ":parameters:"]

    def fails(key: str, *args: Any, **named: Any) -> BlobRef:
        if failing and failing[0] in key:
            raise CacheError(failing.pop(0))
        return put(key, *args, **named)

    monkeypatch.setattr(server.store, "put", fails)
    for _ in range(2):
        with pytest.raises(CacheError):
            server.writer.store(server.version + 1, chain="c")
    assert not failing
    server.step()
    server.step()
