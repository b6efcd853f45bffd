"""A blob that goes to the chunk store while its bytes are still being written.

Whoever fills the buffer says which bytes are done; a thread of the upload's own stores each chunk as soon
as all its bytes are. A chunk that is written to again afterwards is stored again. Nobody is told of the
blob before `finish`, so what others can see, and when, does not change; chunks of an upload that comes to
nothing are deleted, and what a dead process leaves behind has a TTL.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from torchord.cache.blobs.blob import BlobRef
from torchord.cache.errors import CacheError
from torchord.cache.tensors.codec import as_bytes
from torchord.cache.tensors.pieces import chunk_count

log = logging.getLogger(__name__)

_AT_ONCE_NBYTES = 2 << 20  # per round trip of the thread: what an upload that is given up still sends

_TOLD_TIMES = 4  # at least, where the chunks are enough: who reads along is that much of the blob behind


class PartStore(Protocol):
    """What an upload needs of a chunk store."""

    @property
    def chunk_nbytes(self) -> int:
        """Length of each chunk, in bytes."""
        ...

    def put_parts(self, key: str, view: memoryview, numbers: Sequence[int], *, ttl_seconds: int) -> list[str]:
        """Store some chunks of a blob; their checksums, in the order of the numbers."""
        ...

    def delete(self, refs: Iterable[BlobRef]) -> None:
        """Delete blobs."""
        ...


class Upload:
    """One blob on its way. All methods but the thread's own are for one thread.

    Args:
        store: where the chunks go.
        key: prefix of the chunk keys.
        buffer: uint8, 1-D, on the CPU; at least as long as the blob will be.
        due: bytes of each chunk that have to be reported before it goes out; a chunk without an entry
            waits for `finish`.
        ttl_seconds: lifetime of the chunks.
        tell: called by the thread each time that more is stored, with the checksum of each chunk that is;
            an error of the store is none of the upload.
    """

    def __init__(
        self,
        store: PartStore,
        key: str,
        buffer: Tensor,
        due: Sequence[int],
        *,
        ttl_seconds: int,
        tell: Callable[[Mapping[int, str]], None] | None = None,
    ) -> None:
        self._store = store
        self._key = key
        self._view = as_bytes(buffer)
        self._due = list(due)
        self._ttl_seconds = ttl_seconds
        self._tell = tell
        count = chunk_count(len(self._view), store.chunk_nbytes)
        most = max(1, _AT_ONCE_NBYTES // store.chunk_nbytes)
        self._at_once = most if tell is None else min(most, max(1, count // _TOLD_TIMES))
        self._sums: dict[int, str] = {}
        self._queue: deque[int] = deque()
        self._begun: set[int] = set()  # chunks that were handed to the thread
        self._nbytes = len(self._view)  # the blob's length, as far as it is known
        self._change = threading.Condition()
        self._closed = self._given_up = self._over = False
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None

    @property
    def early(self) -> int:
        """How many chunks have been handed to the thread."""
        return len(self._begun)

    def done(self, start: int, nbytes: int) -> None:
        """Bytes of the buffer are as they will be; each is reported once."""
        if not nbytes:
            return
        size = self._store.chunk_nbytes
        stop, ready = start + nbytes, []
        for number in range(start // size, min(chunk_count(stop, size), len(self._due))):
            self._due[number] -= min(stop, (number + 1) * size) - max(start, number * size)
            if self._due[number] == 0:
                ready.append(number)
        self._hand_over(ready)

    def changed(self, start: int, nbytes: int) -> None:
        """Bytes were written that may have been reported as done before: their chunks go out again."""
        size = self._store.chunk_nbytes
        if nbytes:
            numbers = range(start // size, chunk_count(start + nbytes, size))
            self._hand_over([number for number in numbers if number in self._begun])

    def finish(self, nbytes: int) -> BlobRef:
        """Store what is not stored yet and wait for all of it.

        Args:
            nbytes: length of the blob: that much of the buffer, whose bytes are all written now.

        Raises:
            CacheError: a chunk could not be stored; the upload is given up.
        """
        self._nbytes = nbytes
        size = self._store.chunk_nbytes
        count = chunk_count(nbytes, size)
        self._hand_over([number for number in range(count) if number not in self._begun])
        with self._change:
            self._closed = True
            self._change.notify()
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            self.give_up()
            raise self._error
        return BlobRef(self._key, nbytes, size, tuple(self._sums[number] for number in range(count)))

    def give_up(self) -> None:
        """Send no more, and delete what was sent; does not wait. After `finish` it does nothing."""
        with self._change:
            if self._given_up or (self._closed and self._error is None):
                return
            self._given_up = True
            over = self._over
            self._change.notify()
        if over:
            self._delete()

    def _hand_over(self, numbers: Sequence[int]) -> None:
        if not numbers:
            return
        with self._change:
            self._queue.extend(numbers)
            self._begun.update(numbers)
            self._change.notify()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="torchord-upload", daemon=True)
            self._thread.start()

    # --- in the thread --------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while numbers := self._next():
                sums = self._store.put_parts(
                    self._key, self._view[: self._nbytes], numbers, ttl_seconds=self._ttl_seconds
                )
                self._sums.update(zip(numbers, sums, strict=True))
                self._say()
        except Exception as error:  # noqa: BLE001  for the thread that waits in `finish`
            self._error = error
        with self._change:
            self._over = True
            given_up = self._given_up
        if given_up:
            self._delete()

    def _say(self) -> None:
        if self._tell is None:
            return
        try:
            self._tell(self._sums)
        except CacheError as error:
            log.info("nobody is told that %s is on its way: %s", self._key, error)
            self._tell = None

    def _next(self) -> list[int]:
        """The chunks to store next; none at the end."""
        with self._change:
            while not (self._queue or self._closed or self._given_up):
                self._change.wait()
            if self._given_up:
                return []
            return [self._queue.popleft() for _ in range(min(self._at_once, len(self._queue)))]

    def _delete(self) -> None:
        count = chunk_count(len(self._view), self._store.chunk_nbytes)
        doomed = BlobRef(self._key, len(self._view), self._store.chunk_nbytes, ("",) * count)
        try:
            self._store.delete([doomed])
        except CacheError as error:  # the chunks carry a TTL
            log.debug("chunks of %s are left to their TTL: %s", self._key, error)
