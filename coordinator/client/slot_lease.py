"""The lease of a slot: taken before it is computed, ended when it is not written after all.

A Client that can't compute what it was given hands it back at once, and says why: lost bytes to the
training server, another environment or other code to whoever looks at the run.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torchord.cache.errors import (
    CacheError,
    ChunkLost,
    ConfigError,
    Impure,
    InvalidInput,
    ManifestMismatch,
    RecordDamaged,
    RunNotFound,
    ShardFailed,
    Skewed,
    VersionMissing,
)
from torchord.cache.ledger.answers import Begun
from torchord.cache.ledger.hardware import fits
from torchord.cache.ledger.heartbeat import Heartbeat
from torchord.cache.ledger.records import Head
from torchord.coordinator.messages.sender import Join, Sender
from torchord.coordinator.messages.task_names import UPDATES
from torchord.coordinator.runtime import cache_report as tiers
from torchord.coordinator.runtime.context import Contexts, RunContext
from torchord.coordinator.runtime.environment import unlike
from torchord.coordinator.runtime.failures import Failure
from torchord.coordinator.runtime.hindrances import Hindrances
from torchord.coordinator.runtime.services import Services

log = logging.getLogger(__name__)

NO_SUCH_SLOT = "no such slot"
UNWRITTEN = ("early", "input lost", "overtaken", "left to another", NO_SUCH_SLOT)
"""Statuses of a receipt when there was nothing to write yet."""

LOSSES = (VersionMissing, ChunkLost)
"""Errors that mean that bytes which were committed cannot be had."""

_MOST_LAUNCHED = 1024  # steps at once, by staleness
_REFUSAL_SECONDS = (0.25, 2.0)  # how long a refused worker steps back, at first and at most


@dataclass(frozen=True)
class SlotTask:
    """What a message asks for: one slot of one step.

    Attributes:
        run: name of the run.
        step: the global step.
        slot: a shard's number, or a partial sum's.
        version: what it is computed at.
        delivery: id of the Celery task.
        join: the chord that the task belongs to: then Celery itself calls the update when all of the
            step's tasks are done.
        backup: compute even if a live worker is at the slot.
        in_round: whether it was claimed in a round, and not by a message.
    """

    run: str
    step: int
    slot: int
    version: int
    delivery: str
    join: Join | None = None
    backup: bool = False
    in_round: bool = False


class SlotLease:
    """Holds and hands back slots for one worker process.

    Args:
        contexts: the process's view of the runs.
        heartbeat: the process's lease; its id is what the ledger records.
        sender: for what goes back into the queue, and for what the training server has to hear.
    """

    def __init__(self, contexts: Contexts, heartbeat: Heartbeat, sender: Sender) -> None:
        self.contexts = contexts
        self.services = contexts.services
        self.heartbeat = heartbeat
        self.sender = sender
        self.hindrances = Hindrances(heartbeat)
        self._held: dict[int, SlotTask] = {}  # by thread
        self._refusals = 0
        self.leaving = False  # whether this process is about to end

    @property
    def worker(self) -> str:
        """Id of this process, as the ledger records it."""
        return self.heartbeat.info.id

    def hold(
        self,
        task: SlotTask,
        receipt: dict[str, Any],
        doing: str,
        compute: Callable[[Begun], dict[str, Any]],
        *,
        lacking: bool = False,
    ) -> dict[str, Any]:
        """Take the lease of a slot, compute it, and hand it back if that fails.

        Args:
            receipt: what Flower shows in any case.
            doing: what the heartbeat says meanwhile.
            compute: what the ledger answered -> the receipt of the slot that it has written, or of why not.
            lacking: whether the version that the slot is computed at has to be loaded: then the answer
                says where it is.
        """
        run, step, slot = task.run, task.step, task.slot
        receipt["worker"] = self.worker
        ledger = self.services.ledger(run)
        begun = ledger.begin(
            step,
            slot,
            worker=self.worker,
            delivery=task.delivery,
            backup=task.backup,
            environment=self.heartbeat.info.environment,
            version=task.version,
            lacking=lacking,
        )
        verdict = begun.verdict
        if verdict == "skewed":
            return self.refuse({**receipt, "status": verdict}, self.unlike(run, ledger.head()))
        if verdict != "compute":
            log.info("step %d slot %d of run %s: %s, nothing to do", step, slot, run, verdict)
            return {**receipt, "status": verdict}
        self.heartbeat.doing(doing)
        self._held[threading.get_ident()] = task
        written = False
        before = tiers.snapshot(self.services)
        try:
            done = compute(begun)
            written = done["status"] not in UNWRITTEN
            if written:
                self.hindrances.passed(run, "slot")
            return {**done, "tiers": tiers.since(before, self.services)}
        except (Skewed, ManifestMismatch) as error:
            self.end(task)
            return self.refuse(receipt, str(error))
        except (RecordDamaged, ConfigError, InvalidInput) as error:
            # Nobody can compute from what is stored: the run ends with the reason.
            found = Failure(type(error).__name__, str(error), {"worker": self.worker, "step": step})
            found.stop(ledger, incarnation=begun.incarnation)
            self.contexts.forget(run)
            return {**receipt, "status": "failed", "error": str(error)}
        except CacheError as error:
            # Not the recipe's fault: the slot goes back at once and the supervisor sends it again.
            log.warning("step %d slot %d of run %s goes back: %s", step, slot, run, error)
            if isinstance(error, LOSSES):
                self.report_loss(run, step)
            self.hindrances.met(ledger, "slot", (step,), error)
            return {**receipt, "status": "handed back", "error": str(error)}
        finally:
            self._held.pop(threading.get_ident(), None)
            if not written:
                self.end(task)
            self.heartbeat.doing("")

    def holding(self, task: SlotTask | None) -> None:
        """Note which slot the calling thread is at, for `hand_back`; None: at none."""
        if task is None:
            self._held.pop(threading.get_ident(), None)
        else:
            self._held[threading.get_ident()] = task

    def end(self, task: SlotTask) -> None:
        """Hand a slot back, so that it can be computed elsewhere at once."""
        ledger = self.services.ledger(task.run)
        try:
            ledger.end_lease(task.step, task.slot, worker=self.worker, delivery=task.delivery)
        except CacheError as error:  # the supervisor finds out that nobody is at it
            log.warning(
                "step %d slot %d of run %s not handed back: %s", task.step, task.slot, task.run, error
            )

    def report_loss(self, run: str, step: int) -> None:
        """What is to be computed from is gone: the run's training server stores it again, or goes back."""
        try:
            head = self.services.ledger(run).head()
            if head.version <= step:
                self.sender.advance(run, queue=head.queue or UPDATES)
        except (CacheError, RunNotFound) as error:
            log.warning("run %s: loss of version %d not reported: %s", run, step, error)

    def unlike(self, run: str, head: Head) -> str:
        """Why this machine may not compute for the run; "" if it may."""
        here = self.heartbeat.info.environment
        if head.skew != "refuse" or fits(head.environment, here):
            return ""
        return unlike(run, head.environment, here)

    def refuse(self, receipt: dict[str, Any], reason: str) -> dict[str, Any]:
        """Leave a task to workers that may compute it: send it again, and step back for a while."""
        run = receipt["run"]
        if self.heartbeat.refuse(run, reason):
            log.error("%s", reason)
            self.services.ledger(run).emit("refused", {"worker": self.worker, "reason": reason})
            self._refusals = 0
        self.send_again(receipt)
        return {**receipt, "status": "refused", "reason": reason}

    def send_again(self, receipt: dict[str, Any]) -> None:
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

    def worked(self) -> None:
        """Note that a task was computed: the next refusal steps back as briefly as the first."""
        self._refusals = 0

    def hand_back(self) -> None:
        """Give the shards at work to others at once, because this process is about to end.

        Their computation goes on until the process ends; whoever is first writes the slot.
        """
        self.leaving = True
        for task in list(self._held.values()):
            log.info(
                "step %d slot %d of run %s is handed back: this worker stops", task.step, task.slot, task.run
            )
            self.end(task)

    def failed(
        self,
        context: RunContext,
        error: Exception,
        task: SlotTask,
        *,
        place: str,
        samples: Sequence[int] = (),
    ) -> ShardFailed:
        """Record that the recipe's own code raised, and return the error to raise.

        Args:
            task: whose slot it raised for; the run goes on if that is written.
            place: what the slot is, for people.
            samples: dataset indices that went into it.
        """
        if isinstance(error, Impure):
            found = Failure(Impure.__name__, str(error), {"worker": self.worker, "step": task.step})
            found.stop(context.ledger, incarnation=context.incarnation)
            self.contexts.forget(context.run)
            return ShardFailed(str(error))
        failure = Failure.of(
            error,
            place,
            worker=self.worker,
            step=task.step,
            shard=task.slot,
            samples=[int(sample) for sample in samples],
        )
        failure.stop(context.ledger, incarnation=context.incarnation, shard=(task.step, task.slot))
        self.contexts.forget(context.run)
        return ShardFailed(f"run {context.run!r}: {failure.message}")


def hand_back_node(services: Services, node: str) -> None:
    """End every lease that processes of a Celery node hold; the supervisor sends those shards again.

    Their computation goes on until they end; whoever is first writes the slot.

    Raises:
        CacheError: Redis is away.
    """
    registry = services.registry
    ours = {info.id for info in registry.alive().values() if info.node == node}
    for run in registry.active_runs():
        try:
            ledger = services.ledger(run)
            head = ledger.head()
        except (RunNotFound, RecordDamaged, InvalidInput):  # the others are handed back
            continue
        launched = min(head.launched or 0, head.version + _MOST_LAUNCHED)
        for step in range(head.version, max(head.version, launched) + 1):
            for lease in ledger.leases(step).values():
                if lease.open and lease.worker in ours:
                    log.info(
                        "run %s: slot %d of step %d is handed back: this worker stops", run, lease.shard, step
                    )
                    ledger.end_lease(step, lease.shard, worker=lease.worker, delivery=lease.delivery)
