"""How much memory this process has, and how much its machine or container could still give it."""

from __future__ import annotations

import os
from pathlib import Path

_GROUP = Path("/sys/fs/cgroup")


def used_memory_nbytes() -> int:
    """Resident memory of this process, in bytes; 0 where that is not known."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def spare_memory_nbytes() -> int:
    """Memory that the machine, and the container's limit, leave, in bytes; 2**63 where nobody says."""
    return min(_available(), _below_limit())


def _available() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                return int(value.split()[0]) << 10
    except (OSError, ValueError, IndexError):
        pass
    return 1 << 63


def _below_limit() -> int:
    try:
        limit, used = (int((_GROUP / name).read_text().strip()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no limit says "max"
        return 1 << 63
    return max(0, limit - used)
