"""Errors about lost bytes that say whose they are: a chunk's key tells a person little, its tensors much."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torchord.cache.blobs.blob import BlobRef
from torchord.cache.errors import ChunkLost, ManifestMismatch
from torchord.cache.tensors.codec import Manifest

_MOST_NAMED = 3


@contextmanager
def telling(what: str, ref: BlobRef, manifest: Callable[[], Mapping[str, Any]]) -> Iterator[None]:
    """Have errors about a chunk say what was being read, and which tensors lie in the chunk.

    Args:
        what: such as "version 12 of run 'digits'".
        ref: the blob that the block reads.
        manifest: its layout as JSON; asked for only after an error.

    Raises:
        ChunkMissing, ChunkCorrupt: as the block did, with a longer message.
    """
    try:
        yield
    except ChunkLost as error:
        longer = type(error)(f"{what}{_tensors(error, ref, manifest)}: {error}")
        longer.chunk = error.chunk
        raise longer from (error.__cause__ or error)


def _tensors(error: ChunkLost, ref: BlobRef, manifest: Callable[[], Mapping[str, Any]]) -> str:
    if error.chunk is None:
        return ""
    start = error.chunk * ref.chunk_nbytes
    try:
        names = Manifest.from_json(manifest()).between(start, start + ref.chunk_nbytes)
    except Exception:  # noqa: BLE001  whatever is wrong with the layout, the lost chunk is what to tell
        return ""
    shown = ", ".join(repr(name) for name in names[:_MOST_NAMED])
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return f" (tensors {shown}{more})" if names else ""


def require_fitting(what: str, ref: BlobRef, manifest: Manifest) -> None:
    """Refuse bytes of another length than their layout's.

    Raises:
        ManifestMismatch: names both lengths.
    """
    if ref.nbytes != manifest.nbytes:
        raise ManifestMismatch(
            f"{what}: blob {ref.key} has {ref.nbytes} bytes and its manifest describes {manifest.nbytes}; "
            "the record in the control plane is damaged, or was written by another version of torchord"
        )
