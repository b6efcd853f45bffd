"""Rounds over the cache nodes: one attempt of each operation, in the order of the ring."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import xxhash

from torchord.cache.blobs.blob import BlobRef as BlobRef
from torchord.cache.blobs.ring import Ring
from torchord.cache.errors import CacheError, CacheUnreachable, ChunkCorrupt, ChunkMissing
from torchord.cache.servers.cluster import Cluster
from torchord.cache.servers.fork import reset_after_fork
from torchord.cache.servers.node import Node, Problem
from torchord.cache.tensors.pieces import Parts, chunk_count

_AVOIDED_SECONDS = 5.0  # how long a node that did not answer is asked last; doubled each time
_MOST_AVOIDED_SECONDS = 60.0
_log = logging.getLogger(__name__)


class NodeRounds:
    """Chunks on several nodes: a round asks each chunk's first node, the next one its second, and so on.

    A node that did not answer is asked last for a while. Threads may share it; a forked child makes its own.

    Args:
        nodes: the servers; a whole Redis Cluster may be one.
        shares: relative share of each node by its label.
        copies: how many nodes get each chunk.
        connections: sockets per node that one operation uses at a time.

    Attributes:
        placement: see `ChunkStore`.

    Raises:
        CacheUnreachable: from each operation: no node answers.
        CacheError: from each operation: a node refused.
    """

    def __init__(
        self, nodes: Sequence[Node | Cluster], shares: Mapping[str, float], *, copies: int, connections: int
    ) -> None:
        self.placement = _in_words(shares, copies)
        self._ring = Ring(shares)
        self._nodes = {node.label: node for node in nodes}
        self._only = nodes[0] if len(nodes) == 1 else None
        self._copies = copies
        self._connections = connections
        self._avoided: dict[str, tuple[float, float]] = {}  # name -> (until, for how long), seconds
        self._lock = threading.Lock()
        self._threads: ThreadPoolExecutor | None = None
        reset_after_fork(self)

    def close(self) -> None:
        """Close connections and threads; it may be used again."""
        with self._lock:
            threads, self._threads = self._threads, None
        if threads is not None:
            threads.shutdown()
        for node in self._nodes.values():
            node.close()

    def reset(self) -> None:
        """Start afresh in a forked child, which has none of the parent's threads."""
        self._lock = threading.Lock()
        self._threads = None

    def store(
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

    def load(self, keys: Sequence[bytes], parts: Parts, sums: Sequence[str]) -> None:
        """Load; what arrives with other bytes than were written is asked for once more."""
        try:
            self._load_once(keys, parts, sums)
        except ChunkCorrupt as error:
            _log.warning("%s; reading it once more", error)
            self._load_once(keys, parts, sums)

    def _load_once(self, keys: Sequence[bytes], parts: Parts, sums: Sequence[str]) -> None:
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

    def touch(self, keys: Sequence[str], ttl_seconds: int) -> None:
        """Set the lives of chunks.

        Raises:
            ChunkMissing: one is gone already.
        """
        found, failed = self._expire(keys, ttl_seconds, extend=False)
        if not all(found):
            raise self._no_chunk(keys[found.index(False)], None, failed)

    def extend(self, found: dict[str, bool], ttl_seconds: int) -> None:
        """Let the chunks that there are live at least so long, and fill in which those are."""
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

    def delete(self, keys: Sequence[str]) -> None:
        """Delete chunks; a node of several that does not answer is passed over."""
        groups: dict[str, list[bytes]] = {}
        for key, order in zip(keys, self._orders(keys), strict=True):
            for name in order[: self._copies]:
                groups.setdefault(name, []).append(key.encode())
        failed = self._each(
            [(name, partial(self._nodes[name].delete, keys)) for name, keys in groups.items()]
        )
        if failed and len(self._nodes) == 1:
            raise next(iter(failed.values()))

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

    def _pool(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._threads is None:
                most = 2 + 2 * len(self._nodes) * self._connections
                self._threads = ThreadPoolExecutor(most, thread_name_prefix="torchord-cache")
            return self._threads


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
