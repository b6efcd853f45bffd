"""Content-addressed chunks: equal bytes have one key, whoever stores them and as part of what.

The address of a chunk is a cryptographic digest of its bytes, so nobody can make other bytes
pass for them by accident or design. A reader compares the faster checksum beside it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from cache import keys
from cache.blob import BlobRef, chunk_count
from cache.chunks import ChunkStore
from cache.errors import CacheError, CacheUnreachable, ChunkMissing, InvalidInput
from cache.node import Node
from cache.wire import Connection, ServerRefused, command

Bytes = npt.NDArray[np.uint8]

_ADDRESS_DIGITS = 40
_CHECKSUM_DIGITS = 16
_KEYS_AT_ONCE = 512


def address_of(data: memoryview | Bytes | bytes) -> str:
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
    def of(cls, data: memoryview | Bytes | bytes) -> Chunk:
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
            stream = cls(
                int(value["nbytes"]),
                int(value["chunk_nbytes"]),
                str(value["addresses"]),
                str(value["checksums"]),
            )
            int(stream.addresses or "0", 16), int(stream.checksums or "0", 16)
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidInput(f"this is not a list of chunks ({error!r})") from error
        if stream.nbytes < 0 or stream.chunk_nbytes < 1:
            raise InvalidInput(f"{stream.nbytes} bytes in chunks of {stream.chunk_nbytes}")
        count = len(stream)
        if (
            len(stream.addresses) != count * _ADDRESS_DIGITS
            or len(stream.checksums) != count * _CHECKSUM_DIGITS
        ):
            raise InvalidInput(f"the list of chunks does not have the {count} of {stream.nbytes} bytes")
        return stream


@dataclass(frozen=True, slots=True)
class _Named(BlobRef):
    """A reference whose chunks have keys of their own."""

    names: tuple[str, ...] = ()

    def chunk_keys(self) -> Iterator[str]:
        """The key of each chunk, in order."""
        return iter(self.names)


class ContentStore(ChunkStore):
    """A chunk store whose keys are addresses; arguments as there.

    Needs a server that knows `EXPIRE ... GT`: Valkey, or Redis 7 or newer.
    """

    def extend(self, chunks: Sequence[Chunk], ttl_seconds: int) -> list[bool]:
        """Tell which chunks are stored, and make these live at least so long.

        A life that is longer already is left alone, so that a dataset cannot shorten the life of
        what it shares with another.

        Raises:
            CacheUnreachable: no node answers.
            CacheError: a node refused.
        """
        found: list[bool] = []
        for first in range(0, len(chunks), _KEYS_AT_ONCE * len(self._nodes)):
            some = chunks[first : first + _KEYS_AT_ONCE * len(self._nodes)]
            answer: list[bool] = [False] * len(some)
            self._patiently(partial(self._extend, some, ttl_seconds, answer))
            found += answer
        return found

    def write(self, items: Sequence[tuple[Chunk, memoryview]], ttl_seconds: int) -> None:
        """Store chunks; the bytes must be those of the chunk and not change until this returns.

        Raises:
            CacheUnreachable: no node answers.
            CacheError: a node refused.
        """
        if items:
            named = [(keys.chunk(chunk.address).encode(), view) for chunk, view in items]
            self._patiently(lambda: self._store(named, ttl_seconds))

    def read(self, chunks: Sequence[Chunk], out: memoryview) -> None:
        """Fetch chunks one behind the other and verify them.

        Args:
            chunks: all of one length, but the last may be shorter.
            out: writable memory of their lengths' sum.

        Raises:
            ChunkMissing: a chunk expired, was evicted or was lost with its node.
            ChunkCorrupt: a chunk is not what was written.
            CacheUnreachable: no node answers.
            CacheError: a node refused.
        """
        if chunks:
            self.read_into(_named(chunks), out)

    def let_go(self, chunks: Sequence[Chunk]) -> None:
        """Have chunks expire after keys.DATASET_GRACE_SECONDS, unless `extend` is called meanwhile.

        Raises:
            CacheUnreachable: no node answers.
            CacheError: a node refused.
        """
        for first in range(0, len(chunks), _KEYS_AT_ONCE):
            try:
                some = tuple(keys.chunk(chunk.address) for chunk in chunks[first : first + _KEYS_AT_ONCE])
                self.touch(_Named("", 0, 1, (), some), keys.DATASET_GRACE_SECONDS)
            except ChunkMissing:
                continue  # the others were touched; this one has gone already

    def _extend(self, chunks: Sequence[Chunk], ttl_seconds: int, found: list[bool]) -> None:
        orders = [self._order(keys.chunk(chunk.address)) for chunk in chunks]
        failed: dict[str, CacheUnreachable] = {}

        def ask(name: str, indices: Sequence[int]) -> None:
            for i, hit in zip(
                indices, _ask(self._nodes[name], [chunks[i] for i in indices], ttl_seconds), strict=True
            ):
                found[i] |= hit

        for turn in range(len(self._nodes)):
            groups: dict[str, list[int]] = {}
            for i, order in enumerate(orders):
                if turn < self._copies or not found[i]:
                    groups.setdefault(order[turn], []).append(i)
            failed |= self._each(self._lanes(groups, ask))
        if len(failed) == len(self._nodes):
            raise next(iter(failed.values()))


def _named(chunks: Sequence[Chunk]) -> _Named:
    if any(chunk.nbytes != chunks[0].nbytes for chunk in chunks[:-1]):
        raise InvalidInput("chunks that are read together must be of one length, but for the last")
    return _Named(
        key=keys.chunk(chunks[0].address),
        nbytes=sum(chunk.nbytes for chunk in chunks),
        chunk_nbytes=max(1, chunks[0].nbytes),
        checksums=tuple(chunk.checksum for chunk in chunks),
        names=tuple(keys.chunk(chunk.address) for chunk in chunks),
    )


def _ask(node: Node, chunks: Sequence[Chunk], ttl_seconds: int) -> list[bool]:
    """Which chunks a node has, after extending their lives."""
    names = [keys.chunk(chunk.address).encode() for chunk in chunks]
    try:
        lengths = node._run("extend", names[0], partial(_extend_keys, names=names, ttl_seconds=ttl_seconds))
    except CacheError as error:
        if "wrong number of arguments" in str(error):
            raise CacheError(
                f"cache node {node.label} is too old to keep datasets: it must be Valkey, or Redis 7 or newer"
            ) from error
        raise
    return [nbytes == chunk.nbytes for nbytes, chunk in zip(lengths, chunks, strict=True)]


def _extend_keys(connection: Connection, names: Sequence[bytes], ttl_seconds: int) -> list[int]:
    """EXPIRE ... GT, then STRLEN, of each key; the lengths, 0 for a key that does not exist."""
    ttl = str(ttl_seconds)
    connection.send([b"".join(command("EXPIRE", n, ttl, "GT") + command("STRLEN", n) for n in names)])
    replies: list[int] = []
    refusal: ServerRefused | None = None
    for _ in range(2 * len(names)):
        try:
            reply = connection.reply()
            replies.append(reply if isinstance(reply, int) else 0)
        except ServerRefused as error:
            refusal = refusal or error
    if refusal is not None:
        raise refusal
    return replies[1::2]
