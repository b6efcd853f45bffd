"""Notices: what is told of a blob while it is being stored, so that others may begin to read it.

A *notice* names the chunks of a blob that are stored so far. Whoever reads them early keeps them to himself
until the ledger names a blob with the same checksums; a notice that is lost, late or of an attempt that came
to nothing costs time only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torchord.cache.blobs.blob import MOST_CHUNK_NBYTES, BlobRef
from torchord.cache.errors import InvalidInput
from torchord.cache.reading import FOREIGN, parsed
from torchord.cache.tensors.pieces import chunk_count

_DIGITS = 16
_NOT_YET = "-" * _DIGITS


@dataclass(frozen=True, slots=True)
class Notice:
    """A blob that is on its way.

    Attributes:
        number: the step or version that it is for.
        key: prefix of its chunks.
        nbytes: its length in bytes, or a little more where that is not known yet.
        chunk_nbytes: length of each chunk but the last.
        checksums: of each chunk, xxh3_64 as 16 hexadecimal digits; "" where it is not known yet.
        stored: bit i is set if chunk i is stored; its checksum is known then.
    """

    number: int
    key: str
    nbytes: int
    chunk_nbytes: int
    checksums: tuple[str, ...]
    stored: int

    @classmethod
    def of(cls, number: int, key: str, nbytes: int, chunk_nbytes: int, sums: Mapping[int, str]) -> Notice:
        """The notice of a blob of which some chunks are known, and stored."""
        count = chunk_count(nbytes, chunk_nbytes)
        known = tuple(sums.get(i, "") for i in range(count))
        return cls(number, key, nbytes, chunk_nbytes, known, _bits(i for i in sums if i < count))

    @classmethod
    def all_of(cls, number: int, ref: BlobRef, stored: Iterable[int] | None = None) -> Notice:
        """The notice of a blob that is known whole.

        Args:
            stored: which chunks are stored; None: all.
        """
        numbers = range(len(ref.checksums)) if stored is None else stored
        return cls(number, ref.key, ref.nbytes, ref.chunk_nbytes, ref.checksums, _bits(numbers))

    @property
    def ref(self) -> BlobRef | None:
        """The reference of the blob, None while that is not known."""
        if not all(self.checksums):
            return None
        return BlobRef(self.key, self.nbytes, self.chunk_nbytes, self.checksums)

    @property
    def whole(self) -> bool:
        """Whether all of it is stored."""
        return self.stored == (1 << len(self.checksums)) - 1

    def to_json(self) -> str:
        """Return the notice as text."""
        sums = "".join(checksum or _NOT_YET for checksum in self.checksums)
        return json.dumps([self.number, self.key, self.nbytes, self.chunk_nbytes, sums, f"{self.stored:x}"])

    @classmethod
    def from_json(cls, text: str) -> Notice:
        """Rebuild a notice that `to_json` produced, trusting nothing in it.

        Raises:
            InvalidInput: it is none.
        """
        try:
            number, key, nbytes, chunk_nbytes, joined, stored = parsed(text, "it", error=InvalidInput)
            if not all(type(each) is int and 0 <= each < 1 << 63 for each in (number, nbytes, chunk_nbytes)):
                raise ValueError("a number is out of range")
            sums = [str(joined)[i : i + _DIGITS] for i in range(0, len(joined), _DIGITS)]
            found = tuple("" if checksum == _NOT_YET else checksum for checksum in sums)
            bits = int(stored, 16)
            made = cls(int(number), str(key), int(nbytes), int(chunk_nbytes), found, bits)
        except FOREIGN as error:
            raise InvalidInput(f"this is not a notice of a blob ({error!r})") from error
        if made.nbytes < 0 or not 1 <= made.chunk_nbytes <= MOST_CHUNK_NBYTES:
            raise InvalidInput(f"a blob of {made.nbytes} bytes in chunks of {made.chunk_nbytes}")
        if len(found) != chunk_count(made.nbytes, made.chunk_nbytes):
            raise InvalidInput(f"{len(found)} checksums do not fit {made.nbytes} bytes")
        if not 0 <= bits < 1 << len(found) or not all(each for i, each in enumerate(found) if bits >> i & 1):
            raise InvalidInput("a chunk is said to be stored that there is not")
        return made


def _bits(numbers: Iterable[int]) -> int:
    return sum(1 << number for number in numbers)


def notices(texts: Iterable[tuple[str, str | None]]) -> dict[str, Notice]:
    """What can be read of (name, text of a notice)."""
    found = {}
    for name, text in texts:
        if text:
            try:
                found[name] = Notice.from_json(text)
            except InvalidInput:
                continue
    return found
