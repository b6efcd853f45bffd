"""A seat in a round: a Client takes steps by itself, until the round is over.

Celery's messages, the chord and the hand-over to the training server are paid once a round and not once a
step. Inside it a participant asks the ledger in one script call what is next (scripts/take_turn.lua): to
compute a shard, to wait for a live holder, or to take the step, which is complete. It never waits for a task
that is queued.
"""

from __future__ import annotations

import logging
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from torchord.cache.errors import (
    CacheError,
    ConfigError,
    InvalidInput,
    ManifestMismatch,
    NonFinite,
    RecordDamaged,
    RunFailed,
    RunNotFound,
    Skewed,
    TorchordError,
)
from torchord.cache.ledger.answers import Begun
from torchord.cache.ledger.incarnation import revision
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.ledger.records import FALSIFIED, Head
from torchord.cache.ledger.rounds import Report, RoundState, Seat, Turn
from torchord.coordinator.client.participant import Participant
from torchord.coordinator.client.shard_task import ShardTask
from torchord.coordinator.client.slot_lease import SlotTask
from torchord.coordinator.messages.sender import Sender
from torchord.coordinator.messages.task_names import UPDATES
from torchord.coordinator.runtime import activity
from torchord.coordinator.runtime.context import Contexts, RunContext
from torchord.coordinator.runtime.failures import Failure, contained, noted, short_traceback
from torchord.coordinator.runtime.faults import Hook
from torchord.coordinator.runtime.trust import require_trusted

log = logging.getLogger(__name__)

_MOST_WAIT_SECONDS = 0.25  # a holder may have died: then its shard is free
_LATE_FACTOR = 1.5  # a live holder may take so many times as long as this participant does for a shard,
_LATE_SECONDS = 0.1  # and so much longer, before its shard is computed once more
_KEPT = 2  # runs whose model and optimizer stay with a process


@dataclass(frozen=True)
class SeatTask:
    """What a message asks for: a seat in a round.

    Attributes:
        run: name of the run.
        step: the round's first step.
        steps: how many it has.
        seat: its number.
    """

    run: str
    step: int
    steps: int
    seat: int


@dataclass
class _Course:
    """How one seat has gone.

    Attributes:
        seconds: what its last shard took; None before the first.
        shards: how many it has computed.
        commits: how many versions it was the first to report.
        losses: mean losses of the first and of the last step.
    """

    seconds: float | None = None
    shards: int = 0
    commits: int = 0
    losses: list[float] = field(default_factory=list)

    def limits(self) -> dict[str, float]:
        """How long to wait, and from when on a shard is late."""
        if self.seconds is None:
            return {"wait_seconds": _MOST_WAIT_SECONDS}
        late = _LATE_FACTOR * self.seconds + _LATE_SECONDS
        return {"wait_seconds": min(late, _MOST_WAIT_SECONDS), "late_seconds": late}


class RoundTask:
    """Takes part in rounds for one worker process.

    Args:
        contexts: the process's view of the runs.
        shards: computes them.
        sender: calls the training server at a round's end.
        fault: called with the name of each point of the protocol; tests use it to die there.
    """

    def __init__(self, contexts: Contexts, shards: ShardTask, sender: Sender, fault: Hook) -> None:
        self.contexts = contexts
        self.services = contexts.services
        self.shards = shards
        self.lease = shards.lease
        self.sender = sender
        self.fault = fault
        self._participants: dict[str, Participant] = {}
        self._busy: set[str] = set()
        self._lock = threading.Lock()

    def take_seat(self, task: SeatTask) -> dict[str, Any]:
        """Take part in a round, if it is still open and this process can.

        Returns:
            The receipt that Flower shows.

        Raises:
            ShardFailed: the recipe's own code raised; the run has failed with its message.
            TorchordError: the update cannot be made; the run has failed with its message.
        """
        run = task.run
        receipt: dict[str, Any] = {
            "run": run,
            "step": task.step,
            "steps": task.steps,
            "seat": task.seat,
            "worker": self.lease.worker,
        }
        with self._lock:
            if run in self._busy:
                return {**receipt, "status": "already in this round"}
            self._busy.add(run)
        try:
            return self._guarded(task, receipt)
        finally:
            with self._lock:
                self._busy.discard(run)
            self.lease.heartbeat.doing("")

    def _guarded(self, task: SeatTask, receipt: dict[str, Any]) -> dict[str, Any]:
        run, ledger = task.run, self.services.ledger(task.run)
        incarnation = ""
        try:
            head, state = ledger.head(), ledger.round()
            incarnation = head.incarnation
            if state is None or head.round is None or (state.first, head.token) != (task.step, state.token):
                return {**receipt, "status": "late"}
            if reason := self.lease.unlike(run, head):
                return self.lease.refuse({**receipt, "shard": task.seat, "version": task.step}, reason)
            self.lease.heartbeat.doing(activity.in_round(run, head.version))
            return {**receipt, **self._seated(task, head, state)}
        except (Skewed, ManifestMismatch) as error:
            return self.lease.refuse({**receipt, "shard": task.seat, "version": task.step}, str(error))
        except (RecordDamaged, ConfigError, InvalidInput, RunFailed) as error:
            found = Failure(
                type(error).__name__, str(error), {"worker": self.lease.worker, "step": task.step}
            )
            found.stop(ledger, incarnation=incarnation)
            self._forget(run)
            return {**receipt, "status": "failed", "error": str(error)}
        except NonFinite as error:
            # Whether somebody lied or the run is to stop is the training server's to say, in a single step.
            log.warning("run %s: this worker leaves the round of step %d: %s", run, task.step, error)
            self._call(ledger)
            return {**receipt, "status": "left", "error": str(error)}
        except (CacheError, RunNotFound) as error:
            # What of the round can be had elsewhere goes on there; else its training server goes back.
            log.warning("run %s: this worker leaves the round of step %d: %s", run, task.step, error)
            if not self._is_over(ledger, task):
                self.lease.hindrances.met(ledger, "slot", (task.step,), error)
            return {**receipt, "status": "left", "error": str(error)}

    @staticmethod
    def _is_over(ledger: Ledger, task: SeatTask) -> bool:
        """Whether a round has ended while this participant was behind: what it lacked is deleted then."""
        with suppress(CacheError):
            state = ledger.round()
            return state is None or state.first != task.step
        return False

    def _forget(self, run: str) -> None:
        self._participants.pop(run, None)
        self.contexts.forget(run)

    # --- the participant ----------------------------------------------------------------------

    def _participant(self, context: RunContext, head: Head, state: RoundState) -> Participant | None:
        """This process's model and optimizer at the head's version, or at one before in the same round.

        Returns:
            None if they cannot be had: the round is past the version that is stored.
        """
        made = self._participants.get(context.run)
        if made is None or made.context is not context:
            if made is not None and revision(made.context.incarnation) == revision(context.incarnation):
                made.context, context.held = context, made  # after a switch it goes on as it is
            else:
                made = Participant(self.services, context, self.lease.worker)
        self._participants.pop(context.run, None)
        self._participants[context.run] = made
        while len(self._participants) > _KEPT:
            oldest = next(iter(self._participants))
            self._participants.pop(oldest).context.held = None
        if made.slots and made.holds(head.version, head.chain) and head.version == state.first:
            made.settle(context.ledger.version(head.version))  # as whoever ended the round before stored it
        if made.holds(head.version, head.chain) or self._is_before(made, head, state):
            return made
        record = context.ledger.version(head.version)
        if record is None or record.state is None:
            return None
        with contained(), context.lock:
            made.restore(head, record)
        return made

    @staticmethod
    def _is_before(made: Participant, head: Head, state: RoundState) -> bool:
        """Whether it holds an earlier version of this round, from where it may catch up."""
        if not state.first < made.version < head.version:
            return False
        return any(
            made.holds(entry.version, entry.chain)
            for entry in made.ledger.entries(made.version, made.version)
        )

    # --- the round ----------------------------------------------------------------------------

    def _seated(self, task: SeatTask, head: Head, state: RoundState) -> dict[str, Any]:
        if FALSIFIED + self.lease.worker in self.services.ledger(task.run).claims():
            return {"status": "not admitted to rounds"}
        context = self.contexts.of(task.run, head.incarnation)
        require_trusted(context, self.lease.heartbeat)
        toolchain = context.require_same_toolchain()
        self.lease.heartbeat.refuse(task.run, None)
        held = self._participant(context, head, state)
        if held is None:
            return {"status": "joined too late"}
        seat = Seat(
            self.lease.worker,
            self.services.chunks.memory_id,
            state.token,
            state.first,
            head.incarnation,
            context.config.max_attempts,
        )
        course = _Course()
        verdict = ""
        try:
            verdict = self._take_turns(context, held, seat, state, course, toolchain)
        finally:
            if verdict in ("divergent", "behind", ""):
                self._participants.pop(task.run, None)
                context.held = None
            with suppress(CacheError):  # nobody may count on it; if that cannot be said, its lease ends
                context.ledger.leave_round(seat.worker)
        if course.shards:
            self.lease.hindrances.passed(task.run, "slot")
        return {
            "status": verdict,
            "version": held.version,
            "shards": course.shards,
            "commits": course.commits,
            **({"losses": course.losses} if course.losses else {}),
        }

    def _take_turns(
        self,
        context: RunContext,
        held: Participant,
        seat: Seat,
        state: RoundState,
        course: _Course,
        toolchain: str,
    ) -> str:
        """Compute shards and take steps until the round is over for this participant; says how it ended."""

        def turn(**more: Any) -> Turn:
            step = held.version
            inside = step <= state.last and not self.lease.leaving
            return context.ledger.turn(seat, step, shards=plan.fan_in(step).total if inside else 0, **more)

        plan = context.plan()
        answer = turn()
        while True:
            self.fault("round.before_turn")
            if answer.verdict == "compute":
                slot = self._shard(context, held, answer, seat, course, toolchain)
                answer = turn(slot=slot)
                self.fault("round.after_slot")
                if answer.written != "written":
                    self.services.gradients.delete(slot.blobs())
            elif answer.verdict == "wait":
                self.lease.heartbeat.doing(activity.in_round(context.run, held.version))
                answer = turn(**course.limits())
            elif answer.verdict == "complete":
                self.lease.heartbeat.doing(activity.in_round(context.run, held.version))
                report = self._step(context, held, answer, seat)
                answer = turn(report=report)
                self.fault("round.after_report")
                self._reported(context, held, report, answer, course)
            elif answer.verdict == "end":
                return self._end(context, held, seat, state)
            else:
                return self._left(context, held, answer)

    def _shard(
        self,
        context: RunContext,
        held: Participant,
        turn: Turn,
        seat: Seat,
        course: _Course,
        toolchain: str,
    ) -> Any:
        """Compute the shard that was claimed; it is handed back if that fails."""
        task = SlotTask(context.run, held.version, turn.shard, held.version, "round", in_round=True)
        begun = Begun("compute", turn.attempt, seat.incarnation, None, turn.memory)
        self.lease.heartbeat.doing(activity.gradient(context.run, held.version, turn.shard))
        self.lease.holding(task)
        done = False
        try:
            slot, stored = self.shards.computed(context, task, begun, toolchain)
            done = True
        finally:
            self.lease.holding(None)
            if not done:
                self.lease.end(task)
        held.computed(stored)
        course.shards += 1
        course.seconds = slot.seconds
        self.lease.heartbeat.worked(context.run, slot.seconds)
        return slot

    def _step(self, context: RunContext, held: Participant, turn: Turn, seat: Seat) -> Report:
        """Take the step whose slots are all there.

        Raises:
            Exception: as `Participant.advance`; what the recipe's own code raises has stopped the run.
        """
        self.fault("round.before_update")
        step = held.version
        try:
            with contained(), context.lock:
                report = held.advance(turn.slots, seat.token)
        except TorchordError:
            raise
        except Exception as error:
            kind = type(error).__name__
            message = f"{kind} in the update of step {step}: {error}{noted(error)}"
            details = {"traceback": short_traceback(error), "worker": self.lease.worker, "step": step}
            Failure(kind, message, details).stop(context.ledger, incarnation=seat.incarnation)
            self._forget(context.run)
            raise
        self.fault("round.after_update")
        return report

    def _reported(
        self, context: RunContext, held: Participant, report: Report, turn: Turn, course: _Course
    ) -> None:
        spent = held.spent()
        if turn.reported == "first":
            course.commits += 1
            self.services.gradients.delete(spent)
        if turn.reported:
            course.losses = [*course.losses[:1], report.entry.loss]

    def _end(self, context: RunContext, held: Participant, seat: Seat, state: RoundState) -> str:
        """Store the last version, or stay until another participant has."""
        ledger, leaving = context.ledger, self.lease.leaving and held.version <= state.last
        answer = ledger.end_round(seat, held.version, leaving=leaving)
        while answer == "wait":
            answer = ledger.end_round(seat, held.version, wait_seconds=_MOST_WAIT_SECONDS)
        if answer == "publish":
            self.fault("round.before_store")
            record = held.stored()
            self.fault("round.before_publish")
            answer = ledger.end_round(seat, held.version, record=record)
            if answer == "over":
                self.fault("round.after_publish")
                self._call(context.ledger)
                if held.slots:
                    self.services.gradients.delete(held.settle(ledger.version(held.version)))
                return "published"
            self.services.gradients.delete(held.unneeded(record))
        return {"over": "done"}.get(answer, answer)

    def _call(self, ledger: Ledger) -> None:
        """Call the training server: the chord may wait for a seat whose worker has died."""
        head = ledger.head()
        served = self.services.registry.worker(head.owner) if head.owner else None
        self.sender.advance(ledger.run, queue=head.queue if served and head.queue else UPDATES)

    def _left(self, context: RunContext, held: Participant, turn: Turn) -> str:
        """Leave a round before its end, and say why."""
        run, step = context.run, held.version
        if turn.verdict == "divergent":
            message = (
                f"version {step} has other bytes on {self.lease.worker} than on {turn.other}, which made it "
                "first; the round is computed again"
            )
            log.error("run %s: %s", run, message)
            context.ledger.emit(
                "divergent", {"version": step, "workers": [turn.other, self.lease.worker], "message": message}
            )
            self._call(context.ledger)
        elif turn.verdict == "diverged":
            message = (
                f"run {run!r}: replaying step {step - 1} gave other bytes than before; a worker's torch, "
                "hardware, data or code has changed (see run.verify())"
            )
            Failure("RunError", message, {"worker": self.lease.worker, "step": step - 1}).stop(
                context.ledger, incarnation=context.incarnation
            )
            self._forget(run)
        return turn.verdict
