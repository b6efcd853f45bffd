"""Content-addressed chunks: equal bytes have one key, whoever stores them and as part of what.

The address of a chunk is a cryptographic digest of its bytes, so nobody can make other bytes
pass for them by accident or design. A reader compares the faster checksum beside it.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from torchord.cache import keys
from torchord.cache.blobs.blob import BlobRef
from torchord.cache.blobs.chunk_store import ChunkStore
from torchord.cache.errors import ChunkMissing, InvalidInput
from torchord.cache.reading import COUNT, FOREIGN, TEXT, Fields
from torchord.cache.tensors.pieces import chunk_count

Bytes = npt.NDArray[np.uint8]
MOST_CHUNK_NBYTES = 64 << 20

_STREAM = Fields(
    "a list of chunks",
    {"nbytes": COUNT, "chunk_nbytes": COUNT, "addresses": TEXT, "checksums": TEXT},
    error=InvalidInput,
)
_HEX = frozenset("0123456789abcdef")
_ADDRESS_DIGITS = 40
_CHECKSUM_DIGITS = 16


def address_of(data: memoryview | bytes) -> str:
    """BLAKE2b of the bytes, 160 bits as 40 hexadecimal digits."""
    return hashlib.blake2b(data, digest_size=_ADDRESS_DIGITS // 2).hexdigest()


@dataclass(frozen=True, slots=True)
class Chunk:
    """One chunk.

    Attributes:
        address: digest of its bytes, see `address_of`.
        checksum: xxh3_64 of its bytes, 16 hexadecimal digits.
        nbytes: its length in bytes.
    """

    address: str
    checksum: str
    nbytes: int

    @classmethod
    def of(cls, data: memoryview) -> Chunk:
        """The chunk that these bytes make."""
        return cls(address_of(data), xxhash.xxh3_64_hexdigest(data), len(data))


@dataclass(frozen=True, slots=True)
class Stream:
    """A run of bytes as a list of chunks.

    Attributes:
        nbytes: length in bytes.
        chunk_nbytes: length of each chunk but the last.
        addresses: the chunks' addresses in order, joined.
        checksums: the chunks' checksums in order, joined.
    """

    nbytes: int
    chunk_nbytes: int
    addresses: str
    checksums: str

    def __len__(self) -> int:
        return chunk_count(self.nbytes, self.chunk_nbytes)

    def chunk(self, number: int) -> Chunk:
        """Chunk `number`, counted from 0."""
        start = number * self.chunk_nbytes
        return Chunk(
            self.addresses[number * _ADDRESS_DIGITS : (number + 1) * _ADDRESS_DIGITS],
            self.checksums[number * _CHECKSUM_DIGITS : (number + 1) * _CHECKSUM_DIGITS],
            min(self.chunk_nbytes, self.nbytes - start),
        )

    def chunks(self) -> Iterator[Chunk]:
        """All chunks in order."""
        return (self.chunk(number) for number in range(len(self)))

    def to_json(self) -> dict[str, Any]:
        """Return the stream as a dict of strings and integers."""
        return {
            "nbytes": self.nbytes,
            "chunk_nbytes": self.chunk_nbytes,
            "addresses": self.addresses,
            "checksums": self.checksums,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Stream:
        """Rebuild a stream that `to_json` produced, trusting nothing in it.

        Raises:
            InvalidInput: a field is missing, of the wrong type or at odds with the others.
        """
        try:
            stream = cls(**_STREAM.of({name: value[name] for name in cls.__slots__}))
        except FOREIGN as error:
            raise InvalidInput(f"this is not a list of chunks ({error!r:.200})") from error
        if not {*stream.addresses, *stream.checksums} <= _HEX:
            raise InvalidInput("this is not a list of chunks (an address or checksum is not hexadecimal)")
        if not 1 <= stream.chunk_nbytes <= MOST_CHUNK_NBYTES:
            raise InvalidInput(f"{stream.nbytes} bytes in chunks of {stream.chunk_nbytes}")
        count = len(stream)
        if (
            len(stream.addresses) != count * _ADDRESS_DIGITS
            or len(stream.checksums) != count * _CHECKSUM_DIGITS
        ):
            raise InvalidInput(f"the list of chunks does not have the {count} of {stream.nbytes} bytes")
        return stream


class ContentStore:
    """Chunks by address, over the nodes of a `ChunkStore`.

    Threads may share a store; a forked child opens its own connections. Needs servers that know
    `EXPIRE ... GT`: Valkey, or Redis 7 or newer.

    Args:
        chunks: where.
    """

    def __init__(self, chunks: ChunkStore) -> None:
        self._chunks = chunks

    def extend(self, chunks: Sequence[Chunk], ttl_seconds: int) -> list[bool]:
        """Tell which chunks are stored, and make these live at least so long.

        A life that is longer already is left alone, so that a dataset cannot shorten the life of
        what it shares with another.

        Raises:
            CacheUnreachable: no node answers.
            CacheError: a node refused.
        """
        return self._chunks.extend([_ref(chunk) for chunk in chunks], ttl_seconds)

    def write(self, items: Sequence[tuple[Chunk, memoryview]], ttl_seconds: int) -> None:
        """Store chunks; the bytes must be those of the chunk and not change until this returns.

        Raises:
            CacheUnreachable: no node answers.
            CacheError: a node refused.
        """
        named = [(keys.chunk(chunk.address), view) for chunk, view in items]
        self._chunks.put_many(named, ttl_seconds=ttl_seconds)

    def read(self, chunks: Sequence[Chunk]) -> list[Bytes]:
        """Fetch chunks and verify them.

        Returns:
            the bytes of each, in memory of its own.

        Raises:
            ChunkMissing: a chunk expired, was evicted or was lost with its node.
            ChunkCorrupt: a chunk is not what was written.
            CacheUnreachable: no node answers.
            CacheError: a node refused.
        """
        return [found.numpy() for found in self._chunks.get_many([_ref(chunk) for chunk in chunks])]

    def let_go(self, chunks: Sequence[Chunk]) -> None:
        """Have chunks expire after keys.DATASET_GRACE_SECONDS, unless `extend` is called meanwhile.

        Raises:
            CacheUnreachable: no node answers.
            CacheError: a node refused.
        """
        for chunk in chunks:
            with contextlib.suppress(ChunkMissing):
                self._chunks.touch(_ref(chunk), keys.DATASET_GRACE_SECONDS)


def _ref(chunk: Chunk) -> BlobRef:
    """A chunk as a blob of one chunk."""
    return BlobRef(keys.chunk(chunk.address), chunk.nbytes, max(1, chunk.nbytes), (chunk.checksum,))
