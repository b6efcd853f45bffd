"""The training server: holds runs warm, applies complete steps, commits versions, launches the next.

One entry point, `advance`, does whatever comes next in a run, however it was called: by the
chord's callback, by the supervisor, by a late worker, twice, early or late. It decides from the
ledger alone and acts under a fencing token; a server that was overtaken can't commit.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from cache import keys
from cache.errors import (
    CacheError,
    CheckpointError,
    ChunkCorrupt,
    ChunkMissing,
    Fenced,
    NonFinite,
    RunError,
    Skewed,
    TorchordError,
    VersionMissing,
)
from cache.ledger import Ledger
from cache.records import GENESIS, Head, LedgerEntry, SlotReceipt, SlotRecord, VersionRecord
from cache.workers import Heartbeat
from coordinator import activity, tree
from coordinator.aggregate import Accumulator
from coordinator.checkpoint import CheckpointStore
from coordinator.client import short_traceback
from coordinator.faults import Hook, nothing
from coordinator.optimize import ApplyReport, Trainer
from coordinator.services import RunContext, Services, device
from coordinator.shards import Plan
from coordinator.step import Sender
from coordinator.task_names import private_queue

log = logging.getLogger(__name__)

_STATE_SHARE = 4  # published optimizer state may cost 1/4 of the parameters' bytes a step
_STATE_ALWAYS_NBYTES = 256 << 10
_EVALUATION_PIN_SECONDS = 6 * 3600.0
_KEPT_VERSIONS = 2
_EVALUATION_PART = 4096
_NEVER = -1
_CALL_AGAIN_SECONDS = 5.0


@dataclass
class WarmRun:
    """A run that this process serves: its model and optimizer hold exactly `version`."""

    context: RunContext
    ledger: Ledger
    trainer: Trainer
    checkpoints: CheckpointStore
    token: int
    version: int
    chain: str
    record: VersionRecord
    committed_at: float
    state_version: int = _NEVER
    spilled: int = 0
    nbytes: int = 0
    shared: bool = False
    flat: torch.Tensor | None = field(default=None, repr=False)

    @property
    def run(self) -> str:
        """The run's name."""
        return self.context.run


class TrainingServer:
    """Serves runs for one worker process.

    Args:
        services: connections and stores of the process.
        heartbeat: its lease; its id is the owner that the head names.
        sender: publishes the next steps.
        fault: called with the name of each point of the protocol; tests use it to die there.
    """

    def __init__(
        self,
        services: Services,
        heartbeat: Heartbeat,
        sender: Sender,
        *,
        fault: Hook = nothing,
    ) -> None:
        self.services = services
        self.heartbeat = heartbeat
        self.sender = sender
        self.fault = fault
        self._warm: OrderedDict[str, WarmRun] = OrderedDict()
        self._tokens: dict[str, int] = {}
        self._called_again: dict[str, float] = {}
        self._lock = threading.RLock()

    @property
    def queue(self) -> str:
        """The private queue of this process's node."""
        return private_queue(self.heartbeat.info.node)

    # --- the entry point ------------------------------------------------------------------

    def advance(self, run: str, *, step: int | None = None) -> dict[str, Any]:
        """Do whatever comes next in a run.

        Args:
            step: the step whose chord called back, for the receipt; the ledger decides.

        Returns:
            The receipt that Flower shows.
        """
        with self._lock:
            ledger = self.services.ledger(run)
            head = ledger.head()
            if head.status not in ("pending", "running"):
                self._warm.pop(run, None)
                return {"run": run, "status": head.status, "version": head.version}
            self.heartbeat.doing(activity.update(run, head.version))
            try:
                return self._advance(run, ledger, head, called=step)
            except Skewed as error:
                if self.heartbeat.refuse(run, str(error)):
                    log.error("%s", error)
                    ledger.emit("refused", {"worker": self.heartbeat.info.id, "reason": str(error)})
                return {"run": run, "status": "refused", "reason": str(error)}
            except Fenced as error:
                self._warm.pop(run, None)
                log.info("%s", error)
                return {"run": run, "status": "fenced", "version": head.version}
            except CacheError as error:
                self._warm.pop(run, None)  # what was applied and not committed is computed again
                log.warning("run %s: %s", run, error)
                self._call_again(run)
                return {"run": run, "status": "cache error", "error": str(error)}
            except Exception as error:
                self._warm.pop(run, None)
                self._fail(ledger, error, self._tokens.get(run))
                raise
            finally:
                self.heartbeat.doing("")

    def _call_again(self, run: str) -> None:
        """After a failure of the store: try again at once, but not time after time (the supervisor does)."""
        now = time.monotonic()
        if now - self._called_again.get(run, -math.inf) > _CALL_AGAIN_SECONDS:
            self._called_again[run] = now
            try:
                self.sender.advance(run, queue=self.queue)
            except CacheError as error:
                log.debug("run %s: %s", run, error)

    def _advance(self, run: str, ledger: Ledger, head: Head, *, called: int | None) -> dict[str, Any]:
        warm = self._warm.get(run)
        if warm is None or (warm.token, warm.version, warm.context.incarnation) != (
            head.token,
            head.version,
            head.incarnation,
        ):
            taken = self._take_over(run, ledger)
            if isinstance(taken, str):
                self.sender.advance(run, queue=taken)
                return {"run": run, "status": "forwarded", "to": taken}
            warm = taken
            head = ledger.head()
        warm.shared = head.shared
        self._warm.move_to_end(run)
        receipt: dict[str, Any] = {"run": run, "status": "waiting", "version": warm.version}
        plan = warm.context.plan()
        while warm.version < plan.total_steps:
            applied = self._apply(warm)
            if applied is None and called == warm.version == head.launched:
                # A header ended without its slot (its twin is still at it): that one must call again.
                warm.ledger.mark_called(called, token=warm.token)
                applied = self._apply(warm)
            if applied is None:
                if head.launched != warm.version:
                    self._launch(warm)
                else:
                    self._keep_stored(warm)
                return receipt
            receipt = applied
            head = replace(head, launched=None)
            if warm.version < plan.total_steps:
                self._launch(warm)
                head = replace(head, launched=warm.version)
            self._after_commit(warm)
        return self._finish(warm, receipt)

    # --- one step -------------------------------------------------------------------------

    def _apply(self, warm: WarmRun) -> dict[str, Any] | None:
        """Apply and commit the present step if every slot is there; None if one is missing."""
        step = warm.version
        plan = warm.context.plan()
        shards = plan.shards_in(step)
        present = warm.ledger.slots(step)
        if len(present) < shards:
            return None
        slots = [present[shard] for shard in range(shards)]
        self.fault("server.before_apply")
        report, loss = self._update(warm, slots)
        self.fault("server.after_apply")
        flat = warm.trainer.replica.pack(warm.flat)
        warm.flat = flat
        draft = self.services.parameters.publish(warm.ledger, step + 1, flat, chain="")
        self.fault("server.after_publish")
        now = time.time()
        entry = LedgerEntry(
            version=step + 1,
            slots=tuple(_receipt(slot) for slot in slots),
            parameters=draft.digest,
            loss=loss,
            grad_norm=report.grad_norm,
            examples=sum(slot.examples for slot in slots),
            seconds=max(0.0, now - warm.committed_at),
            committed_at=now,
            token=warm.token,
            server=self.heartbeat.info.id,
            skipped=report.skipped,
            lr=tuple(report.lr),
            previous=warm.chain,
        ).sealed()
        record = replace(draft, chain=entry.chain)
        committed = warm.ledger.commit(
            step=step, token=warm.token, shards=shards, entry=entry, record=record, event=_step_event(entry)
        )
        self.fault("server.after_commit")
        if committed.verdict != "ok":
            self.services.chunks.delete([record.blob])
            self._refused(warm, committed.verdict, step)
        warm.version, warm.chain, warm.record, warm.committed_at = step + 1, entry.chain, record, now
        self._retain(warm, committed.stored, committed.pinned)
        self.services.gradients.delete([slot.blob for slot in slots])
        return {
            "run": warm.run,
            "status": "committed",
            "step": step,
            "version": step + 1,
            "loss": loss,
            "grad_norm": report.grad_norm,
            "examples": entry.examples,
            "nbytes": sum(slot.blob.nbytes for slot in slots),
            "skipped": report.skipped,
            "worker": self.heartbeat.info.id,
        }

    def _update(self, warm: WarmRun, slots: list[SlotRecord]) -> tuple[ApplyReport, float]:
        """Average the slots in slot order and step the optimizer."""
        trainer = warm.trainer
        examples = sum(slot.examples for slot in slots)
        loss = sum(slot.loss * slot.examples for slot in slots) / examples
        bad = [s.shard for s in slots if not (math.isfinite(s.loss) and math.isfinite(s.grad_norm))]
        held = {name: buffer.cpu() for name, buffer in trainer.replica.buffers.items()}
        accumulator = Accumulator(held, examples)
        for slot in slots:
            try:
                gradients, buffers = self.services.gradients.get(slot)
            except (ChunkMissing, ChunkCorrupt):
                warm.ledger.drop_slot(warm.version, slot.shard, nonce=slot.nonce, token=warm.token)
                raise
            accumulator.add(gradients, buffers, slot.examples)
        mean = accumulator.result()
        try:
            report = trainer.apply(mean.gradients, mean.buffers, step=warm.version, loss=loss, finite=not bad)
        except NonFinite as error:
            where = f"in shards {bad}" if bad else "in the average only"
            raise NonFinite(f"run {warm.run!r}: {error} The NaN or infinity arose {where}.") from error
        return report, loss

    def _refused(self, warm: WarmRun, verdict: str, step: int) -> None:
        """The commit was not taken; what this process holds is ahead of the head."""
        self._warm.pop(warm.run, None)
        if verdict == "diverged":
            raise RunError(
                f"run {warm.run!r}: replaying step {step} gave other bytes than before; a worker's torch, "
                "hardware, data or code has changed (see run.verify())"
            )
        raise Fenced(
            f"run {warm.run!r}: commit of version {step + 1} was {verdict}; another server or a person acted"
        )

    def _launch(self, warm: WarmRun) -> None:
        """Publish the present step's chord, for the shards that have no slot yet."""
        step = warm.version
        shards = warm.context.plan().shards_in(step)
        missing = sorted(set(range(shards)) - warm.ledger.slots_present(step))
        self.fault("server.before_launch")
        if missing:
            self.sender.step(warm.run, step, missing, callback_queue=self.queue)
        else:
            self.sender.advance(warm.run, queue=self.queue)
        self.fault("server.after_launch")
        warm.ledger.mark_launched(step, token=warm.token)

    # --- beside the steps -------------------------------------------------------------------

    def _after_commit(self, warm: WarmRun) -> None:
        """What follows a commit and may overlap the next step's compute."""
        version, config = warm.version, warm.context.config
        total = warm.context.plan().total_steps
        due = config.evaluate_every is not None and version % config.evaluate_every == 0
        if due and version < total and warm.context.recipe.evaluation is not None:
            self._launch_evaluation(warm)
        if version % config.checkpoint_every == 0 and version < total:
            self._checkpoint(warm)
        if warm.shared or version - warm.state_version >= self._state_cadence(warm):
            self._publish_state(warm)

    def _state_cadence(self, warm: WarmRun) -> int:
        """Every how many steps the optimizer state goes to the cache: cheap states each step."""
        nbytes = warm.trainer.state_nbytes()
        if nbytes <= _STATE_ALWAYS_NBYTES:
            return 1
        return max(1, -(-_STATE_SHARE * nbytes // max(1, warm.record.blob.nbytes)))

    def _publish_state(self, warm: WarmRun) -> None:
        """Store optimizer and scheduler state beside the present version."""
        self.fault("server.before_state")
        before = warm.state_version
        skeleton, tensors = tree.flatten(warm.trainer.state())
        warm.record = self.services.parameters.publish_state(warm.ledger, warm.record, skeleton, tensors)
        if not warm.ledger.put_version(warm.record, token=warm.token):
            raise Fenced(f"run {warm.run!r}: overtaken while publishing the state of version {warm.version}")
        warm.state_version = warm.version
        self.fault("server.after_state")
        if before != _NEVER and before < warm.version - 1:
            self.services.parameters.drop(warm.ledger, [before], token=warm.token)

    def _keep_stored(self, warm: WarmRun) -> None:
        """Store the present version again if its bytes were lost (a cache node died, or evicted them)."""
        try:
            self.services.parameters.fetch(warm.ledger, warm.version)
        except (ChunkCorrupt, ChunkMissing, VersionMissing) as error:
            log.warning("run %s: version %d is stored again: %s", warm.run, warm.version, error)
            flat = warm.trainer.replica.pack(warm.flat)
            record = self.services.parameters.publish(warm.ledger, warm.version, flat, chain=warm.chain)
            if not warm.ledger.put_version(record, token=warm.token):
                raise Fenced(f"run {warm.run!r}: overtaken while storing version {warm.version}") from error
            warm.flat, warm.record, warm.state_version = flat, record, _NEVER

    def _retain(self, warm: WarmRun, stored: tuple[int, ...], pinned: frozenset[int]) -> None:
        """Delete the versions that nobody needs: not recent, not pinned, not the restore point."""
        kept = set(range(warm.version - _KEPT_VERSIONS + 1, warm.version + 1)) | pinned | {warm.state_version}
        doomed = [version for version in stored if version not in kept]
        self.services.parameters.drop(warm.ledger, doomed, token=warm.token)

    def _checkpoint(self, warm: WarmRun) -> None:
        """Write the present version to disk and spill the ledger's older entries beside it."""
        self.fault("server.before_checkpoint")
        config = warm.context.config
        entries = warm.ledger.entries(warm.spilled + 1, warm.version)
        warm.checkpoints.append_ledger([entry.to_json() for entry in entries])
        meta = {
            "run": warm.run,
            "incarnation": warm.context.incarnation,
            "chain": warm.chain,
            "parameters": warm.record.digest,
            "dataset_size": warm.context.plan().size,
            "evaluations": {str(v): m for v, m in warm.ledger.evaluations().items()},
        }
        warm.checkpoints.save(warm.version, warm.trainer.replica.state_tensors(), warm.trainer.state(), meta)
        self.fault("server.after_checkpoint")
        warm.checkpoints.prune(config.keep_checkpoints)
        warm.spilled = warm.version
        kept_from = warm.version - keys.LEDGER_KEPT + 1
        if kept_from > 1 and warm.ledger.ledger_size() > keys.LEDGER_KEPT:
            warm.ledger.trim_entries(
                range(max(1, kept_from - 2 * config.checkpoint_every - keys.LEDGER_KEPT), kept_from)
            )
        warm.ledger.emit("checkpoint", {"version": warm.version, "path": warm.checkpoints.path(warm.version)})

    def _launch_evaluation(self, warm: WarmRun) -> None:
        """Publish the evaluation of the present version; it stays stored until that is done."""
        size = warm.ledger.head().evaluation_size
        if not size:
            return
        parts = evaluation_parts(size, warm.context.config.shards)
        if warm.ledger.launch_evaluation(warm.version, parts, pin_seconds=_EVALUATION_PIN_SECONDS):
            self.sender.evaluation(warm.run, warm.version, range(parts), parts)

    def _finish(self, warm: WarmRun, receipt: dict[str, Any]) -> dict[str, Any]:
        """Evaluate the last version, write the last checkpoint, end the run."""
        ledger, version = warm.ledger, warm.version
        if warm.context.recipe.evaluation is not None:
            if version not in ledger.evaluations():
                self._launch_evaluation(warm)
            if ledger.pending_evaluations():
                return {**receipt, "status": "evaluating"}
        if warm.spilled != version:
            self._checkpoint(warm)
        self.fault("server.before_finish")
        done, _ = ledger.transition(
            "done", allowed=("running",), event="done", data={"version": version}, token=warm.token
        )
        if done:
            stored = [v for v in ledger.versions() if v != version]
            self.services.parameters.drop(ledger, stored, token=warm.token)
            ledger.retire()
            self.services.parameters.keep(warm.record)
        self.fault("server.after_finish")
        self._warm.pop(warm.run, None)
        return {**receipt, "status": "done", "version": version}

    def _fail(self, ledger: Ledger, error: Exception, token: int | None) -> None:
        """Stop the run with the error as its reason, unless another server has taken it over."""
        kind = type(error).__name__
        message = (
            str(error) if isinstance(error, TorchordError) else f"{kind} on the training server: {error}"
        )
        reason = {
            "kind": kind,
            "message": message,
            "traceback": "" if isinstance(error, TorchordError) else short_traceback(error),
            "worker": self.heartbeat.info.id,
        }
        ledger.transition(
            "failed",
            allowed=("pending", "running"),
            event="failed",
            data={"message": message},
            error=reason,
            token=token,
        )
        self.services.forget(ledger.run)

    # --- taking a run over --------------------------------------------------------------------

    def _take_over(self, run: str, ledger: Ledger) -> WarmRun | str:
        """Become the run's server: fence the one before, restore model and optimizer.

        Returns:
            The warm run, or the queue of a live owner on another node.
        """
        self.fault("server.before_acquire")
        info = self.heartbeat.info
        context = self.services.context(run, ledger.head().incarnation)
        context.require_same_code()
        verdict, value = ledger.acquire(
            worker=info.id, node=info.node, queue=self.queue, environment=info.environment
        )
        if verdict == "owned":
            return str(value)
        if verdict == "skewed":
            raise Skewed(
                f"run {run!r} is updated on {value}; this worker has {info.environment}, which may give other "
                "bits. Start a worker like the first, or run.resume(admit_skew=True)"
            )
        self.heartbeat.refuse(run, None)
        self._warm.pop(run, None)
        token = self._tokens[run] = int(value)
        self.fault("server.after_acquire")
        head = ledger.head()
        context = self.services.context(run, head.incarnation)
        trainer = Trainer.build(context.recipe, context.config, device())
        checkpoints = CheckpointStore(
            self.services.settings.checkpoint_dir, run, head.incarnation, fault=self.fault
        )
        if head.status == "pending" or head.total_steps is None:
            warm = self._initialise(context, ledger, trainer, checkpoints, token, head)
        else:
            warm = self._restore(context, ledger, trainer, checkpoints, token, head)
        self._warm[run] = warm
        self._evict(run)
        log.info("run %s: serving from version %d under token %d", run, warm.version, token)
        return warm

    def _initialise(
        self,
        context: RunContext,
        ledger: Ledger,
        trainer: Trainer,
        checkpoints: CheckpointStore,
        token: int,
        head: Head,
    ) -> WarmRun:
        """Make the first version: the recipe's own initial weights, or a checkpoint's."""
        size = len(context.dataset())
        evaluation_size = 0 if context.recipe.evaluation is None else len(context.dataset("evaluation"))
        chain = GENESIS
        if head.version:
            chain = self._load_checkpoint(context, trainer, checkpoints, head.version)
        checkpoints.save_spec({**context.spec, "incarnation": context.incarnation})
        record = self.services.parameters.publish(
            ledger, head.version, trainer.replica.pack(None), chain=chain
        )
        skeleton, tensors = tree.flatten(trainer.state())
        record = self.services.parameters.publish_state(ledger, record, skeleton, tensors)
        plan = Plan(size, context.config)
        self.fault("server.before_initialise")
        verdict = ledger.initialise(
            token=token,
            manifest=trainer.replica.manifest.to_json(),
            record=record,
            dataset_size=size,
            evaluation_size=evaluation_size,
            total_steps=plan.total_steps,
        )
        if verdict != "ok":
            raise Fenced(f"run {context.run!r}: another server or a person acted before it was initialised")
        self.fault("server.after_initialise")
        return WarmRun(
            context, ledger, trainer, checkpoints, token, head.version, chain, record, time.time(),
            state_version=head.version, spilled=head.version, nbytes=trainer.nbytes(),
        )  # fmt: skip

    def _restore(
        self,
        context: RunContext,
        ledger: Ledger,
        trainer: Trainer,
        checkpoints: CheckpointStore,
        token: int,
        head: Head,
    ) -> WarmRun:
        """Load the newest version whose optimizer state is at hand, and replay from there."""
        record = self._from_cache(ledger, trainer, head)
        on_disk = [v for v in checkpoints.versions() if v <= head.version]
        if record is None or any(version > record.version for version in on_disk):
            record = self._from_disk(context, ledger, trainer, checkpoints, token, on_disk)
        if record.version != head.version:
            self.fault("server.before_rollback")
            done, above = ledger.rollback(token=token, version=record.version, chain=record.chain)
            if not done:
                raise Fenced(f"run {context.run!r}: overtaken while restoring")
            self.fault("server.after_rollback")
            self.services.parameters.drop(ledger, above, token=token)
            log.warning("run %s: replaying from version %d to %d", context.run, record.version, head.version)
        return WarmRun(
            context, ledger, trainer, checkpoints, token, record.version, record.chain, record, head.committed_at,
            state_version=record.version, spilled=_spilled(checkpoints, record.version), nbytes=trainer.nbytes(), shared=head.shared,
        )  # fmt: skip

    def _from_cache(self, ledger: Ledger, trainer: Trainer, head: Head) -> VersionRecord | None:
        """Load the newest stored version that has its optimizer state; None if there is none."""
        stored = ledger.versions()
        for version in sorted((v for v in stored if v <= head.version), reverse=True):
            record = stored[version]
            if record.state is None:
                continue
            try:
                _, flat = self.services.parameters.fetch(ledger, version)
                skeleton, tensors = self.services.parameters.fetch_state(record.state)
            except CacheError as error:
                log.warning("run %s: version %d cannot be restored: %s", ledger.run, version, error)
                continue
            trainer.replica.load(flat)
            trainer.load_state(tree.unflatten(skeleton, tensors))
            return record
        return None

    def _from_disk(
        self,
        context: RunContext,
        ledger: Ledger,
        trainer: Trainer,
        checkpoints: CheckpointStore,
        token: int,
        versions: list[int],
    ) -> VersionRecord:
        """Load the newest whole checkpoint of `versions`, or the initial weights, and publish it."""
        chain, version = GENESIS, 0
        for candidate in sorted(versions, reverse=True):
            try:
                chain, version = self._load_checkpoint(context, trainer, checkpoints, candidate), candidate
                break
            except CheckpointError as error:
                log.warning("run %s: checkpoint %d passed over: %s", context.run, candidate, error)
        else:
            fresh = Trainer.build(context.recipe, context.config, device())
            trainer.replica.load_tensors(fresh.replica.state_tensors())
            trainer.load_state(fresh.state())
        record = self.services.parameters.publish(ledger, version, trainer.replica.pack(None), chain=chain)
        skeleton, tensors = tree.flatten(trainer.state())
        record = self.services.parameters.publish_state(ledger, record, skeleton, tensors)
        if not ledger.put_version(record, token=token):
            raise Fenced(f"run {context.run!r}: overtaken while restoring")
        return record

    def _load_checkpoint(
        self, context: RunContext, trainer: Trainer, checkpoints: CheckpointStore, version: int
    ) -> str:
        """Load a checkpoint into the trainer and return its chain."""
        found = checkpoints.load(version)
        if found.meta.get("run") != context.run:
            raise CheckpointError(
                f"checkpoint {checkpoints.path(version)} belongs to run {found.meta.get('run')!r}, not {context.run!r}"
            )
        trainer.replica.load_tensors(found.tensors)
        trainer.load_state(found.state)
        return str(found.meta["chain"])

    # --- memory and departure -------------------------------------------------------------------

    def _evict(self, newest: str) -> None:
        """Let the longest unused runs go while the warm ones exceed the memory bound."""
        bound = self.services.settings.server_memory_bytes
        while len(self._warm) > 1 and sum(warm.nbytes for warm in self._warm.values()) > bound:
            run = next(name for name in self._warm if name != newest)
            self._let_go(self._warm.pop(run))

    def _let_go(self, warm: WarmRun) -> None:
        """Publish the optimizer state, so that whoever serves the run next need not replay."""
        try:
            if warm.state_version != warm.version:
                self._publish_state(warm)
        except (CacheError, Fenced) as error:
            log.warning("run %s: state of version %d not published: %s", warm.run, warm.version, error)

    def leave(self) -> None:
        """Hand every run over before the process ends: a standby goes on at once, without replay."""
        with self._lock:
            for warm in self._warm.values():
                self._let_go(warm)
                try:
                    if warm.ledger.release(warm.token):
                        self.sender.advance(warm.run)
                except CacheError as error:
                    log.warning("run %s: not released: %s", warm.run, error)
            self._warm.clear()


def evaluation_parts(size: int, shards: int) -> int:
    """Into how many tasks an evaluation of `size` samples is split: fixed by the run alone."""
    return max(1, min(size, max(shards, -(-size // _EVALUATION_PART))))


def _spilled(checkpoints: CheckpointStore, version: int) -> int:
    """Up to which version the ledger is on disk, at most `version`."""
    return checkpoints.latest_version(at_most=version) or 0


def _receipt(slot: SlotRecord) -> SlotReceipt:
    return SlotReceipt(
        shard=slot.shard,
        digest=slot.digest,
        examples=slot.examples,
        loss=slot.loss,
        worker=slot.worker,
        attempt=slot.attempt,
        seconds=slot.seconds,
        nbytes=slot.blob.nbytes,
        environment=slot.environment,
    )


def _step_event(entry: LedgerEntry) -> dict[str, Any]:
    return {
        "step": entry.version - 1,
        "version": entry.version,
        "loss": entry.loss,
        "grad_norm": entry.grad_norm,
        "examples": entry.examples,
        "seconds": entry.seconds,
        "nbytes": sum(slot.nbytes for slot in entry.slots),
        "lr": list(entry.lr),
        "skipped": entry.skipped,
    }
