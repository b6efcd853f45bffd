"""One look at the slots of a run's present step: which are lost, which are late, which are hopeless.

A slot is a shard's or a partial sum's; one of the latter is looked for once its inputs are there.
"""

from __future__ import annotations

import logging
import statistics

from torchord.cache.ledger.answers import Lease
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.ledger.records import Head
from torchord.cache.ledger.workers import Registry, WorkerInfo
from torchord.coordinator.messages.sender import Sender
from torchord.coordinator.messages.task_names import GRADIENTS
from torchord.coordinator.runtime import activity
from torchord.coordinator.runtime.failures import Failure
from torchord.coordinator.server.supervisor.discards import Discards
from torchord.coordinator.server.supervisor.memory import REPEAT_SECONDS, UNSEEN_SECONDS, Memory
from torchord.coordinator.spec.plan import Plan, shown

log = logging.getLogger(__name__)

POISON_SECONDS = 3.0  # a worker that was only silent (stopped, or starved) gets so long to come back
SUM_FACTOR = 3.0  # a partial sum is late when it takes so many times as long as usual,
SUM_AT_LEAST_SECONDS = 0.5  # and at least so long
_UNSEEN = "its message was lost"
ASTRAY_SECONDS = 2.0  # longer than a dead worker's lease, whose last beat may be from before it began


class ShardWatch:
    """Compares the step's slots and leases with the living workers, and sends again what is lost.

    Args:
        ledger: of the run.
        head: as read in this round; its step was launched.
        plan: of the run.
        alive: the living workers by id.
        memory: of the supervisor's rounds.
        step: which step; with staleness several are under way.
    """

    def __init__(
        self,
        ledger: Ledger,
        head: Head,
        plan: Plan,
        alive: dict[str, WorkerInfo],
        memory: Memory,
        step: int,
    ) -> None:
        self.ledger = ledger
        self.head = head
        self.plan = plan
        self.alive = alive
        self.memory = memory
        self.run = ledger.run
        self.step = step
        self.tree = plan.fan_in(step)

    def look(self, registry: Registry, sender: Sender, discards: Discards) -> None:
        """Check every slot that could be written and is not, once."""
        present = self.ledger.slots_present(self.step)
        missing = [slot for slot in self.tree.gradients if slot not in present]
        missing += self.tree.ready(present)
        if not missing:
            return
        leases = self.ledger.leases(self.step)
        unseen = [shard for shard in missing if shard not in leases]
        lost: dict[int, str] = {}
        held: list[Lease] = []
        for lease in (leases[shard] for shard in missing if shard in leases):
            why = self._why_lost(lease)
            if why:
                lost[lease.shard] = why
            elif lease.worker in self.alive:
                held.append(lease)
        if unseen and self.memory.lasting((self.run, "unseen", self.step, tuple(unseen)), UNSEEN_SECONDS):
            lost |= dict.fromkeys(unseen, _UNSEEN)
        sent = self._resend(lost, leases, registry, sender)
        if any(lost[shard] == _UNSEEN for shard in sent):
            discards.lost(GRADIENTS, self.ledger, self.alive)
        if not unseen and not lost:
            self._back_up(held, sender)

    def look_in_round(self) -> None:
        """Check the leases of a step that participants of a round take: they send themselves what is lost."""
        present = self.ledger.slots_present(self.step)
        for lease in self.ledger.leases(self.step).values():
            if lease.shard not in present:
                self._why_lost(lease)

    # --- what is lost -----------------------------------------------------------------------

    def _why_lost(self, lease: Lease) -> str:
        """Why nobody computes this shard; "" if its holder is at it, or may yet be."""
        key = (self.run, self.step, lease.shard, lease.worker, lease.attempt)
        limit = self.plan.config.shard_timeout_seconds
        if not lease.open:
            if limit is not None and self._holds_everybody(lease, key, limit):
                self._give_up(
                    lease,
                    f"exceeded shard_timeout_seconds={limit:g} on every worker there is",
                    "restart the workers if they still hang, or allow more time",
                )
                return ""
            return f"worker {lease.worker} handed it back"
        holder = self.alive.get(lease.worker)
        if holder is None:
            if lease.attempt < self.plan.config.max_attempts:
                return f"worker {lease.worker} died"
            if self.memory.lasting(("dead", *key), POISON_SECONDS):
                self._give_up(
                    lease,
                    f"took its worker down {_times(lease.attempt)}, last {lease.worker}",
                    "look at that worker's log (out of memory? a crash in native code?)",
                )
            return ""
        if self._doing(lease.shard) not in holder.tasks:
            # It took the shard and is not at it: it could not hand it back, or Redis lost what it wrote.
            if self.memory.lasting(("idle", *key), ASTRAY_SECONDS):
                self._end(lease, counts=False)
            return ""
        if limit is not None and self._held_seconds(lease) > limit:
            if lease.attempt < self.plan.config.max_attempts:
                log.warning(
                    "run %s: %s of step %d is overdue on %s",
                    self.run, self._named(lease.shard), self.step, lease.worker,
                )  # fmt: skip
                self._end(lease, counts=True)
            else:
                self._give_up(
                    lease,
                    f"exceeded shard_timeout_seconds={limit:g} {_times(lease.attempt)}, "
                    f"last on {lease.worker}",
                    "restart that worker if it still hangs, or allow more time",
                )
        return ""

    def _holds_everybody(self, lease: Lease, key: tuple[object, ...], limit: float) -> bool:
        """Whether all Clients have been at this one shard, in vain, for longer than they may."""
        task = self._doing(lease.shard)
        clients = [info for info in self.alive.values() if GRADIENTS in info.queues and info.environment]
        stuck = bool(clients) and all(task in info.tasks for info in clients)
        return stuck and self.memory.lasting(("everybody", *key), limit)

    def _doing(self, slot: int) -> str:
        """What the heartbeat of a worker at a slot says."""
        name = activity.partial_sum if slot in self.tree.partials else activity.gradient
        return name(self.run, self.step, slot)

    def _named(self, slot: int) -> str:
        if slot in self.tree.partials:
            return f"partial sum {slot}"
        return (
            f"shard {slot}" if slot < self.tree.shards else f"the check of shard {self.tree.shard_of(slot)}"
        )

    def _send(self, sender: Sender, slot: int, *, backup: bool = False) -> None:
        version = self.plan.version_for(self.step)
        send = sender.partial_sum if slot in self.tree.partials else sender.gradient
        send(self.run, self.step, slot, version=version, backup=backup)

    def _held_seconds(self, lease: Lease) -> float:
        return self.memory.lasted((self.run, "held", self.step, lease.shard, lease.worker, lease.attempt))

    def _end(self, lease: Lease, *, counts: bool) -> None:
        self.ledger.end_lease(
            self.step, lease.shard, worker=lease.worker, delivery=lease.delivery, counts=counts
        )

    def _resend(
        self, lost: dict[int, str], leases: dict[int, Lease], registry: Registry, sender: Sender
    ) -> list[int]:
        """Send lost shards again, unless a message for them waits in the queue; returns which were sent."""
        due = []
        for shard in lost:
            attempt = leases[shard].attempt if shard in leases else 0
            if self.memory.due((self.run, "shard", self.step, shard, attempt, lost[shard]), REPEAT_SECONDS):
                due.append(shard)
        if not due:
            return []
        waiting = {
            arguments.get("shard", arguments.get("slot"))
            for arguments in registry.queued(GRADIENTS)
            if (arguments.get("run"), arguments.get("step")) == (self.run, self.step)
        }
        due = [shard for shard in due if shard not in waiting]
        for shard in due:
            name = self._named(shard)
            log.warning("run %s: %s of step %d is sent again: %s", self.run, name, self.step, lost[shard])
            self._send(sender, shard)
        return due

    # --- what is late -----------------------------------------------------------------------

    def _back_up(self, held: list[Lease], sender: Sender) -> None:
        """Have idle workers compute what takes far longer than its peers; the first to finish counts.

        Clients that finish a shard see to it themselves (see
        `torchord.coordinator.client.slot_writer`), unless none is at work.
        """
        idle = sum(
            GRADIENTS in info.queues and bool(info.environment) and not info.tasks
            for info in self.alive.values()
        )
        if not idle:
            return
        late = [lease.shard for lease in held if self._other_is_late(lease)]
        if any(lease.shard < self.tree.shards for lease in held):
            late += self._late_shards(idle - len(late))
        for slot in late:
            name = self._named(slot)
            log.info("run %s: %s of step %d is late; a backup is sent", self.run, name, self.step)
            self._send(sender, slot, backup=True)

    def _late_shards(self, idle: int) -> list[int]:
        """Shards that idle workers would be done with sooner than their holders."""
        found: list[int] = []
        usual = self._usual_seconds(range(self.tree.shards))
        while usual is not None and len(found) < idle:
            shard = self.ledger.late_shard(self.step, shards=self.tree.shards, seconds=usual)
            if shard is None:
                break
            found.append(shard)
        return found

    def _other_is_late(self, lease: Lease) -> bool:
        """Whether a partial sum or a check takes far longer than others; true once for each."""
        if lease.shard < self.tree.shards:
            return False
        seconds = self._held_seconds(lease)
        if seconds <= SUM_AT_LEAST_SECONDS:
            return False
        sums = self.tree.partials
        usual = self._usual_seconds(sums if lease.shard in sums else range(self.tree.shards))
        if usual is None or seconds <= SUM_FACTOR * usual:
            return False
        return self.memory.due((self.run, "backup", self.step, lease.shard), float("inf"))

    def _usual_seconds(self, kind: range) -> float | None:
        """What a slot of the shards, or of the partial sums, takes: the median of this step's.

        If there is none: for a shard that of the step before, for a partial sum that of this step's
        shards. None if that is not known either.
        """
        slots = self.ledger.slots(self.step).values()
        times = [slot.seconds for slot in slots if slot.shard in kind]
        if not times and 0 in kind:
            times = [slot.seconds for e in self.ledger.entries(self.step, self.step) for slot in e.slots]
        times = times or [slot.seconds for slot in slots]
        return statistics.median(times) if times else None

    # --- what is hopeless -------------------------------------------------------------------

    def _give_up(self, lease: Lease, what: str, advice: str) -> None:
        """Stop the run: this shard fails wherever it is tried. The step's other slots are kept."""
        samples, of = [], ""
        if lease.shard not in self.tree.partials and self.plan.knows_samples:
            samples = [int(i) for i in self.plan.indices(self.step, self.tree.shard_of(lease.shard))]
            of = f" (samples {shown(samples)})"
        message = f"{self._named(lease.shard)} of step {self.step}{of} {what}; {advice}"
        details = {
            "step": self.step,
            "shard": self.tree.shard_of(lease.shard),
            "samples": samples,
            "worker": lease.worker,
            "attempts": lease.attempt,
        }
        Failure("Poison", message, details).stop(
            self.ledger, incarnation=self.head.incarnation, shard=(self.step, lease.shard)
        )


def _times(attempts: int) -> str:
    return "once" if attempts == 1 else f"{attempts} times in a row"
