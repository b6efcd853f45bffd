"""Digests of a blob's content that nobody can find a second blob for.

The checksums of chunks (XXH3) tell what a network or a memory has damaged; who wants to can make other bytes
that have the same. A digest of these tells them apart: with a seal over the record that names it, it proves
the bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, Literal

from torchord.cache.errors import ChunkCorrupt, InvalidInput

ContentDigest = Literal["", "blake3", "sha256"]
DIGESTS: tuple[ContentDigest, ...] = ("blake3", "sha256")
"""blake3: 256 bits (O'Connor, Aumasson, Neves, Wilcox-O'Hearn 2020), some 9 GB/s a core with AVX-512.
sha256: FIPS 180-4, some 2 GB/s with the processor's own instructions."""


def _blake3() -> Callable[[Any], Any]:
    try:
        from blake3 import blake3
    except ImportError:
        raise InvalidInput(
            "digests of \"blake3\" take the package blake3: pip install 'torchord[keys]'"
        ) from None
    return blake3


_MAKERS: dict[str, Callable[[], Callable[[Any], Any]]] = {"blake3": _blake3, "sha256": lambda: hashlib.sha256}


def chosen(digest: str, *, keyed: bool) -> ContentDigest:
    """What `TrainingConfig.digest` comes to, in a process that has keys or has none."""
    named: dict[str, ContentDigest] = {"blake3": "blake3", "sha256": "sha256", "xxh3": ""}
    return named.get(digest, "blake3" if keyed else "")


def content_digest(algorithm: ContentDigest, view: memoryview | bytes) -> str:
    """The digest of some bytes: its kind, a colon, hexadecimal digits; "" for the kind ""."""
    return f"{algorithm}:{_MAKERS[algorithm]()(view).hexdigest()}" if algorithm else ""


def require_content(what: str, digest: str, view: memoryview | bytes) -> None:
    """Refuse bytes that have another digest; nothing is looked at where the digest is "".

    Raises:
        ChunkCorrupt: they have.
        InvalidInput: this version knows no such algorithm.
    """
    if not digest:
        return
    algorithm = digest.partition(":")[0]
    if algorithm not in _MAKERS:
        raise InvalidInput(f"{what} has a digest of the unknown kind {algorithm[:20]!r}")
    if f"{algorithm}:{_MAKERS[algorithm]()(view).hexdigest()}" != digest:
        raise ChunkCorrupt(
            f"{what} is not what was written: its checksums are right and its {algorithm} is not, so "
            "somebody has changed it on purpose"
        )
