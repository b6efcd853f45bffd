"""Gradient bytes: stored by a Client under a key of its own attempt, read by the training server.

Each attempt writes to its own chunks, so two workers at one shard never mix their bytes; the
ledger's slot then points to the attempt that came first and the other deletes its own.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from torchord.cache import keys
from torchord.cache.blobs.blob import BlobRef
from torchord.cache.blobs.content_digest import ContentDigest, content_digest
from torchord.cache.blobs.notice import Notice
from torchord.cache.blobs.tiered_store import TieredStore
from torchord.cache.errors import CacheError, ManifestMismatch
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.ledger.records import SlotRecord, StateRecord
from torchord.cache.stores.damage import require_fitting, telling
from torchord.cache.stores.trees import get_tree, put_tree
from torchord.cache.tensors.codec import (
    Manifest,
    TensorSpec,
    as_bytes,
    copy_bits,
    gaps,
    layout,
    pack,
    same_bits,
    views,
)
from torchord.cache.tensors.pieces import chunk_count


@dataclass(frozen=True, slots=True)
class StoredGradient:
    """What `GradientStore.put` returns: enough to write the slot.

    Attributes:
        early: chunks that were handed over before the last tensor was computed.
        packed: the blob's bytes (uint8, 1-D, not to be written to), valid while it is not deleted; None if
            their memory is used for something else.
    """

    nonce: str
    blob: BlobRef
    manifest: dict[str, Any]
    digest: str
    early: int = 0
    packed: torch.Tensor | None = None


class GradientUpload:
    """One attempt's gradients on their way to the chunk store while they are being computed.

    What it is given early is a guess that saves time: `finish` compares every byte with what was to be
    stored, and sends again what differs. So the blob is the one that `GradientStore.put` would have made.

    Args:
        chunks: where the bytes go.
        key: prefix of the chunk keys.
        nonce: of the attempt.
        expected: the tensors that are expected, from the start of the buffer on.
        buffer: uint8, 1-D, to be laid out and sent from; not to be used by others before `finish`.
        tell: as for `Upload`.
        digest: as for `TieredStore.put`.
    """

    def __init__(
        self,
        chunks: TieredStore,
        key: str,
        nonce: str,
        expected: Sequence[TensorSpec],
        buffer: torch.Tensor,
        tell: Callable[[Mapping[int, str]], None] | None = None,
        digest: ContentDigest = "",
    ) -> None:
        self.buffer = buffer
        self._digest = digest
        self.nbytes = expected[-1].end
        self._chunks = chunks
        self._nonce = nonce
        self._expected = {spec.name: spec for spec in expected}
        manifest = Manifest(tuple(expected), buffer.numel())
        self._views = views(buffer, manifest)
        self._written: set[str] = set()
        size = chunks.chunk_nbytes
        due = [0] * (self.nbytes // size)  # what lies behind the last whole chunk waits for the buffers
        for spec in expected:
            for number in range(spec.offset // size, min(len(due), chunk_count(spec.end, size))):
                due[number] += min(spec.end, (number + 1) * size) - max(spec.offset, number * size)
        for gap in gaps(manifest):
            buffer[gap].zero_()
        self._upload = chunks.upload(key, buffer, due, ttl_seconds=keys.WORK_TTL_SECONDS, tell=tell)

    @property
    def early(self) -> int:
        """How many chunks have been handed over."""
        return self._upload.early

    def place(self, name: str) -> torch.Tensor | None:
        """Where a tensor belongs, in its shape and dtype; None if it is not expected, or was written."""
        return None if name in self._written else self._views.get(name)

    def written(self, name: str) -> None:
        """A tensor is in its place."""
        spec = self._expected[name]
        self._written.add(name)
        self._upload.done(spec.offset, spec.nbytes)

    def finish(self, tensors: Mapping[str, torch.Tensor]) -> StoredGradient | None:
        """Send what is missing, and wait for all of it.

        Args:
            tensors: what is to be stored, as for `GradientStore.put`.

        Returns:
            None if they are laid out otherwise than was expected; the upload is given up then.

        Raises:
            CacheError: a chunk could not be stored; the upload is given up.
        """
        manifest = layout(tensors)
        count = len(self._expected)
        fits = manifest.nbytes <= self.buffer.numel()
        if not fits or manifest.tensors[:count] != tuple(self._expected.values()):
            self.give_up()
            return None
        early, flat = self.early, self.buffer[: manifest.nbytes]
        flat[self.nbytes :].zero_()
        for spec, target in zip(manifest.tensors, views(flat, manifest).values(), strict=True):
            source = tensors[spec.name]
            if spec.name not in self._written:
                copy_bits(target, source)
            elif not same_bits(target, source):  # written once more after its hook, say
                copy_bits(target, source)
                self._upload.changed(spec.offset, spec.nbytes)
        blob = replace(
            self._upload.finish(manifest.nbytes), content=content_digest(self._digest, as_bytes(flat))
        )
        self._chunks.uploaded(blob)
        return StoredGradient(self._nonce, blob, manifest.to_json(), blob.digest, early=early)

    def give_up(self) -> None:
        """Delete what was sent, unless it is finished; does not wait."""
        self._upload.give_up()


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
        server_memory: str | None = None,
    ) -> StoredGradient:
        """Store the tensors of one attempt, on this host alone if the training server is here too.

        What is on one host alone can be lost with it; the shard is then computed again.

        Args:
            for_server: whether the training server reads them; if not, a Client does, on any host.
            server_memory: what `Ledger.server_memory` says, where the caller knows it; None: it is asked.
            tensors: name -> gradient or buffer, any dtype and shape, on CPU.
        """
        nonce = uuid.uuid4().hex[:12]
        manifest = layout(tensors)
        key = ledger.keys.gradient_blob(step, shard, nonce)
        near = for_server and self.near(ledger, manifest.nbytes, server_memory)
        packed = pack(tensors, manifest, self.chunks.draft(manifest.nbytes))
        if near:
            blob = self.chunks.put_local(key, packed, ttl_seconds=keys.WORK_TTL_SECONDS, digest=ledger.digest)
        else:
            blob = self.chunks.put(
                key, packed, ttl_seconds=keys.WORK_TTL_SECONDS, inline=True, digest=ledger.digest
            )
        return StoredGradient(nonce, blob, manifest.to_json(), blob.digest, packed=packed)

    def near(self, ledger: Ledger, nbytes: int, server_memory: str | None = None) -> bool:
        """Whether the training server shares this host's memory, for a blob of this length."""
        if not self.chunks.tiered(nbytes):
            return False
        there = ledger.server_memory() if server_memory is None else server_memory
        return there == self.chunks.memory_id

    def upload(
        self,
        ledger: Ledger,
        step: int,
        shard: int,
        expected: Sequence[TensorSpec],
        buffer: torch.Tensor,
        *,
        announced: bool = False,
    ) -> GradientUpload:
        """Begin to store one attempt's tensors for everybody, before they are computed.

        Args:
            expected: the first tensors of their layout.
            buffer: uint8, 1-D; at least as long as the layout will be.
            announced: whether the training server is told, so that it may read along.
        """
        nonce = uuid.uuid4().hex[:12]
        key = ledger.keys.gradient_blob(step, shard, nonce)
        size = self.chunks.chunk_nbytes
        whole = expected[-1].end // size  # the length of the chunks behind is not known yet

        def tell(sums: Mapping[int, str]) -> None:
            early = {number: each for number, each in list(sums.items()) if number < whole}
            notice = Notice.of(step, key, buffer.numel(), size, early)
            ledger.announce(keys.slot_underway(shard), notice)

        told = tell if announced else None
        return GradientUpload(self.chunks, key, nonce, expected, buffer, told, ledger.digest)

    def put_state(
        self, ledger: Ledger, step: int, shard: int, state: Any, *, readers: str | None = None
    ) -> StateRecord:
        """Store the tree that a slot keeps for its next step.

        Args:
            readers: in a round, the memory that its participants share, "" if they do not: where that is
                this host's, it is kept here alone, and nowhere for longer than work is; `lasting` then
                makes it part of a version. None: it is to be part of one at once.
        """
        key = ledger.keys.slot_state_blob(step, shard, uuid.uuid4().hex[:12])

        def put(packed: torch.Tensor) -> BlobRef:
            ttl = keys.BLOB_TTL_SECONDS if readers is None else keys.WORK_TTL_SECONDS
            if readers and self.chunks.tiered(packed.numel()) and readers == self.chunks.memory_id:
                return self.chunks.put_local(key, packed, ttl_seconds=ttl, digest=ledger.digest)
            return self.chunks.put(key, packed, ttl_seconds=ttl, inline=True, digest=ledger.digest)

        return put_tree(state, put, self.chunks.draft)

    def lasting(self, ledger: Ledger, step: int, shard: int, state: StateRecord) -> StateRecord:
        """What a slot keeps, stored for everybody and for as long as versions are.

        Raises:
            CacheError: its bytes are lost, or cannot be stored.
        """
        blob = state.blob
        if blob is None or blob.data:
            return state
        if not blob.local:
            self.chunks.touch(blob, keys.BLOB_TTL_SECONDS)
            return state
        key = ledger.keys.slot_state_blob(step, shard, uuid.uuid4().hex[:12])
        put = partial(self.chunks.put, key, ttl_seconds=keys.BLOB_TTL_SECONDS, digest=ledger.digest)
        return replace(state, blob=put(self.chunks.get(blob)))

    def get_state(self, state: StateRecord) -> Any:
        """The tree that a slot kept; errors as for `get_tree`."""
        return get_tree("slot state", state, self.chunks.get)

    def get(
        self, slot: SlotRecord, read: Callable[[SlotRecord], torch.Tensor] | None = None
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """(gradients as they travelled, buffers) of a slot, as views of one received buffer.

        Args:
            read: reads the slot's bytes; None: from here.

        Raises:
            ChunkMissing, ChunkCorrupt: its bytes are lost; the message names the tensors.
            ManifestMismatch: the slot's record does not describe its bytes.
        """
        what = f"gradient of shard {slot.shard} by worker {slot.worker}"
        manifest = Manifest.from_json(slot.manifest)
        require_fitting(what, slot.blob, manifest)
        with telling(what, slot.blob, lambda: slot.manifest):
            tensors = views(self.chunks.get(slot.blob) if read is None else read(slot), manifest)
        if missing := set(slot.buffers) - set(tensors):
            raise ManifestMismatch(f"{what}: no tensor {min(missing)!r} in its manifest")
        buffers = {name: tensors.pop(name) for name in slot.buffers}
        return tensors, buffers

    def delete(self, blobs: Iterable[BlobRef]) -> None:
        """Delete bytes that no slot points to any more."""
        try:
            self.chunks.delete(blobs)
        except CacheError:
            return  # the chunks carry a TTL; a node that is away loses them by itself
