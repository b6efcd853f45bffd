"""A Client's part in a tree of partial sums: add up the inputs of one slot.

See `torchord.coordinator.spec.sum_tree` for which slots there are and docs/protocol.md for why it may run
twice.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from torchord.cache.errors import CacheError, ChunkCorrupt, ChunkMissing
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.ledger.records import SlotReceipt, SlotRecord, SumRecord
from torchord.cache.tensors.codec import Manifest
from torchord.coordinator.compute.determinism import pinned
from torchord.coordinator.compute.partial import Partial, PartialSum
from torchord.coordinator.messages.sender import Join
from torchord.coordinator.runtime import activity
from torchord.coordinator.runtime.environment import device
from torchord.coordinator.runtime.services import RunContext
from torchord.coordinator.spec.codecs import codec_of

if TYPE_CHECKING:
    from torchord.coordinator.client.shard_task import Client

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
    allowed: tuple[str, ...] | None,
) -> Partial:
    """The sum of some slots, in the order given.

    Args:
        slots: gradients or partial sums, not both.
        read: slot -> (its tensors but for buffers, its buffers).
        manifest: of the parameters.
        examples: examples in the whole step.
        allowed: the worker's allow-list, for codecs that are imported.

    Raises:
        InputLost: a slot's bytes are gone.
    """
    total = PartialSum(examples)
    for slot in slots:
        try:
            tensors, buffers = read(slot)
        except (ChunkMissing, ChunkCorrupt) as error:
            raise InputLost(slot, str(error)) from error
        if slot.total is None:
            gradients = codec_of(slot.compression, allowed).decode(tensors, manifest)
            total.add_shard(gradients, buffers, slot.examples)
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


class Adder:
    """Executes partial sums for one worker process.

    Args:
        client: the process's Client, whose connections, lease and faults it shares.
    """

    def __init__(self, client: Client) -> None:
        self.client = client
        self.services = client.services
        self.fault = client.fault

    def partial_sum(
        self,
        run: str,
        step: int,
        slot: int,
        *,
        delivery: str,
        join: Join | None = None,
        backup: bool = False,
        version: int | None = None,
    ) -> dict[str, Any]:
        """Add up the inputs of a slot and write it.

        Args:
            slot: number of the partial sum.
            delivery: id of the Celery task.
            join: the chord that the task belongs to.
            backup: compute even if a live worker is at it.
            version: what the step is computed at; None: the version of its own number.

        Returns:
            The receipt that Flower shows.
        """
        receipt: dict[str, Any] = {
            "run": run,
            "step": step,
            "slot": slot,
            "version": step if version is None else version,
        }
        self.fault("adder.before_begin")
        return self.client.at_slot(
            receipt,
            slot,
            activity.partial_sum(run, step, slot),
            lambda begun: self._add(receipt, step, slot, begun.attempt, begun.incarnation, join),
            delivery=delivery,
            backup=backup,
        )

    def _add(
        self,
        receipt: dict[str, Any],
        step: int,
        slot: int,
        attempt: int,
        incarnation: str,
        join: Join | None,
    ) -> dict[str, Any]:
        self.fault("adder.after_begin")
        run, ledger = receipt["run"], self.services.ledger(receipt["run"])
        context = self.services.context(run, incarnation)
        context.require_same_code()
        tree = context.plan().fan_in(step)
        wanted = tree.inputs(slot) if slot in tree.partials else range(0)
        found, _ = ledger.some_slots(step, wanted)
        if not wanted or len(found) < len(wanted):
            return {**receipt, "status": "early"}  # sent again by whoever writes the last input
        inputs = [found[number] for number in wanted]
        began = time.perf_counter()
        try:
            total = self._sum(context, ledger, step, inputs)
        except InputLost as lost:
            return self._give_back(receipt, context, lost, slot)
        except CacheError:
            raise
        except Exception as error:
            place = f"partial sum {slot} of step {step}"
            raise self.client.failed(context, error, step=step, shard=slot, place=place) from error
        self.fault("adder.before_put")
        near = tree.parent(slot) is None
        stored = self.services.gradients.put(ledger, step, slot, total.tensors(), for_server=near)
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
            loss=sum(each.loss * each.examples for each in inputs) / total.examples,
            grad_norm=math.nan if kept.nonfinite else max(each.grad_norm for each in inputs),
            worker=self.client.heartbeat.info.id,
            attempt=attempt,
            seconds=time.perf_counter() - began,
            environment=self.client.heartbeat.info.environment,
            total=replace(kept, notes=total.notes()),
        )
        verdict, _ = self.client.writer.write(context, step, record, incarnation=incarnation, join=join)
        self.fault("adder.after_slot")
        if verdict == "written":
            self.services.gradients.delete(each.blob for each in inputs)
        self.fault("adder.after_delete")
        return {
            **receipt,
            "status": verdict,
            "inputs": len(inputs),
            "examples": record.examples,
            "nbytes": stored.blob.nbytes,
            "seconds": round(record.seconds, 6),
            "attempt": attempt,
        }

    def _sum(self, context: RunContext, ledger: Ledger, step: int, inputs: list[SlotRecord]) -> Partial:
        config = context.plan().config_at(step)
        manifest = Manifest.from_json(ledger.manifest())
        allowed = self.services.settings.allowed_modules
        with pinned(config.threads, config.deterministic, device()):
            return add_up(
                inputs, self.services.gradients.get, manifest, context.plan().examples(step), allowed
            )

    def _give_back(
        self, receipt: dict[str, Any], context: RunContext, lost: InputLost, slot: int
    ) -> dict[str, Any]:
        """An input's bytes are gone: have its shards computed again; the last of them asks for this sum."""
        run, step, version = receipt["run"], receipt["step"], receipt["version"]
        tree, number = context.plan().fan_in(step), lost.slot.shard
        below = tree.below(number)
        log.warning("step %d of run %s: slot %d is made again: %s", step, run, number, lost)
        verdict = self.services.ledger(run).drop_slot(
            step, number, nonce=lost.slot.nonce, token=None, into=slot, below=below
        )
        if verdict == "ok":
            for shard in (each for each in (number, *below) if each < tree.shards):
                self.client.sender.gradient(run, step, shard, version=version)
        # Stale: the sum was made meanwhile and its inputs deleted, or somebody else opened them.
        return {**receipt, "status": "input lost" if verdict == "ok" else "overtaken", "error": str(lost)}
