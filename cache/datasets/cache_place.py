"""Where stored datasets lie: records by name, and the chunks that they consist of.

A dataset is a record (small, by name), a manifest (JSON, itself in chunks) and chunks of data.
Chunks are written first, then the record that names them, so a record never points at what was
not there. Two places are offered: the cache (records in the control plane, chunks over the cache
nodes, everything with a TTL) and a folder at an fsspec URL (`torchord.cache.datasets.folder_place`).
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import redis

from torchord.cache import keys
from torchord.cache.blobs.chunk_store import ChunkStore
from torchord.cache.datasets.chunk_cache import ChunkCache, DiskTier
from torchord.cache.datasets.content import Bytes, Chunk, ContentStore, Stream
from torchord.cache.errors import DatasetDamaged, InvalidInput
from torchord.cache.scripts import source
from torchord.cache.servers.fork import reset_after_fork
from torchord.cache.servers.redis_client import CLIENT_PATIENCE_SECONDS, Clients, translated
from torchord.cache.settings import Settings

Verdict = Literal["written", "same", "exists"]

_FORMAT = 1
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Record:
    """What a name stands for.

    Attributes:
        name: of the dataset.
        digest: of the manifest, and so of everything: 40 hexadecimal digits.
        samples: how many.
        nbytes: bytes of all samples, each chunk counted as often as it is used.
        chunk_nbytes: upper bound of a chunk's length that was asked for.
        ttl_seconds: life of record and chunks; renewed when workers use the dataset.
        created_at: Unix time (s) of the put.
        structure: of one sample, for people.
        manifest: the chunks of the manifest.
    """

    name: str
    digest: str
    samples: int
    nbytes: int
    chunk_nbytes: int
    ttl_seconds: int
    created_at: float
    structure: str
    manifest: Stream

    def to_json(self) -> str:
        """Return the record as JSON text."""
        fields = {name: getattr(self, name) for name in self.__slots__ if name != "manifest"}
        return json.dumps({"format": _FORMAT, **fields, "manifest": self.manifest.to_json()})

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> Record:
        """Rebuild a record that `to_json` produced, trusting nothing in it.

        Raises:
            DatasetDamaged: it is not a record that this version of torchord can read.
        """
        try:
            value: Mapping[str, Any] = json.loads(text)
            if value["format"] != _FORMAT:
                raise ValueError(f"format {value['format']}, this version of torchord reads {_FORMAT}")
            return cls(
                name=str(value["name"]),
                digest=str(value["digest"]),
                samples=int(value["samples"]),
                nbytes=int(value["nbytes"]),
                chunk_nbytes=int(value["chunk_nbytes"]),
                ttl_seconds=int(value["ttl_seconds"]),
                created_at=float(value["created_at"]),
                structure=str(value["structure"]),
                manifest=Stream.from_json(value["manifest"]),
            )
        except (KeyError, TypeError, ValueError, InvalidInput) as error:
            raise DatasetDamaged(f"the record of a dataset at {where} cannot be read: {error}") from error


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


class CachePlace:
    """Datasets in the cache.

    Deleting is safe beside a put that shares chunks, without a lock: chunks that nobody names are
    given a grace of some seconds, then the records are read again, and what has been named
    meanwhile gets its life back. A put looks at its chunks once more after it has named them.

    Args:
        settings: where the servers are.
        patience_seconds: how long an operation waits for a control plane that is away.
    """

    def __init__(self, settings: Settings, *, patience_seconds: float = CLIENT_PATIENCE_SECONDS) -> None:
        self._url = settings.url
        self._patience_seconds = patience_seconds
        self._clients = Clients()
        self._store = ContentStore(ChunkStore.of(settings))

    @property
    def label(self) -> str:
        """Where, for messages."""
        return "the cache"

    @property
    def _client(self) -> redis.Redis:
        return self._clients.get(self._url, self._patience_seconds)

    def extend(self, chunks: Sequence[Chunk], ttl_seconds: int) -> list[bool]:
        """See `ContentStore.extend`."""
        return self._store.extend(chunks, ttl_seconds)

    def write(self, items: Sequence[tuple[Chunk, memoryview]], ttl_seconds: int) -> None:
        """See `ContentStore.write`."""
        self._store.write(items, ttl_seconds)

    def read(self, chunks: Sequence[Chunk]) -> list[Bytes]:
        """See `ContentStore.read`."""
        return self._store.read(chunks)

    def mark(self, chunks: Sequence[Chunk]) -> None:
        """See `ContentStore.let_go`."""
        self._store.let_go(chunks)

    def sweep(self, chunks: Sequence[Chunk]) -> None:
        """Nothing to do: marked chunks expire."""

    def record(self, name: str) -> Record | None:
        """The record of a name.

        Raises:
            DatasetDamaged: it cannot be read.
            CacheUnreachable: the control plane does not answer.
        """
        key = keys.dataset(name)
        with translated(self._url, f"look up dataset {name!r}"):
            text = cast("str | None", self._client.hget(key, "record"))
        return None if text is None else Record.from_json(text, f"key {key}")

    def records(self) -> list[Record]:
        """All records, by time of their put; one that cannot be read is logged and left out.

        Raises:
            CacheUnreachable: the control plane does not answer.
        """
        with translated(self._url, "list the datasets"):
            names = cast("list[str]", self._client.zrange(keys.DATASETS, 0, -1))
            pipe = self._client.pipeline(transaction=False)
            for name in names:
                pipe.hget(keys.dataset(name), "record")
            texts = pipe.execute()
        found = []
        for name, text in zip(names, texts, strict=True):
            if text is None:
                self._drop(name, delete=False)
                continue
            try:
                found.append(Record.from_json(text, f"key {keys.dataset(name)}"))
            except DatasetDamaged as error:
                _log.warning("%s", error)
        return found

    def commit(self, record: Record, *, replace: bool) -> tuple[Verdict, Record | None]:
        """Give a name its record in one script.

        Returns:
            "written" (and the record that was replaced, if any), "same" if this content had the
            name already, or "exists" if other content has it and `replace` is False.

        Raises:
            CacheUnreachable: the control plane does not answer.
        """
        key = keys.dataset(record.name)
        with translated(self._url, f"name dataset {record.name!r}"):
            verdict, before = self._client.register_script(source("put_dataset"))(
                keys=[key, keys.DATASETS],
                args=[
                    record.name,
                    record.digest,
                    record.to_json(),
                    record.ttl_seconds,
                    record.created_at,
                    int(replace),
                ],
            )
        try:
            return verdict, Record.from_json(before, f"key {key}") if before else None
        except DatasetDamaged:
            return verdict, None  # then its chunks are left to expire

    def remove(self, name: str) -> None:
        """Take a record away; none is no error.

        Raises:
            CacheUnreachable: the control plane does not answer.
        """
        self._drop(name, delete=True)

    def renew(self, record: Record, chunks: Callable[[], Iterable[Chunk]]) -> None:
        """Prolong the life of a dataset; of all who ask within an hour, one does it.

        A record that has been replaced or deleted meanwhile is left alone, and so are its chunks.

        Raises:
            CacheError: a server does not answer or refuses.
        """
        key = keys.dataset(record.name)
        with translated(self._url, f"renew dataset {record.name!r}"):
            mark = {"nx": True, "ex": renewal_seconds(record.ttl_seconds)}
            if self._client.hget(key, "digest") != record.digest or not self._client.set(
                keys.dataset_renewed(record.name),
                record.digest,
                **mark,  # type: ignore[arg-type]  # redis-py types each keyword by itself
            ):
                return
            self._client.expire(key, record.ttl_seconds, gt=True)
            self._client.expire(keys.DATASETS, record.ttl_seconds, gt=True)
        present = self._store.extend(list(chunks()), record.ttl_seconds)
        if not all(present):
            _log.warning("dataset %r has lost %d chunks", record.name, present.count(False))

    def _drop(self, name: str, *, delete: bool) -> None:
        with translated(self._url, f"delete dataset {name!r}"):
            self._client.register_script(source("drop_dataset"))(
                keys=[keys.dataset(name), keys.DATASETS], args=[name, int(delete)]
            )


def renewal_seconds(ttl_seconds: int) -> int:
    """How often a dataset in use is renewed: once an hour, more often if it lives for less than four."""
    return max(1, min(keys.DATASET_RENEWAL_SECONDS, ttl_seconds // 4))


def now() -> float:
    """Unix time in seconds, to the millisecond."""
    return round(time.time(), 3)


# --- what the process shares ----------------------------------------------------------


class _Shared:
    """Places and chunk caches of this process, by the settings that they were made for."""

    def __init__(self) -> None:
        self.reset()
        reset_after_fork(self)

    def reset(self) -> None:
        """Start with a lock of its own in a forked child; what the parent has kept is kept."""
        self._lock = threading.Lock()
        self._places: dict[Settings | str, Place] = getattr(self, "_places", {})
        self._caches: dict[tuple[int, str, int], ChunkCache] = getattr(self, "_caches", {})

    def place(self, settings: Settings, url: str | None) -> Place:
        from torchord.cache.datasets.folder_place import FolderPlace

        key = settings if url is None else url
        with self._lock:
            if key not in self._places:
                self._places[key] = CachePlace(settings) if url is None else FolderPlace(url)
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


_shared = _Shared()


def place_of(settings: Settings, url: str | None) -> Place:
    """The place that settings (and, for a folder, its fsspec URL) mean; one per process.

    Raises:
        InvalidInput: the URL cannot be used.
    """
    return _shared.place(settings, url)


def chunk_cache(settings: Settings) -> ChunkCache:
    """The chunk cache of this process."""
    return _shared.chunks(settings)
