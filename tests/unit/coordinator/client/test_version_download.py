"""Versions that a Client reads while they are stored: used only where the ledger names the same bytes."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.waiting import wait_until
from torchord.cache.blobs.blob import BlobRef
from torchord.cache.blobs.host_tier import HostTier
from torchord.cache.blobs.notice import Notice
from torchord.cache.blobs.tiered_store import TieredStore
from torchord.cache.keys import PARAMETERS_UNDERWAY
from torchord.cache.testing.memory_chunks import MemoryChunkStore
from torchord.cache.testing.memory_ledger import MemoryLedger
from torchord.cache.testing.memory_plane import MemoryPlane
from torchord.coordinator.client import version_download as arrivals
from torchord.coordinator.client.version_download import VersionDownload

SIZE = 64 << 10
NBYTES = 5 * SIZE + 64


class Counting(MemoryChunkStore):
    """Notes which chunks were read."""

    def __init__(self) -> None:
        super().__init__(chunk_nbytes=SIZE)
        self.read: list[str] = []

    def read_parts(self, key: str, view: memoryview, sums: Any, size: int | None = None) -> None:
        super().read_parts(key, view, sums, size)
        self.read += [f"{key}:{i}" for i in sums]


class Context:
    """What `VersionDownload` asks of a `RunContext`: version 3 is loaded."""

    run, loaded = "r", 3

    def __init__(self, compression: str = "none") -> None:
        self.ledger = MemoryLedger(MemoryPlane(), "r")
        self.services = SimpleNamespace(ledger=lambda run: self.ledger)
        self.config = SimpleNamespace(parameter_compression=compression)

    def replica(self) -> Any:
        return SimpleNamespace(flat=torch.empty(NBYTES, dtype=torch.uint8), memory=None)


class Client:
    """A Client that waits for version 4."""

    def __init__(self, host: HostTier | None = None, *, on: bool = True, compression: str = "none") -> None:
        self.store = Counting()
        self.chunks = TieredStore(self.store, host)
        self.context: Any = Context(compression)
        self.arrivals = VersionDownload(self.chunks, on=on)

    def version(self, key: str = "v4", seed: int = 0) -> BlobRef:
        """Store a version's bytes."""
        made = torch.randint(
            0, 256, (NBYTES,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
        )
        return self.store.put(key, made, ttl_seconds=60)

    def tell(self, ref: BlobRef, stored: Iterable[int] | None = None, version: int = 4) -> None:
        self.context.ledger.announce(PARAMETERS_UNDERWAY, Notice.all_of(version, ref, stored))

    def idle(self, server_memory: str | None = "elsewhere") -> None:
        self.arrivals.idle(self.context, server_memory)

    @property
    def following(self) -> Any:
        return self.arrivals._following.get(self.context)

    def get(self, ref: BlobRef) -> tuple[torch.Tensor, str]:
        """As `ParameterCache.fetch` does."""
        return self.chunks.get_from(ref, None, self.arrivals.take(self.context, ref))


def test_a_version_is_read_as_it_comes() -> None:
    client = Client()
    ref = client.version()
    client.tell(ref, version=3)  # the one that is loaded
    client.idle()
    client.idle()
    client.tell(ref, [0, 1])
    wait_until(lambda: client.store.read == ["v4:0", "v4:1"], message="what is stored to be read")
    client.tell(ref, [0, 1, 2, 3, 4, 5])
    wait_until(lambda: not client.following.alive, message="the rest to be read")
    found, source = client.get(ref)
    assert torch.equal(found, client.store.get(ref)) and source == "store"
    assert client.store.read == [f"v4:{i}" for i in range(6)], "each once"
    assert client.chunks.counters.ahead_nbytes == NBYTES
    assert client.following is None


def test_a_version_that_is_needed_before_it_was_read_to_its_end() -> None:
    client = Client()
    ref = client.version()
    client.idle()
    client.tell(ref, [0, 1])
    wait_until(lambda: len(client.store.read) == 2, message="what is stored to be read")
    found, _ = client.get(ref)
    assert torch.equal(found, client.store.get(ref))
    assert sorted(client.store.read) == [f"v4:{i}" for i in range(6)]


def test_a_version_that_is_needed_before_it_was_heard_of_is_read_once() -> None:
    client = Client()
    ref = client.version()
    client.idle()
    arrival = client.following
    look, arrived, go_on = arrival._look, threading.Event(), threading.Event()

    def late() -> Notice | None:
        arrived.set()
        assert go_on.wait(60)
        return look()  # type: ignore[no-any-return]

    arrival._look = late
    assert arrived.wait(60)
    client.tell(ref)
    found, _ = client.get(ref)
    go_on.set()
    wait_until(lambda: not arrival.alive, message="the thread to end")
    assert torch.equal(found, client.store.get(ref)) and not client.store.read


def test_a_version_that_another_server_commits_in_its_place() -> None:
    """A fenced server's upload comes to nothing; the next one's bytes are read anew where they differ."""
    client = Client()
    fenced, committed = client.version("fenced", seed=1), client.version("committed", seed=2)
    client.idle()
    client.tell(fenced, [0, 1, 2])
    wait_until(lambda: len(client.store.read) == 3, message="what is stored to be read")
    arrival = client.following
    client.tell(committed, [0])
    wait_until(lambda: not arrival.alive, message="the first one to be given up")
    found, _ = client.get(committed)
    assert torch.equal(found, client.store.get(committed))


@pytest.mark.parametrize("whole", [True, False])
def test_in_the_hosts_tier_all_clients_of_the_host_find_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    monkeypatch.setattr(arrivals, "_STALL_SECONDS", 0.2)
    client = Client(HostTier(tmp_path))
    ref = client.version()
    client.idle()
    client.tell(ref, [0, 1])
    wait_until(lambda: len(client.store.read) == 2, message="what is stored to be read")
    if whole:
        client.tell(ref)
    else:  # its server has died; another process of this host is not held up for ever
        arrival = client.following
        wait_until(lambda: not arrival.alive, message="it to be given up")
        assert not [name for name in os.listdir(tmp_path) if name.endswith(".part")]
    found, source = client.get(ref)
    assert torch.equal(found, client.store.get(ref)) and source == ("host" if whole else "store")
    assert client.store.read[:6] == [f"v4:{i}" for i in range(6 if whole else 2)]


def test_where_it_cannot_pay_nobody_looks_out(tmp_path: Path) -> None:
    for client, server in (
        (Client(on=False), "elsewhere"),
        (Client(compression="int8"), "elsewhere"),
        (near := Client(HostTier(tmp_path)), near.chunks.memory_id),
        (Client(HostTier(tmp_path)), None),
    ):
        client.idle(server)
        assert client.following is None


def test_telling_does_not_change_what_is_stored() -> None:
    store, told = Counting(), []
    chunks = TieredStore(store, None)
    made = torch.arange(NBYTES, dtype=torch.int32).to(torch.uint8)
    plain = chunks.put("k", made, ttl_seconds=60)
    ref = chunks.put("k", made, ttl_seconds=60, tell=lambda ref, stored: told.append((ref, sorted(stored))))
    assert ref == plain and torch.equal(store.get(ref), made)
    assert told[-1] == (ref, list(range(6)))
