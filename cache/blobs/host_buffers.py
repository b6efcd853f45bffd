"""Buffers of the same-host tier that are written in place, shown to the host, and used again.

A file that is made anew costs more than what is written to it: the kernel clears and maps every page.
So a process keeps the files that it has shown. Such a draft has two names: one of its own, `<id>.part`,
which the process holds a lock on for as long as it lives (so a sweep leaves it alone, and removes it
once the process is dead), and the blob's name while it is shown. When the blob's name is gone, because
the blob was deleted, and no other process holds a lock on the file, because none maps it any more, the
process writes to it again. A reader that had opened it before and maps it afterwards finds by the
checksums that the blob is gone.
"""

from __future__ import annotations

import fcntl
import os
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_MOST_KEPT = 12
"""Drafts that are free or shown, a process: in a round, what slots send and keep in three steps."""


@dataclass(slots=True)
class Draft:
    """One file.

    Attributes:
        fd: open for reading and writing, locked.
        path: its own name.
        buffer: uint8, 1-D: the file's memory, shared with whoever maps it.
        shown: the blob's name, None while it is being written.
    """

    fd: int
    path: Path
    buffer: Tensor
    shown: Path | None = None


class Drafts:
    """The drafts of one process in one directory. Threads may share it; a forked child starts afresh.

    Args:
        directory: of the tier.
        make: (fd, nbytes) -> memory of a new file: reserves it and maps it, shared.
    """

    def __init__(self, directory: Path, make: Callable[[int, int], Tensor]) -> None:
        self._directory = directory
        self._make = make
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._writing: dict[int, Draft] = {}  # address of the buffer -> draft
        self._kept: list[Draft] = []

    def take(self, nbytes: int) -> Tensor:
        """A buffer of so many bytes (at least 1), to be written to by the caller until it is shown.

        What it contains is whatever it contained before.

        Raises:
            OSError: there is no room.
        """
        with self._lock:
            if self._pid != os.getpid():  # the files are the parent's
                self._pid = os.getpid()
                self._writing, self._kept = {}, []
            draft = next((d for d in self._kept if d.buffer.numel() == nbytes and _free(d)), None)
            if draft is None:
                while len(self._kept) >= _MOST_KEPT:
                    _close(self._kept.pop(0))
                draft = self._new(nbytes)
            else:
                self._kept.remove(draft)
            self._writing[draft.buffer.data_ptr()] = draft
            return draft.buffer

    def owns(self, buffer: Tensor) -> bool:
        """Whether a buffer came from `take` and was neither shown nor given back since."""
        draft = self._writing.get(buffer.data_ptr())
        return draft is not None and self._pid == os.getpid() and draft.buffer.numel() == buffer.numel()

    def show(self, buffer: Tensor, path: Path, prepare: Callable[[int], None]) -> None:
        """Give a buffer that was taken a blob's name; from then on it is not to be written to.

        Args:
            prepare: called with the file before it has the name.

        Raises:
            OSError: the name is taken, or cannot be given.
        """
        with self._lock:
            draft = self._writing[buffer.data_ptr()]
            prepare(draft.fd)
            os.link(draft.path, path)
            draft.shown = path
            self._kept.append(self._writing.pop(buffer.data_ptr()))
            fcntl.flock(draft.fd, fcntl.LOCK_SH)

    def give_back(self, buffer: Tensor) -> None:
        """Give up a buffer that was taken, unless it was shown; whoever still holds it keeps its memory."""
        with self._lock:
            draft = self._writing.pop(buffer.data_ptr(), None)
            if draft is not None and self._pid == os.getpid():
                _close(draft)

    def close(self) -> None:
        """Let go of every file that is not being written."""
        with self._lock:
            kept, self._kept = self._kept, []
            if self._pid == os.getpid():
                for draft in kept:
                    _close(draft)

    def _new(self, nbytes: int) -> Draft:
        path = self._directory / f"{uuid.uuid4().hex}.part"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            return Draft(fd, path, self._make(fd, nbytes))
        except BaseException:
            path.unlink(missing_ok=True)
            os.close(fd)
            raise


def _free(draft: Draft) -> bool:
    """Whether a draft's blob is deleted and nobody maps it; then it is locked for this process."""
    if draft.shown is not None:
        try:
            if os.path.samestat(os.fstat(draft.fd), os.lstat(draft.shown)):
                return False
        except FileNotFoundError:
            pass
        try:
            fcntl.flock(draft.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fcntl.flock(draft.fd, fcntl.LOCK_SH)  # a refused conversion may have lost the lock
            return False
        draft.shown = None
    return draft.path.exists()  # a sweep may have come between two locks


def _close(draft: Draft) -> None:
    """Give up a draft; what maps it, and the blob's name, stay."""
    draft.path.unlink(missing_ok=True)
    os.close(draft.fd)


def tensor_of(memory: memoryview, nbytes: int) -> Tensor:
    """A buffer's memory as a tensor."""
    return torch.frombuffer(memory, dtype=torch.uint8)[:nbytes]
