"""A run as a participant of its rounds holds it: model and optimizer, at exactly one version.

What a training server does with a complete step, each participant does where the gradients are: it adds up
the slots in slot order and steps the optimizer, with the same code and so with the same bits. Between two
rounds it stays as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from torchord.cache.blobs.blob import BlobRef
from torchord.cache.blobs.chunk_store import CHUNK_NBYTES
from torchord.cache.blobs.content_digest import content_digest
from torchord.cache.blobs.tiered_store import INLINE_NBYTES
from torchord.cache.errors import CacheError, InvalidInput, ManifestMismatch
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.ledger.records import CONTENT, Head, SlotRecord, StateRecord, VersionRecord
from torchord.cache.ledger.rounds import KEPT_STEPS, Report
from torchord.cache.stores.gradients import StoredGradient
from torchord.cache.tensors.codec import as_bytes
from torchord.cache.tensors.pieces import checksums, split
from torchord.coordinator.compute import shard_norm
from torchord.coordinator.compute.sums import Aggregate
from torchord.coordinator.compute.trainer import Trainer
from torchord.coordinator.runtime.context import RunContext
from torchord.coordinator.runtime.environment import device
from torchord.coordinator.runtime.restoring import restore
from torchord.coordinator.runtime.services import Services
from torchord.coordinator.runtime.step_result import entry_of, event_of, kept_states, update
from torchord.coordinator.runtime.step_sum import StepSum
from torchord.coordinator.runtime.version_writer import VersionWriter

log = logging.getLogger(__name__)

_MOST_OWN = 4  # slots of a step whose bytes are kept by whoever computed them


class Participant:
    """Model and optimizer of one run in one Client.

    Args:
        services: connections and stores of the process.
        context: the run.
        worker: id of the process, for the ledger's entries.

    Attributes:
        version: the version that it holds; -1: none.
        chain: ledger chain of that.
        digest: of its parameters.
        slots: what its slots keep, by shard.
    """

    def __init__(self, services: Services, context: RunContext, worker: str) -> None:
        self.services = services
        self.context = context
        self.ledger: Ledger = context.ledger
        self.worker = worker
        self.version = -1
        self.chain = ""
        self.digest = ""
        self.slots: dict[int, StateRecord] = {}
        self._committed_at = 0.0
        self._made: Trainer | None = None
        self._writer: VersionWriter | None = None
        self._flats: list[Tensor] = []  # of the present version, and of the one before, which is free
        self._spoilt = False  # whether something wrote to the first of them
        self._own: dict[tuple[str, BlobRef], Tensor] = {}  # bytes of the present step's slots computed here
        self._read: dict[int, list[BlobRef]] = {}  # step -> bytes of its slots, which somebody may still read
        self._stored: dict[int, StateRecord] = {}  # what slots kept at the last stored version, whose it is

    @property
    def trainer(self) -> Trainer:
        """Its model and optimizer; there are none before `restore`."""
        assert self._made is not None
        return self._made

    def holds(self, version: int, chain: str) -> bool:
        """Whether it has this version, of this course of the run."""
        return self._made is not None and (self.version, self.chain) == (version, chain)

    def restore(self, head: Head, record: VersionRecord) -> None:
        """Take over a stored version with its optimizer state.

        Args:
            head: of the run.
            record: of its version; it has a state.

        Raises:
            CacheError: its bytes cannot be had.
            ManifestMismatch: this process's code builds another model.
        """
        self.version = -1
        if self._made is None:
            config = self.context.plan().config_at(max(0, record.version - 1))
            self._made = Trainer.build(self.context.recipe, config, device(), arrange=self.context.lay_out)
        restore(self.services.parameters, self.ledger, self._made, record)
        if self._writer is None:
            self._writer = VersionWriter(
                self.services.parameters, self.ledger, self._made.replica, record.rest
            )
        self._flats = []
        self.settle(record)
        self._take(record.version, record.chain, head.committed_at)
        if self.digest != record.digest:
            raise CacheError(
                f"version {record.version} of run {self.ledger.run!r} has the digest {self.digest} here and "
                f"{record.digest} in the ledger"
            )

    def computed(self, stored: StoredGradient) -> None:
        """A slot of the present step was computed here: its bytes need not be read again."""
        if stored.packed is not None and len(self._own) < _MOST_OWN:
            self._own[stored.nonce, stored.blob] = stored.packed

    def _bytes(self, slot: SlotRecord) -> Tensor:
        own = self._own.get((slot.nonce, slot.blob))
        return self.services.gradients.chunks.get(slot.blob) if own is None else own

    def advance(self, slots: Mapping[int, SlotRecord], token: int) -> Report:
        """Bring model and optimizer to the next version.

        Args:
            slots: all of the present step's.
            token: fencing token of the round.

        Returns:
            What the ledger is to say of it.

        Raises:
            CacheError: a slot's bytes are gone, or a slot is missing; nothing has changed.
            NonFinite, RunFailed, InvalidInput: as `Trainer.apply`; this participant is of no use any more.
        """
        step, context = self.version, self.context
        plan = context.plan()
        tree = plan.fan_in(step)
        if missing := set(tree.roots) - slots.keys():
            raise CacheError(f"slot {min(missing)} of step {step} is no record any more")
        roots = [slots[root] for root in tree.roots]
        self.trainer.adopt(context.recipe, plan.config_at(step))
        mean = self._average(step, roots)
        self.version = -1  # until it has arrived at the next: nobody is to take its bytes for a version's
        ends = plan.ends_epoch(step)
        updated = update(context.run, self.trainer, step, roots, mean, epoch_ends=ends)
        before, self.chain = self.chain, ""
        self._read[step] = [slot.blob for slot in slots.values()]
        self._keep(step, slots, skipped=updated.report.skipped)
        digest, kind = self._pack(), self.ledger.digest
        entry = entry_of(
            context,
            step,
            roots,
            updated,
            parameters=digest,
            previous=before,
            committed_at=self._committed_at,
            token=token,
            server=self.worker,
            notes={CONTENT: [content_digest(kind, as_bytes(self._flats[0]))]} if kind else {},
        )
        self.version, self.chain, self.digest = step + 1, entry.chain, digest
        self._committed_at = entry.committed_at
        context.held = self
        return Report(entry, event_of(entry), tree.total)

    def _average(self, step: int, roots: Sequence[SlotRecord]) -> Aggregate:
        """The average of a step's slots.

        Raises:
            CacheError: a slot's bytes are gone, are not the model's, or too long: its training server finds
                out whose they are.
        """
        plan, trainer = self.context.plan(), self.trainer
        total = StepSum(
            plan.fan_in(step),
            plan.examples(step),
            trainer,
            self.services.gradients,
            self.context.recipe.codec,
            look=shard_norm.within(trainer.config.max_shard_norm),
            read=self._bytes,
        )
        try:
            for slot in roots:
                total.add(slot)
            mean = total.result()
            trainer.require_fitting(mean.gradients, mean.buffers)
        except (InvalidInput, ManifestMismatch, shard_norm.TooLong) as error:
            raise CacheError(f"what was sent for step {step} cannot be added up: {error}") from error
        finally:
            self._own.clear()
        return mean

    def _keep(self, step: int, slots: Mapping[int, SlotRecord], *, skipped: bool) -> None:
        """Take over what the slots of a step keep for their next."""
        before = self.slots
        self.slots, unused = kept_states(self.context, step, slots.values(), before, skipped=skipped)
        self._read[step] += _besides(unused, self.slots)
        self._read.setdefault(step - 1, []).extend(_besides(before.values(), self.slots, self._stored))

    def settle(self, record: VersionRecord | None) -> list[BlobRef]:
        """Keep of the slots' states what is stored with a version: the present one's, at a round's end.

        Args:
            record: of it; None: it is gone, and this participant has to restore the next one.

        Returns:
            The bytes of states that were kept for the round alone.
        """
        if record is None:
            self.version = -1
            return []
        before, self.slots, self._stored = self.slots, dict(record.slots), dict(record.slots)
        return _besides(before.values(), self.slots)

    def unneeded(self, record: VersionRecord) -> list[BlobRef]:
        """The bytes that `stored` wrote for a record that nobody takes."""
        state = [] if record.state is None else record.state.blobs()
        return [*record.own_blobs(), *state, *_besides(record.slots.values(), self.slots)]

    def spent(self) -> list[BlobRef]:
        """The gradient bytes that nobody reads any more, once its version is committed; given once."""
        old = [step for step in self._read if step < self.version - KEPT_STEPS]
        return [blob for step in old for blob in self._read.pop(step)]

    def stored(self) -> VersionRecord:
        """Store the present version with its optimizer state, for everybody.

        Raises:
            CacheError: that failed.
        """
        assert self._writer is not None
        lasting = self.services.gradients.lasting
        slots = {n: lasting(self.ledger, self.version, n, state) for n, state in self.slots.items()}
        record = replace(self._writer.store(self.version, chain=self.chain), slots=slots)
        return self.services.parameters.publish_state(self.ledger, record, self.trainer.state(copies=False))

    def flat(self) -> Tensor:
        """The version's bytes, which the model that computes shards looks at (uint8, 1-D)."""
        if self._spoilt:
            self.trainer.replica.pack(self._flats[0])
            self._spoilt = False
        return self._flats[0]

    def spoil(self) -> None:
        """A forward has written to the bytes: `flat` writes them anew."""
        self._spoilt = True

    def _take(self, version: int, chain: str, committed_at: float) -> None:
        self._own.clear()
        self.digest = self._pack()
        self.version, self.chain, self._committed_at = version, chain, committed_at
        self.context.held = self

    def _pack(self) -> str:
        """Write the trainer's state where the model does not look at present; its digest."""
        nbytes = self.trainer.replica.nbytes()
        if not self._flats:
            self._flats = [torch.empty(nbytes, dtype=torch.uint8) for _ in range(2)]
        self._flats.reverse()
        self._spoilt = False
        self.context.let_go(self._flats[0])
        flat = self.trainer.replica.pack(self._flats[0])
        size = CHUNK_NBYTES if nbytes <= INLINE_NBYTES else self.services.chunks.chunk_nbytes
        return BlobRef("", nbytes, size, checksums(split(as_bytes(flat), size))).digest


def _besides(states: Iterable[StateRecord], *kept: Mapping[int, StateRecord]) -> list[BlobRef]:
    """The bytes of states that others do not have as well."""
    needed = {blob.key for each in kept for state in each.values() for blob in state.blobs()}
    return [blob for state in states for blob in state.blobs() if blob.key not in needed]
