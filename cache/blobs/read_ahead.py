"""Reading a blob before its reference is known, chunk by chunk as notices name them."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import torch
from torch import Tensor

from torchord.cache.blobs.blob import BlobRef
from torchord.cache.blobs.chunk_store import Chunks
from torchord.cache.blobs.notice import Notice
from torchord.cache.tensors.codec import as_bytes

_AT_ONCE_NBYTES = 2 << 20  # what is read before somebody who waits for the blob has his turn


class ReadAhead:
    """What of a blob was read before its reference was known. Threads may share one.

    Args:
        chunks: where it is read from.
        nbytes: at most so long.
        chunk_nbytes: length of its chunks.
        view: memory to read into; None: memory of its own.
    """

    def __init__(
        self, chunks: Chunks, nbytes: int, chunk_nbytes: int, view: memoryview | None = None
    ) -> None:
        self.nbytes = nbytes
        self.chunk_nbytes = chunk_nbytes
        self._chunks = chunks
        self._buffer = torch.empty(nbytes if view is None else 0, dtype=torch.uint8)
        self._view = as_bytes(self._buffer) if view is None else view
        self._sums: dict[int, str] = {}  # of the chunks that are in the buffer
        self._wanted = threading.Event()
        self._lock = threading.Lock()

    @property
    def read_nbytes(self) -> int:
        """Bytes that are here."""
        return len(self._sums) * self.chunk_nbytes

    def follow(self, notice: Notice) -> bool:
        """Read chunks that a notice names and that are not here; False if there were none.

        Raises:
            CacheError: that failed.
        """
        if notice.nbytes > self.nbytes or notice.chunk_nbytes != self.chunk_nbytes:
            return False
        exact = notice.nbytes == self.nbytes and notice.ref is not None
        # Else the last one may turn out to be shorter.
        whole = len(notice.checksums) if exact else notice.nbytes // self.chunk_nbytes
        sums = {i: each for i, each in enumerate(notice.checksums[:whole]) if notice.stored >> i & 1}
        new = [i for i, each in sums.items() if self._sums.get(i) != each]
        most = max(1, _AT_ONCE_NBYTES // self.chunk_nbytes)
        for first in range(0, len(new), most):
            with self._lock:
                if self._wanted.is_set():
                    return False
                self._read(notice.key, self.nbytes, {i: sums[i] for i in new[first : first + most]})
        return bool(new)

    def complete(self, ref: BlobRef) -> Tensor | None:
        """The blob, once its reference is known: what is not here, or differs, is read now.

        Returns:
            uint8, 1-D, `ref.nbytes` long; None if this is of no use for it.

        Raises:
            ChunkMissing, ChunkCorrupt, CacheUnreachable: as the chunk store says.
        """
        self._wanted.set()
        if ref.nbytes > self.nbytes or ref.chunk_nbytes != self.chunk_nbytes or ref.data:
            return None
        with self._lock:
            whole = ref.nbytes // self.chunk_nbytes
            if ref.nbytes != self.nbytes:
                self._sums = {i: each for i, each in self._sums.items() if i < whole}
            missing = {i: each for i, each in enumerate(ref.checksums) if self._sums.get(i) != each}
            if missing:
                self._read(ref.key, ref.nbytes, missing)
            return self._buffer[: ref.nbytes]

    def _read(self, key: str, nbytes: int, sums: Mapping[int, str]) -> None:
        for i in sums:
            self._sums.pop(i, None)
        self._chunks.read_parts(key, self._view[:nbytes], sums)
        self._sums.update(sums)
