"""Reading a stored dataset: from sample indices to chunks, and from chunks to samples."""

from __future__ import annotations

import contextlib
import logging
import operator
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from torchord.cache.datasets import samples
from torchord.cache.datasets.chunk_cache import ChunkCache, ReadCounters
from torchord.cache.datasets.content import Bytes, Chunk, Stream, address_of
from torchord.cache.datasets.place import Place
from torchord.cache.datasets.record import Record, renewal_seconds
from torchord.cache.datasets.samples import Column, DatasetManifest, Leaf
from torchord.cache.errors import (
    CacheError,
    ChunkCorrupt,
    ChunkMissing,
    DatasetChanged,
    DatasetDamaged,
    DatasetError,
)
from torchord.cache.tensors.codec import padded

_READ_NBYTES = 16 << 20  # fetched at a time; what a reader holds beside the cache
_REPAIR = "put the same data again with verify=True, then resume the run"

Integers = npt.NDArray[np.int64]
log = logging.getLogger(__name__)


class StoredDataset(Dataset[Any]):
    """A map-style dataset that fetches the chunks of the samples it is asked for.

    Samples are the ones that were put, in structure, dtype and bits, on the CPU; they may be written
    to. What was fetched is kept in the process's chunk cache, which all its datasets share. Threads
    may share a dataset.

    Attributes:
        name: what it was put under.
        digest: of its content; equal digests are equal samples.

    Raises:
        DatasetDamaged: from access: a chunk is missing or is not what was written.
        DatasetChanged: from access: a chunk is missing since the dataset was replaced or deleted.
        CacheUnreachable: from access: a server does not answer; trying again may help.
    """

    def __init__(self, record: Record, manifest: DatasetManifest, place: Place, cache: ChunkCache) -> None:
        self.name = record.name
        self.digest = record.digest
        self._record = record
        self._manifest = manifest
        self._place = place
        self._cache = cache
        self._counters = ReadCounters()
        self._renew_at = 0.0  # by the monotonic clock, in seconds

    def __len__(self) -> int:
        return self._manifest.samples

    def __repr__(self) -> str:
        what = f"{len(self)} x {self._manifest.describe()}"
        return f"<StoredDataset {self.name!r} in {self._place.label}: {what}>"

    @property
    def counters(self) -> ReadCounters:
        """A snapshot of where this dataset's chunks came from."""
        return replace(self._counters)

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Samples in the order of the indices, fetched together.

        Raises:
            IndexError: an index is out of range.
        """
        rows = self._rows(indices)
        self._renew()
        columns = [self._values(column, rows) for column in self._manifest.columns]
        return samples.assemble(self._manifest.skeleton, columns, len(rows))

    # --- columns ----------------------------------------------------------------------

    def _rows(self, indices: Sequence[int]) -> Integers:
        rows = np.array([operator.index(index) for index in indices], dtype=np.int64)
        outside = (rows < -len(self)) | (rows >= len(self))
        if outside.any():
            raise IndexError(f"dataset {self.name!r} has {len(self)} samples, there is no {rows[outside][0]}")
        found: Integers = np.where(rows < 0, rows + len(self), rows)
        return found

    def _values(self, column: Column, rows: Integers) -> list[Any]:
        if column.shape is not None:
            return samples.decode_rows(column, self._fixed(column, rows))
        starts, ends = self._bounds(column, rows)
        buffers = [_empty(int(end - start)) for start, end in zip(starts, ends, strict=True)]
        self._copy(column, starts, buffers)
        shapes: Any = [None] * len(rows)
        if column.shapes is not None:
            width = column.shapes.nbytes // (8 * len(self))
            table = self._integers(column, column.shapes, width, rows)
            shapes = [row[row >= 0].tolist() for row in table]
        return [
            samples.decode_one(column.leaf, data, shape) for data, shape in zip(buffers, shapes, strict=True)
        ]

    def _bounds(self, column: Column, rows: Integers) -> tuple[Integers, Integers]:
        """Where each value starts and ends."""
        assert column.ends is not None
        both = self._integers(column, column.ends, 1, np.concatenate([rows, np.maximum(rows - 1, 0)]))[:, 0]
        ends, before = both[: len(rows)], both[len(rows) :]
        starts = np.where(rows == 0, 0, before)
        if ((starts < 0) | (ends < starts) | (ends > column.data.nbytes)).any():
            raise DatasetDamaged(f"dataset {self.name!r}: the ends of {column.leaf.path!r} make no sense")
        return starts, ends

    def _integers(self, column: Column, stream: Stream, width: int, rows: Integers) -> Integers:
        """Rows of an index stream, shape (len(rows), width)."""
        index = Column(Leaf(column.leaf.path, "array", "<i8"), (width,), stream)
        return self._fixed(index, rows).view(np.int64)

    def _fixed(self, column: Column, rows: Integers) -> Bytes:
        """Values of one length, shape (len(rows), length), each on a boundary of 64 bytes."""
        length = column.value_nbytes
        found = _empty(len(rows) * padded(length)).reshape(len(rows), padded(length))[:, :length]
        if not length or not len(rows):
            return found
        if column.data.chunk_nbytes % length:
            self._copy(column, rows * length, list(found))
            return found
        numbers, places = np.divmod(rows, column.data.chunk_nbytes // length)
        order = np.argsort(numbers, kind="stable")
        needed, firsts = np.unique(numbers[order], return_index=True)
        groups = np.split(order, firsts[1:])
        for group, data in zip(groups, self._chunks(column, needed.tolist()), strict=True):
            found[group] = data.reshape(-1, length)[places[group]]
        return found

    def _copy(self, column: Column, starts: Integers, buffers: Sequence[Bytes]) -> None:
        """Fill buffers from anywhere in the stream, over the borders of chunks."""
        size = column.data.chunk_nbytes
        needed: dict[int, list[int]] = {}
        for i, buffer in enumerate(buffers):
            if buffer.size:
                for number in range(starts[i] // size, (starts[i] + buffer.size - 1) // size + 1):
                    needed.setdefault(int(number), []).append(i)
        numbers = sorted(needed)
        for number, data in zip(numbers, self._chunks(column, numbers), strict=True):
            base = number * size
            for i in needed[number]:
                first = max(int(starts[i]), base)
                last = min(int(starts[i]) + buffers[i].size, base + data.size)
                buffers[i][first - starts[i] : last - starts[i]] = data[first - base : last - base]

    # --- chunks -----------------------------------------------------------------------

    def _chunks(self, column: Column, numbers: Sequence[int]) -> Iterator[Bytes]:
        """Chunks of a column's data in ascending order, some at a time."""
        size = max(1, _READ_NBYTES // column.data.chunk_nbytes)

        def fetch(chunks: Sequence[Chunk]) -> list[Bytes]:
            return self._fetch(column, chunks)

        for first in range(0, len(numbers), size):
            chunks = [column.data.chunk(number) for number in numbers[first : first + size]]
            found = self._cache.get(chunks, fetch, self._counters)
            yield from (found[chunk.address] for chunk in chunks)

    def _fetch(self, column: Column, chunks: Sequence[Chunk]) -> list[Bytes]:
        try:
            return self._place.read(chunks)
        except (ChunkMissing, ChunkCorrupt) as error:
            raise self._unreadable(column, error) from error

    def _unreadable(self, column: Column, error: CacheError) -> DatasetError:
        """The error to raise for a chunk that cannot be read: was the dataset replaced, or is it damaged?"""
        with contextlib.suppress(CacheError, DatasetError):
            current = self._place.record(self.name)
            if current is None or current.digest != self.digest:
                what = "deleted" if current is None else f"replaced by {current.digest}"
                return DatasetChanged(
                    f"dataset {self.name!r} ({self.digest}) was {what} while it was in use; {error}; submit "
                    "the run anew, under another name"
                )
        place = f"{column.leaf.path} " if column.leaf.path else ""
        return DatasetDamaged(
            f"dataset {self.name!r} ({self.digest}) cannot be read: {place}{error}; {_REPAIR}"
        )

    def _renew(self) -> None:
        if time.monotonic() < self._renew_at:
            return
        self._renew_at = time.monotonic() + renewal_seconds(self._record.ttl_seconds)
        try:
            self._place.renew(self._record, lambda: all_chunks(self._record, self._manifest).values())
        except CacheError as error:
            log.warning("the life of dataset %r was not renewed: %s", self.name, error)


# --- manifests --------------------------------------------------------------------------


def read_manifest(place: Place, record: Record) -> DatasetManifest:
    """Read and verify a manifest.

    Raises:
        DatasetDamaged: it lost a chunk, or is not what was written.
        CacheUnreachable: a server does not answer.
    """
    try:
        text = b"".join(part.tobytes() for part in place.read(list(record.manifest.chunks())))
        if address_of(text) != record.digest:
            raise DatasetDamaged("its manifest does not have the digest of its record")
        manifest = DatasetManifest.from_json(text)
    except (ChunkMissing, ChunkCorrupt, DatasetDamaged) as error:
        raise DatasetDamaged(
            f"dataset {record.name!r} ({record.digest}) in {place.label} cannot be opened: {error}; {_REPAIR}"
        ) from error
    return manifest


def all_chunks(record: Record, manifest: DatasetManifest) -> dict[str, Chunk]:
    """Every chunk once, by address."""
    streams = (record.manifest, *manifest.streams())
    return {chunk.address: chunk for stream in streams for chunk in stream.chunks()}


def _empty(nbytes: int) -> Bytes:
    """Uninitialised bytes at an address that suits any dtype."""
    found: Bytes = torch.empty(nbytes, dtype=torch.uint8).numpy()
    return found
