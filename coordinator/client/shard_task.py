"""One shard's gradient: fetch what it is computed from, compute it, store its bytes, write its slot.

Safe to run twice, anywhere, at any time: what is computed depends on (run, version, shard) alone, and the
slot is written once.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Protocol

from torchord.cache.errors import CacheError, Skewed
from torchord.cache.ledger.answers import Begun
from torchord.cache.ledger.records import SlotRecord, VersionRecord, combined_digest
from torchord.cache.ledger.step_metrics import METRICS
from torchord.cache.servers.fast_client import Command
from torchord.cache.stores.gradients import StoredGradient
from torchord.coordinator.client import optimizer_imports
from torchord.coordinator.client.check_turn import CheckTurns
from torchord.coordinator.client.fresh_copy import FreshCopies
from torchord.coordinator.client.gradient_upload import GradientUploads, Outgoing
from torchord.coordinator.client.slot_lease import NO_SUCH_SLOT, SlotLease, SlotTask
from torchord.coordinator.client.slot_writer import SlotWriter
from torchord.coordinator.client.version_download import VersionDownload
from torchord.coordinator.compute.gradient import unwatched
from torchord.coordinator.compute.probe import due, probe
from torchord.coordinator.compute.replica import Replica
from torchord.coordinator.compute.shard import ShardWork, work
from torchord.coordinator.compute.step_metrics import combined
from torchord.coordinator.runtime import activity
from torchord.coordinator.runtime.context import Contexts, RunContext
from torchord.coordinator.runtime.environment import environment
from torchord.coordinator.runtime.failures import contained
from torchord.coordinator.runtime.faults import Hook
from torchord.coordinator.runtime.joining import join
from torchord.coordinator.runtime.trust import require_trusted
from torchord.coordinator.spec.plan import shown

log = logging.getLogger(__name__)

_NOT_TRIED = (
    "whether the losses of shards have the batch's loss as their mean was not looked at: the attempts "
    "before this one did not end"
)
_FRESH_SECONDS = 1.0  # after so long a training server may have moved: ask where it is


class Part(Protocol):
    """How a task's end is counted in its chord; what it knows of Celery is the tasks' business."""

    def command(self, receipt: dict[str, Any]) -> Command | None:
        """The command that counts, None if it has to be done otherwise."""

    def answered(self, answer: Any) -> None:
        """What the server said, None if the command was not sent."""


class ShardTask:
    """Computes shards for one worker process.

    Args:
        contexts: the process's view of the runs.
        lease: takes and hands back slots.
        writer: writes slots, and sends what they make possible.
        fault: called with the name of each point of the protocol; tests use it to die there.
    """

    def __init__(self, contexts: Contexts, lease: SlotLease, writer: SlotWriter, fault: Hook) -> None:
        self.contexts = contexts
        self.services = contexts.services
        self.lease = lease
        self.writer = writer
        self.fault = fault
        overlap = self.services.settings.overlap
        self.uploads = GradientUploads(
            self.services.gradients, ahead="upload" in overlap, announced="collect" in overlap
        )
        self.downloads = VersionDownload(self.services.chunks, on="fetch" in overlap)
        self.fresh = FreshCopies()
        self.turns = CheckTurns(lease)
        self._this = threading.local()  # of this thread's shard: its parameters' tier, seconds aside

    def compute_gradient(self, task: SlotTask, part: Part | None = None) -> dict[str, Any]:
        """Compute one shard and write its slot.

        Args:
            part: counts the task as a part of its chord, in the round trip that writes the slot.

        Returns:
            The receipt that Flower shows.

        Raises:
            ShardFailed: if the recipe's own code raised; the run has failed with its message.
        """
        receipt: dict[str, Any] = {
            "run": task.run,
            "step": task.step,
            "shard": task.slot,
            "version": task.version,
        }
        self.fault("client.before_begin")
        return self.lease.hold(
            task,
            receipt,
            activity.gradient(task.run, task.step, task.slot),
            lambda begun: self._compute(task, receipt, begun, part),
            lacking=not self.contexts.holds(task.run, task.version),
        )

    def _compute(
        self, task: SlotTask, receipt: dict[str, Any], begun: Begun, part: Part | None
    ) -> dict[str, Any]:
        self.fault("client.after_begin")
        context = self.contexts.of(task.run, begun.incarnation)
        require_trusted(context, self.lease.heartbeat)
        toolchain = context.require_same_toolchain()
        self.lease.heartbeat.refuse(task.run, None)
        if not context.plan().has(task.step, task.slot):
            return {**receipt, "status": NO_SUCH_SLOT}
        shard = context.plan().fan_in(task.step).shard_of(task.slot)
        checks = {} if shard == task.slot else {"check of": shard}
        if checks and self.turns.left(context, task, shard):
            return {**receipt, **checks, "status": "left to another"}
        slot, stored = self.computed(context, task, begun, toolchain)
        written = {**receipt, **checks, **_written(slot, stored)}
        verdict, answer = self.writer.write(
            context,
            task,
            slot,
            incarnation=begun.incarnation,
            then=None if part is None else partial(part.command, written),
        )
        if part is not None:
            part.answered(answer)
        self.fault("client.after_slot")
        # What can be done before the next task comes.
        if not checks:  # one takes longer
            self.lease.heartbeat.worked(task.run, slot.seconds)
        self.downloads.idle(context, begun.memory)
        if context.config.round_steps != 1 and not context.config.compile:  # there will be rounds
            optimizer_imports.begin()
        return {**written, "status": verdict}

    def computed(
        self, context: RunContext, task: SlotTask, begun: Begun, toolchain: str
    ) -> tuple[SlotRecord, StoredGradient]:
        """Compute a slot's gradient and store its bytes; the slot is the caller's to write.

        Args:
            begun: what the ledger answered when the slot was leased.
            toolchain: what the run is compiled with, "" if it is not.

        Raises:
            ShardFailed: the recipe's own code raised; the run has failed with its message.
        """
        done, stored, seconds = self._gradient(context, task, begun)
        state = None
        if done.state is not None:
            state = self.services.gradients.put_state(
                context.ledger,
                task.step,
                task.slot,
                done.state,
                readers=begun.memory if task.in_round else None,
            )
        self.fault("client.after_put")
        # Its slot: the bytes are stored, so the record that points to them may be written.
        slot = SlotRecord(
            shard=task.slot,
            digest=stored.digest if state is None else combined_digest(stored.digest, state),
            nonce=stored.nonce,
            blob=stored.blob,
            manifest=stored.manifest,
            buffers=tuple(done.buffers),
            examples=done.examples,
            loss=done.loss,
            grad_norm=done.grad_norm,
            worker=self.lease.worker,
            attempt=begun.attempt,
            seconds=seconds,
            environment=environment(toolchain) if toolchain else self.lease.heartbeat.info.environment,
            compression=context.plan().config_at(task.step).compression,
            state=state,
            fetched=self._this.source,
            weight=done.weight,
            metrics=done.metrics,
        )
        return slot, stored

    def _gradient(
        self, context: RunContext, task: SlotTask, begun: Begun
    ) -> tuple[ShardWork, StoredGradient, float]:
        """Compute the gradient and store its bytes, the first of them while it is still computed.

        Returns:
            The work, where its bytes are, and the seconds that computing took.
        """
        began = time.perf_counter()
        with ExitStack() as unless_stored:
            done, outgoing = self._work(context, task, begun, unless_stored)
            seconds = time.perf_counter() - began - self._this.aside
            self.fault("client.before_put")
            stored = self.uploads.put(
                outgoing,
                context,
                context.ledger,
                task.step,
                task.slot,
                {**done.payload, **done.buffers},
                len(done.payload),
                server_memory=begun.memory if task.in_round or seconds < _FRESH_SECONDS else None,
            )
        return done, stored, seconds

    def _work(
        self,
        context: RunContext,
        task: SlotTask,
        begun: Begun,
        unless_stored: ExitStack,
    ) -> tuple[ShardWork, Outgoing | None]:
        """Load what the shard is computed from, and compute it.

        Args:
            begun: what the ledger answered, the record of the version to compute at perhaps among it.
            unless_stored: told how to delete what is sent meanwhile.

        Returns:
            The work, and what of it is on its way already.
        """
        step, shard, record = task.step, task.slot, begun.record
        self._this.aside = 0.0
        samples: Sequence[int] = ()
        try:
            with contained(), context.lock:
                dataset = context.dataset()
                plan = context.plan()
                join(context, self.lease.worker)
                shard = plan.fan_in(step).shard_of(task.slot)
                indices = plan.indices(step, shard)
                samples = indices.tolist()
                version = plan.version_for(step)
                replica, self._this.source = context.replica_at(
                    version, record, partial(self.downloads.take, context)
                )
                state = None
                if context.keeps_state(step):
                    state = self._slot_state(context, task, shard, record)
                if shard != task.slot:
                    return self.fresh.work(context, replica, step, shard, state), None
                outgoing = self.uploads.begin(context, step, shard, replica, plan.config_at(step))
                if outgoing is not None:
                    unless_stored.callback(outgoing.upload.give_up)
                done = work(
                    replica,
                    context.recipe,
                    plan,
                    dataset,
                    step,
                    shard,
                    state,
                    watched=unwatched if outgoing is None else outgoing.during_backward,
                )
                if due(context.recipe, plan, step, shard):
                    self._probe(context, replica, dataset, (step, shard), begun)
                return done, outgoing
        except (CacheError, Skewed):
            raise
        except Exception as error:
            place = f"shard {shard} of step {step} (samples {shown(samples)})"
            raise self.lease.failed(context, error, task, place=place, samples=samples) from error

    def _probe(
        self, context: RunContext, replica: Replica, dataset: Any, place: tuple[int, int], begun: Begun
    ) -> None:
        """Try the recipe on a shard's examples, once that has been computed.

        Not in the last attempt that the shard has: whatever ended the others may have been this.

        Raises:
            InvalidInput: its steps would not be those of the whole batches.
        """
        began, plan = time.perf_counter(), context.plan()
        last = 1 < plan.config.max_attempts <= begun.attempt
        note = _NOT_TRIED if last else probe(replica, context.recipe, plan, dataset, *place)
        if note and place[1] == 0:  # the others would say the same
            log.warning("run %s: %s", context.run, note)
            context.ledger.emit("probe", {"message": note})
        self._this.aside = time.perf_counter() - began

    def _slot_state(
        self, context: RunContext, task: SlotTask, shard: int, record: VersionRecord | None
    ) -> Any:
        """What the shard's slot kept at the version that it is computed at, None if nothing.

        Args:
            record: of the version, where the ledger gave it with the lease; None: it is asked for.
        """
        version = context.plan().version_for(task.step)
        if task.in_round and context.held is not None:
            slots = context.held.slots
        elif record is None or record.version != version:
            slots = self.services.parameters.record(context.ledger, version).slots
        else:
            slots = record.slots
        kept = slots.get(shard)
        return None if kept is None else self.services.gradients.get_state(kept)


def _written(slot: SlotRecord, stored: StoredGradient) -> dict[str, Any]:
    """What a receipt says of a slot that is written."""
    said = {
        "status": "written",
        "loss": slot.loss,
        "grad_norm": slot.grad_norm,
        "examples": slot.examples,
        **({} if slot.weight is None else {"weight": slot.weight}),
        **({METRICS: combined([(slot.metrics, slot.examples, slot.weight)])} if slot.metrics else {}),
        "nbytes": stored.blob.nbytes,
        "fetched": slot.fetched,
        "seconds": round(slot.seconds, 6),
        "attempt": slot.attempt,
    }
    if stored.early:
        said["gradient"] = f"{stored.early} of {len(stored.blob.checksums)} chunks sent ahead"
    return said
