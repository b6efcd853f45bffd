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
from collections.abc import Iterable
from typing import Any

from torchord.cache.errors import (
    CacheError,
    CheckpointsUnavailable,
    Fenced,
    NonFinite,
    RecordDamaged,
    Skewed,
    SlotRefused,
    TorchordError,
)
from torchord.cache.ledger.heartbeat import Heartbeat
from torchord.cache.ledger.incarnation import revision
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.ledger.records import Head, SlotRecord, VersionRecord
from torchord.cache.ledger.rounds import RoundState
from torchord.coordinator.messages.sender import Sender
from torchord.coordinator.messages.task_names import private_queue
from torchord.coordinator.runtime import activity
from torchord.coordinator.runtime import cache_report as tiers
from torchord.coordinator.runtime.alike import compare_kernels, require_same_kernels
from torchord.coordinator.runtime.context import Contexts
from torchord.coordinator.runtime.environment import unlike
from torchord.coordinator.runtime.failures import Failure, contained, noted, short_traceback
from torchord.coordinator.runtime.faults import Hook, nothing
from torchord.coordinator.runtime.hindrances import Hindrances
from torchord.coordinator.server.callbacks import Callbacks
from torchord.coordinator.server.commit import Applied, StepCommit
from torchord.coordinator.server.decisions import Decisions
from torchord.coordinator.server.finish import Finish
from torchord.coordinator.server.jury import Jury
from torchord.coordinator.server.takeover import TakeOver
from torchord.coordinator.server.upkeep import Upkeep
from torchord.coordinator.server.warm_run import NEVER, WarmRun, read_ahead

log = logging.getLogger(__name__)

CHECKPOINT = "checkpoint"  # what is tried
CHECKPOINT_SECONDS = 120.0  # for so long at least, before the run is paused
_CALL_AGAIN_SECONDS = 5.0


class TrainingServer:
    """Serves runs for one worker process.

    Args:
        contexts: the process's view of the runs.
        heartbeat: its lease; its id is the owner that the head names.
        sender: publishes the next steps.
        fault: called with the name of each point of the protocol; tests use it to die there.
    """

    def __init__(
        self,
        contexts: Contexts,
        heartbeat: Heartbeat,
        sender: Sender,
        *,
        fault: Hook = nothing,
    ) -> None:
        self.contexts = contexts
        self.services = services = contexts.services
        self.heartbeat = heartbeat
        self.sender = sender
        self.fault = fault
        self._warm: OrderedDict[str, WarmRun] = OrderedDict()
        self._tokens: dict[str, int] = {}
        self._called_again: dict[str, float] = {}
        self._lost: dict[str, int] = {}  # run -> step at which a round was lost, likewise
        self._disputes: dict[str, RoundState] = {}  # until the run is taken over anew
        self._lock = threading.RLock()
        self.hindrances = Hindrances(heartbeat)
        self.callbacks = Callbacks(services, heartbeat.info.id)
        self.upkeep = Upkeep(services, fault)
        self.finish = Finish(services, sender, self.upkeep, self._checkpointed, fault)
        self.decisions = Decisions(self.finish, self._checkpointed, fault)
        self.commit = StepCommit(
            services,
            sender,
            self.upkeep,
            worker=heartbeat.info.id,
            queue=self.queue,
            fault=fault,
            jury=Jury(heartbeat),
        )

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
            try:
                head, slots = self._look(run, ledger)
            except RecordDamaged as error:
                self._fail(ledger, error, self._tokens.get(run))
                raise
            if head.status not in ("pending", "running"):
                self._warm.pop(run, None)
                return {"run": run, "status": head.status, "version": head.version}
            self.heartbeat.doing(activity.update(run, head.version))
            self.commit.before = before = tiers.snapshot(self.services)
            try:
                with contained():
                    done = self._advance(run, ledger, head, slots, called=step)
                if done["status"] == "done":
                    self._warm.pop(run, None)
                self.hindrances.passed(run, "move", moved=done.get("version") != head.version)
                return {**done, "tiers": tiers.since(before, self.services)}
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
                self.hindrances.met(ledger, "move", (head.version,), error, token=self._tokens.get(run))
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
        if warm is None or plan is None or warm.version >= warm.end:
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
        if head.round is not None:
            if (done := self._look_at_round(run, ledger, head)) is not None:
                return done
            head, present = ledger.head(), None
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
        self.callbacks.follow(ledger, warm.context.spec, warm.token)
        self._warm.move_to_end(run)
        receipt: dict[str, Any] = {"run": run, "status": "waiting", "version": warm.version}
        launched = -1 if head.launched is None else head.launched
        while warm.version < warm.end:
            if (first := self.decisions.settle(warm)) is not None:
                if receipt["status"] == "waiting":  # somebody called for another reason than a commit
                    self.upkeep.keep_stored(warm)
                return {**receipt, "status": first}
            if warm.version >= warm.end:
                break
            try:
                applied = self._applied(warm, present, launched, called)
            except SlotRefused as error:
                log.warning("%s", error)
                self.commit.launch(warm, after=warm.version - 1, fresh=False)
                return {**receipt, "status": "refused slots"}
            except NonFinite as error:
                if not self.decisions.stops_for(warm, error):
                    raise
                break
            present = None
            if applied is None:
                last = self.commit.launch(warm, after=launched, fresh=False)
                if last == launched and receipt["status"] == "waiting":
                    self.upkeep.keep_stored(warm)  # somebody called for another reason than a complete step
                return receipt
            receipt, committed, drafted = applied.receipt, applied.committed, applied.drafted
            self._follow_switch(warm, committed.incarnation)
            if drafted is not None and committed.launched:
                launched = drafted.step
            launched = self.commit.launch(warm, after=launched, fresh=True)
            read_ahead(self.services, warm, self.commit.read_nbytes, warm.seconds)
            self._after_commit(warm, committed.dropped)
            if drafted is not None and committed.launched and drafted.step == warm.version:
                return receipt  # it was not launched before, so its chord has yet to call
        return self._end(warm, receipt)

    def _applied(
        self, warm: WarmRun, present: dict[int, SlotRecord] | None, launched: int, called: int | None
    ) -> Applied | None:
        """Apply and commit the present step, as `StepCommit.apply` does."""
        applied = self.commit.apply(warm, present, launched)
        if applied is None and called == warm.version <= launched:
            # A header ended without its slot (its twin is still at it): that one must call again.
            warm.ledger.mark_called(called, token=warm.token)
            applied = self.commit.apply(warm, None, launched)
        return applied

    def _end(self, warm: WarmRun, receipt: dict[str, Any]) -> dict[str, Any]:
        """End the run with its present version."""
        self.decisions.say_limit(warm)
        return self.finish.end(warm, receipt)

    def _look_at_round(self, run: str, ledger: Ledger, head: Head) -> dict[str, Any] | None:
        """What there is to do in a run whose round is open; None: the run goes on without the round."""
        stands, state = self.commit.rounds.look(ledger, head)
        if stands == "under way":
            return {"run": run, "status": "a round is under way", "version": head.version}
        if stands == "waiting":
            return self._not_begun(ledger, head)
        warm = self._adopted(run, ledger, head, state) if stands == "published" else None
        if warm is not None:
            done = self._after_round(warm)
            return self._end(warm, done) if warm.version >= warm.end else done
        self._warm.pop(run, None)
        self._lost[run] = head.version
        if state is not None and state.disputed is not None:
            self._disputes[run] = state
        return None

    def _not_begun(self, ledger: Ledger, head: Head) -> dict[str, Any] | None:
        """What there is to do while nobody has come to a round; None: single tasks did its first step."""
        warm = self._held(ledger.run, head)
        if warm is None:
            return None
        if len(ledger.slots_present(head.version)) >= warm.context.plan().fan_in(head.version).total:
            ledger.close_round(token=warm.token, committed=head.version)
            return None
        self.upkeep.keep_stored(warm)  # somebody has called for another reason
        return {"run": ledger.run, "status": "a round waits for Clients", "version": head.version}

    def _adopted(self, run: str, ledger: Ledger, head: Head, state: RoundState | None) -> WarmRun | None:
        """Go on from the version that a round has come to; None: the run has to be taken over anew."""
        warm, record = self._warm.get(run), ledger.version(head.version)
        if (
            warm is None
            or warm.token != head.token
            or record is None
            or record.state is None
            or state is None
        ):
            return None
        if revision(warm.context.incarnation) != revision(head.incarnation):
            return None
        self.commit.rounds.adopt(warm, head, record, state)
        self._follow_switch(warm, head.incarnation)
        return warm

    def _after_round(self, warm: WarmRun) -> dict[str, Any]:
        """Launch what comes after a round, and do what its end makes due."""
        warm.shared = False  # whoever serves the run next restores what the round's end has stored
        first = self.decisions.settle(warm)
        self.commit.launch(warm, after=-1, fresh=False)
        self._after_commit(warm)
        return {"run": warm.run, "status": first or "round taken over", "version": warm.version}

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
        warm.context = self.contexts.of(warm.run, incarnation)
        warm.checkpoints.save_spec(warm.context.saved_spec())
        log.info("run %s: config switched: %s", warm.run, warm.context.switches)

    # --- beside the steps -------------------------------------------------------------------

    def _after_commit(self, warm: WarmRun, dropped: Iterable[VersionRecord] = ()) -> None:
        """What follows a commit and may overlap the next step's compute.

        Args:
            dropped: records of the versions that went with the commit.
        """
        outlived = self.services.parameters.outlived(warm.ledger, dropped, warm.record)
        self.services.gradients.delete([*warm.spent, *outlived])
        self.upkeep.retain(warm, warm.stored, warm.pinned)
        self.finish.evaluate_if_due(warm)
        due = warm.version % warm.context.config.checkpoint_every == 0
        if (due or self.hindrances.waits(warm.run, CHECKPOINT)) and warm.version < warm.end:
            self._checkpointed(warm)
        if self.upkeep.state_due(warm):
            self.upkeep.publish_state(warm)

    def _checkpointed(self, warm: WarmRun) -> bool:
        """Write the present version's checkpoint; False if that failed, or is to be tried again later.

        The run goes on meanwhile. It is paused where no try of some minutes goes well.
        """
        if not self.hindrances.due(warm.run, CHECKPOINT):
            return False
        try:
            self.upkeep.checkpoint(warm)
        except CheckpointsUnavailable as error:
            log.warning("run %s: the checkpoint of version %d: %s", warm.run, warm.version, error)
            self.hindrances.met(
                warm.ledger, CHECKPOINT, (), error, token=warm.token, seconds=CHECKPOINT_SECONDS
            )
            return False
        self.hindrances.passed(warm.run, CHECKPOINT)
        return True

    def _fail(self, ledger: Ledger, error: Exception, token: int | None) -> None:
        """Stop the run with the error as its reason, unless another server has taken it over."""
        kind, message, trace = type(error).__name__, str(error), ""
        if not isinstance(error, TorchordError):
            message, trace = f"{kind} on the training server: {error}{noted(error)}", short_traceback(error)
        failure = Failure(kind, message, {"traceback": trace, "worker": self.heartbeat.info.id})
        failure.stop(ledger, allowed=("pending", "running"), token=token)
        self.contexts.forget(ledger.run)

    # --- taking a run over --------------------------------------------------------------------

    def _take_over(self, run: str, ledger: Ledger) -> WarmRun | str:
        """Become the run's server: fence the one before, restore model and optimizer.

        Returns:
            The warm run, or the queue of a live owner on another node.
        """
        self.fault("server.before_acquire")
        info = self.heartbeat.info
        context = self.contexts.of(run, ledger.head().incarnation)
        context.require_same_code()
        compare_kernels(context)
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
            raise Skewed(unlike(run, str(value), info.environment, does="updated"))
        require_same_kernels(context, info.id, updates=True)
        self.heartbeat.refuse(run, None)
        self._warm.pop(run, None)
        token = self._tokens[run] = int(value)
        self.fault("server.after_acquire")
        head = ledger.head()
        context = self.contexts.of(run, head.incarnation)
        warm = TakeOver(self.services, self.fault, context, token).warm(head)
        if head.round is not None:
            ledger.close_round(token=token, committed=warm.version)
        warm.alone_until = self._lost.pop(run, NEVER)
        if (disputed := self._disputes.pop(run, None)) is not None:
            warm.dispute(disputed)
        self._warm[run] = warm
        self._evict(run)
        self.finish.evaluate_if_due(warm)  # the server before may have ended just before it did so
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
                if warm.download is not None:
                    warm.download.stop()
                self.upkeep.let_go(warm)
                try:
                    if warm.ledger.release(warm.token):
                        self.sender.advance(warm.run)
                except CacheError as error:
                    log.warning("run %s: not released: %s", warm.run, error)
            self._warm.clear()
        self.callbacks.stop()
