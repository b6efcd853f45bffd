"""The chunk store: one large buffer in, a small reference out; the buffer travels as checked chunks.

A *blob* is a run of bytes under a key prefix. It is cut into chunks of `chunk_nbytes`, each one
Redis string `<key>:<index>` with a TTL. The reference carries each chunk's checksum, so a reader
knows at once when it was given other bytes than the writer wrote.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import ParamSpec, Protocol

import torch
from torch import Tensor

from torchord.cache.blobs.blob import BlobRef as BlobRef
from torchord.cache.blobs.checksum_thread import Checker
from torchord.cache.blobs.node_rounds import NodeRounds
from torchord.cache.errors import CacheUnreachable, InvalidInput
from torchord.cache.servers.cluster import node_of
from torchord.cache.servers.fork import reset_after_fork
from torchord.cache.settings import Settings
from torchord.cache.tensors.codec import as_bytes
from torchord.cache.tensors.pieces import Cut, split

CHUNK_NBYTES = 1 << 19
"""Half a MiB: still in the processor's cache when it is checked, and few enough keys for 1.6 GB."""

P = ParamSpec("P")


class Chunks(Protocol):
    """What callers need of a chunk store; `ChunkStore` and `MemoryChunkStore` have it.

    Attributes:
        chunk_nbytes: length of each chunk, in bytes.
        written_seconds: wall seconds that writing took so far, by all threads.
    """

    chunk_nbytes: int
    written_seconds: float

    def put(self, key: str, buffer: Tensor | memoryview, *, ttl_seconds: int) -> BlobRef:
        """Store a buffer."""
        ...

    def put_parts(self, key: str, view: memoryview, numbers: Sequence[int], *, ttl_seconds: int) -> list[str]:
        """Store some chunks of a buffer."""
        ...

    def get(self, ref: BlobRef, out: Tensor | None = None) -> Tensor:
        """Fetch and verify a blob."""
        ...

    def read_into(self, ref: BlobRef, buffer: Tensor | memoryview) -> None:
        """Fetch and verify a blob, into any writable memory."""
        ...

    def read_parts(
        self, key: str, view: memoryview, sums: Mapping[int, str], chunk_nbytes: int | None = None
    ) -> None:
        """Fetch and verify some chunks of a blob."""
        ...

    def delete(self, refs: Iterable[BlobRef]) -> None:
        """Delete blobs."""
        ...

    def touch(self, ref: BlobRef, ttl_seconds: int) -> None:
        """Set the remaining lifetime of a blob."""
        ...

    def close(self) -> None:
        """Let go of connections."""
        ...


class ChunkStore:
    """Blobs in one or several Redis-compatible servers.

    Chunks are spread over the nodes by consistent hashing and move in parallel, one thread a node.
    A node that does not answer is skipped: its chunks are written to, and looked for on, the next
    nodes of the ring. Threads may share a store; a forked child opens its own connections.

    Args:
        urls: redis://, rediss:// or unix:// URL of each node; a whole Redis Cluster may be one node
            (redis+cluster://HOST:PORT,HOST:PORT, see `torchord.cache.servers.cluster`). A node is known to
            the ring by its URL without credentials, or by the URL's #fragment, so every process must be given
            the same ones, in any order.
        chunk_nbytes: length of each chunk, in bytes.
        replicas: further nodes that get a copy of each chunk; fewer than there are nodes.
        connections: sockets per node that one operation uses at a time; more than one helps where
            a single one does not fill the network.
        weights: relative share of each node, in the order of `urls`; None or empty means equal.
        connect_timeout_seconds: longest wait for a connection.
        timeout_seconds: longest wait without a byte moving.
        patience_seconds: how long an operation is tried again while no node answers (a restart).

    Attributes:
        placement: which chunk lies where, in words: two processes that say the same find each other's
            chunks at the first node that they ask, and keep as many copies.
        written_seconds: wall seconds that writing took so far, by all threads.

    Raises:
        InvalidInput: no URL, an unusable one, the same node twice, or a value out of range.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        chunk_nbytes: int = CHUNK_NBYTES,
        replicas: int = 0,
        connections: int = 1,
        weights: Sequence[float] | None = None,
        connect_timeout_seconds: float = 2.0,
        timeout_seconds: float = 30.0,
        patience_seconds: float = 0.0,
    ) -> None:
        nodes = [
            node_of(url, connect_timeout_seconds=connect_timeout_seconds, timeout_seconds=timeout_seconds)
            for url in urls
        ]
        names = [node.label for node in nodes]
        if len(set(names)) != len(names):
            raise InvalidInput(f"the same cache node is listed twice: {', '.join(names)}")
        if chunk_nbytes < 1 or connections < 1:
            raise InvalidInput("chunk_nbytes and connections must be at least 1")
        if not 0 <= replicas < max(1, len(names)):
            raise InvalidInput(
                f"replicas={replicas} with {len(names)} cache nodes: each copy needs a node of its own"
            )
        if weights and len(weights) != len(names):
            raise InvalidInput(f"{len(weights)} weights for {len(names)} cache nodes: give one for each")
        shares = dict(zip(names, weights or [1.0] * len(names), strict=True))
        self.chunk_nbytes = chunk_nbytes
        self.written_seconds = 0.0
        self._rounds = NodeRounds(nodes, shares, copies=1 + replicas, connections=connections)
        self.placement = self._rounds.placement
        self._patience_seconds = patience_seconds
        self._lock = threading.Lock()
        self._checker = Checker()
        reset_after_fork(self)

    @classmethod
    def of(cls, settings: Settings, *, patience_seconds: float = 0.0) -> ChunkStore:
        """The store that a process's settings mean; arguments and errors as for the class."""
        return cls(
            settings.cache_urls or (settings.url,),
            replicas=settings.cache_replicas,
            connections=settings.cache_connections,
            weights=settings.cache_weights,
            patience_seconds=patience_seconds,
        )

    def put(self, key: str, buffer: Tensor | memoryview, *, ttl_seconds: int) -> BlobRef:
        """Store a buffer and return its reference; chunks that exist are overwritten.

        The buffer must not change until this returns.

        Args:
            key: prefix of the chunk keys.
            buffer: contiguous CPU tensor (any dtype) or memoryview; sent from its own memory.
            ttl_seconds: lifetime of the chunks, at least 1.

        Raises:
            CacheUnreachable: no node answers.
            CacheError: a node refused.
        """
        if ttl_seconds < 1:
            raise InvalidInput(f"ttl_seconds must be at least 1, not {ttl_seconds}")
        view = as_bytes(buffer)
        started = time.perf_counter()
        parts = split(view, self.chunk_nbytes)
        prefix = key.encode()
        items = [(b"%s:%d" % (prefix, i), part) for i, part in enumerate(parts)]
        sums = [""] * len(items)
        if items:
            with self._checker.beside(parts, sums):
                self._patiently(self._rounds.store, items, ttl_seconds, sums)
        with self._lock:
            self.written_seconds += time.perf_counter() - started
        return BlobRef(key, len(view), self.chunk_nbytes, tuple(sums))

    def put_parts(self, key: str, view: memoryview, numbers: Sequence[int], *, ttl_seconds: int) -> list[str]:
        """Store some chunks of a buffer, as `put` stores all of them; those that exist are overwritten.

        Args:
            key: prefix of the chunk keys.
            view: the whole buffer, or as much of it as is known; these chunks of it must not change
                until this returns, or are to be stored again.
            numbers: which chunks, counted from 0; at least one.
            ttl_seconds: lifetime of the chunks, at least 1.

        Returns:
            the xxh3_64 of each, in the order of `numbers`.

        Raises:
            CacheUnreachable: no node answers.
            CacheError: a node refused.
        """
        started = time.perf_counter()
        size, prefix = self.chunk_nbytes, key.encode()
        items = [(b"%s:%d" % (prefix, i), view[i * size : (i + 1) * size]) for i in numbers]
        sums = [""] * len(items)
        self._patiently(self._rounds.store, items, ttl_seconds, sums)
        with self._lock:
            self.written_seconds += time.perf_counter() - started
        return sums

    def get(self, ref: BlobRef, out: Tensor | None = None) -> Tensor:
        """Fetch a blob and verify it.

        Args:
            ref: from `put`.
            out: 1-D uint8 CPU tensor of `ref.nbytes` bytes to receive into (pinned, if it goes on
                to a GPU); allocated if None. Undefined after an error.

        Returns:
            `out`, 1-D uint8.

        Raises:
            ChunkMissing: a chunk expired, was evicted or was lost with its node.
            ChunkCorrupt: a chunk is not what was written.
            CacheUnreachable: no node answers.
            CacheError: a node refused.
        """
        if out is None:
            out = torch.empty(ref.nbytes, dtype=torch.uint8)
        self.read_into(ref, out)
        return out

    def read_into(self, ref: BlobRef, buffer: Tensor | memoryview) -> None:
        """As `get`, into any memory of `ref.nbytes` bytes: of a contiguous CPU tensor, or writable."""
        ref.require_length(buffer)
        if ref.nbytes:
            parts = Cut(partial(as_bytes, buffer), ref.nbytes, ref.chunk_nbytes)
            self._patiently(self._rounds.load, _keys(ref), parts, ref.checksums)

    def read_parts(
        self, key: str, view: memoryview, sums: Mapping[int, str], chunk_nbytes: int | None = None
    ) -> None:
        """Fetch some chunks of a blob into its memory and verify them; errors as for `get`.

        Args:
            key: prefix of the chunk keys.
            view: memory of the whole blob; of it, these chunks' are written to.
            sums: number of each wanted chunk -> its xxh3_64; at least one.
            chunk_nbytes: length of the blob's chunks; None: as long as this store writes them.
        """
        size, prefix = chunk_nbytes or self.chunk_nbytes, key.encode()
        numbers = sorted(sums)  # only the last one may be shorter
        parts = [view[i * size : (i + 1) * size] for i in numbers]
        names = [b"%s:%d" % (prefix, i) for i in numbers]
        self._patiently(self._rounds.load, names, parts, [sums[i] for i in numbers])

    def put_many(self, blobs: Sequence[tuple[str, memoryview]], *, ttl_seconds: int) -> None:
        """Store many small blobs together; each becomes one chunk, whatever `chunk_nbytes` is.

        Args:
            blobs: prefix and bytes of each.
            ttl_seconds: lifetime of the chunks, at least 1.

        Raises:
            CacheUnreachable: no node answers.
            CacheError: a node refused.
        """
        if not blobs:
            return
        started = time.perf_counter()
        self._patiently(self._rounds.store, [(f"{key}:0".encode(), view) for key, view in blobs], ttl_seconds)
        with self._lock:
            self.written_seconds += time.perf_counter() - started

    def get_many(self, refs: Sequence[BlobRef]) -> list[Tensor]:
        """Fetch many small blobs together; as `get` for each, but not a round trip for each."""
        outs = [torch.empty(ref.nbytes, dtype=torch.uint8) for ref in refs]
        alike: dict[int, tuple[list[bytes], list[memoryview], list[str]]] = {}
        for ref, out in zip(refs, outs, strict=True):
            for key, part, checksum in zip(
                _keys(ref), split(as_bytes(out), ref.chunk_nbytes), ref.checksums, strict=True
            ):
                keys, parts, sums = alike.setdefault(len(part), ([], [], []))
                keys.append(key)
                parts.append(part)
                sums.append(checksum)
        for keys, parts, sums in alike.values():
            self._patiently(self._rounds.load, keys, parts, sums)
        return outs

    def delete(self, refs: Iterable[BlobRef]) -> None:
        """Delete the chunks of blobs; absent ones are no error.

        With several nodes, one that does not answer is passed over: its chunks expire.

        Raises:
            CacheUnreachable: the only node does not answer.
            CacheError: a node refused.
        """
        self._rounds.delete([key for ref in refs for key in ref.chunk_keys()])

    def touch(self, ref: BlobRef, ttl_seconds: int) -> None:
        """Set the remaining lifetime of a blob's chunks.

        Raises:
            ChunkMissing: a chunk is gone already.
            CacheUnreachable: no node answers.
            CacheError: a node refused.
        """
        self._patiently(self._rounds.touch, list(ref.chunk_keys()), ttl_seconds)

    def extend(self, refs: Sequence[BlobRef], ttl_seconds: int) -> list[bool]:
        """Tell which blobs are stored whole, and let the chunks that there are live at least so long.

        A life that is longer already stays. The nodes must be Valkey, or Redis 7 or newer.

        Raises:
            CacheUnreachable: no node answers.
            CacheError: a node refused.
        """
        found: dict[str, bool] = {key: False for ref in refs for key in ref.chunk_keys()}
        self._patiently(self._rounds.extend, found, ttl_seconds)
        return [all(found[key] for key in ref.chunk_keys()) for ref in refs]

    def close(self) -> None:
        """Close connections and threads; the store may be used again."""
        self._rounds.close()
        self._checker.close()

    def reset(self) -> None:
        """Start afresh in a forked child, which has none of the parent's threads."""
        self._lock = threading.Lock()

    def _patiently(self, attempt: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            return attempt(*args, **kwargs)
        except CacheUnreachable:
            if not self._patience_seconds:
                raise
        deadline = time.monotonic() + self._patience_seconds
        pause = 0.05
        while True:
            time.sleep(pause)
            pause = min(2 * pause, 1.0)
            try:
                return attempt(*args, **kwargs)
            except CacheUnreachable:
                if time.monotonic() + pause > deadline:
                    raise


def _keys(ref: BlobRef) -> list[bytes]:
    """The key of each chunk of a blob, also of one that travels in its reference."""
    prefix = ref.key.encode()
    return [b"%s:%d" % (prefix, i) for i in range(len(ref.checksums))]
