"""Any data -> chunks in a place and the manifest that lists them.

Chunks are addressed by content, so what is stored already is not sent: a put that was interrupted
goes on where it was, and equal data is stored once.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import TensorDataset

from torchord.cache.datasets import samples
from torchord.cache.datasets.content import Chunk, Stream
from torchord.cache.datasets.place import Place
from torchord.cache.datasets.samples import Column, DatasetManifest, Leaf, Value
from torchord.cache.errors import ChunkCorrupt, ChunkMissing, InvalidInput

_GROUP_NBYTES = 4 << 20  # looked for and sent together
_GROUP_CHUNKS = 256
_GROUPS_IN_FLIGHT = 4
_THREADS = 2
_BLOCK_NBYTES = 8 << 20  # of a column that lies in memory as a whole
_SAMPLES_AT_ONCE = 64

Advance = Callable[[float], None]


@dataclass(slots=True)
class Tally:
    """What became of the chunks of a put.

    Attributes:
        uploaded: chunks that were sent.
        uploaded_nbytes: their bytes.
        reused: chunks that were stored already, by this dataset or another.
        reused_nbytes: their bytes.
    """

    uploaded: int = 0
    uploaded_nbytes: int = 0
    reused: int = 0
    reused_nbytes: int = 0


class Uploader:
    """Names chunks, and stores those that are missing, some groups ahead of the caller.

    Args:
        place: where to.
        ttl_seconds: life of a chunk that is sent.
        tally: where to count.
        send: False only names them.
        verify: read what is stored already, and send it again if it is damaged.
    """

    def __init__(
        self, place: Place, ttl_seconds: int, tally: Tally, *, send: bool = True, verify: bool = False
    ) -> None:
        self._place = place
        self._ttl_seconds = ttl_seconds
        self._tally = tally
        self._send = send
        self._verify = verify
        self._seen: set[str] = set()
        self._group: list[tuple[Chunk, memoryview]] = []
        self._group_nbytes = 0
        self._in_flight: deque[Future[Tally]] = deque()
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="torchord-upload")

    def __enter__(self) -> Uploader:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)

    def add(self, view: memoryview) -> Chunk:
        """Name a chunk and see to it that it is stored; its bytes must not change until `finish`."""
        chunk = Chunk.of(view)
        if not self._send:
            return chunk
        if chunk.address in self._seen:
            self._count(Tally(reused=1, reused_nbytes=chunk.nbytes))
            return chunk
        self._seen.add(chunk.address)
        self._group.append((chunk, view))
        self._group_nbytes += chunk.nbytes
        if self._group_nbytes >= _GROUP_NBYTES or len(self._group) >= _GROUP_CHUNKS:
            self._submit()
        return chunk

    def finish(self) -> None:
        """Wait until all is stored.

        Raises:
            CacheError: something could not be.
        """
        self._submit()
        while self._in_flight:
            self._count(self._in_flight.popleft().result())

    def _submit(self) -> None:
        group, self._group, self._group_nbytes = self._group, [], 0
        if group:
            self._in_flight.append(self._threads.submit(self._store, group))
        while len(self._in_flight) > _GROUPS_IN_FLIGHT:
            self._count(self._in_flight.popleft().result())

    def _store(self, group: Sequence[tuple[Chunk, memoryview]]) -> Tally:
        present = self._place.extend([chunk for chunk, _ in group], self._ttl_seconds)
        missing = [
            (chunk, view)
            for (chunk, view), there in zip(group, present, strict=True)
            if not (there and (not self._verify or self._whole(chunk)))
        ]
        self._place.write(missing, self._ttl_seconds)
        nbytes = sum(chunk.nbytes for chunk, _ in missing)
        total = sum(chunk.nbytes for chunk, _ in group)
        return Tally(len(missing), nbytes, len(group) - len(missing), total - nbytes)

    def _whole(self, chunk: Chunk) -> bool:
        try:
            self._place.read([chunk])
        except (ChunkCorrupt, ChunkMissing):
            return False
        return True

    def _count(self, more: Tally) -> None:
        self._tally.uploaded += more.uploaded
        self._tally.uploaded_nbytes += more.uploaded_nbytes
        self._tally.reused += more.reused
        self._tally.reused_nbytes += more.reused_nbytes


class StreamWriter:
    """Cuts a stream of bytes into chunks.

    Args:
        uploader: where they go.
        chunk_nbytes: bound of a chunk's length.
        value_nbytes: length of a value; a chunk then holds whole values if one fits.
    """

    def __init__(self, uploader: Uploader, chunk_nbytes: int, value_nbytes: int = 0) -> None:
        whole = chunk_nbytes // value_nbytes * value_nbytes if value_nbytes else 0
        self._chunk_nbytes = whole or chunk_nbytes
        self._uploader = uploader
        self._chunks: list[Chunk] = []
        self._rest = bytearray()
        self.nbytes = 0

    def write(self, data: memoryview | bytes, *, stable: bool = False) -> None:
        """Append bytes.

        Args:
            data: what to append.
            stable: they do not change until the uploader has finished, so they need no copy.
        """
        view = memoryview(data)
        self.nbytes += len(view)
        while len(view):
            if stable and not self._rest and len(view) >= self._chunk_nbytes:
                taken = self._chunk_nbytes
                self._chunks.append(self._uploader.add(view[:taken]))
            else:
                taken = min(self._chunk_nbytes - len(self._rest), len(view))
                self._rest += view[:taken]
                if len(self._rest) == self._chunk_nbytes:
                    self._flush()
            view = view[taken:]

    def finish(self) -> Stream:
        """Store the rest and return what was written."""
        self._flush()
        return Stream(
            self.nbytes,
            self._chunk_nbytes,
            "".join(chunk.address for chunk in self._chunks),
            "".join(chunk.checksum for chunk in self._chunks),
        )

    def _flush(self) -> None:
        if self._rest:
            self._chunks.append(self._uploader.add(memoryview(self._rest)))
            self._rest = bytearray()


class _ColumnWriter:
    """Writes the values of one place. Ends and shapes are kept only once a value differs from the first."""

    def __init__(self, leaf: Leaf, uploader: Uploader, chunk_nbytes: int) -> None:
        self._leaf = leaf
        self._uploader = uploader
        self._chunk_nbytes = chunk_nbytes
        self._data: StreamWriter | None = None
        self._first: tuple[int, ...] = ()
        self._ends: array[int] | None = array("q") if leaf.kind in ("str", "bytes") else None
        self._shapes: list[tuple[int, ...]] = []
        self._known: dict[tuple[int, ...], tuple[int, ...]] = {}
        self._count = 0

    def add(self, value: Value) -> None:
        """Append one value; its bytes are copied."""
        if self._data is None:
            self._open(value.shape, len(value.data) if self._ends is None else 0)
        assert self._data is not None
        if self._ends is None and value.shape != self._first:
            nbytes = self._data.nbytes // self._count
            self._ends = array("q", range(nbytes, nbytes * self._count + 1, nbytes) if nbytes else ())
            self._ends.extend([0] * (self._count - len(self._ends)))
            self._shapes = [self._first] * self._count
        self._data.write(value.data)
        self._count += 1
        if self._ends is not None:
            self._ends.append(self._data.nbytes)
            self._shapes.append(self._known.setdefault(value.shape, value.shape))

    def add_rows(self, view: memoryview, rows: int, shape: tuple[int, ...]) -> None:
        """Append values of one shape that lie one behind the other and stay as they are."""
        if self._data is None:
            self._open(shape, len(view) // rows)
        assert self._data is not None
        self._data.write(view, stable=True)

    def finish(self) -> Column:
        assert self._data is not None
        data = self._data.finish()
        if self._ends is None:
            return Column(self._leaf, self._first, data)
        ends = self._integers(np.frombuffer(self._ends, dtype=np.int64).reshape(-1, 1))
        if self._leaf.kind in ("str", "bytes"):
            return Column(self._leaf, None, data, ends)
        table = np.full((self._count, max(1, *map(len, self._known), len(self._first))), -1, dtype=np.int64)
        for row, shape in zip(table, self._shapes, strict=True):
            row[: len(shape)] = shape
        return Column(self._leaf, None, data, ends, self._integers(table))

    def _open(self, shape: tuple[int, ...], value_nbytes: int) -> None:
        self._first = shape
        self._data = StreamWriter(self._uploader, self._chunk_nbytes, value_nbytes)

    def _integers(self, table: np.ndarray[Any, np.dtype[np.int64]]) -> Stream:
        writer = StreamWriter(self._uploader, self._chunk_nbytes, 8 * table.shape[1])
        writer.write(samples.rows_of(table))
        return writer.finish()


def write(data: Any, uploader: Uploader, chunk_nbytes: int, advance: Advance) -> DatasetManifest:
    """Store data as columns.

    Args:
        data: a tensor or array, whose rows are the samples; a dict or tuple (nested, if need be)
            of such with equal first dimension; a TensorDataset; or any map-style dataset.
        uploader: what takes the chunks; the caller finishes it.
        chunk_nbytes: bound of a chunk's length, in bytes.
        advance: called with the number of samples done since the last call.

    Raises:
        InvalidInput: it is none of these, is empty, or a sample holds what cannot be stored; the
            message names sample and place.
        Exception: what the dataset raises, with a note.
    """
    if type(data) is TensorDataset:
        data = data.tensors
    if isinstance(data, Tensor | np.ndarray | tuple | dict):
        return _write_arrays(data, uploader, chunk_nbytes, advance)
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        raise InvalidInput(
            f"a {type(data).__name__} is no data to store: give a map-style dataset (with __len__ and "
            "__getitem__), or tensors or arrays, one or in a dict or tuple"
        )
    return _write_samples(data, uploader, chunk_nbytes, advance)


def size_of(data: Any) -> int | None:
    """How many samples data has, for a progress bar; None if that cannot be seen."""
    while isinstance(data, tuple | dict) and data:
        data = next(iter(data.values() if isinstance(data, dict) else data))
    try:
        return len(data)
    except TypeError:
        return None


def _write_arrays(data: Any, uploader: Uploader, chunk_nbytes: int, advance: Advance) -> DatasetManifest:
    skeleton, leaves = samples.take_apart(data)
    arrays = samples.follow(skeleton, data)
    for leaf, column in zip(leaves, arrays, strict=True):
        if leaf.kind not in ("tensor", "array") or not column.shape:
            raise InvalidInput(
                f"data{leaf.path} is a {type(column).__name__} without rows; a dict or tuple stands for "
                "columns, each a tensor or array with one row a sample (give samples as a list or a dataset)"
            )
    counts = {f"data{leaf.path}": len(column) for leaf, column in zip(leaves, arrays, strict=True)}
    if len(set(counts.values())) != 1 or 0 in counts.values():
        shown = ", ".join(f"{path} has {count}" for path, count in counts.items())
        raise InvalidInput(
            f"every column must have the same number of rows, at least one; {shown or 'no columns'}"
        )
    count = next(iter(counts.values()))
    columns = []
    for leaf, column in zip(leaves, arrays, strict=True):
        shape = tuple(column.shape[1:])
        kind = "scalar" if leaf.kind == "array" and not shape else leaf.kind
        writer = _ColumnWriter(Leaf(leaf.path, kind, leaf.dtype), uploader, chunk_nbytes)
        row_nbytes = int(np.prod(shape, dtype=np.int64)) * leaf.itemsize
        rows = max(1, _BLOCK_NBYTES // max(1, row_nbytes))
        for first in range(0, count, rows):
            block = column[first : first + rows]
            writer.add_rows(samples.rows_of(block), len(block), shape)
            advance(len(block) / len(arrays))
        columns.append(writer.finish())
    return DatasetManifest(count, skeleton, tuple(columns))


def _write_samples(data: Any, uploader: Uploader, chunk_nbytes: int, advance: Advance) -> DatasetManifest:
    skeleton: Any = None
    leaves: list[Leaf] = []
    writers: list[_ColumnWriter] = []
    count = len(data)
    if count == 0:
        raise InvalidInput("the dataset has no samples")
    for index, sample in enumerate(_read(data, count)):
        try:
            if index == 0:
                skeleton, leaves = samples.take_apart(sample)
                writers = [_ColumnWriter(leaf, uploader, chunk_nbytes) for leaf in leaves]
            for leaf, writer, value in zip(leaves, writers, samples.follow(skeleton, sample), strict=True):
                writer.add(samples.encode(leaf, value))
        except InvalidInput as error:
            raise InvalidInput(f"sample {index} cannot be stored: {error}") from None
        advance(1)
    return DatasetManifest(count, skeleton, tuple(writer.finish() for writer in writers))


def _read(data: Any, count: int) -> Iterator[Any]:
    """Every sample in order, several at once where the dataset offers it."""
    for first in range(0, count, _SAMPLES_AT_ONCE):
        some = range(first, min(first + _SAMPLES_AT_ONCE, count))
        try:
            if hasattr(data, "__getitems__"):
                found = list(data.__getitems__(list(some)))
                if len(found) != len(some):
                    raise InvalidInput(
                        f"the dataset's __getitems__ returned {len(found)} samples for {len(some)} indices"
                    )
                yield from found
                continue
        except Exception as error:
            error.add_note(f"while reading samples {some[0]} to {some[-1]} of the dataset")
            raise
        for index in some:
            try:
                sample = data[index]
            except Exception as error:
                error.add_note(f"while reading sample {index} of the dataset")
                raise
            yield sample
