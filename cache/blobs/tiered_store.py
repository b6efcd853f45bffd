"""The chunk store with the same-host tier before it: one interface, `Chunks`, for both.

A read looks on this host first; what is not there is downloaded once for all processes of the host. A
write goes to the chunk store and is shown to the host, or to the host alone where the only reader is
known to be here. Whatever goes wrong with the host's tier, the chunk store serves.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from torchord.cache.blobs.blob import BlobRef, inlined, unpacked
from torchord.cache.blobs.bounds import require_plausible
from torchord.cache.blobs.chunk_store import CHUNK_NBYTES, Chunks
from torchord.cache.blobs.content_digest import ContentDigest, content_digest
from torchord.cache.blobs.host_tier import HostTier
from torchord.cache.blobs.read_ahead import ReadAhead
from torchord.cache.blobs.upload import Upload
from torchord.cache.tensors.codec import as_bytes
from torchord.cache.tensors.pieces import checksums, split

HOST_AT_LEAST_NBYTES = 256 << 10
INLINE_NBYTES = 4096
"""Up to here a blob may travel inside its reference: less than what one more round trip costs."""

_LOCAL_KEEP_SECONDS = 3600.0  # more than a step takes; what a killed worker left lies there as long


@dataclass(frozen=True, slots=True)
class TierCounters:
    """How this process's reads and writes were served.

    Attributes:
        host_hits: reads that another process of this host, or this one, had done before.
        host_nbytes: bytes of those.
        host_seconds: time spent on those.
        store_reads: reads from the chunk store.
        store_nbytes: bytes of those.
        store_seconds: time spent on those.
        ahead_nbytes: of those bytes, what was read before somebody asked for the blob.
        written_nbytes: bytes written to the chunk store.
        local_nbytes: bytes shown to this host alone.
    """

    host_hits: int = 0
    host_nbytes: int = 0
    host_seconds: float = 0.0
    store_reads: int = 0
    store_nbytes: int = 0
    store_seconds: float = 0.0
    ahead_nbytes: int = 0
    written_nbytes: int = 0
    local_nbytes: int = 0


class TieredStore:
    """Blobs on this host and in the chunk store.

    Args:
        chunks: the chunk store.
        host: the same-host tier; None where it is turned off.
    """

    def __init__(self, chunks: Chunks, host: HostTier | None) -> None:
        self.chunks = chunks
        self.host = host
        self._counters = TierCounters()
        self._lock = threading.Lock()

    @property
    def counters(self) -> TierCounters:
        """A snapshot of the counters."""
        return self._counters

    @property
    def chunk_nbytes(self) -> int:
        """Length of each chunk of what goes to the chunk store, in bytes."""
        return self.chunks.chunk_nbytes

    @property
    def written_seconds(self) -> float:
        """Wall seconds that writing to the chunk store took, by all threads."""
        return self.chunks.written_seconds

    @cached_property
    def memory_id(self) -> str:
        """Equal in two processes exactly if they share this tier's memory; "" without one."""
        return "" if self.host is None else self.host.identity()

    def tiered(self, nbytes: int) -> bool:
        """Whether a blob of this length passes through the host's tier.

        A small one costs more there, in files and locks, than the chunk store's round trip.
        """
        return self.host is not None and nbytes >= HOST_AT_LEAST_NBYTES and bool(self.memory_id)

    def _count(self, **more: float) -> None:
        with self._lock:
            now = self._counters
            self._counters = replace(
                now, **{name: getattr(now, name) + value for name, value in more.items()}
            )

    def put(
        self,
        key: str,
        buffer: Tensor | memoryview,
        *,
        ttl_seconds: int,
        inline: bool = False,
        shown: bool = True,
        digest: ContentDigest = "",
        tell: Callable[[BlobRef, Iterable[int]], None] | None = None,
    ) -> BlobRef:
        """Store a blob for everybody, and show it to this host.

        Args:
            tell: called by another thread each time that more is stored, with the blob's reference and the
                numbers of the chunks that are.
            digest: of the content that the reference is to have.
            shown: False for what hardly anybody will read, such as what a successor would start from.
            inline: a small blob may travel inside the reference and is then stored nowhere else; for
                callers whose references live in the control plane.
        """
        if inline and 0 < len(view := as_bytes(buffer)) <= INLINE_NBYTES:
            return _with_content(inlined(key, view, CHUNK_NBYTES), digest, view)
        try:
            if tell is None or not isinstance(buffer, Tensor):
                ref = self.chunks.put(key, buffer, ttl_seconds=ttl_seconds)
            else:
                ref = self._put_telling(key, buffer, ttl_seconds, tell)
            ref = _with_content(ref, digest, buffer)
            self._count(written_nbytes=ref.nbytes)
            if shown and self.host is not None and self.tiered(ref.nbytes):
                self._show(ref, buffer)
        finally:
            if self.host is not None and isinstance(buffer, Tensor):
                self.host.give_back(buffer)
        return ref

    def _put_telling(
        self, key: str, buffer: Tensor, ttl_seconds: int, tell: Callable[[BlobRef, Iterable[int]], None]
    ) -> BlobRef:
        size, nbytes = self.chunk_nbytes, buffer.numel()
        ref = BlobRef(key, nbytes, size, checksums(split(as_bytes(buffer), size)))
        upload = Upload(
            self.chunks, key, buffer, (), ttl_seconds=ttl_seconds, tell=lambda sums: tell(ref, sums)
        )
        return upload.finish(nbytes)

    def upload(
        self,
        key: str,
        buffer: Tensor,
        due: Sequence[int],
        *,
        ttl_seconds: int,
        tell: Callable[[Mapping[int, str]], None] | None = None,
    ) -> Upload:
        """Begin to store a blob for everybody while it is written; see `Upload`.

        It is not shown to this host: whoever begins early knows that its reader is elsewhere.
        """
        return Upload(self.chunks, key, buffer, due, ttl_seconds=ttl_seconds, tell=tell)

    def uploaded(self, ref: BlobRef) -> None:
        """Count a blob that an upload has finished."""
        self._count(written_nbytes=ref.nbytes)

    def read_ahead(self, nbytes: int, chunk_nbytes: int, view: memoryview | None = None) -> ReadAhead:
        """Begin to read a blob of the chunk store before its reference is known; see `ReadAhead`."""
        return ReadAhead(self.chunks, nbytes, chunk_nbytes, view)

    def collected(self, ref: BlobRef, ahead_nbytes: int) -> None:
        """Count a blob that was read from the chunk store past this tier, most of it maybe ahead."""
        self._count(store_reads=1, store_nbytes=ref.nbytes, ahead_nbytes=min(ahead_nbytes, ref.nbytes))

    def here(self, ref: BlobRef) -> bool:
        """Whether a blob travels in its reference, or this host seems to have it."""
        return bool(ref.data) or ref.local or (self.host is not None and self.host.has(ref))

    def draft(self, nbytes: int) -> Tensor:
        """Memory to write a blob to that `put` or `put_local` is then given: the host's, if it may be.

        Each call is to be followed by a put of this buffer, which is not to be written to afterwards.

        Returns:
            uint8, 1-D, with any content.
        """
        found = self.host.draft(nbytes) if self.host is not None and self.tiered(nbytes) else None
        return torch.empty(nbytes, dtype=torch.uint8) if found is None else found

    def _show(self, ref: BlobRef, buffer: Tensor | memoryview, keep_seconds: float = 0.0) -> bool:
        assert self.host is not None
        if isinstance(buffer, Tensor) and self.host.drafted(buffer):
            return self.host.show(ref, buffer, keep_seconds=keep_seconds)
        return self.host.publish(ref, buffer, keep_seconds=keep_seconds)

    def put_local(
        self, key: str, buffer: Tensor | memoryview, *, ttl_seconds: int, digest: ContentDigest = ""
    ) -> BlobRef:
        """Show a blob to this host alone; stored for everybody if the host's tier cannot take it.

        For what can be computed again, such as a gradient whose reader is on this host. It is kept for
        an hour, for nobody else has it and the other gradients of its step may take their time; a step
        that is committed deletes it.
        """
        if self.host is not None:
            view = as_bytes(buffer)
            parts = split(view, CHUNK_NBYTES)
            ref = BlobRef(key, len(view), CHUNK_NBYTES, checksums(parts), local=True)
            ref = _with_content(ref, digest, buffer)
            if self._show(ref, buffer, _LOCAL_KEEP_SECONDS):
                self._count(local_nbytes=ref.nbytes)
                return ref
        return self.put(key, buffer, ttl_seconds=ttl_seconds, digest=digest)

    def get(self, ref: BlobRef, out: Tensor | None = None) -> Tensor:
        """Read a blob: the first part of what `get_from` returns."""
        return self.get_from(ref, out)[0]

    def get_from(
        self, ref: BlobRef, out: Tensor | None = None, ahead: ReadAhead | None = None
    ) -> tuple[Tensor, str]:
        """Read a blob, and say which tier had it.

        Args:
            out: uint8, 1-D, `ref.nbytes` long, used if the blob has to come from the chunk store
                without the host's tier.
            ahead: what was read of it before, used likewise.

        Returns:
            The bytes (uint8, 1-D: the host's mapping, which is not to be written to, `out`, or new
            memory) and "host" or "store".

        Raises:
            ChunkMissing, ChunkCorrupt, CacheUnreachable: as the chunk store says.
        """
        if ref.data:
            return self._carried(ref, out), "store"
        began = time.perf_counter()
        downloaded = False

        def download(view: memoryview) -> None:
            nonlocal downloaded
            downloaded = True
            self.chunks.read_into(ref, view)
            ref.require_content(view)

        found = None
        if out is None and ahead is None and not (self.host is not None and self.host.has(ref)):
            require_plausible(ref, self.chunks)
        if self.host is not None and self.tiered(ref.nbytes):
            found = self.host.fetch(ref, download)
        if found is not None and not downloaded:
            self._count(host_hits=1, host_nbytes=ref.nbytes, host_seconds=time.perf_counter() - began)
            return found, "host"
        if found is None and ahead is not None:
            read = ahead.read_nbytes
            found = ahead.complete(ref)
            self._count(ahead_nbytes=0 if found is None else min(read, ref.nbytes))
        if found is None:
            found = self.chunks.get(ref, out)
        if not downloaded:
            ref.require_content(as_bytes(found))
        self._count(store_reads=1, store_nbytes=ref.nbytes, store_seconds=time.perf_counter() - began)
        return found, "store"

    def _carried(self, ref: BlobRef, out: Tensor | None) -> Tensor:
        """The bytes of a blob that travels inside its reference."""
        found = torch.empty(ref.nbytes, dtype=torch.uint8) if out is None else out
        view = as_bytes(found)
        ref.require_length(view)
        view[:] = unpacked(ref)
        self._count(store_reads=1, store_nbytes=ref.nbytes)
        return found

    def require_stored(self, ref: BlobRef) -> None:
        """Make sure that the chunk store has a blob, whatever this host has.

        Raises:
            ChunkMissing, ChunkCorrupt, CacheUnreachable: it has not.
        """
        if ref.data:
            unpacked(ref)
        else:
            require_plausible(ref, self.chunks)
            ref.require_content(as_bytes(self.chunks.get(ref)))

    def read_into(self, ref: BlobRef, view: memoryview) -> None:
        """Read a blob into memory of the caller's."""
        if ref.data:
            view[:] = unpacked(ref)
            return
        ref.require_length(view)
        found = None if self.host is None or not self.tiered(ref.nbytes) else self.host.get(ref)
        if found is None:
            self.chunks.read_into(ref, view)
            ref.require_content(view)
        else:
            view[:] = as_bytes(found)

    def delete(self, refs: Iterable[BlobRef]) -> None:
        """Delete blobs here and in the chunk store."""
        listed = [ref for ref in refs if not ref.data]
        if not listed:
            return
        if self.host is not None:
            self.host.discard(ref for ref in listed if self.tiered(ref.nbytes))
        if stored := [ref for ref in listed if not ref.local]:
            self.chunks.delete(stored)

    def touch(self, ref: BlobRef, ttl_seconds: int) -> None:
        """Set the remaining lifetime of a blob in the chunk store."""
        if not ref.data:
            self.chunks.touch(ref, ttl_seconds)

    def close(self) -> None:
        """Let go of connections."""
        if self.host is not None:
            self.host.close()
        self.chunks.close()


def _with_content(ref: BlobRef, digest: ContentDigest, buffer: Tensor | memoryview) -> BlobRef:
    """A reference that proves the content, if that is wanted."""
    return replace(ref, content=content_digest(digest, as_bytes(buffer))) if digest else ref
