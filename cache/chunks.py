"""The chunk store: one large buffer in, a small reference out; the buffer travels as checked chunks.

A *blob* is a run of bytes under a key prefix. It is cut into chunks of `chunk_nbytes`, each one
Redis string `<key>:<index>` with a TTL. The reference carries each chunk's checksum, so a reader
knows at once when it was given other bytes than the writer wrote.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import urlsplit

import redis
import torch
import xxhash
from torch import Tensor

from cache.codec import memory
from cache.errors import CacheError, CacheUnreachable, ChunkCorrupt, ChunkMissing, InvalidInput

CHUNK_NBYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class BlobRef:
    """Where a blob is and what it contains.

    Attributes:
        key: prefix of its chunks; chunk i is stored under `<key>:<i>`.
        nbytes: length in bytes.
        chunk_nbytes: length of each chunk but the last.
        checksums: xxh3_64 of each chunk, 16 hexadecimal digits each.
    """

    key: str
    nbytes: int
    chunk_nbytes: int
    checksums: tuple[str, ...]

    @property
    def digest(self) -> str:
        """32 hexadecimal digits that depend on the content (and chunk size), not on the key."""
        text = f"{self.nbytes}:{self.chunk_nbytes}:{''.join(self.checksums)}"
        return xxhash.xxh3_128_hexdigest(text.encode())

    def to_json(self) -> dict[str, Any]:
        """Return the reference as a dict of strings and integers."""
        return {
            "key": self.key,
            "nbytes": self.nbytes,
            "chunk_nbytes": self.chunk_nbytes,
            "checksums": "".join(self.checksums),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> BlobRef:
        """Rebuild a reference that `to_json` produced, trusting nothing in it.

        Raises:
            InvalidInput: a field is missing, of the wrong type or at odds with the others.
        """
        try:
            joined = str(value["checksums"])
            ref = cls(
                str(value["key"]),
                int(value["nbytes"]),
                int(value["chunk_nbytes"]),
                tuple(joined[i : i + 16] for i in range(0, len(joined), 16)),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidInput(f"this is not a blob reference ({error!r})") from error
        if (
            ref.nbytes < 0
            or ref.chunk_nbytes <= 0
            or len(joined) != 16 * _count(ref.nbytes, ref.chunk_nbytes)
        ):
            raise InvalidInput(
                f"blob {ref.key!r}: {len(joined) // 16} checksums do not fit {ref.nbytes} bytes"
            )
        return ref


class Chunks(Protocol):
    """What callers need of a chunk store; `ChunkStore` and `MemoryChunkStore` have it."""

    def put(self, key: str, buffer: Tensor | memoryview, *, ttl_seconds: int) -> BlobRef: ...
    def get(self, ref: BlobRef, out: Tensor | None = None) -> Tensor: ...
    def delete(self, refs: Iterable[BlobRef]) -> None: ...
    def touch(self, ref: BlobRef, ttl_seconds: int) -> None: ...
    def close(self) -> None: ...


@dataclass(slots=True)
class Counters:
    """What went through one store: bytes and wall seconds, each way."""

    bytes_in: int = 0
    bytes_out: int = 0
    seconds_in: float = 0.0
    seconds_out: float = 0.0


class ChunkStore:
    """Blobs in one or several Redis-compatible servers.

    Threads may share a store; a forked child opens its own connections.

    Args:
        urls: redis://, rediss:// or unix:// URL of each node.
        chunk_nbytes: length of each chunk, in bytes.
        connect_timeout_seconds: longest wait for a node to answer.
    """

    def __init__(
        self, urls: Sequence[str], *, chunk_nbytes: int = CHUNK_NBYTES, connect_timeout_seconds: float = 2.0
    ) -> None:
        if not urls:
            raise InvalidInput("a chunk store needs at least one URL")
        self.chunk_nbytes = chunk_nbytes
        self.counters = Counters()
        self._url = urls[0]
        self._timeout = connect_timeout_seconds
        self._lock = threading.Lock()
        self._pid = -1
        self._client: redis.Redis | None = None

    def put(self, key: str, buffer: Tensor | memoryview, *, ttl_seconds: int) -> BlobRef:
        """Store a buffer and return its reference; chunks that exist are overwritten.

        Args:
            key: prefix of the chunk keys.
            buffer: contiguous CPU tensor (any dtype) or memoryview; sent from its own memory.
            ttl_seconds: lifetime of the chunks.

        Raises:
            CacheUnreachable: the node does not answer.
            CacheError: the node refused.
        """
        view = as_bytes(buffer)
        started = time.perf_counter()
        sums: list[str] = []
        client = self._connection()
        try:
            for group in _groups(_count(len(view), self.chunk_nbytes), 8):
                pipe = client.pipeline(transaction=False)
                for i in group:
                    part = view[i * self.chunk_nbytes : (i + 1) * self.chunk_nbytes]
                    sums.append(xxhash.xxh3_64_hexdigest(part))
                    pipe.set(f"{key}:{i}", part, ex=ttl_seconds)
                pipe.execute()
        except (redis.RedisError, OSError) as error:
            raise self._error(error, "SET", key) from error
        with self._lock:
            self.counters.bytes_out += len(view)
            self.counters.seconds_out += time.perf_counter() - started
        return BlobRef(key, len(view), self.chunk_nbytes, tuple(sums))

    def get(self, ref: BlobRef, out: Tensor | None = None) -> Tensor:
        """Fetch a blob and verify it.

        Args:
            ref: from `put`.
            out: 1-D uint8 CPU tensor of `ref.nbytes` bytes to receive into; allocated if None.

        Returns:
            `out`, 1-D uint8.

        Raises:
            ChunkMissing: a chunk expired, was evicted or was lost.
            ChunkCorrupt: a chunk is not what was written.
            CacheUnreachable: the node does not answer.
            CacheError: the node refused.
        """
        if out is None:
            out = torch.empty(ref.nbytes, dtype=torch.uint8)
        view = as_bytes(out)
        if len(view) != ref.nbytes:
            raise InvalidInput(f"blob {ref.key!r} has {ref.nbytes} bytes, the buffer {len(view)}")
        started = time.perf_counter()
        client = self._connection()
        try:
            for group in _groups(len(ref.checksums), 8):
                values: Any = client.mget([f"{ref.key}:{i}" for i in group])
                for i, value in zip(group, values, strict=True):
                    part = view[i * ref.chunk_nbytes : (i + 1) * ref.chunk_nbytes]
                    if value is None:
                        raise ChunkMissing(f"chunk {ref.key}:{i} is not on {self._node()}")
                    if len(value) != len(part) or xxhash.xxh3_64_hexdigest(value) != ref.checksums[i]:
                        raise ChunkCorrupt(f"chunk {ref.key}:{i} on {self._node()} is not what was written")
                    part[:] = value
        except (redis.RedisError, OSError) as error:
            raise self._error(error, "GET", ref.key) from error
        with self._lock:
            self.counters.bytes_in += len(view)
            self.counters.seconds_in += time.perf_counter() - started
        return out

    def delete(self, refs: Iterable[BlobRef]) -> None:
        """Delete the chunks of blobs; absent ones are no error."""
        keys = [f"{ref.key}:{i}" for ref in refs for i in range(len(ref.checksums))]
        client = self._connection()
        try:
            for start in range(0, len(keys), 512):
                client.unlink(*keys[start : start + 512])
        except (redis.RedisError, OSError) as error:
            raise self._error(error, "UNLINK", keys[0]) from error

    def touch(self, ref: BlobRef, ttl_seconds: int) -> None:
        """Set the remaining lifetime of a blob's chunks.

        Raises:
            ChunkMissing: a chunk is gone already.
        """
        client = self._connection()
        try:
            for group in _groups(len(ref.checksums), 512):
                pipe = client.pipeline(transaction=False)
                for i in group:
                    pipe.expire(f"{ref.key}:{i}", ttl_seconds)
                for i, found in zip(group, pipe.execute(), strict=True):
                    if not found:
                        raise ChunkMissing(f"chunk {ref.key}:{i} is not on {self._node()}")
        except (redis.RedisError, OSError) as error:
            raise self._error(error, "EXPIRE", ref.key) from error

    def close(self) -> None:
        """Close the connections; the store may be used again."""
        with self._lock:
            client, self._client = self._client, None
        if client is not None and self._pid == os.getpid():
            client.close()

    def _connection(self) -> redis.Redis:
        with self._lock:
            if self._client is None or self._pid != os.getpid():
                self._client = redis.Redis.from_url(self._url, socket_connect_timeout=self._timeout)
                self._pid = os.getpid()
            return self._client

    def _node(self) -> str:
        parts = urlsplit(self._url)
        return f"{parts.scheme}://{parts.hostname or ''}:{parts.port or 6379}{parts.path}"

    def _error(self, error: Exception, command: str, key: str) -> CacheError:
        if isinstance(error, (redis.ConnectionError, redis.TimeoutError, OSError)):
            return CacheUnreachable(f"{command} {key} on {self._node()}: {error}")
        return CacheError(f"{command} {key} on {self._node()}: {error}")


class MemoryChunkStore:
    """The same interface over a dict, for tests of what is built on a chunk store."""

    def __init__(self, *, chunk_nbytes: int = CHUNK_NBYTES) -> None:
        self.chunk_nbytes = chunk_nbytes
        self.counters = Counters()
        self.chunks: dict[str, tuple[bytes, float]] = {}

    def put(self, key: str, buffer: Tensor | memoryview, *, ttl_seconds: int) -> BlobRef:
        """As `ChunkStore.put`."""
        view = as_bytes(buffer)
        parts = [bytes(view[s : s + self.chunk_nbytes]) for s in range(0, len(view), self.chunk_nbytes)]
        for i, part in enumerate(parts):
            self.chunks[f"{key}:{i}"] = (part, time.monotonic() + ttl_seconds)
        self.counters.bytes_out += len(view)
        return BlobRef(key, len(view), self.chunk_nbytes, tuple(map(xxhash.xxh3_64_hexdigest, parts)))

    def get(self, ref: BlobRef, out: Tensor | None = None) -> Tensor:
        """As `ChunkStore.get`."""
        if out is None:
            out = torch.empty(ref.nbytes, dtype=torch.uint8)
        view = as_bytes(out)
        if len(view) != ref.nbytes:
            raise InvalidInput(f"blob {ref.key!r} has {ref.nbytes} bytes, the buffer {len(view)}")
        for i, checksum in enumerate(ref.checksums):
            self._require(f"{ref.key}:{i}")
            part = self.chunks[f"{ref.key}:{i}"][0]
            if xxhash.xxh3_64_hexdigest(part) != checksum:
                raise ChunkCorrupt(f"chunk {ref.key}:{i} in memory is not what was written")
            view[i * ref.chunk_nbytes : i * ref.chunk_nbytes + len(part)] = part
        self.counters.bytes_in += len(view)
        return out

    def delete(self, refs: Iterable[BlobRef]) -> None:
        """As `ChunkStore.delete`."""
        for ref in refs:
            for i in range(len(ref.checksums)):
                self.chunks.pop(f"{ref.key}:{i}", None)

    def touch(self, ref: BlobRef, ttl_seconds: int) -> None:
        """As `ChunkStore.touch`."""
        for i in range(len(ref.checksums)):
            self._require(f"{ref.key}:{i}")
            self.chunks[f"{ref.key}:{i}"] = (self.chunks[f"{ref.key}:{i}"][0], time.monotonic() + ttl_seconds)

    def close(self) -> None:
        """Nothing to close."""

    def _require(self, key: str) -> None:
        if key not in self.chunks or self.chunks[key][1] < time.monotonic():
            raise ChunkMissing(f"chunk {key} is not in memory")


def as_bytes(buffer: Tensor | memoryview) -> memoryview:
    """Return the buffer's own memory as bytes, without a copy."""
    return memory(buffer) if isinstance(buffer, Tensor) else buffer.cast("B")


def _count(nbytes: int, chunk_nbytes: int) -> int:
    return -(-nbytes // chunk_nbytes)


def _groups(count: int, size: int) -> Iterator[range]:
    for start in range(0, count, size):
        yield range(start, min(start + size, count))
