"""Keeps freed memory in the process: the same large tensors are needed again in the next step.

By default glibc hands large blocks back to the kernel when they are freed and asks for them again, and the
kernel clears and maps every page anew. A step of a small convolutional net then spends an eighth of its
time on page faults. A worker keeps what it has had instead, so its resident memory stays at its peak.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h
_NEVER = 1 << 30  # bytes; the parameter is an int


def keep_memory() -> bool:
    """Have this process keep the memory that it frees.

    To be called before other threads begin: those that have an arena of their own keep it.

    Returns:
        Whether the C library knows how; if not, nothing was changed.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library, such as musl
        return False
    values = ((_M_ARENA_MAX, 1), (_M_MMAP_THRESHOLD, _NEVER), (_M_TRIM_THRESHOLD, _NEVER))
    results = [bool(mallopt(which, value)) for which, value in values]
    return all(results)
