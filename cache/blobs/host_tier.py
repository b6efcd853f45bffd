"""The same-host tier: processes of one host share what one of them has fetched or written.

Each blob is one file named by its content and its key, on a file system that is memory
(/dev/shm), and readers map it. The rules that keep it sound:

- A file has its final name only when it is complete: it grows as `<name>.part` and is renamed.
- Whoever writes holds an exclusive lock (flock) on the part, so one process downloads and the
  others wait. The kernel drops the lock of a process that dies; an unlocked part is garbage.
- Whoever maps a file holds a shared lock on it for as long as the mapping lives, so a file
  without a lock is used by nobody. Removing a file that is in use would be harmless, too: its
  memory goes when the last mapping does.
- A file's modification time says until when it is to be kept though nobody maps it.
- The directory belongs to this user and is closed to others. Checksums are verified by every
  process that finds a file all the same, since a power cut can leave a file system that is not
  memory with a name but no content, and checking runs at memory speed.

The tier is never needed: whatever goes wrong with it is logged, and the caller fetches for itself.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import xxhash
from torch import Tensor

from torchord.cache.blobs.blob import BlobRef
from torchord.cache.blobs.host_files import (
    blob_nbytes,
    closing,
    holds,
    in_use,
    lock_shared,
    locked,
    map_private,
    map_shared,
    opened,
    quarter,
    remove_unused,
    reserve,
    still_at,
    usable_directory,
    write_all,
)
from torchord.cache.tensors.codec import as_bytes
from torchord.cache.tensors.pieces import checksums, split

_PART = ".part"
_IDENTITY = "identity"
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.0005, 0.005
_SWEEP_SECONDS = 1.0  # between two looks at what nobody uses, where a file is used again and none is made
_log = logging.getLogger(__name__)
T = TypeVar("T")

if TYPE_CHECKING:
    from torchord.cache.blobs.host_buffers import Drafts


@dataclass(slots=True)
class HostCounters:
    """How the tier was used by this process.

    Attributes:
        hits: blobs that were mapped because another process (or an earlier call) had them.
        misses: blobs that this process downloaded.
        nbytes: bytes that hits saved.
    """

    hits: int = 0
    misses: int = 0
    nbytes: int = 0


class HostTier:
    """Blobs shared by the processes of this user on this host.

    Threads may share a tier, and it survives a fork: it keeps no open file.

    Args:
        directory: where the files go; None means `torchord-<uid>` in /dev/shm, or in the
            directory for temporary files where there is no usable /dev/shm.
        spare_nbytes: how much of what no process maps is kept for a latecomer, newest first;
            None means a quarter of the file system. The newest is kept in any case.
        idle_seconds: how long a file that no process maps is kept at most.
        wait_seconds: how long to wait for another process that downloads the same blob.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] | None = None,
        *,
        spare_nbytes: int | None = None,
        idle_seconds: float = 60.0,
        wait_seconds: float = 60.0,
    ) -> None:
        self.counters = HostCounters()
        self._idle_seconds = idle_seconds
        self._wait_seconds = wait_seconds
        self.directory = usable_directory(directory)
        self._spare_nbytes = spare_nbytes if spare_nbytes is not None else quarter(self.directory)
        self._drafts = None if self.directory is None else _drafts(self.directory)
        self._swept = 0.0
        self.sweep()

    def get(self, ref: BlobRef) -> Tensor | None:
        """Map a blob that is here.

        Returns:
            uint8, 1-D, `ref.nbytes` long, or None if it is not here. The memory is shared with
            other processes as long as nobody writes to it: a write makes a private copy of its
            page, so it can harm no other process.
        """
        if self.directory is None:
            return None
        try:
            return self._mapped(ref)
        except OSError as error:
            self._warn("read", ref, error)
            return None

    def fetch(self, ref: BlobRef, download: Callable[[memoryview], None]) -> Tensor | None:
        """Map a blob, downloading it first if no process of this host has done so.

        Args:
            ref: what to fetch.
            download: fills `ref.nbytes` bytes of memory and verifies them, as
                `ChunkStore.read_into` does. Called by one process at a time.

        Returns:
            As `get`; None if the tier cannot be used: then fetch it without the tier.

        Raises:
            Exception: whatever `download` raises; nothing is left behind.
        """
        if self.directory is None:
            return None
        deadline = time.monotonic() + self._wait_seconds
        pause = _FIRST_PAUSE_SECONDS
        try:
            while (tensor := self._mapped(ref)) is None:
                part = self._lock_part(ref)
                if part is not None:
                    break
                if time.monotonic() > deadline:
                    raise TimeoutError("another process has had it locked for too long")
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
            else:
                return tensor
        except OSError as error:
            self._warn("fetch", ref, error)
            return None
        with closing(part):  # outside of the `try`: an error of `download` is the caller's
            return self._download(ref, part, download)

    def has(self, ref: BlobRef) -> bool:
        """Whether there is a file of a blob's name; `get` says whether it is good."""
        return self.directory is not None and self._path(ref).exists()

    def publish(self, ref: BlobRef, buffer: Tensor | memoryview, *, keep_seconds: float = 0.0) -> bool:
        """Show a buffer of this process to the others of this host: one copy, by the kernel.

        Args:
            ref: the buffer's reference, from `ChunkStore.put`.
            buffer: contiguous CPU tensor or memoryview of `ref.nbytes` bytes.
            keep_seconds: how long to keep it though nobody maps it, whatever else wants the space;
                for what is nowhere else. Without it the file is a spare, kept as the tier's limits say.

        Returns:
            Whether the blob is here now.
        """
        view = as_bytes(buffer)
        ref.require_length(view)
        if self.directory is None:
            return False
        try:
            if self._path(ref).exists():
                return True
            part = self._lock_part(ref)
            if part is None:
                return self._path(ref).exists()
            with closing(part), self._removing_unfinished(ref, part):
                self._with_room(lambda: write_all(part, view))
                self._complete(ref, part, keep_seconds)
            return True
        except OSError as error:
            self._warn("write", ref, error)
            return False

    def draft(self, nbytes: int) -> Tensor | None:
        """Memory of the tier to write a blob to in place, for `show`; see
        `torchord.cache.blobs.host_buffers`.

        Returns:
            uint8, 1-D, with any content; None if the tier cannot give it.
        """
        if self._drafts is None or not nbytes:
            return None
        try:
            return self._roomy(lambda: self._drafts.take(nbytes))  # type: ignore[union-attr]
        except OSError as error:
            _log.warning("no memory in %s: %s; going on without", self.directory, error)
            return None

    def drafted(self, buffer: Tensor | memoryview) -> bool:
        """Whether a buffer came from `draft` and is still the caller's."""
        return isinstance(buffer, Tensor) and self._drafts is not None and self._drafts.owns(buffer)

    def show(self, ref: BlobRef, buffer: Tensor, *, keep_seconds: float = 0.0) -> bool:
        """Show a draft to the other processes of this host; it is not to be written to any more.

        Args:
            keep_seconds: as for `publish`.

        Returns:
            Whether the blob is here now.
        """
        assert self._drafts is not None
        try:
            self._drafts.show(buffer, self._path(ref), lambda fd: self._keep(fd, keep_seconds, anew=True))
            return True
        except FileExistsError:
            return True  # the same bytes under the same key
        except OSError as error:
            self._warn("show", ref, error)
            return False

    def give_back(self, buffer: Tensor) -> None:
        """Give up a draft, unless it was shown; whoever still holds it keeps its memory."""
        if self._drafts is not None:
            self._drafts.give_back(buffer)

    def discard(self, refs: Iterable[BlobRef]) -> None:
        """Remove blobs that nobody will ask for again; mappings of them stay valid."""
        if self.directory is None:
            return
        for ref in refs:
            try:
                self._path(ref).unlink(missing_ok=True)
            except OSError as error:
                self._warn("remove", ref, error)

    def sweep(self, *, keep_spares: bool = True) -> None:
        """Remove parts of dead processes, and files that no process maps and that are too old or too many.

        Args:
            keep_spares: False removes every file that no process maps, but for those that were
                published with `keep_seconds`.
        """
        if self.directory is None:
            return
        self._swept = time.monotonic()
        try:
            now = time.time()
            kept_nbytes = 0
            for keep_until, nbytes, path in sorted(self._unused(), reverse=True):
                if keep_until > now + self._idle_seconds:
                    continue  # its writer asked for it
                if keep_spares and keep_until > now and kept_nbytes <= self._spare_nbytes:
                    kept_nbytes += nbytes
                else:
                    remove_unused(path)
        except OSError as error:
            _log.warning("cannot clean up %s: %s", self.directory, error)

    def identity(self) -> str:
        """Equal in two processes exactly if they share this tier's directory; "" without one."""
        if self.directory is None:
            return ""
        path = self.directory / _IDENTITY
        try:
            with contextlib.suppress(FileExistsError):
                temporary = self.directory / f"{_IDENTITY}.{uuid.uuid4().hex}"
                with closing(opened(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)) as fd:
                    os.write(fd, uuid.uuid4().hex.encode())
                try:
                    os.link(temporary, path)  # the first to link wins, with the file complete
                finally:
                    temporary.unlink()
            return path.read_text()
        except OSError as error:
            _log.warning("processes of this host cannot tell that they share %s: %s", self.directory, error)
            return ""

    def close(self) -> None:
        """Remove what no process maps; call it when a worker ends. The tier may be used again."""
        if self._drafts is not None:
            self._drafts.close()
        self.sweep(keep_spares=False)

    def _path(self, ref: BlobRef) -> Path:
        assert self.directory is not None
        # The key too: of two blobs with equal content, such as two gradients of zeros, each has its own life.
        return self.directory / f"{ref.digest}-{xxhash.xxh3_64_hexdigest(ref.key.encode())}"

    def _part(self, ref: BlobRef) -> Path:
        return self._path(ref).with_suffix(_PART)

    def _mapped(self, ref: BlobRef) -> Tensor | None:
        """Map a complete file after checking whose it is and what it contains."""
        path = self._path(ref)
        try:
            fd = opened(path)
        except FileNotFoundError:
            return None
        except PermissionError as error:
            _log.warning("%s is removed: %s", path, error)
            path.unlink(missing_ok=True)
            return None
        with closing(fd):
            lock_shared(fd)
            tensor = map_private(fd, ref.nbytes) if holds(fd, ref.nbytes) else None
            if tensor is not None and checksums(split(as_bytes(tensor), ref.chunk_nbytes)) == ref.checksums:
                self._keep(fd, 0.0)
                self.counters.hits += 1
                self.counters.nbytes += ref.nbytes
                return tensor
        _log.warning("%s is not what blob %s contains; removing it", path, ref.key)
        path.unlink(missing_ok=True)
        return None

    def _lock_part(self, ref: BlobRef) -> int | None:
        """Open and lock the part; None if another process holds it or has just finished."""
        path = self._part(ref)
        fd = opened(path, os.O_RDWR | os.O_CREAT)
        try:
            if locked(fd) and still_at(fd, path):
                if not self._path(ref).exists():
                    return fd
                path.unlink()
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        return None

    def _download(self, ref: BlobRef, part: int, download: Callable[[memoryview], None]) -> Tensor | None:
        with self._removing_unfinished(ref, part):
            try:
                # Memory is reserved, so that a full file system is an error here and not a SIGBUS later.
                self._with_room(lambda: reserve(part, ref.nbytes))
                buffer = memoryview(map_shared(part, ref.nbytes))
            except OSError as error:
                self._warn("write", ref, error)
                return None
            download(buffer[: ref.nbytes])
            try:
                self._complete(ref, part, 0.0)
                tensor = map_private(part, ref.nbytes)
            except OSError as error:
                self._warn("write", ref, error)
                return None
        self.counters.misses += 1
        return tensor

    def _with_room(self, write: Callable[[], T]) -> T:
        """Clean up, then write; where there is no space left, clean up for good and try again."""
        self.sweep()
        return self._roomy(write)

    def _roomy(self, write: Callable[[], T]) -> T:
        """Write, having cleaned up not long ago; where there is no space left, clean up for good first."""
        if time.monotonic() - self._swept > _SWEEP_SECONDS:
            self.sweep()
        try:
            return write()
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            self.sweep(keep_spares=False)
            return write()

    @contextmanager
    def _removing_unfinished(self, ref: BlobRef, part: int) -> Iterator[None]:
        """Remove the part at the end of the block, unless it has got its final name."""
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                if still_at(part, self._part(ref)):
                    self._part(ref).unlink()

    def _complete(self, ref: BlobRef, part: int, keep_seconds: float) -> None:
        """Give the part its final name, and turn this process's lock into that of a reader."""
        self._keep(part, keep_seconds)
        os.fchmod(part, 0o400)
        os.rename(self._part(ref), self._path(ref))
        lock_shared(part)

    def _keep(self, fd: int, seconds: float, *, anew: bool = False) -> None:
        """Have a file kept for so long, at least as long as a spare, and no shorter than it was to be.

        Args:
            anew: its modification time says nothing yet.
        """
        now = time.time()
        before = 0.0 if anew else os.fstat(fd).st_mtime
        os.utime(fd, (now, max(now + max(seconds, self._idle_seconds), before)))

    def _warn(self, verb: str, ref: BlobRef, error: OSError) -> None:
        _log.warning("cannot %s blob %s in %s: %s; going on without", verb, ref.key, self.directory, error)

    def _unused(self) -> Iterator[tuple[float, int, Path]]:
        """(keep until, length, path) of each complete file that no process maps; removes dead parts."""
        assert self.directory is not None
        for path in self.directory.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if path.name.startswith(_IDENTITY):
                    continue
                if path.suffix == _PART:
                    remove_unused(path)
                elif not in_use(path):
                    found = path.lstat()
                    yield found.st_mtime, blob_nbytes(found), path


def _drafts(directory: Path) -> Drafts:
    from torchord.cache.blobs.host_buffers import Drafts, tensor_of

    def make(fd: int, nbytes: int) -> Tensor:
        reserve(fd, nbytes)
        return tensor_of(memoryview(map_shared(fd, nbytes)), nbytes)

    return Drafts(directory, make)
