"""A step's way into the ledger: average, optimizer, stored version, entry, commit, next chord.

Nothing here decides whether this process may act: the commit is a compare-and-swap of the head under
the fencing token, and whoever was overtaken learns it there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from torch import Tensor

from torchord.cache.blobs.blob import BlobRef
from torchord.cache.errors import (
    ChunkCorrupt,
    ChunkMissing,
    Fenced,
    InvalidInput,
    ManifestMismatch,
    NonFinite,
    RunError,
)
from torchord.cache.ledger.answers import Committed
from torchord.cache.ledger.launch import Launch
from torchord.cache.ledger.records import (
    CHECKS,
    CONTENT,
    LedgerEntry,
    SlotRecord,
    VersionRecord,
)
from torchord.cache.ledger.step_metrics import METRICS
from torchord.coordinator.compute import shard_norm
from torchord.coordinator.compute.sums import Aggregate
from torchord.coordinator.messages.sender import Sender
from torchord.coordinator.runtime import cache_report as tiers
from torchord.coordinator.runtime.faults import Hook
from torchord.coordinator.runtime.joining import compare_server
from torchord.coordinator.runtime.services import Services
from torchord.coordinator.runtime.step_result import (
    Updated,
    entry_of,
    event_of,
    kept_states,
    nonfinite,
    update,
)
from torchord.coordinator.runtime.step_sum import StepSum
from torchord.coordinator.server.gradient_download import LEAST_CHUNKS
from torchord.coordinator.server.jury import Jury
from torchord.coordinator.server.rounds import RoundOpener
from torchord.coordinator.server.step_checks import compare
from torchord.coordinator.server.step_slots import needed, needed_slots, own, send_missing
from torchord.coordinator.server.upkeep import Upkeep
from torchord.coordinator.server.warm_run import WarmRun

_FAR_STEPS = 20
_SUSPECTS = 4  # shards that are computed once more before a run stops for a NaN


@dataclass(frozen=True)
class Applied:
    """A step that was committed.

    Attributes:
        receipt: what Flower shows of it.
        committed: the ledger's answer.
        drafted: the chord that was to be launched with it, None if there was none.
    """

    receipt: dict[str, Any]
    committed: Committed
    drafted: Launch | None


class StepCommit:
    """Applies complete steps of warm runs, commits them and launches the next, for one training server.

    Args:
        services: connections and stores of the process.
        sender: publishes the next steps.
        upkeep: says which versions a commit may drop.
        worker: id of the process, for the ledger's entries.
        queue: its private queue, where the chords call back.
        fault: called with the name of each point of the protocol; tests use it to die there.
        jury: decides who lied.

    Attributes:
        read_nbytes: what the last update had to read from the chunk store, in bytes.
        rounds: opens rounds.
        before: what the cache's tiers had done when the server was called.
    """

    def __init__(
        self,
        services: Services,
        sender: Sender,
        upkeep: Upkeep,
        *,
        worker: str,
        queue: str,
        fault: Hook,
        jury: Jury,
    ) -> None:
        self.services = services
        self.sender = sender
        self.upkeep = upkeep
        self.worker = worker
        self.queue = queue
        self.fault = fault
        self.jury = jury
        self.rounds = RoundOpener(services, sender, upkeep, queue=queue, fault=fault)
        self.read_nbytes = 0
        self.before = tiers.snapshot(services)

    # --- one step -------------------------------------------------------------------------

    def apply(self, warm: WarmRun, present: dict[int, SlotRecord] | None, launched: int) -> Applied | None:
        """Apply and commit the present step if every slot is there; None if one is missing.

        Args:
            present: all its slots, where they have just been read.
            launched: the last step that is launched; the one after goes out with the commit.

        Raises:
            Fenced: another server or a person acted; what `warm` holds is ahead of the head.
            RunError: a replayed step gave other bytes than before.
            NonFinite: the gradients are not finite and the config asks to stop then.
            SlotRefused: a worker lied; nothing was applied, and the slots are open again.
            Impure: a shard that was computed twice came out differently.
            ChunkMissing, ChunkCorrupt: a slot's bytes are lost; it was opened again.
        """
        step, tree = warm.version, warm.context.plan().fan_in(warm.version)
        if present is None:
            present = needed_slots(warm.ledger, step, tree)
        else:
            present = own(warm.ledger, step, tree, present)
        if present is None or not needed(tree) <= present.keys():
            return None
        slots = [present[root] for root in tree.roots]
        if step == 0:
            compare_server(warm.context, self.worker)
        self.jury.discard(warm, present)
        checks = compare(warm, present, self.services.gradients, self.jury)
        self.jury.look(warm, present, slots)
        # The average, and the optimizer's step.
        self.fault("server.before_apply")
        self._adopt(warm)
        updated = self._update(warm, slots)
        self.fault("server.after_apply")
        # The new version's bytes: before the record that points to them.
        draft = self._stored(warm, slots)
        self.fault("server.after_publish")
        # The ledger's entry and the version's record, and with them the next chord.
        entry = self._entry(warm, slots, updated, draft, {CHECKS: checks} if checks else {})
        record, unused = self._record(warm, slots, draft, entry)
        verdict = None if warm.watch is None else warm.watch.see(entry)
        drafted = self._draft(warm, entry, after=launched, ends=verdict is not None)
        committed = warm.ledger.commit(
            step=step,
            token=warm.token,
            shards=tree.total,
            entry=entry,
            record=record,
            event={**event_of(entry), "tiers": tiers.since(self.before, self.services)},
            drop=() if warm.record.slots or record.slots else self.upkeep.outlived(warm),
            launch=drafted,
        )
        self.fault("server.after_commit")
        if committed.verdict != "ok":
            self.services.chunks.delete(record.own_blobs())
            raise _refusal(warm, committed.verdict)
        spent = [blob for check in tree.checks for blob in present[check].blobs()]
        spent += [present[each].blob for each in {*tree.roots, *tree.checked}]
        warm.take(entry, record, committed, spent=[*spent, *unused])
        if verdict is None and not warm.waits_at(warm.version):
            warm.settled = warm.version
        self.rounds.judge(warm, entry.parameters)
        return Applied(self._receipt(warm, entry), committed, drafted)

    def _stored(self, warm: WarmRun, slots: Sequence[SlotRecord]) -> VersionRecord:
        """Store the version that the trainer has made, and its difference where Clients read differences."""
        draft = warm.writer.store(warm.version + 1, chain="", announced=self._far(warm, slots))
        if (delta := warm.trainer.delta) is None:
            return draft
        return self.services.parameters.publish_delta(
            warm.ledger, draft, warm.record, delta.compression, delta.payload, delta.buffers
        )

    def _entry(
        self,
        warm: WarmRun,
        slots: Sequence[SlotRecord],
        updated: Updated,
        draft: VersionRecord,
        checks: dict[str, Any],
    ) -> LedgerEntry:
        return entry_of(
            warm.context,
            warm.version,
            slots,
            updated,
            parameters=draft.digest,
            previous=warm.chain,
            committed_at=warm.committed_at,
            token=warm.token,
            server=self.worker,
            notes={**checks, **_proof(draft)},
        )

    def _record(
        self, warm: WarmRun, slots: Sequence[SlotRecord], draft: VersionRecord, entry: LedgerEntry
    ) -> tuple[VersionRecord, list[BlobRef]]:
        """The version's record with what its slots keep, and the blobs of states that nobody will need."""
        shards: Iterable[SlotRecord] = slots
        if slots[0].total is not None and warm.context.keeps_state(warm.version):
            count = warm.context.plan().shards_in(warm.version)
            shards = [slot for slot in warm.ledger.slots(warm.version).values() if slot.shard < count]
        kept, unused = kept_states(
            warm.context, warm.version, shards, warm.record.slots, skipped=entry.skipped
        )
        return replace(draft, chain=entry.chain, slots=kept), [blob for s in unused for blob in s.blobs()]

    def _receipt(self, warm: WarmRun, entry: LedgerEntry) -> dict[str, Any]:
        return {
            "run": warm.run,
            "status": "committed",
            "step": entry.version - 1,
            "version": entry.version,
            "loss": entry.loss,
            "grad_norm": entry.grad_norm,
            "examples": entry.examples,
            "nbytes": sum(slot.nbytes for slot in entry.slots),
            "skipped": entry.skipped,
            **({METRICS: entry.metrics} if entry.metrics else {}),
            "worker": self.worker,
        }

    def _far(self, warm: WarmRun, slots: Sequence[SlotRecord]) -> bool:
        """Whether Clients read versions from the chunk store, so that they are told while one is stored."""
        if "fetch" not in self.services.settings.overlap:
            return False
        if any(slot.fetched == "store" for slot in slots):  # who reads ahead into the host's tier says "host"
            warm.far_until = warm.version + _FAR_STEPS
        least = LEAST_CHUNKS * self.services.chunks.chunk_nbytes
        far = self.read_nbytes >= least or warm.version < warm.far_until
        return far and warm.writer.nbytes >= least

    def _draft(self, warm: WarmRun, entry: LedgerEntry, *, after: int, ends: bool) -> Launch | None:
        """The chord that the commit of the present step makes possible, None if there is none or several.

        Args:
            after: the last step that is launched.
            entry: of the present step.
            ends: whether a rule of the config says that the step is the last.
        """
        plan, following = warm.context.plan(), warm.version + 1
        if following >= warm.end or warm.waits_at(following) or ends:
            return None
        steps = [step for step in plan.window(following) if step > after]
        if len(steps) != 1 or self.rounds.steps(warm, following, seconds=entry.seconds) > 1:
            return None
        tree = plan.fan_in(steps[0])
        return self.sender.drafted(
            warm.run,
            steps[0],
            tree.gradients,
            callback_queue=self.queue,
            version=plan.version_for(steps[0]),
            incarnation=warm.context.incarnation,
            seconds=fmean(slot.seconds for slot in entry.slots),
            joining=len(tree.partials),
        )

    def _update(self, warm: WarmRun, slots: Sequence[SlotRecord]) -> Updated:
        """Average the slots in slot order and step the optimizer."""
        before = self.services.chunks.counters.store_nbytes
        mean = self._sum(warm, slots)
        self.read_nbytes = self.services.chunks.counters.store_nbytes - before
        try:
            ends = warm.context.plan().ends_epoch(warm.version)
            return update(warm.run, warm.trainer, warm.version, slots, mean, epoch_ends=ends)
        except NonFinite:
            self._doubt(warm, slots, nonfinite(slots))
            raise

    def _sum(self, warm: WarmRun, slots: Sequence[SlotRecord]) -> Aggregate:
        """The average of all root slots of the present step, added up in slot order."""
        step, plan, ahead = warm.version, warm.context.plan(), warm.download
        tree = plan.fan_in(step)
        trainer, present = warm.trainer, {slot.shard: slot for slot in slots}
        total = StepSum(
            tree,
            plan.examples(step),
            trainer,
            self.services.gradients,
            warm.context.recipe.codec,
            read=None if ahead is None or ahead.step != step else ahead.read,
            look=shard_norm.within(trainer.config.max_shard_norm),
        )
        for slot in slots:
            try:
                total.add(slot)
            except shard_norm.TooLong as error:
                self.jury.refuse(warm, present, slot, str(error))
                raise InvalidInput(f"run {warm.run!r}: shard {slot.shard} of step {step}: {error}") from None
            except (ChunkMissing, ChunkCorrupt, ManifestMismatch) as error:
                if slot.total is None and isinstance(error, ManifestMismatch):
                    self.jury.refuse(warm, present, slot, str(error))
                below = tree.below(slot.shard)
                warm.ledger.drop_slot(step, slot.shard, nonce=slot.nonce, token=warm.token, below=below)
                raise
        return total.result()

    def _doubt(self, warm: WarmRun, slots: Sequence[SlotRecord], bad: Sequence[int]) -> None:
        """Before a run stops for a NaN: whether a worker made it up.

        Raises:
            SlotRefused: one did.
        """
        present = {slot.shard: slot for slot in slots}
        suspects = [slot for slot in slots if slot.total is None and (not bad or slot.shard in bad)]
        for slot in suspects[:_SUSPECTS]:
            if bad or not _finite(self.services.gradients.get(slot)[0].values()):
                self.jury.decide(warm, present, [slot])

    def _adopt(self, warm: WarmRun) -> None:
        """Follow a switch of the config that holds from the present step on."""
        warm.trainer.adopt(warm.context.recipe, warm.context.plan().config_at(warm.version))

    # --- what comes next --------------------------------------------------------------------

    def launch(self, warm: WarmRun, *, after: int, fresh: bool) -> int:
        """Publish the chords of the steps that may be computed by now and were not launched.

        Args:
            after: the last step that was launched.
            fresh: this process has just committed the step before, so no slot can be there yet.

        Returns:
            The last step that is launched now.
        """
        plan = warm.context.plan()
        if warm.version >= warm.end or warm.open_verdict:
            return after
        for step in plan.window(warm.version):
            if step <= after:
                continue
            present = set() if fresh else warm.ledger.slots_present(step)
            if not present and (last := self.rounds.open(warm)) is not None:
                return last
            self.fault("server.before_launch")
            send_missing(
                self.sender,
                warm.run,
                step,
                plan.fan_in(step),
                present,
                version=plan.version_for(step),
                callback_queue=self.queue,
            )
            self.fault("server.after_launch")
            warm.ledger.mark_launched(step, token=warm.token)
            after = step
        return after


def _finite(tensors: Iterable[Tensor]) -> bool:
    return all(bool(each.isfinite().all()) for each in tensors if each.is_floating_point())


def _refusal(warm: WarmRun, verdict: str) -> RunError | Fenced:
    """Why a commit was not taken; what this process holds is ahead of the head."""
    if verdict == "diverged":
        return RunError(
            f"run {warm.run!r}: replaying step {warm.version} gave other bytes than before; a worker's "
            "torch, hardware, data or code has changed (see run.verify())"
        )
    return Fenced(
        f"run {warm.run!r}: commit of version {warm.version + 1} was {verdict}; another server or a person "
        "acted"
    )


def _proof(record: VersionRecord) -> dict[str, Any]:
    """For an entry's notes: the digests that prove a version's bytes, where the run has such."""
    found = [blob.content for blob in (record.blob, *record.shared_blobs())]
    return {CONTENT: found} if all(found) else {}
