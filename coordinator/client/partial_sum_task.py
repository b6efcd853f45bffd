"""A Client's part in a tree of partial sums: add up the inputs of one slot.

See `torchord.coordinator.spec.sum_tree` for which slots there are and docs/protocol.md for why it may run
twice.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from torchord.cache.errors import CacheError, ChunkCorrupt, ChunkMissing
from torchord.cache.ledger.answers import Begun
from torchord.cache.ledger.records import SlotReceipt, SlotRecord, SumRecord
from torchord.cache.tensors.codec import Manifest
from torchord.coordinator.client.slot_lease import NO_SUCH_SLOT, SlotLease, SlotTask
from torchord.coordinator.client.slot_writer import SlotWriter
from torchord.coordinator.compute.buffer_rules import Rule
from torchord.coordinator.compute.determinism import pinned
from torchord.coordinator.compute.shares import mean_loss, total_weight
from torchord.coordinator.compute.sums import Partial, PartialSum
from torchord.coordinator.runtime import activity
from torchord.coordinator.runtime.context import Contexts, RunContext
from torchord.coordinator.runtime.environment import device
from torchord.coordinator.runtime.failures import contained
from torchord.coordinator.runtime.faults import Hook
from torchord.coordinator.runtime.trust import require_trusted
from torchord.coordinator.spec.codecs import CodecOf

log = logging.getLogger(__name__)


class InputLost(Exception):
    """The bytes of a slot are gone; `slot` says which."""

    def __init__(self, slot: SlotRecord, why: str) -> None:
        super().__init__(why)
        self.slot = slot


def add_up(
    slots: list[SlotRecord],
    read: Callable[[SlotRecord], tuple[dict[str, Tensor], dict[str, Tensor]]],
    manifest: Manifest,
    examples: int,
    codec_of: CodecOf,
    rules: Mapping[str, Rule],
) -> Partial:
    """The sum of some slots, in the order given.

    Args:
        slots: gradients or partial sums, not both.
        read: slot -> (its tensors but for buffers, its buffers).
        manifest: of the parameters.
        examples: examples in the whole step.
        codec_of: finds the codec of each slot, see `ResolvedRecipe.codec`.
        rules: buffer name -> its rule.

    Raises:
        InvalidInput: shards disagree on a buffer that has no rule.
        InputLost: a slot's bytes are gone.
    """
    total = PartialSum(examples, rules)
    for slot in slots:
        try:
            tensors, buffers = read(slot)
        except (ChunkMissing, ChunkCorrupt) as error:
            raise InputLost(slot, str(error)) from error
        if slot.total is None:
            gradients = codec_of(slot.compression).decode(tensors, manifest)
            total.add_shard(gradients, buffers, slot.examples, slot.weight)
        else:
            total.add(Partial.of(tensors, slot.total.notes, slot.examples))
    return total.result()


def summed(inputs: list[SlotRecord]) -> SumRecord:
    """What belongs to the sum of some slots, but for the notes of its tensors."""
    receipts: list[SlotReceipt] = []
    sums: list[SlotReceipt] = []
    nonfinite: list[int] = []
    for slot in inputs:
        if slot.total is None:
            receipts.append(slot.receipt())
            nonfinite += [] if math.isfinite(slot.loss) and math.isfinite(slot.grad_norm) else [slot.shard]
        else:
            receipts += slot.total.receipts
            sums += [*slot.total.sums, slot.receipt()]
            nonfinite += slot.total.nonfinite
    return SumRecord(tuple(receipts), tuple(sums), tuple(nonfinite))


def _figures(inputs: list[SlotRecord], kept: SumRecord) -> dict[str, Any]:
    """What the record of a sum says of all its inputs together."""
    return {
        "loss": mean_loss((each.loss, each.examples, each.weight) for each in inputs),
        "grad_norm": math.nan if kept.nonfinite else max(each.grad_norm for each in inputs),
        "weight": total_weight((each.examples, each.weight) for each in inputs),
    }


class PartialSumTask:
    """Executes partial sums for one worker process.

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

    def partial_sum(self, task: SlotTask) -> dict[str, Any]:
        """Add up the inputs of a slot and write it.

        Returns:
            The receipt that Flower shows.
        """
        receipt: dict[str, Any] = {
            "run": task.run,
            "step": task.step,
            "slot": task.slot,
            "version": task.version,
        }
        self.fault("adder.before_begin")
        return self.lease.hold(
            task,
            receipt,
            activity.partial_sum(task.run, task.step, task.slot),
            lambda begun: self._add(task, receipt, begun),
        )

    def _add(self, task: SlotTask, receipt: dict[str, Any], begun: Begun) -> dict[str, Any]:
        self.fault("adder.after_begin")
        step, slot = task.step, task.slot
        context = self.contexts.of(task.run, begun.incarnation)
        require_trusted(context, self.lease.heartbeat)
        if not context.plan().has(step, slot):
            return {**receipt, "status": NO_SUCH_SLOT}
        tree = context.plan().fan_in(step)
        wanted = tree.inputs(slot)
        found, _ = context.ledger.some_slots(step, wanted)
        if not wanted or len(found) < len(wanted):
            return {**receipt, "status": "early"}  # sent again by whoever writes the last input
        inputs = [found[number] for number in wanted]
        began = time.perf_counter()
        try:
            with contained():
                total = self._sum(context, step, inputs)
        except InputLost as lost:
            return self._give_back(task, receipt, context, lost)
        except CacheError:
            raise
        except Exception as error:
            place = f"partial sum {slot} of step {step}"
            raise self.lease.failed(context, error, task, place=place) from error
        # Its bytes, then its slot.
        self.fault("adder.before_put")
        near = tree.parent(slot) is None
        stored = self.services.gradients.put(context.ledger, step, slot, total.tensors(), for_server=near)
        self.fault("adder.after_put")
        kept = summed(inputs)
        record = SlotRecord(
            shard=slot,
            digest=stored.digest,
            nonce=stored.nonce,
            blob=stored.blob,
            manifest=stored.manifest,
            buffers=(),
            examples=total.examples,
            **_figures(inputs, kept),
            worker=self.lease.worker,
            attempt=begun.attempt,
            seconds=time.perf_counter() - began,
            environment=self.lease.heartbeat.info.environment,
            total=replace(kept, notes=total.notes()),
        )
        verdict, _ = self.writer.write(context, task, record, incarnation=begun.incarnation)
        self.fault("adder.after_slot")
        if verdict == "written":
            checked = context.plan().fan_in(step).checked  # their bytes are compared, and go with the commit
            self.services.gradients.delete(each.blob for each in inputs if each.shard not in checked)
        self.fault("adder.after_delete")
        return {
            **receipt,
            "status": verdict,
            "inputs": len(inputs),
            "examples": record.examples,
            "nbytes": stored.blob.nbytes,
            "seconds": round(record.seconds, 6),
            "attempt": begun.attempt,
        }

    def _sum(self, context: RunContext, step: int, inputs: list[SlotRecord]) -> Partial:
        config = context.plan().config_at(step)
        manifest = Manifest.from_json(context.ledger.manifest())
        with pinned(config.threads, config.deterministic, device()):
            return add_up(
                inputs,
                self.services.gradients.get,
                manifest,
                context.plan().examples(step),
                context.recipe.codec,
                context.replica().rules,
            )

    def _give_back(
        self, task: SlotTask, receipt: dict[str, Any], context: RunContext, lost: InputLost
    ) -> dict[str, Any]:
        """An input's bytes are gone: have its shards computed again; the last of them asks for this sum."""
        run, step = task.run, task.step
        tree, number = context.plan().fan_in(step), lost.slot.shard
        below = tree.below(number)
        log.warning("step %d of run %s: slot %d is made again: %s", step, run, number, lost)
        verdict = context.ledger.drop_slot(
            step, number, nonce=lost.slot.nonce, token=None, into=task.slot, below=below
        )
        if verdict == "ok":
            for shard in (each for each in (number, *below) if each < tree.shards):
                self.lease.sender.gradient(run, step, shard, version=task.version)
        # Stale: the sum was made meanwhile and its inputs deleted, or somebody else opened them.
        return {**receipt, "status": "input lost" if verdict == "ok" else "overtaken", "error": str(lost)}
