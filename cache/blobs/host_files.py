"""Files of the same-host tier: where they may lie, who holds a lock on one, and their memory.

A blob's bytes begin behind an empty page. They are whatever somebody stored, and the name of the file can be
told in advance: without that page a blob could be a program, which a loader of libraries takes by its name.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import mmap
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

try:
    import fcntl
except ImportError:  # pragma: no cover
    _HAS_FLOCK = False  # Windows: the tier is off
else:
    _HAS_FLOCK = True

_SHARED_MEMORY = Path("/dev/shm")
_LEAD_NBYTES = mmap.ALLOCATIONGRANULARITY
_log = logging.getLogger(__name__)


def usable_directory(wanted: str | os.PathLike[str] | None) -> Path | None:
    """Create the first directory that can be had, closed to other users; None without any."""
    if not _HAS_FLOCK:
        return None
    name = f"torchord-{os.geteuid()}"
    candidates = [Path(wanted)] if wanted else [_SHARED_MEMORY / name, Path(tempfile.gettempdir()) / name]
    for path in candidates:
        try:
            with contextlib.suppress(FileExistsError):
                path.mkdir(mode=0o700)
            found = path.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
                raise PermissionError(
                    errno.EPERM, "it must be a directory of this user, closed to others", str(path)
                )
            with tempfile.TemporaryFile(dir=path):
                return path
        except OSError as error:
            _log.warning("processes of this host cannot share fetched tensors in %s: %s", path, error)
    return None


def quarter(directory: Path | None) -> int:
    """A quarter of the file system that a directory is on, in bytes."""
    if directory is None:
        return 0
    found = os.statvfs(directory)
    return found.f_frsize * found.f_blocks // 4


@contextmanager
def closing(fd: int) -> Iterator[int]:
    """Close a file at the end of the block."""
    try:
        yield fd
    finally:
        os.close(fd)


def locked(fd: int) -> bool:
    """Lock a file for this process alone; False if another one holds a lock on it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def lock_shared(fd: int) -> None:
    """Lock a file as a reader does; whoever held it alone is a reader from then on."""
    fcntl.flock(fd, fcntl.LOCK_SH)


def still_at(fd: int, path: Path) -> bool:
    """Whether `path` still names the open file (it may have been renamed or removed before the lock)."""
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


def opened(path: Path, flags: int = os.O_RDONLY) -> int:
    """Open a file of the tier, closed to other users where it is made; links are not followed.

    Raises:
        PermissionError: it is a link, or no file of this user that is closed to others.
        OSError: it cannot be opened.
    """
    try:
        fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
        if _is_private(os.fstat(fd)):
            return fd
        os.close(fd)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
    raise PermissionError(errno.EPERM, "it must be a file of this user, closed to others", str(path))


def in_use(path: Path) -> bool:
    """Whether a process holds a lock on a file."""
    try:
        fd = opened(path)
    except PermissionError:
        return False  # none of ours
    with closing(fd):
        return not locked(fd)


def remove_unused(path: Path) -> None:
    """Remove a file unless somebody holds a lock on it."""
    with contextlib.suppress(FileNotFoundError):
        try:
            fd = opened(path)
        except PermissionError:  # none of ours
            path.unlink()
            return
        with closing(fd):
            if locked(fd) and still_at(fd, path):
                path.unlink()


def blob_nbytes(found: os.stat_result) -> int:
    """The length of the blob in a file."""
    return max(0, found.st_size - _LEAD_NBYTES)


def holds(fd: int, nbytes: int) -> bool:
    """Whether a file has the length of a blob of so many bytes."""
    return os.fstat(fd).st_size == _LEAD_NBYTES + nbytes


def _is_private(found: os.stat_result) -> bool:
    return stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077


def map_private(fd: int, nbytes: int) -> Tensor:
    """Map privately: reads share the pages, a write copies its page for this process alone.

    The mapping duplicates `fd`, and with it the shared lock, which therefore lives as long as the
    tensor does.
    """
    if not nbytes:
        return torch.empty(0, dtype=torch.uint8)
    memory = mmap.mmap(fd, nbytes, access=mmap.ACCESS_COPY, offset=_LEAD_NBYTES)
    return torch.frombuffer(memory, dtype=torch.uint8)


def map_shared(fd: int, nbytes: int) -> mmap.mmap:
    """Map the blob of so many bytes in a file, to be written to."""
    flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
    return mmap.mmap(fd, nbytes, flags=flags, offset=_LEAD_NBYTES) if nbytes else mmap.mmap(-1, 1)


def reserve(fd: int, nbytes: int) -> None:
    """Give a file the length of a blob, for which there is memory."""
    os.ftruncate(fd, 0)
    os.ftruncate(fd, _LEAD_NBYTES)
    if not nbytes:
        return
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, _LEAD_NBYTES, nbytes)
    else:  # pragma: no cover  # macOS
        write_all(fd, memoryview(bytes(nbytes)))


def write_all(fd: int, view: memoryview) -> None:
    """Give a file a blob's bytes."""
    os.ftruncate(fd, 0)
    os.ftruncate(fd, _LEAD_NBYTES)
    written = 0
    while written < len(view):
        written += os.pwrite(fd, view[written:], _LEAD_NBYTES + written)
