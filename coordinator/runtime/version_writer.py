"""Storing a run's versions: whole, or what moves of each beside what rests of all.

Frozen parameters and buffers *may* rest. Whether they do is seen, not believed: at each version their bytes
are compared, by a checksum of 128 bits, with what is stored. A tensor that is found changed moves from then
on; what then rests is stored anew, without it. Where little rests, versions are stored whole, and nothing is
compared.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import xxhash
from torch import Tensor

from torchord.cache.blobs.blob import BlobRef
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.ledger.records import VersionRecord
from torchord.cache.ledger.rest_record import RestRecord
from torchord.cache.stores.parameters import ParameterCache
from torchord.cache.tensors.codec import pack, views
from torchord.cache.tensors.halves import ChunkSums, Halves, Rest, bits
from torchord.coordinator.compute.replica import Replica

LEAST_NBYTES = 256 << 10
LEAST_SHARE = 8
"""What rests is kept apart from so many bytes on, if it is at least this part of a version: 1/8."""

_RENEWED_SECONDS = 24 * 3600.0  # well below the life of a blob


class VersionWriter:
    """What one training server knows of the stored versions of a run that it holds warm.

    Args:
        parameters: stores them.
        ledger: the run's.
        replica: the model; its state is what is stored.
        stored: of a version that the server restored: what rests in it.
    """

    def __init__(
        self, parameters: ParameterCache, ledger: Ledger, replica: Replica, stored: RestRecord | None = None
    ) -> None:
        self.parameters = parameters
        self._chunks = parameters.chunks
        self._ledger = ledger
        self._replica = replica
        self._may_rest = replica.may_rest()
        if stored is not None:
            listed = enumerate(replica.manifest.tensors)
            self._may_rest &= {spec.name for i, spec in listed if stored.tensors >> i & 1}
        self._stored = stored
        self._renewed: float | None = None  # when it was last known to live long enough
        self._halves = self._worthwhile()
        self._known: dict[str, int] = {}  # checksum of each tensor that rests
        self._sums: ChunkSums | None = None

    @property
    def nbytes(self) -> int:
        """What a version takes at present, in bytes, without what others have too."""
        return self._replica.nbytes() if self._halves is None else self._halves.moving_layout.nbytes

    def store(self, version: int, *, chain: str, announced: bool = False) -> VersionRecord:
        """Store the replica's state as a version: first what rests, if that is not stored, then what moves.

        The digest is over the whole state in one buffer, however it is stored.

        Args:
            chain, announced: see `ParameterCache.publish`.
        """
        replica = self._replica
        state: Mapping[str, Tensor] = {} if self._halves is None else self._state()
        if state:
            self._strike_changed(state)
        if self._halves is None:
            flat = replica.pack(self._chunks.draft(replica.nbytes()))
            return self.parameters.publish(self._ledger, version, flat, chain=chain, announced=announced)
        rest = self._rest(state)
        if self._sums is None:
            self._sums = ChunkSums(replica.manifest, self._chunks.chunk_nbytes)
        layout = self._halves.moving_layout
        moving = {spec.name: state[spec.name] for spec in layout.tensors}
        sums = self._sums.after(state, moving)
        digest = BlobRef("", replica.nbytes(), self._chunks.chunk_nbytes, sums).digest
        flat = pack(moving, layout, self._chunks.draft(layout.nbytes))
        return self.parameters.publish(
            self._ledger, version, flat, chain=chain, announced=announced, rest=rest, digest=digest
        )

    def resting(self) -> Rest | None:
        """What rests, from where the model has it; without a digest, so that whoever uses it compares."""
        if self._halves is None:
            return None
        state, layout = self._state(), self._halves.resting_layout
        return Rest(self._halves, "", pack({spec.name: state[spec.name] for spec in layout.tensors}, layout))

    def doubt(self) -> None:
        """What rests may be lost: the next version stores it again."""
        self._stored = self._renewed = None

    def _state(self) -> Mapping[str, Tensor]:
        """Name -> tensor of the whole state, on the CPU: the live tensors, if they are there."""
        replica = self._replica
        on_cpu = replica.memory is None
        return replica.state_tensors() if on_cpu else views(replica.pack(), replica.manifest)

    def _worthwhile(self) -> Halves | None:
        manifest = self._replica.manifest
        resting = sum(spec.nbytes for spec in manifest.tensors if spec.name in self._may_rest)
        if resting < max(LEAST_NBYTES, manifest.nbytes // LEAST_SHARE):
            return None
        halves = Halves.of(manifest, self._may_rest)
        return halves if halves.moving_layout.nbytes else None

    def _strike_changed(self, state: Mapping[str, Tensor]) -> None:
        """Take the tensors that changed from those that rest."""
        known = {name: xxhash.xxh3_128_intdigest(bits(state[name])) for name in self._may_rest}
        changed = {name for name, before in self._known.items() if known[name] != before}
        for name in changed:
            del known[name]
        self._known = known
        if changed:
            self._may_rest -= changed
            self._halves, self._renewed = self._worthwhile(), None

    def _rest(self, state: Mapping[str, Tensor]) -> RestRecord:
        """Where what rests is stored; that is looked after now and then, and first of all."""
        now = time.monotonic()
        if self._stored is None or self._renewed is None or now - self._renewed > _RENEWED_SECONDS:
            assert self._halves is not None
            layout = self._halves.resting_layout
            buffer = pack({spec.name: state[spec.name] for spec in layout.tensors}, layout)
            self._stored = self.parameters.publish_rest(
                self._ledger, buffer, self._halves.resting, stored=self._stored
            )
            self._renewed = now
        return self._stored
