"""What versions share, as their records name it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from string import hexdigits
from typing import Any

from torchord.cache.blobs.blob import BlobRef
from torchord.cache.errors import RecordDamaged
from torchord.cache.ledger.fields import REST


@dataclass(frozen=True, slots=True)
class RestRecord:
    """The tensors of a version that rest: their bytes are stored once, for all versions that have the same.

    Attributes:
        blob: where they are; its key contains its digest.
        tensors: bit i is set if tensor i of the run's layout is among them.
    """

    blob: BlobRef
    tensors: int

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON-able form."""
        return {"blob": self.blob.to_json(), "tensors": f"{self.tensors:x}"}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> RestRecord:
        """The inverse of `as_dict`.

        Raises:
            RecordDamaged, InvalidInput: it is none.
        """
        tensors = REST.of(fields)["tensors"]
        if not set(tensors) <= set(hexdigits) or not tensors:
            raise RecordDamaged(f"field 'tensors' of what versions share is {tensors:.60}, not hexadecimal")
        return cls(BlobRef.from_json(fields["blob"]), int(tensors, 16))
