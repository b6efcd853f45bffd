"""What the name of a stored dataset stands for, as small JSON."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Literal

from torchord.cache import keys
from torchord.cache.datasets.content import Chunk, Stream, address_of
from torchord.cache.errors import ChunkCorrupt, DatasetDamaged, InvalidInput, NotAuthentic
from torchord.cache.keyring import AnyKeyring
from torchord.cache.reading import COUNT, FINITE, FOREIGN, OBJECT, TEXT, Fields, parsed

Verdict = Literal["written", "same", "exists"]

_FORMAT = 1
_FORMATTED = Fields("it", {"format": COUNT}, open=True, error=InvalidInput)
_RECORD = Fields(
    "it",
    {
        "name": TEXT,
        "digest": TEXT,
        "samples": COUNT,
        "nbytes": COUNT,
        "chunk_nbytes": COUNT,
        "ttl_seconds": COUNT,
        "created_at": FINITE,
        "structure": TEXT,
        "manifest": OBJECT,
    },
    open=True,
    error=InvalidInput,
)


@dataclass(frozen=True, slots=True)
class Record:
    """What a name stands for.

    Attributes:
        name: of the dataset.
        digest: of the manifest, and so of everything: 40 hexadecimal digits.
        samples: how many.
        nbytes: bytes of all samples, each chunk counted as often as it is used.
        chunk_nbytes: upper bound of a chunk's length that was asked for.
        ttl_seconds: life of record and chunks; renewed when workers use the dataset.
        created_at: Unix time (s) of the put.
        structure: of one sample, for people.
        manifest: the chunks of the manifest.
    """

    name: str
    digest: str
    samples: int
    nbytes: int
    chunk_nbytes: int
    ttl_seconds: int
    created_at: float
    structure: str
    manifest: Stream

    def to_json(self) -> str:
        """Return the record as JSON text."""
        fields = {name: getattr(self, name) for name in self.__slots__ if name != "manifest"}
        return json.dumps({"format": _FORMAT, **fields, "manifest": self.manifest.to_json()})

    def sealed(self, keyring: AnyKeyring) -> str:
        """The record's text with the seal of whoever puts the dataset."""
        return keyring.sealed("submit", _place(self.name), self.to_json())

    @classmethod
    def opened(cls, name: str, text: str | bytes, where: str, keyring: AnyKeyring) -> Record:
        """Rebuild a record that `sealed` produced for this name.

        Raises:
            DatasetDamaged: it has no seal that the keyring trusts, or see `from_json`.
        """
        try:
            return cls.from_json(keyring.opened("submit", _place(name), _text(text)), where)
        except (NotAuthentic, UnicodeDecodeError) as error:
            raise DatasetDamaged(f"the record of a dataset at {where} cannot be believed: {error}") from error

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> Record:
        """Rebuild a record that `to_json` produced, trusting nothing in it.

        Raises:
            DatasetDamaged: it is not a record that this version of torchord can read.
        """
        try:
            value = _FORMATTED.of(parsed(text, "it", error=InvalidInput))
            if value["format"] != _FORMAT:
                raise ValueError(f"format {value['format']}, this version of torchord reads {_FORMAT}")
            _RECORD.of(value)
            known = {name: value[name] for name in cls.__slots__}
            return cls(**{**known, "manifest": Stream.from_json(value["manifest"])})
        except (InvalidInput, *FOREIGN) as error:
            raise DatasetDamaged(f"the record of a dataset at {where} cannot be read: {error}") from error


def require_address(chunk: Chunk, data: memoryview | bytes, where: str) -> None:
    """Refuse bytes that a chunk's address is not of, though its checksum may be.

    Raises:
        ChunkCorrupt: they are such.
    """
    if address_of(data) != chunk.address:
        raise ChunkCorrupt(f"{where} is not what was written: somebody has changed it on purpose")


def _place(name: str) -> str:
    return f"the record of dataset {name}"


def _text(text: str | bytes) -> str:
    return text if isinstance(text, str) else text.decode()


def renewal_seconds(ttl_seconds: int) -> int:
    """How often a dataset in use is renewed: once an hour, more often if it lives for less than four."""
    return max(1, min(keys.DATASET_RENEWAL_SECONDS, ttl_seconds // 4))


def now() -> float:
    """Unix time in seconds, to the millisecond."""
    return round(time.time(), 3)
