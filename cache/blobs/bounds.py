"""How much a reference may claim before memory is taken for it.

A reference is a few hundred signs that anybody who writes to Redis can make up, and it may claim terabytes:
the host's tier would reserve them before the first byte has come.
"""

from __future__ import annotations

import mmap
import os
import secrets
from functools import cache

from torchord.cache.blobs.blob import BlobRef
from torchord.cache.blobs.chunk_store import Chunks
from torchord.cache.errors import CacheError, ChunkCorrupt

UNASKED_NBYTES = 32 << 20
"""Memory for so much is taken without asking."""


@cache
def machine_nbytes() -> int:
    """Memory of this machine in bytes; 2**63 where that is not known."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 1 << 63


def require_plausible(ref: BlobRef, chunks: Chunks) -> None:
    """Refuse a large reference whose bytes do not seem to be there, before memory is taken for them.

    One chunk of it, chosen by chance, is read: whoever wants a process to take memory for bytes has to store
    most of them. It costs one round trip and half a MiB of 32 or more.

    Args:
        chunks: where it is to be read from.

    Raises:
        ChunkMissing, ChunkCorrupt: that chunk is not there, or the machine has no such memory.
        CacheUnreachable: no node answers.
    """
    if ref.nbytes <= UNASKED_NBYTES:
        return
    if ref.nbytes > machine_nbytes():
        raise ChunkCorrupt(
            f"blob {ref.key:.200} claims {ref.nbytes:,} bytes, more than the {machine_nbytes():,} of this "
            "machine's memory; its record was not written by torchord, or is to be read on a larger machine"
        )
    number = secrets.randbelow(len(ref.checksums))  # of no generator that a recipe may have seeded
    try:
        scratch = mmap.mmap(-1, ref.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise CacheError(f"there is no memory for the {ref.nbytes:,} bytes of blob {ref.key:.200}") from error
    view = memoryview(scratch)  # only the pages that are written to take memory
    chunks.read_parts(ref.key, view, {number: ref.checksums[number]}, ref.chunk_nbytes)
