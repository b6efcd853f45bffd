"""How a version is told by what it differs in from the one before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torchord.cache.blobs.blob import BlobRef
from torchord.cache.ledger.fields import DELTA


@dataclass(frozen=True, slots=True)
class DeltaRecord:
    """How a version follows from the one before, in fewer bytes than the version has.

    Attributes:
        base: digest of the parameters of the version before.
        compression: how the difference is encoded (`TrainingConfig.parameter_compression`).
        manifest: layout of the bytes (torchord.cache.tensors.codec.Manifest as JSON).
        buffers: names in the manifest that are buffers, which travel whole.
        blob: where the bytes are.
    """

    base: str
    compression: str
    manifest: dict[str, Any]
    buffers: tuple[str, ...]
    blob: BlobRef

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON-able form."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        return {**fields, "buffers": list(self.buffers), "blob": self.blob.to_json()}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> DeltaRecord:
        """The inverse of `as_dict`."""
        blob = BlobRef.from_json(DELTA.of(fields)["blob"])
        return cls(**{**fields, "buffers": tuple(fields["buffers"]), "blob": blob})
