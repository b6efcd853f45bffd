"""The reference to a blob: small, JSON-able, and enough to find its chunks and to check them."""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import xxhash

from torchord.cache.blobs.content_digest import require_content
from torchord.cache.errors import ChunkCorrupt, InvalidInput
from torchord.cache.reading import COUNT, FLAG, TEXT, Fields
from torchord.cache.tensors.pieces import checksums, chunk_count, split

if TYPE_CHECKING:
    from torch import Tensor

MOST_CHUNK_NBYTES = 4 << 20
"""Of a reference that somebody else wrote: each checksum in it stands for so much memory at most.

Torchord's own chunks have had 256 KiB to 1 MiB.
"""

_REFERENCE = Fields(
    "a blob reference",
    {"key": TEXT, "nbytes": COUNT, "chunk_nbytes": COUNT, "checksums": TEXT},
    {"data": TEXT, "local": FLAG},
    open=True,
    error=InvalidInput,
)


@dataclass(frozen=True, slots=True)
class BlobRef:
    """Where a blob is and what it contains.

    Attributes:
        key: prefix of its chunks; chunk i is stored under `<key>:<i>`.
        nbytes: length in bytes.
        chunk_nbytes: length of each chunk but the last.
        checksums: xxh3_64 of each chunk, 16 hexadecimal digits each.
        data: the bytes themselves in base64, for a small blob that travels in its reference and is
            stored nowhere else; "" for all others.
        local: whether it was shown to one host alone, and the chunk store has nothing of it.
        content: digest of all its bytes, see `content_digest`; "" where the checksums are to do.
    """

    key: str
    nbytes: int
    chunk_nbytes: int
    checksums: tuple[str, ...]
    data: str = ""
    local: bool = False
    content: str = ""

    @classmethod
    def of(cls, key: str, view: memoryview, chunk_nbytes: int) -> BlobRef:
        """The reference that a chunk store would give to these bytes; nothing is stored."""
        return cls(key, len(view), chunk_nbytes, checksums(split(view, chunk_nbytes)))

    @property
    def digest(self) -> str:
        """32 hexadecimal digits that depend on the content (and chunk size), not on the key."""
        text = f"{self.nbytes}:{self.chunk_nbytes}:{''.join(self.checksums)}"
        return xxhash.xxh3_128_hexdigest(text.encode())

    def chunk_keys(self) -> Iterable[str]:
        """The key of each chunk that is stored, in order."""
        return () if self.data else (f"{self.key}:{i}" for i in range(len(self.checksums)))

    def to_json(self) -> dict[str, Any]:
        """Return the reference as a dict of strings and integers."""
        fields: dict[str, Any] = {
            "key": self.key,
            "nbytes": self.nbytes,
            "chunk_nbytes": self.chunk_nbytes,
            "checksums": "".join(self.checksums),
        }
        if self.data:
            fields["data"] = self.data
        if self.local:
            fields["local"] = True
        if self.content:
            fields["content"] = self.content
        return fields

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> BlobRef:
        """Rebuild a reference that `to_json` produced, trusting nothing in it.

        Raises:
            InvalidInput: a field is missing, of the wrong type or at odds with the others.
        """
        _REFERENCE.of(value)
        try:
            joined = str(value["checksums"])
            ref = cls(
                str(value["key"]),
                int(value["nbytes"]),
                int(value["chunk_nbytes"]),
                tuple(joined[i : i + 16] for i in range(0, len(joined), 16)),
                str(value.get("data", "")),
                value.get("local") is True,
                str(value.get("content", "")),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidInput(f"this is not a blob reference ({error!r})") from error
        if (
            ref.nbytes < 0
            or ref.chunk_nbytes <= 0
            or len(joined) != 16 * chunk_count(ref.nbytes, ref.chunk_nbytes)
            or ref.chunk_nbytes > MOST_CHUNK_NBYTES
        ):
            raise InvalidInput(
                f"blob {ref.key!r}: {len(joined) // 16} checksums do not fit {ref.nbytes} bytes"
            )
        if ref.data and len(ref.data) != 4 * -(-ref.nbytes // 3):
            raise InvalidInput(
                f"blob {ref.key!r:.200}: {len(ref.data)} signs are not {ref.nbytes} bytes in base64"
            )
        return ref

    def require_content(self, view: memoryview) -> None:
        """Refuse other bytes than those that the reference's digest is of.

        Raises:
            ChunkCorrupt: they are others.
        """
        if self.content:
            require_content(f"blob {self.key}", self.content, view)

    def require_length(self, buffer: Tensor | memoryview) -> None:
        """Refuse memory of another length than the blob's.

        Raises:
            InvalidInput: names both lengths.
        """
        if buffer.nbytes != self.nbytes:
            raise InvalidInput(f"blob {self.key!r} has {self.nbytes} bytes, the buffer {buffer.nbytes}")


def inlined(key: str, view: memoryview, chunk_nbytes: int) -> BlobRef:
    """The reference to a small blob that carries its bytes itself.

    Args:
        view: at least one byte, at most `chunk_nbytes`.
    """
    sums = checksums(split(view, chunk_nbytes))
    return BlobRef(key, len(view), chunk_nbytes, sums, b64encode(view).decode())


def unpacked(ref: BlobRef) -> bytes:
    """The bytes that a reference carries.

    Raises:
        ChunkCorrupt: they are not what was written.
    """
    try:
        data = b64decode(ref.data, validate=True)
    except ValueError as error:
        raise ChunkCorrupt(f"blob {ref.key} is not what was written: {error}") from error
    if len(data) != ref.nbytes or checksums(split(memoryview(data), ref.chunk_nbytes)) != ref.checksums:
        raise ChunkCorrupt(f"blob {ref.key}, inside its reference, is not what was written")
    return data
