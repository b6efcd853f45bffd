"""The chunk store: one large buffer in, a small reference out; the buffer travels as checked chunks.

A *blob* is a run of bytes under a key prefix. It is cut into chunks of `chunk_nbytes`, each one
Redis string `<key>:<index>` with a TTL. The reference carries each chunk's checksum, so a reader
knows at once when it was given other bytes than the writer wrote.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import ParamSpec, Protocol

import torch
import xxhash
from torch import Tensor

from torchord.cache.blobs.blob import BlobRef as BlobRef
from torchord.cache.blobs.checksum_thread import Checker
from torchord.cache.blobs.ring import Ring
from torchord.cache.errors import CacheError, CacheUnreachable, ChunkCorrupt, ChunkMissing, InvalidInput
from torchord.cache.servers.cluster import node_of
from torchord.cache.servers.fork import reset_after_fork
from torchord.cache.servers.node import Problem
from torchord.cache.settings import Settings
from torchord.cache.tensors.codec import as_bytes
from torchord.cache.tensors.pieces import Cut, Parts, chunk_count, split

CHUNK_NBYTES = 1 << 19
"""Half a MiB: still in the processor's cache when it is checked, and few enough keys for 1.6 GB."""

_AVOIDED_SECONDS = 5.0  # how long a node that did not answer is asked last; doubled each time
_MOST_AVOIDED_SECONDS = 60.0
_log = logging.getLogger(__name__)
P = ParamSpec("P")


@dataclass(slots=True)
class Counters:
    """What went through one store: bytes and wall seconds, each way."""

    bytes_in: int = 0
    bytes_out: int = 0
    seconds_in: float = 0.0
    seconds_out: float = 0.0


class Chunks(Protocol):
    """What callers need of a chunk store; `ChunkStore` and `MemoryChunkStore` have it.

    Attributes:
        chunk_nbytes: length of each chunk, in bytes.
        counters: what went through the store.
    """

    chunk_nbytes: int
    counters: Counters

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

    def read_parts(self, key: str, view: memoryview, sums: Mapping[int, str]) -> None:
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
        self.counters = Counters()
        self.placement = _in_words(shares, 1 + replicas)
        self._ring = Ring(shares)
        self._nodes = {node.label: node for node in nodes}
        self._only = self._nodes[names[0]] if len(names) == 1 else None
        self._copies = 1 + replicas
        self._connections = connections
        self._patience_seconds = patience_seconds
        self._avoided: dict[str, tuple[float, float]] = {}  # name -> (until, for how long), seconds
        self._lock = threading.Lock()
        self._threads: ThreadPoolExecutor | None = None
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
                self._patiently(self._store, items, ttl_seconds, sums)
        with self._lock:
            self.counters.bytes_out += len(view)
            self.counters.seconds_out += time.perf_counter() - started
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
        self._patiently(self._store, items, ttl_seconds, sums)
        with self._lock:
            self.counters.bytes_out += sum(len(part) for _, part in items)
            self.counters.seconds_out += time.perf_counter() - started
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
        started = time.perf_counter()
        if ref.nbytes:
            parts = Cut(partial(as_bytes, buffer), ref.nbytes, ref.chunk_nbytes)
            self._patiently(self._load_again, _keys(ref), parts, ref.checksums)
        with self._lock:
            self.counters.bytes_in += ref.nbytes
            self.counters.seconds_in += time.perf_counter() - started

    def read_parts(self, key: str, view: memoryview, sums: Mapping[int, str]) -> None:
        """Fetch some chunks of a blob into its memory and verify them; errors as for `get`.

        Args:
            key: prefix of the chunk keys.
            view: memory of the whole blob; of it, these chunks' are written to.
            sums: number of each wanted chunk -> its xxh3_64; at least one.
        """
        started = time.perf_counter()
        size, prefix = self.chunk_nbytes, key.encode()
        numbers = sorted(sums)  # only the last one may be shorter
        parts = [view[i * size : (i + 1) * size] for i in numbers]
        names = [b"%s:%d" % (prefix, i) for i in numbers]
        self._patiently(self._load_again, names, parts, [sums[i] for i in numbers])
        with self._lock:
            self.counters.bytes_in += sum(len(part) for part in parts)
            self.counters.seconds_in += time.perf_counter() - started

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
        self._patiently(self._store, [(f"{key}:0".encode(), view) for key, view in blobs], ttl_seconds)
        with self._lock:
            self.counters.bytes_out += sum(len(view) for _, view in blobs)
            self.counters.seconds_out += time.perf_counter() - started

    def get_many(self, refs: Sequence[BlobRef]) -> list[Tensor]:
        """Fetch many small blobs together; as `get` for each, but not a round trip for each."""
        started = time.perf_counter()
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
            self._patiently(self._load_again, keys, parts, sums)
        with self._lock:
            self.counters.bytes_in += sum(ref.nbytes for ref in refs)
            self.counters.seconds_in += time.perf_counter() - started
        return outs

    def delete(self, refs: Iterable[BlobRef]) -> None:
        """Delete the chunks of blobs; absent ones are no error.

        With several nodes, one that does not answer is passed over: its chunks expire.

        Raises:
            CacheUnreachable: the only node does not answer.
            CacheError: a node refused.
        """
        groups: dict[str, list[bytes]] = {}
        keys = [key for ref in refs for key in ref.chunk_keys()]
        for key, order in zip(keys, self._orders(keys), strict=True):
            for name in order[: self._copies]:
                groups.setdefault(name, []).append(key.encode())
        failed = self._each(
            [(name, partial(self._nodes[name].delete, keys)) for name, keys in groups.items()]
        )
        if failed and len(self._nodes) == 1:
            raise next(iter(failed.values()))

    def touch(self, ref: BlobRef, ttl_seconds: int) -> None:
        """Set the remaining lifetime of a blob's chunks.

        Raises:
            ChunkMissing: a chunk is gone already.
            CacheUnreachable: no node answers.
            CacheError: a node refused.
        """
        self._patiently(self._touch, ref, ttl_seconds)

    def extend(self, refs: Sequence[BlobRef], ttl_seconds: int) -> list[bool]:
        """Tell which blobs are stored whole, and let the chunks that there are live at least so long.

        A life that is longer already stays. The nodes must be Valkey, or Redis 7 or newer.

        Raises:
            CacheUnreachable: no node answers.
            CacheError: a node refused.
        """
        found: dict[str, bool] = {key: False for ref in refs for key in ref.chunk_keys()}
        self._patiently(self._extend, found, ttl_seconds)
        return [all(found[key] for key in ref.chunk_keys()) for ref in refs]

    def close(self) -> None:
        """Close connections and threads; the store may be used again."""
        with self._lock:
            threads, self._threads = self._threads, None
        if threads is not None:
            threads.shutdown()
        self._checker.close()
        for node in self._nodes.values():
            node.close()

    def reset(self) -> None:
        """Start afresh in a forked child, which has none of the parent's threads."""
        self._lock = threading.Lock()
        self._threads = None

    # --- one attempt of each operation: rounds over the nodes, in the order of the ring -------

    def _store(
        self, items: Sequence[tuple[bytes, memoryview]], ttl_seconds: int, sums: list[str] | None = None
    ) -> None:
        """Store items; fill in their checksums, computed while a node works on what was sent."""

        def check(indices: Sequence[int], first: int, stop: int) -> None:
            if sums is not None:
                for i in indices[first:stop]:
                    sums[i] = sums[i] or xxhash.xxh3_64_hexdigest(items[i][1])

        if self._only is not None and self._connections == 1:
            self._only.store(items, ttl_seconds, partial(check, range(len(items))))
            return
        orders = self._orders([key.decode() for key, _ in items])
        placed = [0] * len(items)
        failed: dict[str, CacheUnreachable] = {}

        def send(name: str, indices: Sequence[int]) -> None:
            self._nodes[name].store([items[i] for i in indices], ttl_seconds, partial(check, indices))

        for turn in range(len(self._nodes)):
            groups: dict[str, list[int]] = {}
            for i, order in enumerate(orders):
                if turn < self._copies or placed[i] < self._copies:
                    groups.setdefault(order[turn], []).append(i)
            lost = self._each(self._lanes(groups, send))
            failed |= lost
            for name, indices in groups.items():
                for i in indices if name not in lost else ():
                    placed[i] += 1
        if not all(placed):
            raise _nowhere(failed)

    def _load_again(self, keys: Sequence[bytes], parts: Parts, sums: Sequence[str]) -> None:
        """Load; what arrives with other bytes than were written is asked for once more."""
        try:
            self._load(keys, parts, sums)
        except ChunkCorrupt as error:
            _log.warning("%s; reading it once more", error)
            self._load(keys, parts, sums)

    def _load(self, keys: Sequence[bytes], parts: Parts, sums: Sequence[str]) -> None:
        if self._only is not None and self._connections == 1:
            problems = self._only.load(keys, parts, sums)
            if problems:
                raise self._no_chunk(keys[min(problems)].decode(), problems[min(problems)], {})
            return
        orders = self._orders([key.decode() for key in keys])
        good = [False] * len(keys)
        problems = {}
        failed: dict[str, CacheUnreachable] = {}
        refused: list[CacheError] = []

        def receive(name: str, indices: Sequence[int]) -> None:
            try:
                wrong = self._nodes[name].load(
                    [keys[i] for i in indices], [parts[i] for i in indices], [sums[i] for i in indices]
                )
            except CacheUnreachable:
                raise
            except CacheError as error:  # another node may have it all the same
                refused.append(error)
                return
            for position, i in enumerate(indices):
                good[i] = position not in wrong
                if wrong.get(position) is Problem.CORRUPT:
                    problems[i] = Problem.CORRUPT

        for turn in range(len(self._nodes)):
            groups: dict[str, list[int]] = {}
            for i, order in enumerate(orders):
                if not good[i]:
                    groups.setdefault(order[turn], []).append(i)
            failed |= self._each(self._lanes(groups, receive))
        if not all(good):
            bad = good.index(False)
            if refused and bad not in problems:
                raise refused[0]
            raise self._no_chunk(keys[bad].decode(), problems.get(bad), failed)

    def _touch(self, ref: BlobRef, ttl_seconds: int) -> None:
        keys = list(ref.chunk_keys())
        found, failed = self._expire(keys, ttl_seconds, extend=False)
        if not all(found):
            raise self._no_chunk(keys[found.index(False)], None, failed)

    def _extend(self, found: dict[str, bool], ttl_seconds: int) -> None:
        hits, failed = self._expire(list(found), ttl_seconds, extend=True)
        if found and len(failed) == len(self._nodes):
            raise _nowhere(failed)
        found.update(zip(found, hits, strict=True))

    def _expire(
        self, keys: Sequence[str], ttl_seconds: int, *, extend: bool
    ) -> tuple[list[bool], dict[str, CacheUnreachable]]:
        """Set lives on all nodes that have a key; returns which keys there are, and silent nodes."""
        orders = self._orders(keys)
        found = [False] * len(keys)
        failed: dict[str, CacheUnreachable] = {}

        def expire(name: str, indices: Sequence[int]) -> None:
            hits = self._nodes[name].expire([keys[i].encode() for i in indices], ttl_seconds, extend=extend)
            for i, hit in zip(indices, hits, strict=True):
                found[i] |= hit

        for turn in range(len(self._nodes)):
            groups: dict[str, list[int]] = {}
            for i, order in enumerate(orders):
                if turn < self._copies or not found[i]:
                    groups.setdefault(order[turn], []).append(i)
            failed |= self._each(self._lanes(groups, expire))
        return found, failed

    # --- nodes and threads -------------------------------------------------------------------

    def _orders(self, keys: Sequence[str]) -> list[list[str]]:
        """For each key all nodes in the order in which to try them; silent ones last."""
        if len(self._nodes) == 1:
            return [list(self._nodes)] * len(keys)
        orders = [list(self._ring.order(key)) for key in keys]
        now = time.monotonic()
        silent = {name for name, (until, _) in list(self._avoided.items()) if until > now}
        if silent:
            for order in orders:
                order.sort(key=silent.__contains__)
        return orders

    def _lanes(
        self, groups: Mapping[str, Sequence[int]], work: Callable[[str, Sequence[int]], None]
    ) -> list[tuple[str, Callable[[], None]]]:
        """Cut the work of each node into one run of chunks per connection."""
        lanes: list[tuple[str, Callable[[], None]]] = []
        for name, indices in groups.items():
            size = chunk_count(len(indices), self._connections)
            for first in range(0, len(indices), size):
                lanes.append((name, partial(work, name, indices[first : first + size])))
        return lanes

    def _each(self, tasks: Sequence[tuple[str, Callable[[], None]]]) -> dict[str, CacheUnreachable]:
        """Run tasks side by side, the last one in this thread, and return the nodes that did not answer."""
        others = [(name, self._pool().submit(task)) for name, task in tasks[:-1]]
        failed: dict[str, CacheUnreachable] = {}
        refused: CacheError | None = None
        outcomes = [(name, other.result) for name, other in others]
        for name, outcome in [*tasks[-1:], *outcomes]:
            try:
                outcome()
                if name not in failed:
                    self._avoided.pop(name, None)
            except CacheUnreachable as error:
                failed[name] = error
                self._avoid(name, error)
            except CacheError as error:
                refused = error
        if refused is not None:
            raise refused
        return failed

    def _avoid(self, name: str, error: CacheUnreachable) -> None:
        if len(self._nodes) == 1:
            return
        _, seconds = self._avoided.get(name, (0.0, 0.0))
        seconds = min(max(2 * seconds, _AVOIDED_SECONDS), _MOST_AVOIDED_SECONDS)
        self._avoided[name] = (time.monotonic() + seconds, seconds)
        _log.warning("%s; asking the other nodes first for %g s", error, seconds)

    def _no_chunk(
        self, key: str, problem: Problem | None, failed: Mapping[str, CacheUnreachable]
    ) -> CacheError:
        if problem is Problem.CORRUPT:
            corrupt = ChunkCorrupt(
                f"chunk {key} on cache node {', '.join(self._nodes)} is not what was written"
            )
            corrupt.chunk = _number(key)
            return corrupt
        if len(failed) == len(self._nodes):
            return _nowhere(failed)
        silent = f"; silent: {', '.join(failed)}" if failed else ""
        error = ChunkMissing(f"chunk {key} is on none of the cache nodes {', '.join(self._nodes)}{silent}")
        error.chunk = _number(key)
        error.__cause__ = next(iter(failed.values()), None)
        return error

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

    def _pool(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._threads is None:
                most = 2 + 2 * len(self._nodes) * self._connections
                self._threads = ThreadPoolExecutor(most, thread_name_prefix="torchord-cache")
            return self._threads


def _keys(ref: BlobRef) -> list[bytes]:
    """The key of each chunk of a blob, also of one that travels in its reference."""
    prefix = ref.key.encode()
    return [b"%s:%d" % (prefix, i) for i in range(len(ref.checksums))]


def _in_words(shares: Mapping[str, float], copies: int) -> str:
    """What decides where chunks lie; a single node may be known under another address to each process."""
    if len(shares) == 1:
        return "all chunks on one node"
    nodes = ", ".join(f"{name} (weight {shares[name]:g})" for name in sorted(shares))
    return f"{copies} of each chunk on {nodes}"


def _number(key: str) -> int:
    return int(key.rpartition(":")[2])


def _nowhere(failed: Mapping[str, CacheUnreachable]) -> CacheUnreachable:
    """The error when no node answered: the first node's own words, and how many said the same."""
    first = next(iter(failed.values()))
    if len(failed) == 1:
        return first
    error = CacheUnreachable(f"none of {len(failed)} cache nodes answers; the first: {first}")
    error.__cause__ = first
    return error
