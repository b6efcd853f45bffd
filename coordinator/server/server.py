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
from collections import Counter, OrderedDict
from dataclasses import replace
from typing import Any

from torchord.cache.errors import (
    CacheError,
    ChunkCorrupt,
    ChunkMissing,
    Fenced,
    ManifestMismatch,
    NonFinite,
    RunError,
    Skewed,
    TorchordError,
)
from torchord.cache.ledger.answers import Committed
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.ledger.records import (
    PARTIAL_SUMS,
    Head,
    Launch,
    LedgerEntry,
    SlotRecord,
    StateRecord,
    revision,
)
from torchord.cache.ledger.workers import Heartbeat
from torchord.coordinator.compute.sums import Aggregate
from torchord.coordinator.compute.trainer import ApplyReport
from torchord.coordinator.messages.sender import Sender
from torchord.coordinator.messages.task_names import private_queue
from torchord.coordinator.runtime import activity
from torchord.coordinator.runtime import cache_report as tiers
from torchord.coordinator.runtime.failures import short_traceback
from torchord.coordinator.runtime.faults import Hook, nothing
from torchord.coordinator.runtime.services import Services
from torchord.coordinator.server.gradient_download import LEAST_CHUNKS
from torchord.coordinator.server.step_slots import (
    loss_of,
    nonfinite,
    receipts_of,
    roots_of,
    send_missing,
)
from torchord.coordinator.server.step_sum import StepSum
from torchord.coordinator.server.takeover import TakeOver
from torchord.coordinator.server.upkeep import Upkeep
from torchord.coordinator.server.warm_run import WarmRun, collect

log = logging.getLogger(__name__)

_EVALUATION_PIN_SECONDS = 6 * 3600.0
_EVALUATION_PART = 4096
_CALL_AGAIN_SECONDS = 5.0
_FAR_STEPS = 20


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
        self._before = tiers.snapshot(services)
        self._read_nbytes = 0  # of the last step's gradients, from the chunk store
        self._lock = threading.RLock()
        self.upkeep = Upkeep(services, fault)

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
            head, slots = self._look(run, ledger)
            if head.status not in ("pending", "running"):
                self._warm.pop(run, None)
                return {"run": run, "status": head.status, "version": head.version}
            self.heartbeat.doing(activity.update(run, head.version))
            self._before = tiers.snapshot(self.services)
            try:
                done = self._advance(run, ledger, head, slots, called=step)
                return {**done, "tiers": tiers.since(self._before, self.services)}
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

    def _look(self, run: str, ledger: Ledger) -> tuple[Head, dict[int, SlotRecord] | None]:
        """The head, and in the same round trip all slots of the step that is next, where they are few."""
        warm = self._warm.get(run)
        plan = None if warm is None else warm.context.plan()
        if warm is None or plan is None or warm.version >= plan.total_steps:
            return ledger.head(), None
        if plan.fan_in(warm.version).partials:
            return ledger.head(), None
        return ledger.head_and_slots(warm.version)

    def _call_again(self, run: str) -> None:
        """After a failure of the store: try again at once, but not time after time (the supervisor does)."""
        now = time.monotonic()
        if now - self._called_again.get(run, -math.inf) > _CALL_AGAIN_SECONDS:
            self._called_again[run] = now
            try:
                self.sender.advance(run, queue=self.queue)
            except CacheError as error:
                log.debug("run %s: %s", run, error)

    def _advance(
        self,
        run: str,
        ledger: Ledger,
        head: Head,
        present: dict[int, SlotRecord] | None,
        *,
        called: int | None,
    ) -> dict[str, Any]:
        warm = self._held(run, head)
        if warm is None:
            present = None
            taken = self._take_over(run, ledger)
            if isinstance(taken, str):
                self.sender.advance(run, queue=taken)
                return {"run": run, "status": "forwarded", "to": taken}
            warm = taken
            head = ledger.head()
        warm.shared = head.shared
        self._warm.move_to_end(run)
        receipt: dict[str, Any] = {"run": run, "status": "waiting", "version": warm.version}
        launched = -1 if head.launched is None else head.launched
        while warm.version < warm.context.plan().total_steps:
            applied = self._apply(warm, present, launched)
            present = None
            if applied is None and called == warm.version <= launched:
                # A header ended without its slot (its twin is still at it): that one must call again.
                warm.ledger.mark_called(called, token=warm.token)
                applied = self._apply(warm, None, launched)
            if applied is None:
                last = self._launch(warm, after=launched, fresh=False)
                if last == launched and receipt["status"] == "waiting":
                    self.upkeep.keep_stored(warm)  # somebody called for another reason than a complete step
                return receipt
            receipt, committed, drafted = applied
            self._follow_switch(warm, committed.incarnation)
            if drafted is not None and committed.launched:
                launched = drafted.step
            launched = self._launch(warm, after=launched, fresh=True)
            collect(self.services, warm, self._read_nbytes, warm.seconds)
            self._after_commit(warm, committed)
            if drafted is not None and committed.launched and drafted.step == warm.version:
                return receipt  # it was not launched before, so its chord has yet to call
        return self._finish(warm, receipt)

    def _held(self, run: str, head: Head) -> WarmRun | None:
        """The run as this process holds it, if that is what the head says."""
        warm = self._warm.get(run)
        if warm is None or (warm.token, warm.version) != (head.token, head.version):
            return None
        if revision(warm.context.incarnation) != revision(head.incarnation):
            return None
        self._follow_switch(warm, head.incarnation)
        return warm

    def _follow_switch(self, warm: WarmRun, incarnation: str | None = None) -> None:
        """Take a live switch of the config over; it holds from a step on that is not launched yet."""
        if incarnation is None:
            incarnation = warm.ledger.incarnation()
        if incarnation in ("", warm.context.incarnation):
            return
        if revision(incarnation) != revision(warm.context.incarnation):
            raise Fenced(f"run {warm.run!r}: its recipe was corrected meanwhile")
        warm.context = self.services.context(warm.run, incarnation)
        warm.checkpoints.save_spec({**warm.context.spec, "incarnation": incarnation})
        log.info("run %s: config switched: %s", warm.run, warm.context.switches)

    # --- one step -------------------------------------------------------------------------

    def _apply(
        self, warm: WarmRun, present: dict[int, SlotRecord] | None, launched: int
    ) -> tuple[dict[str, Any], Committed, Launch | None] | None:
        """Apply and commit the present step if every slot is there; None if one is missing.

        Args:
            present: all its slots, where they have just been read.
            launched: the last step that is launched; the one after goes out with the commit.

        Returns:
            The receipt, the answer to the commit, and what was to be launched with it.
        """
        step = warm.version
        plan = warm.context.plan()
        tree = plan.fan_in(step)
        if present is None:
            present = roots_of(warm.ledger, step, tree)
        if present is None or len(present) < len(tree.roots):
            return None
        slots = [present[root] for root in tree.roots]
        receipts, sums = receipts_of(slots)
        self.fault("server.before_apply")
        self._adopt(warm)
        report, loss = self._update(warm, slots)
        self.fault("server.after_apply")
        replica = warm.trainer.replica
        flat = replica.pack(self.services.chunks.draft(replica.nbytes()))
        draft = self.services.parameters.publish(
            warm.ledger, step + 1, flat, chain="", announced=self._far(warm, slots)
        )
        if (delta := warm.trainer.delta) is not None:
            draft = self.services.parameters.publish_delta(
                warm.ledger, draft, warm.record, delta.compression, delta.payload, delta.buffers
            )
        self.fault("server.after_publish")
        now = time.time()
        entry = LedgerEntry(
            version=step + 1,
            slots=tuple(receipts),
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
            notes={
                **({"switch": plan.switches[step]} if step in plan.switches else {}),
                **({PARTIAL_SUMS: sums} if tree.partials else {}),
            },
        ).sealed()
        states = self._new_states(warm, slots)
        # A step that was skipped for a NaN changes no slot's state: what it made is of no use.
        unused = [blob for state in states.values() for blob in state.blobs()] if report.skipped else []
        kept = dict(warm.record.slots) if warm.context.keeps_state(step) else {}
        record = replace(draft, chain=entry.chain, slots=kept if report.skipped else {**kept, **states})
        drafted = self._draft(warm, after=launched)
        committed = warm.ledger.commit(
            step=step,
            token=warm.token,
            shards=tree.total,
            entry=entry,
            record=record,
            event={**_step_event(entry), "tiers": tiers.since(self._before, self.services)},
            drop=() if warm.record.slots or record.slots else self.upkeep.outlived(warm),
            launch=drafted,
        )
        self.fault("server.after_commit")
        if committed.verdict != "ok":
            self.services.chunks.delete(record.own_blobs())
            self._refused(warm, committed.verdict, step)
        warm.version, warm.chain, warm.record, warm.committed_at = step + 1, entry.chain, record, now
        warm.seconds = entry.seconds
        warm.spent = [*(slot.blob for slot in slots), *unused]
        warm.stored, warm.pinned = committed.stored, committed.pinned
        receipt = {
            "run": warm.run,
            "status": "committed",
            "step": step,
            "version": step + 1,
            "loss": loss,
            "grad_norm": report.grad_norm,
            "examples": entry.examples,
            "nbytes": sum(receipt.nbytes for receipt in receipts),
            "skipped": report.skipped,
            "worker": self.heartbeat.info.id,
        }
        return receipt, committed, drafted

    def _far(self, warm: WarmRun, slots: list[SlotRecord]) -> bool:
        """Whether Clients read versions from the chunk store, so that they are told while one is stored."""
        if "fetch" not in self.services.settings.overlap:
            return False
        if any(slot.fetched == "store" for slot in slots):  # who reads ahead into the host's tier says "host"
            warm.far_until = warm.version + _FAR_STEPS
        least = LEAST_CHUNKS * self.services.chunks.chunks.chunk_nbytes
        far = self._read_nbytes >= least or warm.version < warm.far_until
        return far and warm.trainer.replica.nbytes() >= least

    def _draft(self, warm: WarmRun, *, after: int) -> Launch | None:
        """The chord that the commit of the present step makes possible, None if there is none or several."""
        plan, following = warm.context.plan(), warm.version + 1
        if following >= plan.total_steps:
            return None
        steps = [step for step in plan.window(following) if step > after]
        if len(steps) != 1:
            return None
        tree = plan.fan_in(steps[0])
        return self.sender.drafted(
            warm.run,
            steps[0],
            range(tree.shards),
            callback_queue=self.queue,
            version=plan.version_for(steps[0]),
            incarnation=warm.context.incarnation,
            joining=len(tree.partials),
        )

    def _update(self, warm: WarmRun, slots: list[SlotRecord]) -> tuple[ApplyReport, float]:
        """Average the slots in slot order and step the optimizer."""
        trainer = warm.trainer
        loss, bad = loss_of(slots), nonfinite(slots)
        before = self.services.chunks.counters.store_nbytes
        mean = self._sum(warm, slots)
        self._read_nbytes = self.services.chunks.counters.store_nbytes - before
        try:
            report = trainer.apply(mean.gradients, mean.buffers, step=warm.version, loss=loss, finite=not bad)
        except NonFinite as error:
            where = f"in shards {bad}" if bad else "in the average only"
            raise NonFinite(f"run {warm.run!r}: {error} The NaN or infinity arose {where}.") from error
        return report, loss

    def _sum(self, warm: WarmRun, slots: list[SlotRecord]) -> Aggregate:
        """The average of all root slots of the present step, added up in slot order."""
        step, plan, ahead = warm.version, warm.context.plan(), warm.collector
        tree = plan.fan_in(step)
        total = StepSum(
            tree,
            plan.examples(step),
            warm.trainer,
            self.services.gradients,
            allowed=self.services.settings.allowed_modules,
            read=None if ahead is None or ahead.step != step else ahead.read,
        )
        for slot in slots:
            try:
                total.add(slot)
            except (ChunkMissing, ChunkCorrupt, ManifestMismatch):
                below = tree.below(slot.shard)
                warm.ledger.drop_slot(step, slot.shard, nonce=slot.nonce, token=warm.token, below=below)
                raise
        return total.result()

    def _adopt(self, warm: WarmRun) -> None:
        """Follow a switch of the config that holds from the present step on."""
        config = warm.context.plan().config_at(warm.version)
        if config != warm.trainer.config:
            warm.trainer.adopt(warm.context.recipe, config)

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

    def _new_states(self, warm: WarmRun, slots: list[SlotRecord]) -> dict[int, StateRecord]:
        """What the slots of the present step left for their next one; some may sit the step out."""
        if not warm.context.keeps_state(warm.version):
            return {}
        if slots[0].total is not None:
            shards = warm.context.plan().shards_in(warm.version)
            slots = [slot for slot in warm.ledger.slots(warm.version).values() if slot.shard < shards]
        return {slot.shard: slot.state for slot in slots if slot.state is not None}

    def _launch(self, warm: WarmRun, *, after: int, fresh: bool) -> int:
        """Publish the chords of the steps that may be computed by now and were not launched.

        Args:
            after: the last step that was launched.
            fresh: this process has just committed the step before, so no slot can be there yet.

        Returns:
            The last step that is launched now.
        """
        plan = warm.context.plan()
        if warm.version >= plan.total_steps:
            return after
        for step in plan.window(warm.version):
            if step <= after:
                continue
            present = set() if fresh else warm.ledger.slots_present(step)
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

    # --- beside the steps -------------------------------------------------------------------

    def _after_commit(self, warm: WarmRun, committed: Committed) -> None:
        """What follows a commit and may overlap the next step's compute."""
        dropped = [blob for record in committed.dropped for blob in record.blobs()]
        self.services.gradients.delete([*warm.spent, *dropped])
        self.upkeep.retain(warm, warm.stored, warm.pinned)
        self._evaluate_if_due(warm)
        version, config = warm.version, warm.context.config
        total = warm.context.plan().total_steps
        if version % config.checkpoint_every == 0 and version < total:
            self.upkeep.checkpoint(warm)
        if self.upkeep.state_due(warm):
            self.upkeep.publish_state(warm)

    def _evaluate_if_due(self, warm: WarmRun) -> None:
        """Launch the evaluation that the config asks for at the present version, if there is one."""
        version, every = warm.version, warm.context.config.evaluate_every
        due = every is not None and version > 0 and version % every == 0
        if due and version < warm.context.plan().total_steps and warm.context.recipe.evaluation is not None:
            self._launch_evaluation(warm)

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
                if receipt["status"] == "waiting":  # somebody called for another reason than a commit
                    self.upkeep.keep_stored(warm)
                return {**receipt, "status": "evaluating"}
        if warm.spilled != version:
            self.upkeep.checkpoint(warm)
        if warm.record.slots or warm.record.delta is not None:  # no slot and no Client has a next step
            kept, warm.record = warm.record, replace(warm.record, slots={}, delta=None)
            if not ledger.put_version(warm.record, token=warm.token):
                raise Fenced(f"run {warm.run!r}: overtaken at its end")
            left = warm.record.blobs()
            self.services.gradients.delete(blob for blob in kept.blobs() if blob not in left)
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
            worker=info.id,
            node=info.node,
            queue=self.queue,
            environment=info.environment,
            memory=self.services.chunks.memory_id,
        )
        if verdict == "owned":
            return str(value)
        if verdict == "skewed":
            raise Skewed(
                f"run {run!r} is updated on {value}; this worker has {info.environment}, which may give "
                "other bits. Start a worker like the first, or run.resume(admit_skew=True)"
            )
        self.heartbeat.refuse(run, None)
        self._warm.pop(run, None)
        token = self._tokens[run] = int(value)
        self.fault("server.after_acquire")
        head = ledger.head()
        context = self.services.context(run, head.incarnation)
        warm = TakeOver(self.services, self.fault, context, token).warm(head)
        self._warm[run] = warm
        self._evict(run)
        self._evaluate_if_due(warm)  # the server before may have ended just before it did so
        log.info("run %s: serving from version %d under token %d", run, warm.version, token)
        return warm

    # --- memory and departure -------------------------------------------------------------------

    def _evict(self, newest: str) -> None:
        """Let the longest unused runs go while the warm ones exceed the memory bound."""
        bound = self.services.settings.server_memory_bytes
        while len(self._warm) > 1 and sum(warm.nbytes for warm in self._warm.values()) > bound:
            run = next(name for name in self._warm if name != newest)
            self.upkeep.let_go(self._warm.pop(run))

    def leave(self) -> None:
        """Hand every run over before the process ends: a standby goes on at once, without replay."""
        with self._lock:
            for warm in self._warm.values():
                if warm.collector is not None:
                    warm.collector.stop()
                self.upkeep.let_go(warm)
                try:
                    if warm.ledger.release(warm.token):
                        self.sender.advance(warm.run)
                except CacheError as error:
                    log.warning("run %s: not released: %s", warm.run, error)
            self._warm.clear()


def evaluation_parts(size: int, shards: int) -> int:
    """Into how many tasks an evaluation of `size` samples is split: fixed by the run alone."""
    return max(1, min(size, max(shards, -(-size // _EVALUATION_PART))))


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
        "fetched": dict(Counter(slot.fetched for slot in entry.slots)),
    }
