"""Stored datasets in a folder: any fsspec URL, or a directory that all workers see.

Layout of the folder:

    <name>.dataset.json        the record
    chunks/<2 digits>/<address>

Files do not expire; `delete` removes them. Two programs that change the same folder at the same
time can undo each other's work (files know no atomic "unless"); reading is always safe, since
every chunk is verified.
"""

from __future__ import annotations

import contextlib
import logging
import os
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import PurePath
from typing import Any

import fsspec
import numpy as np
import xxhash

from torchord.cache.datasets.content import Bytes, Chunk
from torchord.cache.datasets.record import Record, Verdict, require_address
from torchord.cache.errors import CacheUnreachable, ChunkCorrupt, ChunkMissing, DatasetDamaged, InvalidInput
from torchord.cache.keyring import NO_KEYS, AnyKeyring
from torchord.cache.servers.address import masked

_SUFFIX = ".dataset.json"
_log = logging.getLogger(__name__)


class FolderPlace:
    """Datasets in a folder.

    Args:
        url: fsspec URL such as "s3://bucket/datasets", or an absolute directory, which may begin with `~`.
        keyring: seals and opens the records; with keys a chunk's address is looked at, too.

    Raises:
        InvalidInput: a relative directory, a chain of URLs, or no driver for the protocol.
    """

    def __init__(self, url: str, keyring: AnyKeyring = NO_KEYS) -> None:
        self._keyring = keyring
        folder = os.path.expanduser(url)
        if "::" in url or ("://" not in url and not os.path.isabs(folder)):
            raise InvalidInput(
                f"datasets cannot be kept at {masked(url)!r}: give one URL such as 's3://bucket/datasets', "
                "or an absolute directory that every worker sees"
            )
        folder = folder.rstrip("/")
        self.label = masked(folder) if "://" in folder else folder
        try:
            self._files, self._base = fsspec.core.url_to_fs(folder)
        except (ImportError, ValueError) as error:
            raise InvalidInput(f"datasets cannot be kept at {masked(url)!r}: {error}") from error
        self._base = self._base.rstrip("/")

    def extend(self, chunks: Sequence[Chunk], ttl_seconds: int) -> list[bool]:
        """Tell which chunks are stored and have their full length; files do not expire."""
        return [self._length(self._path(chunk)) == chunk.nbytes for chunk in chunks]

    def write(self, items: Sequence[tuple[Chunk, memoryview]], ttl_seconds: int) -> None:
        """Store chunks.

        Raises:
            CacheUnreachable: the folder cannot be written to.
        """
        for chunk, view in items:
            self._put(self._path(chunk), bytes(view))

    def read(self, chunks: Sequence[Chunk]) -> list[Bytes]:
        """Fetch and verify chunks, several at a time where the driver can.

        Raises:
            ChunkMissing: a file is not there.
            ChunkCorrupt: a file is not what was written.
            CacheUnreachable: the folder cannot be read.
        """
        paths = [self._path(chunk) for chunk in chunks]
        return [self._verified(*found) for found in zip(chunks, paths, self._contents(paths), strict=True)]

    def mark(self, chunks: Sequence[Chunk]) -> None:
        """Nothing to do: `sweep` removes them."""

    def sweep(self, chunks: Sequence[Chunk]) -> None:
        """Remove files.

        Raises:
            CacheUnreachable: one could not be removed.
        """
        for chunk in chunks:
            self._remove(self._path(chunk))

    def record(self, name: str) -> Record | None:
        """The record of a name.

        Raises:
            DatasetDamaged: it cannot be read.
            CacheUnreachable: the folder cannot be read.
        """
        path = f"{self._base}/{name}{_SUFFIX}"
        try:
            return Record.opened(name, self._files.cat_file(path), path, self._keyring)
        except FileNotFoundError:
            return None
        except DatasetDamaged:
            raise
        except Exception as error:  # every driver has exceptions of its own
            raise _cannot("read", path, error) from error

    def records(self) -> list[Record]:
        """All records, by time of their put; one that cannot be read is logged and left out.

        Raises:
            CacheUnreachable: the folder cannot be read.
        """
        try:
            self._files.invalidate_cache()
            entries = self._files.ls(self._base, detail=False)
        except FileNotFoundError:
            return []
        except Exception as error:
            raise _cannot("list", self._base, error) from error
        names = [PurePath(entry).name.removesuffix(_SUFFIX) for entry in entries if entry.endswith(_SUFFIX)]
        found = []
        for name in names:
            try:
                record = self.record(name)
            except DatasetDamaged as error:
                _log.warning("%s", error)
                continue
            if record is not None:
                found.append(record)
        return sorted(found, key=lambda record: record.created_at)

    def commit(self, record: Record, *, replace: bool) -> tuple[Verdict, Record | None]:
        """Give a name its record; see `CachePlace.commit`, but for programs that race."""
        try:
            before = self.record(record.name)
        except DatasetDamaged:
            before = None
        if before is not None and before.digest != record.digest and not replace:
            return "exists", before
        self._put(f"{self._base}/{record.name}{_SUFFIX}", record.sealed(self._keyring).encode())
        return ("same" if before is not None and before.digest == record.digest else "written"), before

    def remove(self, name: str) -> None:
        """Take a record away; none is no error."""
        self._remove(f"{self._base}/{name}{_SUFFIX}")

    def renew(self, record: Record, chunks: Callable[[], Iterable[Chunk]]) -> None:
        """Nothing to do: files do not expire."""

    # --- files ------------------------------------------------------------------------

    def _path(self, chunk: Chunk) -> str:
        return f"{self._base}/chunks/{chunk.address[:2]}/{chunk.address}"

    def _verified(self, chunk: Chunk, path: str, data: Any) -> Bytes:
        where = f"chunk {chunk.address} in {self.label} ({path})"
        if isinstance(data, FileNotFoundError):
            raise ChunkMissing(f"{where} does not exist") from data
        if isinstance(data, Exception):
            raise _cannot("read", path, data) from data
        if len(data) != chunk.nbytes or xxhash.xxh3_64_hexdigest(data) != chunk.checksum:
            raise ChunkCorrupt(f"{where} is not what was written")
        if self._keyring:
            require_address(chunk, data, where)
        return np.frombuffer(data, dtype=np.uint8)

    def _length(self, path: str) -> int | None:
        try:
            length: int = self._files.info(path, refresh=True)["size"]
        except FileNotFoundError:
            return None
        except Exception as error:
            raise _cannot("read", path, error) from error
        return length

    def _contents(self, paths: Sequence[str]) -> list[Any]:
        """Bytes, or the error, of each file."""
        if not paths:
            return []
        try:
            found = self._files.cat(list(dict.fromkeys(paths)), on_error="return")
        except Exception as error:
            raise _cannot("read", paths[0], error) from error
        found = {self._files._strip_protocol(path): data for path, data in found.items()}
        return [found.get(self._files._strip_protocol(path), FileNotFoundError(path)) for path in paths]

    def _put(self, path: str, data: bytes) -> None:
        """Write a file whole: an object store does so by itself, a directory gets it renamed into place."""
        protocols = self._files.protocol
        local = "file" in ((protocols,) if isinstance(protocols, str) else protocols)
        try:
            self._files.makedirs(path.rpartition("/")[0], exist_ok=True)
            if not local:
                self._files.pipe_file(path, data)
                return
            temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
            try:
                self._files.pipe_file(temporary, data)
                os.replace(temporary, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
                raise
        except Exception as error:
            raise _cannot("write", path, error) from error

    def _remove(self, path: str) -> None:
        try:
            self._files.rm_file(path)
        except FileNotFoundError:
            return
        except Exception as error:
            raise _cannot("remove", path, error) from error


def _cannot(verb: str, path: str, error: Exception) -> CacheUnreachable:
    return CacheUnreachable(f"cannot {verb} {path}: {type(error).__name__}: {error}")
