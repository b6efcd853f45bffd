"""Chunks that this process, or this host, has fetched already: a bounded LRU in memory, one on disk.

Chunks are named by their content, so one cache serves all datasets of a process and nothing in it
is ever out of date. A chunk that several threads want at once is fetched by one of them.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from torchord.cache.datasets.content import Bytes, Chunk
from torchord.cache.servers.fork import reset_after_fork

Fetch = Callable[[Sequence[Chunk]], list[Bytes]]

_LEAD = b"torchord chunk\n\0"  # a chunk's bytes are anybody's: a file that began with them could be a program
_RESCAN_SHARE = 16  # look at the disk again after having written 1/16 of its bound
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class ReadCounters:
    """Where chunks came from.

    Attributes:
        fetched: chunks read from the store (over the network).
        fetched_nbytes: their bytes.
        memory_hits: chunks that this process had.
        disk_hits: chunks that this host's disk had.
        shared: chunks that another thread was fetching already.
    """

    fetched: int = 0
    fetched_nbytes: int = 0
    memory_hits: int = 0
    disk_hits: int = 0
    shared: int = 0


class ChunkCache:
    """The chunks used last, up to a bound.

    Threads may share a cache. A forked child keeps what its parent had.

    Args:
        nbytes: how much is kept in memory, in bytes; what a caller holds while it copies from it
            comes on top.
        disk: the tier below, or None.
    """

    def __init__(self, nbytes: int, *, disk: DiskTier | None = None) -> None:
        self.bound_nbytes = nbytes
        self._disk = disk
        self._kept: OrderedDict[str, Bytes] = OrderedDict()
        self._kept_nbytes = 0
        self._flights: dict[str, Future[Bytes]] = {}
        self._lock = threading.Lock()
        reset_after_fork(self)

    @property
    def nbytes(self) -> int:
        """How much is kept in memory now, in bytes; never above the bound."""
        return self._kept_nbytes

    def get(self, chunks: Sequence[Chunk], fetch: Fetch, counters: ReadCounters) -> dict[str, Bytes]:
        """Return chunks by address, fetching what is not here.

        Args:
            chunks: what is wanted.
            fetch: returns the bytes of the chunks that it is given, a part of `chunks` in the
                same order. What it raises is raised here.
            counters: where to count.

        Returns:
            address -> bytes, 1-D uint8, not to be written to.
        """
        found: dict[str, Bytes] = {}
        wanted = {chunk.address: chunk for chunk in chunks}
        while missing := [chunk for address, chunk in wanted.items() if address not in found]:
            mine, others = self._claim(missing, found, counters)
            if mine:
                self._bring(mine, fetch, counters, found)
            for address, flight in others:
                if flight.exception() is None:
                    found[address] = flight.result()
                    with self._lock:
                        counters.shared += 1
                # else: the next turn claims it, and meets the error itself if it persists
        return found

    def reset(self) -> None:
        """Start afresh in a forked child, in which nobody is fetching anything."""
        self._lock = threading.Lock()
        self._flights = {}

    def _claim(
        self, missing: Sequence[Chunk], found: dict[str, Bytes], counters: ReadCounters
    ) -> tuple[list[Chunk], list[tuple[str, Future[Bytes]]]]:
        """Take what is kept; split the rest into what this thread fetches and what others do."""
        mine: list[Chunk] = []
        others: list[tuple[str, Future[Bytes]]] = []
        with self._lock:
            for chunk in missing:
                kept = self._kept.get(chunk.address)
                flight = self._flights.get(chunk.address)
                if kept is not None:
                    self._kept.move_to_end(chunk.address)
                    found[chunk.address] = kept
                    counters.memory_hits += 1
                elif flight is not None:
                    others.append((chunk.address, flight))
                else:
                    self._flights[chunk.address] = Future()
                    mine.append(chunk)
        return mine, others

    def _bring(
        self, mine: Sequence[Chunk], fetch: Fetch, counters: ReadCounters, found: dict[str, Bytes]
    ) -> None:
        """Read chunks from disk or store, keep them, and tell those who wait for them."""
        try:
            got = {} if self._disk is None else self._disk.load(mine)
            absent = [chunk for chunk in mine if chunk.address not in got]
            fetched = dict(zip((c.address for c in absent), fetch(absent), strict=True)) if absent else {}
        except BaseException as error:
            with self._lock:
                flights = [self._flights.pop(chunk.address) for chunk in mine]
            for flight in flights:
                flight.set_exception(error)
            raise
        with self._lock:
            counters.disk_hits += len(got)
            counters.fetched += len(fetched)
            counters.fetched_nbytes += sum(data.size for data in fetched.values())
            got |= fetched
            flights = [self._flights.pop(chunk.address) for chunk in mine]
            for address, data in got.items():
                self._keep(address, data)
        for chunk, flight in zip(mine, flights, strict=True):
            flight.set_result(got[chunk.address])
        found |= got
        if self._disk is not None:
            self._disk.save(fetched)

    def _keep(self, address: str, data: Bytes) -> None:
        data.flags.writeable = False
        if data.size > self.bound_nbytes:
            return
        self._kept[address] = data
        self._kept_nbytes += data.size
        while self._kept_nbytes > self.bound_nbytes:
            _, old = self._kept.popitem(last=False)
            self._kept_nbytes -= old.size


class DiskTier:
    """Chunks as files below a directory that the processes of one host share.

    A file is checked when it is read, so a damaged or half-written one is no more than a miss.
    A disk that cannot be written to is reported once and then left alone, and so is a directory that
    other users can write to. The oldest files go when the bound is passed; each process looks after
    having written a sixteenth of it.

    Args:
        directory: of this user, closed to what others write; created, for this user only, if need be.
        nbytes: how much is kept, in bytes.
    """

    def __init__(self, directory: str | Path, nbytes: int) -> None:
        self.directory = Path(directory)
        self.bound_nbytes = nbytes
        self._unseen_nbytes = nbytes  # the first chunk written has the directory looked at
        self._broken = False

    def load(self, chunks: Sequence[Chunk]) -> dict[str, Bytes]:
        """Return those of the chunks that are on disk and whole."""
        found: dict[str, Bytes] = {}
        for chunk in chunks:
            path = self._path(chunk.address)
            try:
                with open(path, "rb", opener=_own) as file:
                    if file.read(len(_LEAD)) != _LEAD:
                        continue
                    data = np.fromfile(file, dtype=np.uint8)
                if data.size == chunk.nbytes and xxhash.xxh3_64_hexdigest(data.data) == chunk.checksum:
                    found[chunk.address] = data
                    os.utime(path)
            except OSError:
                continue
        return found

    def save(self, chunks: dict[str, Bytes]) -> None:
        """Write chunks to disk, and delete the oldest if it has become too full."""
        if self._broken:
            return
        try:
            for address, data in chunks.items():
                self._write(self._path(address), data)
            if self._unseen_nbytes * _RESCAN_SHARE > self.bound_nbytes:
                self._shrink()
        except OSError as error:
            self._broken = True
            _log.warning("no more chunks are kept in %s: %s", self.directory, error)

    def _path(self, address: str) -> Path:
        return self.directory / address[:2] / address

    def _write(self, path: Path, data: Bytes) -> None:
        if data.size > self.bound_nbytes:
            return
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_own(self.directory.stat()):
            raise PermissionError(errno.EPERM, "it must be this user's, and closed to what others write")
        path.parent.mkdir(mode=0o700, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=".", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(_LEAD)
                file.write(data.data)
            with contextlib.suppress(FileNotFoundError):  # another process took it for a leftover
                os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        self._unseen_nbytes += data.size

    def _shrink(self) -> None:
        files = []
        for path in self.directory.glob("??/*"):
            with contextlib.suppress(FileNotFoundError):  # another process is at it, too
                status = path.stat()
                files.append((status.st_mtime_ns, status.st_size, path))
        excess = sum(nbytes for _, nbytes, _ in files) - self.bound_nbytes
        for _, nbytes, path in sorted(files):
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            excess -= nbytes
        self._unseen_nbytes = 0


def _own(path: str, flags: int) -> int:
    """Open a file of this user that nobody else can write to, and no link.

    Raises:
        OSError: it is none, or cannot be opened.
    """
    fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
    found = os.fstat(fd)
    if stat.S_ISREG(found.st_mode) and _is_own(found):
        return fd
    os.close(fd)
    raise PermissionError(errno.EPERM, "it must be a file of this user, closed to what others write", path)


def _is_own(found: os.stat_result) -> bool:
    return found.st_uid == os.geteuid() and not found.st_mode & 0o022
