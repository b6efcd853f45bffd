"""Where stored datasets lie: records by name, and the chunks that they consist of.

A dataset is a record (small, by name), a manifest (JSON, itself in chunks) and chunks of data.
Chunks are written first, then the record that names them, so a record never points at what was
not there. Two places are offered: the cache (`torchord.cache.datasets.cache_place`) and a folder at an
fsspec URL (`torchord.cache.datasets.folder_place`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from torchord.cache.datasets.allowed_urls import require_allowed
from torchord.cache.datasets.cache_place import CachePlace
from torchord.cache.datasets.chunk_cache import ChunkCache, DiskTier
from torchord.cache.datasets.content import Bytes, Chunk
from torchord.cache.datasets.folder_place import FolderPlace
from torchord.cache.datasets.record import Record, Verdict
from torchord.cache.keyring import keyring
from torchord.cache.servers.fork import reset_after_fork
from torchord.cache.settings import Settings


class Place(Protocol):
    """Where datasets lie; `CachePlace` and `FolderPlace` have it.

    `extend`, `write` and `read` are those of `torchord.cache.datasets.content.ContentStore`.
    """

    @property
    def label(self) -> str:
        """Where, for messages."""

    def extend(self, chunks: Sequence[Chunk], ttl_seconds: int) -> list[bool]:
        """Tell which chunks are stored, and let these live at least so long."""

    def write(self, items: Sequence[tuple[Chunk, memoryview]], ttl_seconds: int) -> None:
        """Store chunks."""

    def read(self, chunks: Sequence[Chunk]) -> list[Bytes]:
        """Fetch and verify chunks."""

    def mark(self, chunks: Sequence[Chunk]) -> None:
        """Announce that chunks are to go; `extend` takes that back."""

    def sweep(self, chunks: Sequence[Chunk]) -> None:
        """Remove marked chunks, if they do not go by themselves."""

    def record(self, name: str) -> Record | None:
        """The record of a name."""

    def records(self) -> list[Record]:
        """All records, by time of their put."""

    def commit(self, record: Record, *, replace: bool) -> tuple[Verdict, Record | None]:
        """Give a name its record, atomically; the one before is returned."""

    def remove(self, name: str) -> None:
        """Take a record away; none is no error."""

    def renew(self, record: Record, chunks: Callable[[], Iterable[Chunk]]) -> None:
        """Prolong the life of a dataset in use, if nobody has done so a short while ago."""


class _Shared:
    """Places and chunk caches of this process, by the settings that they were made for."""

    def __init__(self) -> None:
        self.reset()
        reset_after_fork(self)

    def reset(self) -> None:
        """Start with a lock of its own in a forked child; what the parent has kept is kept."""
        self._lock = threading.Lock()
        self._places: dict[Settings | tuple[str, str], Place] = getattr(self, "_places", {})
        self._caches: dict[tuple[int, str, int], ChunkCache] = getattr(self, "_caches", {})

    def place(self, settings: Settings, url: str | None) -> Place:
        if url is not None:
            require_allowed(url, settings.dataset_urls)
        key = settings if url is None else (url, settings.keys)
        with self._lock:
            if key not in self._places:
                self._places[key] = _made(settings, url)
            return self._places[key]

    def chunks(self, settings: Settings) -> ChunkCache:
        key = (settings.dataset_memory_bytes, settings.dataset_disk, settings.dataset_disk_bytes)
        with self._lock:
            if key not in self._caches:
                disk = (
                    DiskTier(settings.dataset_disk, settings.dataset_disk_bytes)
                    if settings.dataset_disk
                    else None
                )
                self._caches[key] = ChunkCache(settings.dataset_memory_bytes, disk=disk)
            return self._caches[key]


def _made(settings: Settings, url: str | None) -> Place:
    if url is None:
        return CachePlace(settings)
    return FolderPlace(url, keyring(settings.keys or "off", ""))


_shared = _Shared()


def place_of(settings: Settings, url: str | None) -> Place:
    """The place that settings (and, for a folder, its fsspec URL) mean; one per process.

    Raises:
        InvalidInput: the URL cannot be used, or this process opens none there.
    """
    return _shared.place(settings, url)


def chunk_cache(settings: Settings) -> ChunkCache:
    """The chunk cache of this process."""
    return _shared.chunks(settings)
