"""A run of bytes cut into chunks: how many there are, where each lies in memory, and its checksum."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import xxhash


class Parts(Protocol):
    """Memory of each of some chunks, by number: a list, or a `Cut`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> memoryview: ...


class Cut:
    """A buffer's chunks, each cut when it is asked for.

    The few calls into torch that find out where a tensor's memory is take as long, right after a large
    transfer, as 50 KB on their way: a reader sends its request first.

    Args:
        look: the buffer's memory, at least one byte; called once.
        total_nbytes: its length.
        nbytes: length of each chunk but the last.
    """

    def __init__(self, look: Callable[[], memoryview], total_nbytes: int, nbytes: int) -> None:
        self.nbytes = nbytes
        self._look = look
        self._total_nbytes = total_nbytes
        self._view: memoryview | None = None

    def __len__(self) -> int:
        return chunk_count(self._total_nbytes, self.nbytes)

    def __getitem__(self, index: int, /) -> memoryview:
        if self._view is None:
            self._view = self._look()
        return self._view[index * self.nbytes : (index + 1) * self.nbytes]


def chunk_count(nbytes: int, chunk_nbytes: int) -> int:
    """How many chunks so many bytes make."""
    return -(-nbytes // chunk_nbytes)


def split(view: memoryview, nbytes: int) -> list[memoryview]:
    """Cut a view into views of `nbytes` bytes, the last one shorter."""
    return [view[start : start + nbytes] for start in range(0, len(view), nbytes)]


def checksums(parts: Iterable[memoryview]) -> tuple[str, ...]:
    """xxh3_64 of each chunk, 16 hexadecimal digits."""
    return tuple(xxhash.xxh3_64_hexdigest(part) for part in parts)
