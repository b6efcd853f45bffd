"""The supervisor: finds what a dead process or a lost message left undone, and sends it again.

Celery's redelivery is the second net (an hour by default, and a message can be lost between
the pop and its record). This is the first: it compares the ledger with the living workers a few
times a second. It computes nothing and decides nothing; it only sends messages, and every
message may be sent twice without harm. One supervisor works at a time, elected by a lease among
the processes that serve `updates`; two at once would only send more duplicates.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from torchord.cache.errors import CacheError, CacheUnreachable, RunNotFound, TorchordError
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.ledger.records import Head
from torchord.cache.ledger.rounds import RoundState
from torchord.cache.ledger.workers import Registry, WorkerInfo
from torchord.coordinator.messages.sender import Sender
from torchord.coordinator.messages.task_names import GRADIENTS, UPDATES
from torchord.coordinator.messages.waits import WaitKind, Waits
from torchord.coordinator.runtime import activity
from torchord.coordinator.runtime.failures import Failure
from torchord.coordinator.runtime.faults import Hook, nothing
from torchord.coordinator.runtime.recorded import recorded_visits, switches_of
from torchord.coordinator.runtime.recreate import recreate
from torchord.coordinator.runtime.services import Services
from torchord.coordinator.server.supervisor.discards import Discards
from torchord.coordinator.server.supervisor.memory import IDLE_SECONDS, REPEAT_SECONDS, Memory
from torchord.coordinator.server.supervisor.messenger import Messenger
from torchord.coordinator.server.supervisor.recorder import Recorder
from torchord.coordinator.server.supervisor.shard_watch import ASTRAY_SECONDS, ShardWatch
from torchord.coordinator.spec.config import TrainingConfig
from torchord.coordinator.spec.plan import Plan

log = logging.getLogger(__name__)

POLL_SECONDS = 0.25
OUTAGE_SECONDS = 1.5  # a round that took longer waited for Redis, or the process was stopped
SETTLE_SECONDS = 1.5  # after an outage, living workers need up to this long to say so
EVALUATION_TRIES = 3
QUIET_SECONDS = 15.0  # without a commit, before the log says what the run waits for
QUIET_AGAIN_SECONDS = 45.0
UNREADABLE_AGAIN_SECONDS = 50.0


class Supervisor:
    """Watches every active run from a thread, while it holds the lease.

    Args:
        services: connections of the process.
        worker: id under which it stands for election.
        sender: publishes what has to be sent again.
        clock: monotonic seconds, replaced in tests.
        fault: called with the name of each point of the protocol; tests use it to die there.
        report: as for `Discards`.
    """

    def __init__(
        self,
        services: Services,
        worker: str,
        sender: Sender,
        *,
        clock: Callable[[], float] = time.monotonic,
        fault: Hook = nothing,
        report: Callable[[dict[str, str]], None] = lambda wrong: None,
    ) -> None:
        self.services = services
        self.worker = worker
        self.sender = sender
        self.clock = clock
        self.fault = fault
        self.memory = Memory(clock)
        self.discards = Discards(clock, report)
        self.recorder = Recorder(services)
        self.messenger = Messenger(services, worker, sender, fault=fault)
        self._plans: dict[tuple[str, str], Plan] = {}
        self._known: dict[str, str] = {}  # active run -> id of the Redis that knew it
        self._round_ended = clock()
        self._settled_at = float("-inf")
        self._server = ""
        self._rival: WorkerInfo | None = None  # who holds the lease in this one's place, if it is known
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="torchord-supervisor", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End, and give the lease up."""
        self._stop.set()
        self.recorder.stop()
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
                if self._elected(registry):
                    self.fault("supervisor.before_look")
                    self.look(registry)
                    self._tell(registry)
                    self.recorder.want()
            except TorchordError as error:
                self._settled_at = self.clock() + SETTLE_SECONDS
                log.warning("supervisor: %s", error)
            except Exception:
                log.exception("supervisor: unexpected error; going on")
            finally:
                self._round_ended = self.clock()

    def _tell(self, registry: Registry) -> None:
        """Have others told of their runs; what is wrong with that stops no run."""
        try:
            self.messenger.look(registry)
        except Exception as error:  # noqa: BLE001  # as just said
            if self.memory.due(("messenger",), UNREADABLE_AGAIN_SECONDS):
                log.error("supervisor: nobody can be told of a run: %s: %s", type(error).__name__, error)

    def _elected(self, registry: Registry) -> bool:
        """Whether this process is the supervisor; it follows one that died beside it at once."""
        holder = registry.elect(self.worker)
        if holder == self.worker:
            self._rival = None
            return True
        if self._rival is None or self._rival.id != holder:
            self._rival = registry.worker(holder)
        if self._rival is None or not self._rival.ended:
            return False
        log.warning("supervisor: %s has died; %s takes its place", holder, self.worker)
        return registry.elect(self.worker, dead=holder) == self.worker

    # --- one round ------------------------------------------------------------------------

    def look(self, registry: Registry) -> None:
        """Check every active run once."""
        alive = self._living(registry)
        if not self._settled(registry, alive):
            return
        self.memory.begin_round()
        active = registry.active_runs()
        self._restore_lost(registry, active)
        for run in active:
            try:
                ledger = self.services.ledger(run)
                self._check(ledger, ledger.head(), alive, registry)
            except RunNotFound:  # expired or deleted between the two reads
                registry.forget_run(run)
            except CacheUnreachable:
                raise
            except Exception as error:
                if self.memory.due((run, "unreadable"), UNREADABLE_AGAIN_SECONDS):
                    log.exception("run %.100r cannot be looked after; the others are", run)
                    self._unreadable(run, error)
        self.memory.end_round()
        self.discards.end_round()
        for key in [key for key in self._plans if key[0] not in active]:
            del self._plans[key]

    def _unreadable(self, run: str, error: Exception) -> None:
        """Say in a run's events that its records cannot be read, if that can be said."""
        message = f"its records cannot be read: {type(error).__name__}: {error}"
        with suppress(Exception):
            self.services.ledger(run).emit("unreadable", {"message": message[:500]})

    def _living(self, registry: Registry) -> dict[str, WorkerInfo]:
        """The workers whose lease is in force and whose process, where it runs beside this one, lives.

        The lease of one that has ended is deleted: the scripts that ask for it shall not wait for its end.
        """
        alive = registry.alive()
        for info in [info for info in alive.values() if info.ended]:
            log.warning("supervisor: worker %s has died", info.id)
            registry.leave(info)
            del alive[info.id]
        return alive

    def _settled(self, registry: Registry, alive: dict[str, WorkerInfo]) -> bool:
        """Whether the list of the living can be trusted.

        After Redis was away, or this process was stopped, everybody's lease has run out. Nobody is
        taken for dead before they had the time to renew it.
        """
        now = self.clock()
        if now - self._round_ended > OUTAGE_SECONDS or not self._server:
            server = registry.server_id()
            if self._server:
                log.info("supervisor: back after %.1f s", now - self._round_ended)
                self._settled_at = now + SETTLE_SECONDS
            self._server = server
        if self.worker not in alive:
            self._settled_at = now + SETTLE_SECONDS
        return now >= self._settled_at

    def _restore_lost(self, registry: Registry, active: list[str]) -> None:
        """Create the runs again that a Redis without its data has forgotten, from their checkpoints."""
        gone = [run for run in self._known if run not in active]
        if gone:
            self._server = registry.server_id()
        for run in gone:
            server = self._known.pop(run)
            if server == self._server:
                continue  # it ended, or a person deleted it
            try:
                self.services.ledger(run).head()
            except RunNotFound:
                try:
                    version = recreate(self.services, run)
                    log.warning("run %s: unknown to this Redis; goes on from checkpoint %d", run, version)
                    self.sender.advance(run)
                except CacheError:
                    self._known[run] = server
                    raise
                except TorchordError as error:
                    log.error("run %s: Redis lost it, and it cannot be restored here: %s", run, error)
        for run in active:
            self._known[run] = self._server

    def _check(self, ledger: Ledger, head: Head, alive: dict[str, WorkerInfo], registry: Registry) -> None:
        run = ledger.run
        if head.status not in ("pending", "running"):
            registry.forget_run(run)
            return
        self._say_if_quiet(ledger, head, alive)
        owner = alive.get(head.owner)
        if owner is None:
            # Nobody serves the run: at the first look after a death, else when a message was lost.
            patience = 0.0 if head.owner else IDLE_SECONDS
            if self.memory.lasting((run, "unserved", head.owner), patience):
                if head.queue:
                    registry.expire_queue(head.queue)
                self._advance(ledger, alive, UPDATES, ("unserved", head.token))
            return
        idle = not _serving(owner, run) and self._waits_for_owner(ledger, head)
        if idle and self.memory.lasting((run, "idle", head.version, head.token), IDLE_SECONDS):
            self._advance(ledger, alive, head.queue or UPDATES, ("idle", head.version))
        if head.total_steps is None:
            return
        in_round = head.round is not None and self._look_at_round(ledger, head, alive)
        if not in_round and head.version < head.total_steps:
            plan = self._plan(ledger, head)
            for step in plan.window(head.version):
                if head.launched is not None and step <= head.launched:
                    ShardWatch(ledger, head, plan, alive, self.memory, step).look(
                        registry, self.sender, self.discards
                    )
        self._check_evaluations(ledger, head, alive, registry)

    def _look_at_round(self, ledger: Ledger, head: Head, alive: dict[str, WorkerInfo]) -> bool:
        """Look after the open round; False: nobody is at its first step, whose shards go out singly."""
        state = ledger.round()
        if state is None or state.token != head.token:
            return False
        plan = self._plan(ledger, head)
        inside = head.version <= state.last and head.version < plan.total_steps
        self._strike_absent(ledger, state, alive)
        if any(worker in alive for worker in state.participants) and state.disputed is None:
            if state.published == head.version:
                self._call_after_round(ledger, head, alive, IDLE_SECONDS)
            elif inside:
                ShardWatch(ledger, head, plan, alive, self.memory, head.version).look_in_round()
            return True
        if state.first == head.version and state.disputed is None and inside:
            present = ledger.slots_present(head.version)
            if not set(range(plan.fan_in(head.version).total)) <= present:
                return False
        # Whoever was in it has died or left: the training server goes on from what is there.
        self._call_after_round(ledger, head, alive, 0.0)
        return True

    def _strike_absent(self, ledger: Ledger, state: RoundState, alive: dict[str, WorkerInfo]) -> None:
        """Count nobody as a participant who lives and is at something else: it left, and could not say so."""
        for worker in state.participants:
            at_it = worker in alive and any(map(activity.of(ledger.run), alive[worker].tasks))
            key = (ledger.run, "absent", state.first, worker)
            if worker in alive and not at_it and self.memory.lasting(key, ASTRAY_SECONDS):
                log.warning("run %s: worker %s is not in its round any more", ledger.run, worker)
                ledger.leave_round(worker)

    def _call_after_round(
        self, ledger: Ledger, head: Head, alive: dict[str, WorkerInfo], seconds: float
    ) -> None:
        """Call the training server once a round has been over for so long."""
        if self.memory.lasting((ledger.run, "round", head.version, seconds), seconds):
            self._advance(ledger, alive, head.queue or UPDATES, ("round", head.version))

    def _say_if_quiet(self, ledger: Ledger, head: Head, alive: dict[str, WorkerInfo]) -> None:
        """Log what a run waits for that has not moved for a while, and again.

        It is paused if everybody refuses it still: that only a person can end.
        """
        key = (ledger.run, "quiet", head.status, head.version)
        if not self.memory.lasting(key, QUIET_SECONDS) or not self.memory.due(key, QUIET_AGAIN_SECONDS):
            return
        memory = self.services.registry.memory
        waits = Waits(ledger, partial(self._plan, ledger), memory=memory).look(head, alive)
        for wait in waits:
            log.warning("run %s %s", ledger.run, wait.said(time.time()))
        refused = [wait for wait in waits if wait.kind is WaitKind.REFUSED]
        if refused and self.memory.count(key) > 1:
            message = f"run {ledger.run!r} was paused, since it {refused[0].said(time.time())}"
            ledger.transition(
                "paused",
                allowed=("pending", "running"),
                event="paused",
                data={"message": message},
                error={"kind": "Refused", "message": message},
                incarnation=head.incarnation,
            )

    def _waits_for_owner(self, ledger: Ledger, head: Head) -> bool:
        """Whether the next move is the training server's."""
        if head.total_steps is None:
            return True
        if head.version >= head.total_steps:
            return not ledger.pending_evaluations()
        if head.round is not None:
            return False
        decides = self._plan(ledger, head).config.decides_by_evaluations
        if decides and head.version in ledger.pending_evaluations():
            return False
        if head.launched is None or head.launched < self._plan(ledger, head).window(head.version)[-1]:
            return True
        slots = self._plan(ledger, head).fan_in(head.version).total
        return len(ledger.slots_present(head.version)) >= slots

    def _advance(
        self, ledger: Ledger, alive: dict[str, WorkerInfo], queue: str, why: tuple[object, ...]
    ) -> None:
        """Call a training server, unless a call waits in the queue."""
        run = ledger.run

        def send() -> None:
            waiting = self.services.registry.queued(queue)
            if not any(arguments.get("run") == run for arguments in waiting):
                log.warning("run %s: a training server is called: %s", run, why[0])
                self.sender.advance(run, queue=queue)
                if queue == UPDATES and self.memory.count((run, *why)) > 1:  # nobody has heard the one before
                    self.discards.lost(queue, ledger, alive)

        self.memory.once((run, *why), REPEAT_SECONDS, send)

    # --- evaluations ------------------------------------------------------------------------

    def _check_evaluations(
        self, ledger: Ledger, head: Head, alive: dict[str, WorkerInfo], registry: Registry
    ) -> None:
        """Parts of an evaluation that nobody computes and no queue holds."""
        run = ledger.run
        for version, parts in ledger.pending_evaluations().items():
            prefix = activity.evaluations(run, version)
            if any(task.startswith(prefix) for info in alive.values() for task in info.tasks):
                continue
            missing = set(range(parts)) - ledger.parts_present(version)
            key = (run, "evaluation", version, len(missing))
            if not self.memory.lasting(key, IDLE_SECONDS):
                continue
            queued = {
                arguments.get("part")
                for arguments in registry.queued(GRADIENTS)
                if (arguments.get("run"), arguments.get("version")) == (run, version) and "part" in arguments
            }
            # None missing: the last writer died before it recorded the whole; any part does it again.
            lost = sorted((missing or {0}) - queued)
            if lost and self.memory.due(key, REPEAT_SECONDS):
                self._resend_evaluation(ledger, head, version, lost, parts, key)

    def _resend_evaluation(
        self, ledger: Ledger, head: Head, version: int, lost: list[int], parts: int, key: tuple[object, ...]
    ) -> None:
        """Send parts again, or end the run when they take their workers down time after time."""
        run = ledger.run
        if self.memory.count(key) > EVALUATION_TRIES:
            message = (
                f"parts {lost} of {parts} of the evaluation of version {version} were begun "
                f"{EVALUATION_TRIES} times and never finished; look at the workers' logs (out of memory? "
                "a crash in native code?)"
            )
            Failure("Poison", message, {"version": version}).stop(ledger, incarnation=head.incarnation)
            return
        log.warning("run %s: parts %s of the evaluation of version %d are sent again", run, lost, version)
        self.sender.evaluation(run, version, lost, parts)

    # --- what is known of a run -----------------------------------------------------------------

    def _plan(self, ledger: Ledger, head: Head) -> Plan:
        key = (ledger.run, head.incarnation)
        if key not in self._plans:
            spec = ledger.spec()
            config = TrainingConfig.from_json(spec["config"])
            visits = recorded_visits(ledger, spec)
            self._plans[key] = Plan(head.dataset_size or 0, config, switches_of(spec), visits=visits)
        return self._plans[key]


def _serving(owner: WorkerInfo, run: str) -> bool:
    return any(task.startswith(activity.updates(run)) for task in owner.tasks)
