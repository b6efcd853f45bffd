"""A Client's work: compute one shard's gradient, or one part of an evaluation or prediction.

Each operation may run twice, anywhere, at any time: what it computes depends on its arguments
only, and what it writes is written once.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Protocol

import torch

from torchord.cache.blobs.chunk_store import BlobRef
from torchord.cache.errors import (
    CacheError,
    CacheUnreachable,
    ChunkCorrupt,
    ChunkLost,
    ManifestMismatch,
    RunNotFound,
    ShardFailed,
    Skewed,
    VersionMissing,
)
from torchord.cache.ledger.answers import Begun
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.ledger.records import Head, SlotRecord, VersionRecord, combined_digest
from torchord.cache.ledger.workers import Heartbeat
from torchord.cache.servers.fast_client import Command
from torchord.cache.servers.redis_client import WORKER_PATIENCE_SECONDS
from torchord.cache.tensors import tree
from torchord.cache.tensors.codec import Manifest, layout, pack, views
from torchord.coordinator.client.gradient_upload import Outbox, Outgoing
from torchord.coordinator.client.slot_writer import SlotWriter
from torchord.coordinator.client.version_download import Arrivals
from torchord.coordinator.compute import gradient
from torchord.coordinator.compute.gradient import unwatched
from torchord.coordinator.compute.shard import ShardWork, work
from torchord.coordinator.messages.sender import Join, Sender
from torchord.coordinator.messages.task_names import UPDATES
from torchord.coordinator.runtime import activity
from torchord.coordinator.runtime import cache_report as tiers
from torchord.coordinator.runtime.environment import environment
from torchord.coordinator.runtime.failures import Failure
from torchord.coordinator.runtime.faults import Hook, nothing
from torchord.coordinator.runtime.services import RunContext, Services
from torchord.coordinator.spec.plan import shown

log = logging.getLogger(__name__)

UNWRITTEN = (
    "early",
    "input lost",
    "overtaken",
)  # what `Client.at_slot` is told when there is nothing to write yet
_REFUSAL_SECONDS = (0.25, 2.0)  # how long a refused worker steps back, at first and at most
_LOSSES = (VersionMissing, ChunkLost)  # bytes that were committed cannot be had
_FRESH_SECONDS = 1.0  # after so long a training server may have moved: ask where it is


class Part(Protocol):
    """How a task's end is counted in its chord; what it knows of Celery is the tasks' business."""

    def command(self, receipt: dict[str, Any]) -> Command | None:
        """The command that counts, None if it has to be done otherwise."""

    def answered(self, answer: Any) -> None:
        """What the server said, None if the command was not sent."""


class Client:
    """Executes tasks for one worker process.

    Args:
        services: connections and stores of the process.
        heartbeat: its lease; its id is what the ledger records.
        sender: for the message that follows a step completed outside its chord.
        fault: called with the name of each point of the protocol; tests use it to die there.
    """

    def __init__(
        self, services: Services, heartbeat: Heartbeat, sender: Sender, *, fault: Hook = nothing
    ) -> None:
        self.services = services
        self.heartbeat = heartbeat
        self.sender = sender
        self.fault = fault
        self._at: dict[int, tuple[str, int, int, str]] = {}  # thread -> run, step, shard, delivery
        self.writer = SlotWriter(services, sender, fault)
        overlap = services.settings.overlap
        self.outbox = Outbox(services.gradients, ahead="upload" in overlap, announced="collect" in overlap)
        self.arrivals = Arrivals(services.chunks, on="fetch" in overlap)
        self._refusals = 0
        self._silent_since: dict[tuple[str, int], float] = {}  # (run, version) to evaluate -> monotonic clock
        self._fetched = threading.local()  # which tier this thread's shard had its parameters from

    # --- gradients ----------------------------------------------------------------------

    def compute_gradient(
        self,
        run: str,
        step: int,
        shard: int,
        *,
        delivery: str,
        join: Join | None = None,
        backup: bool = False,
        version: int | None = None,
        part: Part | None = None,
    ) -> dict[str, Any]:
        """Compute one shard and write its slot.

        Args:
            version: what it is computed at; None: the version of the step's own number.
            delivery: id of the Celery task.
            join: the chord that the task belongs to: then Celery itself calls the update when all of
                the step's tasks are done.
            backup: compute even if a live worker is at the shard.
            part: counts the task as a part of its chord, in the round trip that writes the slot.

        Returns:
            The receipt that Flower shows.

        Raises:
            ShardFailed: if the recipe's own code raised; the run has failed with its message.
        """
        version = step if version is None else version
        receipt: dict[str, Any] = {"run": run, "step": step, "shard": shard, "version": version}
        self.fault("client.before_begin")

        def compute(begun: Begun) -> dict[str, Any]:
            self.fault("client.after_begin")
            return self._compute(receipt, step, shard, begun, join, part)

        doing = activity.gradient(run, step, shard)
        lacking = not self.services.holds(run, version)
        return self.at_slot(receipt, shard, doing, compute, delivery=delivery, backup=backup, lacking=lacking)

    def at_slot(
        self,
        receipt: dict[str, Any],
        slot: int,
        doing: str,
        compute: Callable[[Begun], dict[str, Any]],
        *,
        delivery: str,
        backup: bool,
        lacking: bool = False,
    ) -> dict[str, Any]:
        """Take the lease of a slot, compute it, and hand it back if that fails.

        Args:
            receipt: run, step and version, and what else Flower shows in any case.
            slot: a shard's number or a partial sum's.
            doing: what the heartbeat says meanwhile.
            compute: what the ledger answered -> the receipt of the slot that it has written, or of why not.
            lacking: whether the version that the slot is computed at has to be loaded: then the answer
                says where it is.
        """
        run, step, worker = receipt["run"], receipt["step"], self.heartbeat.info.id
        receipt["worker"] = worker
        ledger = self.services.ledger(run)
        begun = ledger.begin(
            step,
            slot,
            worker=worker,
            delivery=delivery,
            backup=backup,
            environment=self.heartbeat.info.environment,
            version=receipt["version"],
            lacking=lacking,
        )
        verdict = begun.verdict
        if verdict == "skewed":
            return self._refuse({**receipt, "status": verdict}, self._unlike(run, ledger.head()))
        if verdict != "compute":
            log.info("step %d slot %d of run %s: %s, nothing to do", step, slot, run, verdict)
            return {**receipt, "status": verdict}
        self.heartbeat.doing(doing)
        self._at[threading.get_ident()] = (run, step, slot, delivery)
        written = False
        before = tiers.snapshot(self.services)
        try:
            done = compute(begun)
            written = done["status"] not in UNWRITTEN
            return {**done, "tiers": tiers.since(before, self.services)}
        except (Skewed, ManifestMismatch) as error:
            self._end_lease(run, step, slot, delivery)
            return self._refuse(receipt, str(error))
        except CacheError as error:
            # Not the recipe's fault: the slot goes back at once and the supervisor sends it again.
            log.warning("step %d slot %d of run %s goes back: %s", step, slot, run, error)
            if isinstance(error, _LOSSES):
                self._report_loss(run, step)
            return {**receipt, "status": "handed back", "error": str(error)}
        finally:
            self._at.pop(threading.get_ident(), None)
            if not written:
                self._end_lease(run, step, slot, delivery)
            self.heartbeat.doing("")

    def _end_lease(self, run: str, step: int, shard: int, delivery: str) -> None:
        worker = self.heartbeat.info.id
        try:
            self.services.ledger(run).end_lease(step, shard, worker=worker, delivery=delivery)
        except CacheError as error:  # the supervisor finds out that nobody is at it
            log.warning("step %d shard %d of run %s not handed back: %s", step, shard, run, error)

    def _report_loss(self, run: str, step: int) -> None:
        """What is to be computed from is gone: the run's training server stores it again, or goes back."""
        try:
            head = self.services.ledger(run).head()
            if head.version <= step:
                self.sender.advance(run, queue=head.queue or UPDATES)
        except (CacheError, RunNotFound) as error:
            log.warning("run %s: loss of version %d not reported: %s", run, step, error)

    def _unlike(self, run: str, head: Head) -> str:
        """Why this machine may not compute for the run; "" if it may."""
        here = self.heartbeat.info.environment
        if head.skew != "refuse" or head.environment in ("", here):
            return ""
        return (
            f"run {run!r} is computed on {head.environment}; this worker has {here}, which may give other "
            "bits. Start a worker like the first, or run.resume(admit_skew=True)"
        )

    def _refuse(self, receipt: dict[str, Any], reason: str) -> dict[str, Any]:
        """Leave a task to workers that may compute it: send it again, and step back for a while."""
        run = receipt["run"]
        if self.heartbeat.refuse(run, reason):
            log.error("%s", reason)
            self.services.ledger(run).emit("refused", {"worker": self.heartbeat.info.id, "reason": reason})
            self._refusals = 0
        self._send_again(receipt)
        return {**receipt, "status": "refused", "reason": reason}

    def _send_again(self, receipt: dict[str, Any]) -> None:
        """Put a task back into the queue and step back for a while, so that others may take it."""
        run = receipt["run"]
        if "slot" in receipt:
            self.sender.partial_sum(run, receipt["step"], receipt["slot"], version=receipt["version"])
        elif "shard" in receipt:
            self.sender.gradient(run, receipt["step"], receipt["shard"], version=receipt["version"])
        else:
            self.sender.evaluation(run, receipt["version"], [receipt["part"]], receipt["parts"])
        time.sleep(min(_REFUSAL_SECONDS[1], _REFUSAL_SECONDS[0] * 2**self._refusals))
        self._refusals += 1

    def hand_back(self) -> None:
        """Give the shards at work to others at once, because this process is about to end.

        Their computation goes on until the process ends; whoever is first writes the slot.
        """
        for run, step, shard, delivery in list(self._at.values()):
            log.info("step %d shard %d of run %s is handed back: this worker stops", step, shard, run)
            self._end_lease(run, step, shard, delivery)

    def _compute(
        self,
        receipt: dict[str, Any],
        step: int,
        shard: int,
        begun: Begun,
        join: Join | None,
        part: Part | None,
    ) -> dict[str, Any]:
        attempt, incarnation = begun.attempt, begun.incarnation
        run, worker = receipt["run"], receipt["worker"]
        ledger = self.services.ledger(run)
        context = self.services.context(run, incarnation)
        context.require_same_code()
        toolchain = context.require_same_toolchain()
        self.heartbeat.refuse(run, None)
        began = time.perf_counter()
        with ExitStack() as unless_stored:
            done, outgoing = self._work(context, step, shard, begun.record, unless_stored)
            seconds = time.perf_counter() - began
            self.fault("client.before_put")
            stored = self.outbox.put(
                outgoing,
                context,
                ledger,
                step,
                shard,
                {**done.payload, **done.buffers},
                len(done.payload),
                server_memory=begun.memory if seconds < _FRESH_SECONDS else None,
            )
        state = None
        if done.state is not None:
            state = self.services.gradients.put_state(ledger, step, shard, *tree.flatten(done.state))
        self.fault("client.after_put")
        slot = SlotRecord(
            shard=shard,
            digest=stored.digest if state is None else combined_digest(stored.digest, state),
            nonce=stored.nonce,
            blob=stored.blob,
            manifest=stored.manifest,
            buffers=tuple(done.buffers),
            examples=done.examples,
            loss=done.loss,
            grad_norm=done.grad_norm,
            worker=worker,
            attempt=attempt,
            seconds=seconds,
            environment=environment(toolchain) if toolchain else self.heartbeat.info.environment,
            compression=context.plan().config_at(step).compression,
            state=state,
            fetched=self._fetched.source,
        )
        written = {
            **receipt,
            "status": "written",
            "loss": done.loss,
            "grad_norm": done.grad_norm,
            "examples": done.examples,
            "nbytes": stored.blob.nbytes,
            "fetched": slot.fetched,
            "seconds": round(seconds, 6),
            "attempt": attempt,
        }
        if stored.early:
            written["gradient"] = f"{stored.early} of {len(stored.blob.checksums)} chunks sent ahead"
        then = None if part is None else partial(part.command, written)
        verdict, answer = self.writer.write(
            context, step, slot, incarnation=incarnation, join=join, then=then
        )
        if part is not None:
            part.answered(answer)
        self.fault("client.after_slot")
        self.heartbeat.worked(run, seconds)
        self.arrivals.idle(context, begun.memory)
        return {**written, "status": verdict}

    def _work(
        self,
        context: RunContext,
        step: int,
        shard: int,
        record: VersionRecord | None,
        unless_stored: ExitStack,
    ) -> tuple[ShardWork, Outgoing | None]:
        """Load what the shard is computed from, and compute it.

        Args:
            record: of the version to compute at, where the ledger gave it.
            unless_stored: told how to delete what is sent meanwhile.

        Returns:
            The work, and what of it is on its way already.
        """
        samples: Sequence[int] = ()
        try:
            with context.lock:
                dataset = context.dataset()
                plan = context.plan()
                indices = plan.indices(step, shard)
                samples = indices.tolist()
                version = plan.version_for(step)
                replica, self._fetched.source = context.replica_at(
                    version, record, partial(self.arrivals.take, context)
                )
                state = None
                if context.keeps_state(step):
                    state = self._slot_state(context, version, shard, record)
                allowed = self.services.settings.allowed_modules
                outgoing = self.outbox.begin(context, step, shard, replica, plan.config_at(step))
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
                    allowed=allowed,
                    watched=unwatched if outgoing is None else outgoing.during_backward,
                )
                return done, outgoing
        except CacheError:
            raise
        except Exception as error:
            place = f"shard {shard} of step {step} (samples {shown(samples)})"
            raise self.failed(context, error, step=step, shard=shard, place=place, samples=samples) from error

    def _slot_state(self, context: RunContext, version: int, shard: int, record: VersionRecord | None) -> Any:
        """What the shard's slot kept at a version, None if nothing.

        Args:
            record: of the version, where the ledger gave it with the lease; None: it is asked for.
        """
        if record is None or record.version != version:
            record = self.services.parameters.record(self.services.ledger(context.run), version)
        kept = record.slots.get(shard)
        return None if kept is None else tree.unflatten(*self.services.gradients.get_state(kept))

    def failed(
        self,
        context: RunContext,
        error: Exception,
        *,
        step: int,
        shard: int,
        place: str,
        samples: Sequence[int] = (),
    ) -> ShardFailed:
        """Record that the recipe's own code raised, and return the error to raise.

        Args:
            shard: number of the slot that it raised for; the run goes on if that is written.
            place: what the slot is, for people.
            samples: dataset indices that went into it.
        """
        failure = Failure.of(
            error,
            place,
            worker=self.heartbeat.info.id,
            step=step,
            shard=shard,
            samples=[int(sample) for sample in samples],
        )
        ledger = self.services.ledger(context.run)
        failure.stop(ledger, incarnation=context.incarnation, shard=(step, shard))
        self.services.forget(context.run)
        return ShardFailed(f"run {context.run!r}: {failure.message}")

    # --- evaluation ---------------------------------------------------------------------

    def evaluate(self, run: str, version: int, part: int, parts: int) -> dict[str, Any]:
        """Evaluate one part of the evaluation dataset at one version and write it once.

        Returns:
            The receipt that Flower shows: metrics of the part, and of the whole when it is the last.
        """
        ledger = self.services.ledger(run)
        receipt: dict[str, Any] = {
            "run": run,
            "version": version,
            "part": part,
            "worker": self.heartbeat.info.id,
        }
        head = ledger.head()
        if head.status != "running" or version in ledger.evaluations():
            return {**receipt, "status": "nothing to do"}
        context = self.services.context(run, head.incarnation)
        try:
            if unlike := self._unlike(run, head):
                raise Skewed(unlike)
            context.require_same_code()
        except Skewed as error:
            return self._refuse({**receipt, "parts": parts}, str(error))
        self.heartbeat.doing(activity.evaluation(run, version, part))
        try:
            with context.lock:
                dataset = context.dataset("evaluation")
                samples = torch.arange(len(dataset)).tensor_split(parts)[part].tolist()
                replica, _ = context.replica_at(version)
                examples, metrics = gradient.evaluate(
                    replica, context.recipe, context.config, dataset, samples
                )
        except ManifestMismatch as error:
            return self._refuse({**receipt, "parts": parts}, str(error))
        except CacheError as error:
            return self._evaluation_back({**receipt, "parts": parts}, error)
        except Exception as error:
            raise self._evaluation_failed(context, error, version=version, part=part) from error
        finally:
            self.heartbeat.doing("")
        self.fault("client.before_part")
        verdict, values = ledger.write_part(
            version, part, {"examples": examples, "metrics": metrics}, parts=parts
        )
        self.fault("client.after_part")
        self._refusals = 0
        self._silent_since.pop((run, version), None)
        if verdict == "complete":
            _, whole = gradient.combine([(value["examples"], value["metrics"]) for value in values])
            ledger.record_evaluation(version, whole)
            receipt["evaluation"] = whole
            self._call_if_evaluated(ledger)
        return {**receipt, "status": verdict, "examples": examples, **metrics}

    def _evaluation_back(self, receipt: dict[str, Any], error: CacheError) -> dict[str, Any]:
        """Give a part of an evaluation back that the store does not let this worker compute.

        Of the present version the training server still holds the bytes and stores them again. Those of an
        earlier one are gone for good, unless a cache node that may have them comes back in time, and the run
        goes on without its evaluation.
        """
        run, version = receipt["run"], receipt["version"]
        log.warning("evaluation part %d of run %s goes back: %s", receipt["part"], run, error)
        ledger = self.services.ledger(run)
        try:
            if isinstance(error, _LOSSES):
                if version != ledger.head().version and self._gone_for_good(run, version, error):
                    why = f"version {version} cannot be evaluated any more: {error}"
                    ledger.abandon_evaluation(version, why)
                    self._call_if_evaluated(ledger)
                    return {**receipt, "status": "version lost", "error": str(error)}
                self._report_loss(run, version)
            self._send_again(receipt)
        except (CacheError, RunNotFound) as away:  # the supervisor sends it again
            log.warning("evaluation part %d of run %s not sent again: %s", receipt["part"], run, away)
        return {**receipt, "status": "handed back", "error": str(error)}

    def _gone_for_good(self, run: str, version: int, error: CacheError) -> bool:
        """Whether every node said that it lacks a version's bytes, or one has been silent for too long."""
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, CacheUnreachable):
            cause = cause.__cause__
        now = time.monotonic()
        since = self._silent_since.setdefault((run, version), now)
        if cause is not None and now - since < WORKER_PATIENCE_SECONDS:
            return False
        self._silent_since.pop((run, version), None)
        return True

    def _call_if_evaluated(self, ledger: Ledger) -> None:
        """Call the training server if the run has waited for nothing but its evaluations."""
        head = ledger.head()
        if head.version == head.total_steps and not ledger.pending_evaluations():
            self.sender.advance(ledger.run, queue=head.queue or UPDATES)

    def _evaluation_failed(
        self, context: RunContext, error: Exception, *, version: int, part: int
    ) -> ShardFailed:
        what = f"part {part} of the evaluation of version {version}"
        failure = Failure.of(error, what, worker=self.heartbeat.info.id, version=version)
        failure.stop(self.services.ledger(context.run), incarnation=context.incarnation)
        self.services.forget(context.run)
        return ShardFailed(f"run {context.run!r}: {failure.message}")

    # --- prediction ---------------------------------------------------------------------

    def predict(
        self, run: str, version: int, request: str, part: int, inputs: dict[str, Any]
    ) -> dict[str, Any]:
        """Compute the outputs of one part of a prediction and write them once.

        Args:
            inputs: {"blob", "manifest", "skeleton"} of the part's inputs.
        """
        ledger = self.services.ledger(run)
        receipt: dict[str, Any] = {
            "run": run,
            "version": version,
            "part": part,
            "worker": self.heartbeat.info.id,
        }
        context = self.services.context(run, ledger.head().incarnation)
        self.heartbeat.doing(activity.prediction(run, version, part))
        try:
            blob = BlobRef.from_json(inputs["blob"])
            tensors = views(self.services.chunks.get(blob), Manifest.from_json(inputs["manifest"]))
            with context.lock:
                replica, _ = context.replica_at(version)
                outputs = gradient.predict(replica, tree.unflatten(inputs["skeleton"], tensors))
            skeleton, found = tree.flatten(outputs)
            manifest = layout(found)
            key = ledger.keys.predict_blob(request, part, "outputs")
            stored = self.services.chunks.put(key, pack(found, manifest), ttl_seconds=3600)
            answer = {"blob": stored.to_json(), "manifest": manifest.to_json(), "skeleton": skeleton}
        except ChunkCorrupt as error:  # and so it will stay; what is only missing may be stored again
            answer = {"error": f"part {part} cannot be computed: {error}"}
        except CacheError:
            raise
        except Exception as error:  # noqa: BLE001  the recipe's own code; it goes to whoever asked
            kind = type(error).__name__
            answer = {"error": f"part {part} failed on worker {receipt['worker']}: {kind}: {error}"}
        finally:
            self.heartbeat.doing("")
        ledger.write_output(request, part, answer)
        return {**receipt, "status": "failed" if "error" in answer else "written"}
