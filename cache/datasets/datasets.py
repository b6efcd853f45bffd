"""Stored datasets: put once, read by workers that share no disk, in just the chunks that they need.

    master.datasets.put("digits", TensorDataset(images, labels))
    recipe = Recipe(dataset=partial(stored_dataset, name="digits"), ...)

Reading happens on whichever worker computes a shard, with that process's own settings.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

from torchord.cache import keys
from torchord.cache.datasets.content import MOST_CHUNK_NBYTES, Chunk, address_of
from torchord.cache.datasets.place import Place, chunk_cache, place_of
from torchord.cache.datasets.reader import StoredDataset, all_chunks, read_manifest
from torchord.cache.datasets.record import Record, now
from torchord.cache.datasets.writer import Advance, StreamWriter, Tally, Uploader, size_of, write
from torchord.cache.errors import (
    CacheError,
    ChunkCorrupt,
    ChunkMissing,
    DatasetChanged,
    DatasetDamaged,
    DatasetExists,
    DatasetMissing,
    InvalidInput,
)
from torchord.cache.settings import Settings

CHUNK_NBYTES = 256 << 10
"""A compromise: a worker that needs one sample fetches its whole chunk."""
_LET_GO_AT_ONCE = 4096  # so few that they are looked at again well before their grace ends
_PASSES = 3
_CHECKED_TOGETHER = 16

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
                    raise _exists(name, before, size)
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

    def check(self, name: str, *, url: str | None = None) -> DatasetInfo:
        """Read every chunk of a dataset from where it is stored, past all caches, and compare its digest.

        Raises:
            DatasetMissing: there is none of that name.
            DatasetDamaged: a chunk is missing or damaged; `put` with `verify=True` sends it again.
            CacheUnreachable: a server does not answer.
        """
        place = place_of(self._settings, url)
        record = _record(place, name)
        chunks = list(all_chunks(record, read_manifest(place, record)).values())
        try:
            for first in range(0, len(chunks), _CHECKED_TOGETHER):
                place.read(chunks[first : first + _CHECKED_TOGETHER])
        except (ChunkCorrupt, ChunkMissing) as error:
            raise DatasetDamaged(
                f"dataset {name!r} in {place.label} is damaged: {error}; put it again with verify=True"
            ) from error
        return _info(record, url)

    def delete(self, name: str, *, url: str | None = None) -> None:
        """Delete a dataset. Chunks that another dataset has, too, stay.

        In the cache the others expire within a minute; a run that still needs them fails.

        Raises:
            DatasetMissing: there is none of that name.
            CacheUnreachable: a server does not answer.
        """
        place = place_of(self._settings, url)
        try:
            record = _record(place, name)
        except DatasetDamaged as error:
            log.warning("%s; its chunks are left behind", error)
            place.remove(name)
            return
        place.remove(name)
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
        return StoredDataset(record, read_manifest(place, record), place, chunk_cache(self._settings))


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
        return _Draft(record, list(all_chunks(record, manifest).values()))

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
            if verdict == "exists":  # somebody else's put was first
                _let_go(self._place, draft.record)
                raise _exists(self._name, found, self._chunk_nbytes)
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
        doomed = all_chunks(old, read_manifest(place, old))
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
            chunks = all_chunks(record, read_manifest(place, record))
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


def _exists(name: str, before: Record | None, chunk_nbytes: int) -> DatasetExists:
    what = ""
    if before is not None:
        if before.chunk_nbytes != chunk_nbytes:
            what = f" in chunks of {before.chunk_nbytes} bytes, not {chunk_nbytes}"
        what += f": {before.samples} samples of {before.structure}, digest {before.digest}"
    return DatasetExists(
        f"dataset {name!r} exists with other content{what}; choose another name, or pass replace=True"
    )


# --- small things -----------------------------------------------------------------------


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
            done += count  # beyond the total when the data is read again
            note = f"sent {tally.uploaded_nbytes / 1e6:,.1f} MB, found {tally.reused_nbytes / 1e6:,.1f} MB"
            bar.update(task, completed=round(done if total is None else min(done, total)), note=note)

        yield advance
        advance(0)
