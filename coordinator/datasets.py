"""Stored datasets: put once, read by workers that share no disk, in just the chunks that they need.

    master.datasets.put("digits", TensorDataset(images, labels))
    recipe = Recipe(dataset=partial(stored_dataset, name="digits"), ...)

Reading happens on whichever worker computes a shard, with that process's own settings.
"""

from __future__ import annotations

import contextlib
import logging
import operator
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from cache import keys
from cache.chunk_cache import ChunkCache, ReadCounters
from cache.content import MOST_CHUNK_NBYTES, Bytes, Chunk, Stream, address_of
from cache.datasets import Place, Record, chunk_cache, now, place_of, renewal_seconds
from cache.errors import (
    CacheError,
    ChunkCorrupt,
    ChunkMissing,
    DatasetChanged,
    DatasetDamaged,
    DatasetError,
    DatasetExists,
    DatasetMissing,
    InvalidInput,
)
from cache.settings import Settings, from_environment
from coordinator import samples
from coordinator.dataset_writer import Advance, StreamWriter, Tally, Uploader, size_of, write
from coordinator.samples import Column, Leaf, Manifest

CHUNK_NBYTES = 256 << 10
"""A compromise: a worker that needs one sample fetches its whole chunk."""
_READ_NBYTES = 16 << 20  # fetched at a time; what a reader holds beside the cache
_LET_GO_AT_ONCE = 4096  # so few that they are looked at again well before their grace ends
_PASSES = 3
_REPAIR = "put the same data again with verify=True, then resume the run"

Integers = npt.NDArray[np.int64]
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DatasetInfo:
    """A stored dataset.

    Attributes:
        name: what a recipe calls it.
        digest: of content and chunk size, 40 hexadecimal digits; equal digests are equal samples.
        samples: how many.
        nbytes: bytes of all samples.
        chunk_nbytes: bound of a chunk's length, in bytes.
        structure: of one sample, as in "(tensor float32 [1, 8, 8], tensor int64 [])".
        created_at: Unix time (s) of the put.
        ttl_seconds: how long it lives after it was last used; None in a folder, where it stays.
        url: the folder, None for the cache.
    """

    name: str
    digest: str
    samples: int
    nbytes: int
    chunk_nbytes: int
    structure: str
    created_at: float
    ttl_seconds: int | None
    url: str | None


@dataclass(frozen=True, slots=True)
class PutReport:
    """What a put did.

    Attributes:
        info: the dataset.
        uploaded: chunks that were sent.
        uploaded_nbytes: their bytes.
        reused: chunks that were stored already, by an earlier or interrupted put of any dataset.
        reused_nbytes: their bytes.
    """

    info: DatasetInfo
    uploaded: int
    uploaded_nbytes: int
    reused: int
    reused_nbytes: int


class Datasets:
    """The stored datasets of a cache, or of a folder; what `Master.datasets` is.

    Every method takes `url`: an fsspec URL or an absolute directory in place of the cache.

    Args:
        settings: where the servers are.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def put(
        self,
        name: str,
        data: Any,
        *,
        url: str | None = None,
        chunk_nbytes: int | None = None,
        ttl: int = keys.DATASET_TTL_SECONDS,
        replace: bool = False,
        verify: bool = False,
        progress: bool = False,
    ) -> PutReport:
        """Store data under a name. A put that was interrupted goes on where it was when called again.

        Args:
            name: 1 to 100 letters, digits, '.', '_' or '-'.
            data: a tensor or numpy array, whose rows are the samples; a dict or tuple of such with
                equal first dimension; a TensorDataset; or any map-style dataset (a list, say)
                whose samples are tensors, arrays, numbers, bytes, str or None, nested in dicts,
                tuples and lists alike in every sample. Shapes may differ. Read once, in order,
                and twice if the name exists.
            url: a folder in place of the cache.
            chunk_nbytes: bound of a chunk's length in bytes, 1 to 64 MiB; a small one suits random
                access to large data, see docs/datasets.md. None: 256 KiB, or what the dataset of
                this name has.
            ttl: how long the dataset lives after its last use, in seconds (30 days); a folder's
                stays until `delete`.
            replace: let the name stand for other content from now on. A run that uses the old
                content fails when a worker notices.
            verify: read what is stored already, and send again what is damaged.
            progress: show a bar.

        Raises:
            DatasetExists: the name stands for other content (or chunk size).
            InvalidInput: the data cannot be stored; the message names sample and place.
            CacheUnreachable: a server does not answer; call again to go on.
            CacheError: a server is full, or evicts what is written.

        Example:
            >>> master.datasets.put("digits", (images, labels)).uploaded  # doctest: +SKIP
            4
        """
        keys.check_name(name, "dataset")
        if chunk_nbytes is not None and not 1 <= chunk_nbytes <= MOST_CHUNK_NBYTES:
            raise InvalidInput(f"chunk_nbytes must be from 1 to {MOST_CHUNK_NBYTES}, not {chunk_nbytes}")
        if ttl < 1:
            raise InvalidInput(f"ttl must be at least 1 second, not {ttl}")
        place = place_of(self._settings, url)
        before = _readable_record(place, name)
        size = chunk_nbytes or (before.chunk_nbytes if before is not None else CHUNK_NBYTES)
        putting = _Put(place, name, data, chunk_nbytes=size, ttl_seconds=ttl, verify=verify)
        with _bar(f"put {name}", size_of(data), putting.tally) if progress else _no_bar() as advance:
            draft = None
            if before is not None and not replace:
                draft = putting.draft(advance, send=False)
                if draft.record.digest != before.digest:
                    raise _exists(before, size)
            record, replaced = putting.store(draft, advance, replace=replace)
        if replaced is not None and replaced.digest != record.digest:
            _let_go(place, replaced)
        tally = putting.tally
        return PutReport(
            _info(record, url), tally.uploaded, tally.uploaded_nbytes, tally.reused, tally.reused_nbytes
        )

    def list(self, *, url: str | None = None) -> list[DatasetInfo]:
        """All datasets, oldest first.

        Raises:
            CacheUnreachable: a server does not answer.
        """
        return [_info(record, url) for record in place_of(self._settings, url).records()]

    def info(self, name: str, *, url: str | None = None) -> DatasetInfo:
        """One dataset.

        Raises:
            DatasetMissing: there is none of that name.
            CacheUnreachable: a server does not answer.
        """
        return _info(_record(place_of(self._settings, url), name), url)

    def delete(self, name: str, *, url: str | None = None) -> None:
        """Delete a dataset. Chunks that another dataset has, too, stay.

        In the cache the others expire within a minute; a run that still needs them fails.

        Raises:
            DatasetMissing: there is none of that name.
            CacheUnreachable: a server does not answer.
        """
        place = place_of(self._settings, url)
        record = _readable_record(place, keys.check_name(name, "dataset"))
        if record is None and place.record(name) is None:
            raise _missing(place, name)
        place.remove(name)
        if record is not None:
            _let_go(place, record)

    def open(self, name: str, *, url: str | None = None, digest: str | None = None) -> StoredDataset:
        """Open a dataset for reading in this process; no sample is fetched yet.

        Args:
            name: what it was put under.
            url: the folder that it was put in, if that was not the cache.
            digest: of the content that is wanted; None takes whatever has the name.

        Raises:
            DatasetMissing: there is none of that name.
            DatasetChanged: the name stands for content with another digest.
            DatasetDamaged: its manifest is missing or damaged.
            CacheUnreachable: a server does not answer.
        """
        place = place_of(self._settings, url)
        record = _record(place, name)
        if digest is not None and record.digest != digest:
            raise DatasetChanged(
                f"dataset {name!r} in {place.label} has the digest {record.digest}, but {digest} is wanted: "
                "it was replaced; put the old content under a name of its own, or take the new digest"
            )
        return StoredDataset(record, _manifest(place, record), place, chunk_cache(self._settings))


def stored_dataset(name: str, *, url: str | None = None, digest: str | None = None) -> StoredDataset:
    """A stored dataset, for a recipe: `dataset=partial(stored_dataset, name="digits")`.

    It is looked for where this process's environment says (TORCHORD_URL, TORCHORD_CACHE_URLS, and
    what `celery -b` was given). Every worker admits this function, whatever its allow-list.

    Args:
        name: what it was put under.
        url: the folder that it was put in, if that was not the cache.
        digest: pins the content, see `DatasetInfo.digest`.

    Raises:
        DatasetMissing: there is none of that name.
        DatasetChanged: the name stands for other content than pinned.
        DatasetDamaged: its manifest is missing or damaged.
        CacheUnreachable: a server does not answer.
    """
    return Datasets(from_environment()).open(name, url=url, digest=digest)


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

    def __init__(self, record: Record, manifest: Manifest, place: Place, cache: ChunkCache) -> None:
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
        """Values of one length, shape (len(rows), length)."""
        length = column.value_nbytes
        found = _empty(len(rows) * length).reshape(len(rows), length)
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
            self._place.renew(self._record, lambda: _all_chunks(self._record, self._manifest).values())
        except CacheError as error:
            log.warning("the life of dataset %r was not renewed: %s", self.name, error)


# --- putting ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Draft:
    """A dataset that was read to its end and may be named."""

    record: Record
    chunks: list[Chunk]


class _Put:
    """One call of `Datasets.put`: reads the data as often as need be."""

    def __init__(
        self, place: Place, name: str, data: Any, *, chunk_nbytes: int, ttl_seconds: int, verify: bool
    ) -> None:
        self.tally = Tally()
        self._place = place
        self._name = name
        self._data = data
        self._chunk_nbytes = chunk_nbytes
        self._ttl_seconds = ttl_seconds
        self._verify = verify

    def draft(self, advance: Advance, *, send: bool) -> _Draft:
        """Read the data once; store its chunks if `send`."""
        upload_ttl = min(self._ttl_seconds, keys.DATASET_UPLOAD_TTL_SECONDS)
        with Uploader(self._place, upload_ttl, self.tally, send=send, verify=self._verify) as uploader:
            manifest = write(self._data, uploader, self._chunk_nbytes, advance)
            text = manifest.to_json()
            writer = StreamWriter(uploader, CHUNK_NBYTES)
            writer.write(text)
            stream = writer.finish()
            uploader.finish()
        record = Record(
            name=self._name,
            digest=address_of(text),
            samples=manifest.samples,
            nbytes=sum(column.data.nbytes for column in manifest.columns),
            chunk_nbytes=self._chunk_nbytes,
            ttl_seconds=self._ttl_seconds,
            created_at=now(),
            structure=manifest.describe(),
            manifest=stream,
        )
        return _Draft(record, list(_all_chunks(record, manifest).values()))

    def store(self, draft: _Draft | None, advance: Advance, *, replace: bool) -> tuple[Record, Record | None]:
        """Store the chunks, then the record; returns it, and the one that was there before.

        Somebody may delete a dataset that shares chunks meanwhile, so they are looked at again once
        the record names them.
        """
        before: Record | None = None
        known = draft is not None and not self._verify
        for attempt in range(_PASSES):
            if draft is None or attempt > 0 or not known:
                draft = self.draft(advance, send=True)
            if not self._all_there(draft):
                continue
            verdict, found = self._place.commit(draft.record, replace=replace)
            if verdict == "exists":
                assert found is not None
                raise _exists(found, self._chunk_nbytes)
            before = before or found
            if self._all_there(draft):
                if known and attempt == 0:
                    self.tally.reused += len(draft.chunks)
                    self.tally.reused_nbytes += sum(chunk.nbytes for chunk in draft.chunks)
                return draft.record, before
        raise CacheError(
            f"dataset {self._name!r}: chunks are gone as soon as they are written to {self._place.label}; "
            "does a node evict keys (set maxmemory-policy noeviction), or does the data change from one "
            "reading to the next?"
        )

    def _all_there(self, draft: _Draft) -> bool:
        return all(self._place.extend(draft.chunks, self._ttl_seconds))


def _let_go(place: Place, old: Record) -> None:
    """Remove the chunks of a dataset that no other dataset has.

    Other programs may be putting datasets meanwhile: chunks are marked first, and those that have
    been named since then get their life back.
    """
    try:
        doomed = _all_chunks(old, _manifest(place, old))
    except DatasetDamaged as error:
        log.warning("the chunks of dataset %r are left behind: %s", old.name, error)
        return
    seen: set[str] = set()
    for _, chunks in _others(place, seen):
        for address in chunks:
            doomed.pop(address, None)
    for first in range(0, len(doomed), _LET_GO_AT_ONCE):
        some = dict(list(doomed.items())[first : first + _LET_GO_AT_ONCE])
        place.mark(list(some.values()))
        for record, chunks in _others(place, set(seen)):
            shared = [chunk for address, chunk in chunks.items() if some.pop(address, None) is not None]
            place.extend(shared, record.ttl_seconds)
        place.sweep(list(some.values()))


def _others(place: Place, seen: set[str]) -> Iterator[tuple[Record, dict[str, Chunk]]]:
    """Each dataset whose digest was not seen, with its chunks."""
    for record in place.records():
        if record.digest in seen:
            continue
        try:
            chunks = _all_chunks(record, _manifest(place, record))
        except DatasetDamaged as error:
            log.warning("%s", error)
            continue
        seen.add(record.digest)
        yield record, chunks


# --- records and manifests --------------------------------------------------------------


def _record(place: Place, name: str) -> Record:
    record = place.record(keys.check_name(name, "dataset"))
    if record is None:
        raise _missing(place, name)
    return record


def _readable_record(place: Place, name: str) -> Record | None:
    """The record of a name; None if there is none, or one that is damaged and may be overwritten."""
    try:
        return place.record(name)
    except DatasetDamaged as error:
        log.warning("%s", error)
        return None


def _manifest(place: Place, record: Record) -> Manifest:
    """Read and verify a manifest."""
    try:
        text = b"".join(part.tobytes() for part in place.read(list(record.manifest.chunks())))
        if address_of(text) != record.digest:
            raise DatasetDamaged("its manifest does not have the digest of its record")
        manifest = Manifest.from_json(text)
    except (ChunkMissing, ChunkCorrupt, DatasetDamaged) as error:
        raise DatasetDamaged(
            f"dataset {record.name!r} ({record.digest}) in {place.label} cannot be opened: {error}; {_REPAIR}"
        ) from error
    return manifest


def _all_chunks(record: Record, manifest: Manifest) -> dict[str, Chunk]:
    """Every chunk once, by address."""
    streams = (record.manifest, *manifest.streams())
    return {chunk.address: chunk for stream in streams for chunk in stream.chunks()}


def _info(record: Record, url: str | None) -> DatasetInfo:
    same = {field.name: getattr(record, field.name) for field in fields(DatasetInfo) if field.name != "url"}
    return DatasetInfo(**{**same, "ttl_seconds": None if url else record.ttl_seconds}, url=url)


def _missing(place: Place, name: str) -> DatasetMissing:
    known = [record.name for record in place.records()]
    there = ", ".join(known[:20]) or "none"
    return DatasetMissing(
        f"no dataset {name!r} in {place.label} (there: {there}); put it with Master.datasets.put({name!r}, "
        "data)"
    )


def _exists(before: Record, chunk_nbytes: int) -> DatasetExists:
    size = ""
    if before.chunk_nbytes != chunk_nbytes:
        size = f" in chunks of {before.chunk_nbytes} bytes, not {chunk_nbytes}"
    return DatasetExists(
        f"dataset {before.name!r} exists with other content{size}: {before.samples} samples of "
        f"{before.structure}, digest {before.digest}; choose another name, or pass replace=True"
    )


# --- small things -----------------------------------------------------------------------


def _empty(nbytes: int) -> Bytes:
    """Uninitialised bytes at an address that suits any dtype."""
    found: Bytes = torch.empty(nbytes, dtype=torch.uint8).numpy()
    return found


@contextmanager
def _no_bar() -> Iterator[Advance]:
    yield lambda _: None


@contextmanager
def _bar(title: str, total: int | None, tally: Tally) -> Iterator[Callable[[float], None]]:
    """Show how many samples were read, and how much was sent and found."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    ) as bar:
        task = bar.add_task(title, total=total, note="")
        done = 0.0

        def advance(count: float) -> None:
            nonlocal done
            done += count
            passed = done if total is None else min(done, total) if done <= total else done % total or total
            note = f"sent {tally.uploaded_nbytes / 1e6:,.1f} MB, found {tally.reused_nbytes / 1e6:,.1f} MB"
            bar.update(task, completed=round(passed), note=note)

        yield advance
        note = f"sent {tally.uploaded_nbytes / 1e6:,.1f} MB, found {tally.reused_nbytes / 1e6:,.1f} MB"
        bar.update(task, completed=total, note=note)
