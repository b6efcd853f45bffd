"""The supervisor: finds what a dead process or a lost message left undone, and sends it again.

Celery's redelivery is the second net (an hour by default, and a message can be lost between
the pop and its record). This is the first: it compares the ledger with the living workers a few
times a second. It computes nothing and decides nothing; it only sends messages, and every
message may be sent twice without harm. One supervisor works at a time, elected by a lease among
the processes that serve `updates`; two at once would only send more duplicates.
"""

from __future__ import annotations

import logging
import statistics
import threading
import time
from collections.abc import Callable

from cache.errors import TorchordError
from cache.ledger import Lease, Ledger
from cache.records import Head
from cache.workers import Registry, WorkerInfo
from coordinator.config import TrainingConfig
from coordinator.services import Services
from coordinator.shards import Plan
from coordinator.step import Sender
from coordinator.task_names import GRADIENTS, UPDATES

log = logging.getLogger(__name__)

POLL_SECONDS = 0.25
IDLE_SECONDS = 1.5  # a heartbeat is up to 0.5 s old: what looks idle for less may not be
REPEAT_SECONDS = 2.0
BACKUP_FACTOR = 3.0
BACKUP_AT_LEAST_SECONDS = 1.0


class Supervisor:
    """Watches every active run from a thread, while it holds the lease.

    Args:
        services: connections of the process.
        worker: id under which it stands for election.
        sender: publishes what has to be sent again.
        clock: monotonic seconds, replaced in tests.
    """

    def __init__(
        self, services: Services, worker: str, sender: Sender, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.services = services
        self.worker = worker
        self.sender = sender
        self.clock = clock
        self._since: dict[tuple[object, ...], float] = {}
        self._seen: set[tuple[object, ...]] = set()
        self._sent: dict[tuple[object, ...], float] = {}
        self._plans: dict[tuple[str, str], Plan] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="torchord-supervisor", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End, and give the lease up."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2.0)
        try:
            self.services.registry.step_down(self.worker)
        except TorchordError as error:
            log.debug("supervisor: %s", error)

    def _run(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            try:
                registry = self.services.registry
                if registry.elect(self.worker):
                    self.look(registry)
            except TorchordError as error:
                log.warning("supervisor: %s", error)
            except Exception:
                log.exception("supervisor: unexpected error; going on")

    # --- one round ------------------------------------------------------------------------

    def look(self, registry: Registry) -> None:
        """Check every active run once."""
        alive = registry.alive()
        self._seen.clear()
        active = registry.active_runs()
        for run in active:
            ledger = self.services.ledger(run)
            try:
                self._check(ledger, ledger.head(), alive)
            except KeyError:  # expired or deleted between the two reads
                registry.forget_run(run)
        for key in [key for key in self._since if key not in self._seen]:
            del self._since[key]
        horizon = self.clock() - 60.0
        for key in [key for key, at in self._sent.items() if at < horizon]:
            del self._sent[key]
        for plan in [plan for plan in self._plans if plan[0] not in active]:
            del self._plans[plan]

    def _check(self, ledger: Ledger, head: Head, alive: dict[str, WorkerInfo]) -> None:
        run = ledger.run
        if head.status not in ("pending", "running"):
            self.services.registry.forget_run(run)
            return
        owner = alive.get(head.owner)
        if owner is None:
            # Nobody serves the run: at the first look after a death, else when a message was lost.
            patience = 0.0 if head.owner else IDLE_SECONDS
            if self._lasting((run, "unserved", head.owner), patience):
                if head.queue:
                    self.services.registry.expire_queue(head.queue)
                self._once((run, "unserved", head.token), lambda: self.sender.advance(run, queue=UPDATES))
            return
        if head.total_steps is None:
            return  # the owner is initialising it
        if owner.task == "" and self._idle_owner(ledger, head):
            self._once(
                (run, "idle", head.version), lambda: self.sender.advance(run, queue=head.queue or UPDATES)
            )
        if head.version < head.total_steps and head.launched == head.version:
            self._check_shards(ledger, head, alive)
        self._check_evaluations(ledger, alive)

    def _idle_owner(self, ledger: Ledger, head: Head) -> bool:
        """Whether the next move is the training server's, and has been for a while."""
        run = ledger.run
        if head.version == head.total_steps:
            waiting = not ledger.pending_evaluations()
        elif head.launched != head.version:
            waiting = True
        else:
            waiting = len(ledger.slots_present(head.version)) >= self._plan(ledger, head).shards_in(
                head.version
            )
        return waiting and self._lasting((run, "idle", head.version, head.token), IDLE_SECONDS)

    # --- shards ---------------------------------------------------------------------------

    def _check_shards(self, ledger: Ledger, head: Head, alive: dict[str, WorkerInfo]) -> None:
        run, step = ledger.run, head.version
        plan = self._plan(ledger, head)
        present = ledger.slots_present(step)
        missing = [shard for shard in range(plan.shards_in(step)) if shard not in present]
        if not missing:
            return
        leases = ledger.leases(step)
        unseen = []
        for shard in missing:
            lease = leases.get(shard)
            if lease is None:
                unseen.append(shard)
            elif lease.open and lease.worker in alive:
                self._check_slow(ledger, step, lease, len(missing), plan, alive)
            else:
                self._lost(ledger, step, lease, plan, alive)
        if unseen and self._lasting((run, "unseen", step, tuple(unseen)), IDLE_SECONDS):
            queued = self.services.registry.queued_shards(GRADIENTS, run, step)
            for shard in unseen:
                if shard not in queued:
                    self._resend(run, step, shard, "its message was lost")

    def _lost(
        self, ledger: Ledger, step: int, lease: Lease, plan: Plan, alive: dict[str, WorkerInfo]
    ) -> None:
        """A shard whose worker died, or handed it back."""
        run = ledger.run
        attempts = self._config(ledger).max_attempts
        if lease.open and lease.attempt >= attempts:
            samples = [int(i) for i in plan.indices(step, lease.shard)]
            shown = f"[{', '.join(map(str, samples[:8]))}{', …' if len(samples) > 8 else ''}]"
            message = (
                f"shard {lease.shard} of step {step} (samples {shown}) took its worker down {lease.attempt} times "
                f"in a row, last {lease.worker}; look at that worker's log (out of memory? a crash in native code?)"
            )
            reason = {
                "kind": "Poison",
                "message": message,
                "step": step,
                "shard": lease.shard,
                "samples": samples,
            }
            ledger.transition(
                "failed", allowed=("running",), event="failed", data={"message": message}, error=reason
            )
            return
        why = f"worker {lease.worker} died" if lease.open else f"worker {lease.worker} handed it back"
        self._resend(run, step, lease.shard, why, attempt=lease.attempt)

    def _resend(self, run: str, step: int, shard: int, why: str, *, attempt: int = 0) -> None:
        def send() -> None:
            log.warning("run %s: shard %d of step %d is sent again: %s", run, shard, step, why)
            self.sender.gradient(run, step, shard)

        self._once((run, "shard", step, shard, attempt), send)

    def _check_slow(
        self, ledger: Ledger, step: int, lease: Lease, missing: int, plan: Plan, alive: dict[str, WorkerInfo]
    ) -> None:
        """A shard at work: send a backup if it takes far longer than its peers and workers idle."""
        run, shard = ledger.run, lease.shard
        key = (run, "held", step, shard, lease.worker, lease.attempt)
        held = self._for(key)
        limit = self._config(ledger).shard_timeout_seconds
        if limit is not None and held > limit:
            self._overdue(ledger, step, lease, plan, held)
            return
        idle = [
            info
            for info in alive.values()
            if GRADIENTS in info.queues and info.environment and info.task == ""
        ]
        if not idle or missing > len(idle) or held < BACKUP_AT_LEAST_SECONDS:
            return
        peers = [slot.seconds for slot in ledger.slots(step).values()]
        if peers and held > BACKUP_FACTOR * statistics.median(peers):
            if ("backup", run, step, shard) not in self._sent:
                self._sent[("backup", run, step, shard)] = self.clock()
                log.info(
                    "run %s: backup of shard %d of step %d (%.1f s on %s)",
                    run,
                    shard,
                    step,
                    held,
                    lease.worker,
                )
                self.sender.gradient(run, step, shard, backup=True)

    def _overdue(self, ledger: Ledger, step: int, lease: Lease, plan: Plan, held: float) -> None:
        """A shard past its time limit: elsewhere, or the end of the run after too many tries."""
        run, shard = ledger.run, lease.shard
        if lease.attempt >= self._config(ledger).max_attempts:
            samples = [int(i) for i in plan.indices(step, shard)]
            message = (
                f"shard {shard} of step {step} (samples {samples[:8]}) exceeded shard_timeout_seconds "
                f"{lease.attempt} times, last on {lease.worker} ({held:.0f} s)"
            )
            reason = {"kind": "Poison", "message": message, "step": step, "shard": shard, "samples": samples}
            ledger.transition(
                "failed", allowed=("running",), event="failed", data={"message": message}, error=reason
            )
            return

        def send() -> None:
            log.warning("run %s: shard %d of step %d is overdue on %s", run, shard, step, lease.worker)
            self.sender.gradient(run, step, shard, backup=True)

        self._once((run, "overdue", step, shard, lease.attempt), send)

    # --- evaluations ------------------------------------------------------------------------

    def _check_evaluations(self, ledger: Ledger, alive: dict[str, WorkerInfo]) -> None:
        """Parts of an evaluation that nobody computes and no queue holds."""
        run = ledger.run
        for version, parts in ledger.pending_evaluations().items():
            prefix = f"{run}: evaluation of version {version}"
            missing = set(range(parts)) - ledger.parts_present(version)
            busy = any(info.task.startswith(prefix) for info in alive.values())
            waiting = self.services.registry.queue_length(GRADIENTS) > 0
            key = (run, "evaluation", version, len(missing))
            if missing and not busy and not waiting and self._lasting(key, IDLE_SECONDS):
                self._once(
                    key, lambda v=version, m=missing, p=parts: self.sender.evaluation(run, v, sorted(m), p)
                )  # type: ignore[misc]
            elif not missing and self._lasting(key, IDLE_SECONDS):  # its last writer died before recording it
                self._once(key, lambda v=version, p=parts: self.sender.evaluation(run, v, [0], p))  # type: ignore[misc]

    # --- memory of this round and the ones before ---------------------------------------------

    def _for(self, key: tuple[object, ...]) -> float:
        """Seconds since `key` was first reported, in every round since."""
        self._seen.add(key)
        return self.clock() - self._since.setdefault(key, self.clock())

    def _lasting(self, key: tuple[object, ...], seconds: float) -> bool:
        """Whether `key` has been reported in every round for `seconds`."""
        return self._for(key) >= seconds

    def _once(self, key: tuple[object, ...], send: Callable[[], None]) -> None:
        """Send, but not again within `REPEAT_SECONDS` for the same reason."""
        now = self.clock()
        if now - self._sent.get(key, float("-inf")) >= REPEAT_SECONDS:
            self._sent[key] = now
            send()

    def _plan(self, ledger: Ledger, head: Head) -> Plan:
        key = (ledger.run, head.incarnation)
        if key not in self._plans:
            self._plans[key] = Plan(head.dataset_size or 0, self._config(ledger))
        return self._plans[key]

    def _config(self, ledger: Ledger) -> TrainingConfig:
        plan = next((p for (run, _), p in self._plans.items() if run == ledger.run), None)
        return plan.config if plan is not None else TrainingConfig.from_json(ledger.spec()["config"])
