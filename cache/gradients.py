"""Gradient bytes: stored by a Client under a key of its own attempt, read by the training server.

Each attempt writes to its own chunks, so two workers at one shard never mix their bytes; the
ledger's slot then points to the attempt that came first and the other deletes its own.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from cache import keys
from cache.blob import BlobRef
from cache.codec import Manifest, layout, pack, views
from cache.damage import require_fitting, telling
from cache.errors import CacheError, ManifestMismatch
from cache.ledger import Ledger
from cache.records import SlotRecord, StateRecord
from cache.tiered import TieredStore


@dataclass(frozen=True, slots=True)
class StoredGradient:
    """What `GradientStore.put` returns: enough to write the slot."""

    nonce: str
    blob: BlobRef
    manifest: dict[str, Any]
    digest: str


class GradientStore:
    """Moves the tensors of gradient slots.

    Args:
        chunks: where the bytes go.
    """

    def __init__(self, chunks: TieredStore) -> None:
        self.chunks = chunks

    def put(
        self,
        ledger: Ledger,
        step: int,
        shard: int,
        tensors: Mapping[str, torch.Tensor],
        *,
        for_server: bool = True,
    ) -> StoredGradient:
        """Store the tensors of one attempt, on this host alone if the training server is here too.

        What is on one host alone can be lost with it; the shard is then computed again.

        Args:
            for_server: whether the training server reads them; if not, a Client does, on any host.
            tensors: name -> gradient or buffer, any dtype and shape, on CPU.
        """
        nonce = uuid.uuid4().hex[:12]
        manifest = layout(tensors)
        key = ledger.keys.gradient_blob(step, shard, nonce)
        near = (
            for_server
            and self.chunks.tiered(manifest.nbytes)
            and ledger.server_memory() == self.chunks.memory_id
        )
        packed = pack(tensors, manifest, self.chunks.draft(manifest.nbytes))
        if near:
            blob = self.chunks.put_local(key, packed, ttl_seconds=keys.WORK_TTL_SECONDS)
        else:
            blob = self.chunks.put(key, packed, ttl_seconds=keys.WORK_TTL_SECONDS, inline=True)
        return StoredGradient(nonce, blob, manifest.to_json(), blob.digest)

    def put_state(
        self, ledger: Ledger, step: int, shard: int, skeleton: Any, tensors: Mapping[str, torch.Tensor]
    ) -> StateRecord:
        """Store what a slot keeps for its next step."""
        manifest = layout(tensors)
        blob = None
        if manifest.nbytes:
            key = ledger.keys.slot_state_blob(step, shard, uuid.uuid4().hex[:12])
            blob = self.chunks.put(
                key, pack(tensors, manifest), ttl_seconds=keys.BLOB_TTL_SECONDS, inline=True
            )
        return StateRecord(skeleton, manifest.to_json(), blob)

    def get_state(self, state: StateRecord) -> tuple[Any, dict[str, torch.Tensor]]:
        """Skeleton and tensors of a stored tree."""
        if state.blob is None:
            return state.skeleton, {}
        what = f"slot state {state.blob.key}"
        return state.skeleton, self._read(what, state.blob, state.manifest)

    def get(self, slot: SlotRecord) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """(gradients as they travelled, buffers) of a slot, as views of one received buffer.

        Raises:
            ChunkMissing, ChunkCorrupt: its bytes are lost; the message names the tensors.
            ManifestMismatch: the slot's record does not describe its bytes.
        """
        what = f"gradient of shard {slot.shard} by worker {slot.worker}"
        tensors = self._read(what, slot.blob, slot.manifest)
        if missing := set(slot.buffers) - set(tensors):
            raise ManifestMismatch(f"{what}: no tensor {min(missing)!r} in its manifest")
        buffers = {name: tensors.pop(name) for name in slot.buffers}
        return tensors, buffers

    def _read(self, what: str, blob: BlobRef, manifest: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        layout_of_it = Manifest.from_json(manifest)
        require_fitting(what, blob, layout_of_it)
        with telling(what, blob, lambda: manifest):
            return views(self.chunks.get(blob), layout_of_it)

    def delete(self, blobs: Iterable[BlobRef]) -> None:
        """Delete bytes that no slot points to any more."""
        try:
            self.chunks.delete(blobs)
        except CacheError:
            return  # the chunks carry a TTL; a node that is away loses them by itself
