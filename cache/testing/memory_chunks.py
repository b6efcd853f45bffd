"""A chunk store without a server."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence

import torch
import xxhash
from torch import Tensor

from torchord.cache.blobs.blob import BlobRef
from torchord.cache.blobs.chunk_store import CHUNK_NBYTES
from torchord.cache.errors import ChunkCorrupt, ChunkMissing
from torchord.cache.tensors.codec import as_bytes


class MemoryChunkStore:
    """The same interface over a dict, for tests of what is built on a chunk store."""

    def __init__(self, *, chunk_nbytes: int = CHUNK_NBYTES) -> None:
        self.chunk_nbytes = chunk_nbytes
        self.written_seconds = 0.0
        self.chunks: dict[str, tuple[bytes, float]] = {}

    def put(self, key: str, buffer: Tensor | memoryview, *, ttl_seconds: int) -> BlobRef:
        """As `ChunkStore.put`."""
        view = as_bytes(buffer)
        parts = [bytes(view[s : s + self.chunk_nbytes]) for s in range(0, len(view), self.chunk_nbytes)]
        for i, part in enumerate(parts):
            self.chunks[f"{key}:{i}"] = (part, time.monotonic() + ttl_seconds)
        return BlobRef(key, len(view), self.chunk_nbytes, tuple(map(xxhash.xxh3_64_hexdigest, parts)))

    def put_parts(self, key: str, view: memoryview, numbers: Sequence[int], *, ttl_seconds: int) -> list[str]:
        """As `ChunkStore.put_parts`."""
        sums = []
        for i in numbers:
            part = bytes(view[i * self.chunk_nbytes : (i + 1) * self.chunk_nbytes])
            self.chunks[f"{key}:{i}"] = (part, time.monotonic() + ttl_seconds)
            sums.append(xxhash.xxh3_64_hexdigest(part))
        return sums

    def get(self, ref: BlobRef, out: Tensor | None = None) -> Tensor:
        """As `ChunkStore.get`."""
        if out is None:
            out = torch.empty(ref.nbytes, dtype=torch.uint8)
        self.read_into(ref, out)
        return out

    def read_into(self, ref: BlobRef, buffer: Tensor | memoryview) -> None:
        """As `ChunkStore.read_into`."""
        ref.require_length(buffer)
        self._read(ref.key, as_bytes(buffer), dict(enumerate(ref.checksums)), ref.chunk_nbytes)

    def read_parts(
        self, key: str, view: memoryview, sums: Mapping[int, str], chunk_nbytes: int | None = None
    ) -> None:
        """As `ChunkStore.read_parts`."""
        self._read(key, view, sums, chunk_nbytes or self.chunk_nbytes)

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

    def _read(self, key: str, view: memoryview, sums: Mapping[int, str], chunk_nbytes: int) -> None:
        for i, checksum in sums.items():
            self._require(f"{key}:{i}")
            part = self.chunks[f"{key}:{i}"][0]
            if xxhash.xxh3_64_hexdigest(part) != checksum:
                raise ChunkCorrupt(f"chunk {key}:{i} in memory is not what was written")
            view[i * chunk_nbytes : i * chunk_nbytes + len(part)] = part

    def _require(self, key: str) -> None:
        if key not in self.chunks or self.chunks[key][1] < time.monotonic():
            raise ChunkMissing(f"chunk {key} is not in memory")
