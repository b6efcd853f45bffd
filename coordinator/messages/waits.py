"""What a run waits for: one list of all that it can be, and where a run stands on it now.

Whoever watches a run (`Run.status`, `Run.wait`, the command line, the supervisor's log) asks here, so that
all of them say the same. docs/errors.md has the list as a table.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

from torchord.cache.ledger.answers import Lease
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.ledger.records import Head
from torchord.cache.ledger.rounds import RoundState
from torchord.cache.ledger.workers import StoreMemory, WorkerInfo
from torchord.coordinator.messages.task_names import GRADIENTS, UPDATES, worker_command
from torchord.coordinator.runtime import activity
from torchord.coordinator.spec.plan import Plan

_SHOWN = 3
_AGAIN = "a worker that then is still at it starts anew a minute later"


class WaitKind(Enum):
    """Everything that a run can wait for, and who can end it."""

    PERSON = "a person: it is paused"
    REDIS = "Redis, which does not answer"
    ROOM = "room in Redis, which is full"
    SERVER = "a worker on the queue of updates"
    CLIENT = "a worker on the queue of gradients"
    REFUSED = "a worker that may work on it: those that there are refuse"
    DEAF = "a worker that is alive and takes no messages"
    HINDERED = "the success of what failed and is tried again"
    DISCARDED = "messages that somebody throws away"
    CALL = "a training server that takes it up"
    START = "its training server, which makes or restores it"
    UPDATE = "its training server, which is at an update"
    QUEUE = "Clients that take its shards out of the queue"
    SHARDS = "Clients that compute its shards"
    ROUND = "the participants of its round"
    EVALUATION = "Clients that evaluate"


@dataclass(frozen=True)
class Wait:
    """One thing that a run waits for.

    Attributes:
        kind: which one it is.
        what: it is, in words: who is at what.
        ends: who can end it, and how.
        since: Unix time (s) from which on it is so, as far as that is known: else that of the last commit.
    """

    kind: WaitKind
    what: str
    ends: str
    since: float

    def said(self, now: float) -> str:
        """One sentence for people, at Unix time `now` (s)."""
        return f"waits for {self.what}, since {duration(max(0.0, now - self.since))}; {self.ends}"


def duration(seconds: float) -> str:
    """Seconds in words.

    Example:
        >>> duration(47.2), duration(190), duration(7300)
        ('47 s', '3 min', '2 h 1 min')
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = int(seconds // 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


class Waits:
    """Finds what one run waits for.

    Args:
        ledger: of the run.
        plan: of the run at a head, None where it is not known yet.
        memory: how full the server of the control plane is, None where it does not say.
        clock: Unix time (s), replaced in tests.
    """

    def __init__(
        self,
        ledger: Ledger,
        plan: Callable[[Head], Plan | None],
        *,
        memory: Callable[[], StoreMemory | None] = lambda: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._ledger = ledger
        self._plan = plan
        self._memory = memory
        self._clock = clock

    def look(self, head: Head, alive: Mapping[str, WorkerInfo]) -> tuple[Wait, ...]:
        """What the run waits for now, the most telling first; () if it is at rest.

        Args:
            head: of the run.
            alive: the living workers, by id.
        """
        since = max(head.committed_at, head.submitted_at)
        if head.status == "paused":
            why = (head.error or {}).get("message", "")
            what = f"a person: it is paused{f' ({why})' if why else ''}"
            return (Wait(WaitKind.PERSON, what, "run.resume() goes on", since),)
        if head.status not in ("pending", "running"):
            return ()
        memory = self._memory()
        if memory is not None and memory.full:  # then workers cannot even say that they live
            what = f"room in Redis, which is full ({memory.used:,} of {memory.limit:,} bytes)"
            ends = "raise its maxmemory, or let finished runs expire: the run then goes on by itself"
            return (Wait(WaitKind.ROOM, what, ends, since),)
        lacking = [found for queue in (UPDATES, GRADIENTS) if (found := self._lacking(queue, alive, since))]
        wrong = [*lacking, *self._odd(alive, since)]
        return tuple(wrong) if lacking else (*wrong, *self._at_work(head, alive, since))

    def _lacking(self, queue: str, alive: Mapping[str, WorkerInfo], since: float) -> Wait | None:
        """Nobody, or nobody who may, consumes a queue."""
        run, command = self._ledger.run, worker_command(queue)
        serving = [info for info in alive.values() if queue in info.queues]
        if not serving:
            kind = WaitKind.SERVER if queue == UPDATES else WaitKind.CLIENT
            return Wait(kind, f"a worker on queue {queue!r}: none lives", f"start one: {command}", since)
        reasons = [f"{info.id}: {info.refuses[run]}" for info in serving if run in info.refuses]
        if len(reasons) < len(serving):
            return None
        what = f"a worker on queue {queue!r} that may work on it; all refuse ({_some(reasons)})"
        ends = "give them what the run was submitted with and restart them"
        if all("TORCHORD_HARDWARE" in reason for reason in reasons):
            return Wait(WaitKind.REFUSED, what, f"start one: TORCHORD_HARDWARE=portable {command}", since)
        if any("admit_code" in reason for reason in reasons):
            ends += ", or run.resume(admit_code=True) where the new code is right"
        return Wait(WaitKind.REFUSED, what, f"{ends}, or run.resume(admit_skew=True)", since)

    def _odd(self, alive: Mapping[str, WorkerInfo], since: float) -> list[Wait]:
        """Workers that are there and of no use."""
        found = [
            Wait(
                WaitKind.DEAF,
                f"worker {info.id}, which is alive and takes no messages",
                f"it starts anew by itself, else restart it (process {info.pid} on {info.host})",
                self._clock() - info.silent,
            )
            for info in alive.values()
            if info.deaf
        ]
        run, ends = self._ledger.run, "it goes on by itself once that passes, else the run is paused"
        found += [
            Wait(WaitKind.HINDERED, f"what {info.id} tries again, {info.hindered[run]}", ends, since)
            for info in alive.values()
            if run in info.hindered
        ]
        thrown = sorted({said for info in alive.values() for said in info.discarded.values()})
        ends = "stop whoever takes them"
        return [*found, *(Wait(WaitKind.DISCARDED, f"what is lost: {said}", ends, since) for said in thrown)]

    def _at_work(self, head: Head, alive: Mapping[str, WorkerInfo], since: float) -> list[Wait]:
        """Who is at what."""
        run, ledger = self._ledger.run, self._ledger
        owner = alive.get(head.owner)
        updating = [(info, task) for info in alive.values() for task in _does(info, activity.updates(run))]
        if updating:
            (busy, task), made = updating[0], head.total_steps is None
            what = f"which {'makes its first version' if made else f'is at {task}'}{_at(busy, task)}"
            kind = WaitKind.START if made else WaitKind.UPDATE
            ends = f"it ends by itself; else look at the log of {busy.node}, or run.cancel(): {_AGAIN}"
            return [Wait(kind, f"its training server {busy.id}, {what}", ends, busy.since)]
        if owner is None or head.total_steps is None:
            serving = [info for info in alive.values() if UPDATES in info.queues]
            others = [f"{info.id}: {info.task}" for info in serving if info.task]
            what = "a training server that takes it up"
            what += f"; those that there are do something else ({_some(others)})" if others else ""
            return [Wait(WaitKind.CALL, what, "one takes it up within seconds of being idle", since)]
        if head.version >= head.total_steps:
            return self._evaluations(alive, since)
        plan = self._plan(head)
        if plan is None:
            return []
        if plan.config.decides_by_evaluations and head.version in ledger.pending_evaluations():
            return self._evaluations(alive, since)
        slots = plan.fan_in(head.version)
        missing = sorted(set(range(slots.total)) - ledger.slots_present(head.version))
        if head.round is not None and (found := self._round(head, plan, alive, missing, since)):
            return [found]
        if not missing:
            what = f"its training server {owner.id}, which is called"
            return [Wait(WaitKind.CALL, what, "it comes within seconds", since)]
        return self._shards(head, plan, alive, missing, since)

    def _shards(
        self, head: Head, plan: Plan, alive: Mapping[str, WorkerInfo], missing: list[int], since: float
    ) -> list[Wait]:
        held, found = self._held(head, alive, missing), []
        if held:
            who = self._holders(head, plan, alive, held)
            what = f"{len(held)} of the {len(missing)} missing slots of step {head.version} ({_some(who)})"
            began = min(lease.since for lease in held.values())
            found.append(Wait(WaitKind.SHARDS, what, _ended_by(plan), began))
        if len(held) < len(missing):
            clients = [info for info in alive.values() if GRADIENTS in info.queues]
            others = [f"{info.id}: {info.task}" for info in clients if info.task]
            what = f"{len(missing) - len(held)} slots of step {head.version} that nobody has begun"
            what += f"; the Clients are at {_some(others)}" if others else ""
            ends = f"a Client takes them, or start more: {worker_command(GRADIENTS)}"
            found.append(Wait(WaitKind.QUEUE, what, ends, since))
        return found

    def _held(self, head: Head, alive: Mapping[str, WorkerInfo], missing: Iterable[int]) -> dict[int, Lease]:
        """The missing slots of the present step that living workers are at."""
        leases = self._ledger.leases(head.version)
        return {
            slot: leases[slot]
            for slot in missing
            if slot in leases and leases[slot].open and leases[slot].worker in alive
        }

    def _holders(
        self, head: Head, plan: Plan, alive: Mapping[str, WorkerInfo], held: Mapping[int, Lease]
    ) -> list[str]:
        run, partials = self._ledger.run, plan.fan_in(head.version).partials
        who = []
        for slot, lease in held.items():
            name = activity.partial_sum if slot in partials else activity.gradient
            place = _at(alive[lease.worker], name(run, head.version, slot))
            who.append(f"slot {slot} at {lease.worker}, try {lease.attempt}{place}")
        return who

    def _round(
        self,
        head: Head,
        plan: Plan,
        alive: Mapping[str, WorkerInfo],
        missing: list[int],
        since: float,
    ) -> Wait | None:
        """Who of the open round is at what, and who waits for it; None if nobody is in it, or it is over."""
        state, ours = self._ledger.round(), activity.of(self._ledger.run)
        if state is None or state.published == head.version:
            return None
        in_it = [info for info in alive.values() if any(map(ours, info.tasks)) and _is_in(info, state, ours)]
        if not in_it:
            return None
        whose = f"the participants of its round of steps {state.first} to {state.last}"
        if held := self._held(head, alive, missing):
            busy = {lease.worker for lease in held.values()}
            at = _some(self._holders(head, plan, alive, held))
            what = f"{whose}: {len(held)} of the {len(missing)} missing slots of step {head.version} ({at})"
            began, ends = min(lease.since for lease in held.values()), _ended_by(plan)
        else:
            at_it = [info for info in in_it if info.id not in state.waiting] or in_it
            busy = {info.id for info in at_it}
            at = _some([f"{info.id}{''.join(_at(info, task) for task in info.tasks)}" for info in at_it])
            over = head.version > state.last or state.ending
            what = f"step {head.version} is {'begun' if missing else 'taken'} by {at}"
            what = f"{whose}: {f'version {head.version} is stored by {at}' if over else what}"
            began = max(since, min(info.since for info in at_it))
            ends = f"it ends by itself; else look at the workers' logs, or run.cancel(): {_AGAIN}"
        if idle := [worker for worker in state.waiting if worker in alive and worker not in busy]:
            what += f"; waited for by {_some(idle)}"
        return Wait(WaitKind.ROUND, what, ends, began)

    def _evaluations(self, alive: Mapping[str, WorkerInfo], since: float) -> list[Wait]:
        run, found = self._ledger.run, []
        for version, parts in self._ledger.pending_evaluations().items():
            prefix = activity.evaluations(run, version)
            at_it = [f"{info.id}{_at(info, task)}" for info in alive.values() for task in _does(info, prefix)]
            there = len(self._ledger.parts_present(version))
            what = f"the evaluation of version {version}, of which {there} of {parts} parts are there"
            what += f" ({_some(at_it)})" if at_it else ""
            ends = f"the Clients do, or more of them: {worker_command(GRADIENTS)}; or run.cancel(): {_AGAIN}"
            found.append(Wait(WaitKind.EVALUATION, what, ends, since))
        return found


def _is_in(info: WorkerInfo, state: RoundState, ours: Callable[[str], bool]) -> bool:
    """Whether a worker takes part in a round, or restores what it takes for that."""
    return info.id in state.participants or any(": round, " in task for task in info.tasks if ours(task))


def _ended_by(plan: Plan) -> str:
    """Who can end the computing of a shard."""
    config = plan.config
    if (limit := config.shard_timeout_seconds) is not None:
        how = f"shard_timeout_seconds={limit:g} ends them: each gets {config.max_attempts} tries"
    else:
        how = f"run.cancel() does, since the run has no shard_timeout_seconds: {_AGAIN}"
    return f"they end by themselves, else {how}"


def _does(info: WorkerInfo, prefix: str) -> list[str]:
    """What a worker does that begins so."""
    return [task for task in info.tasks if task.startswith(prefix)]


def _at(info: WorkerInfo, task: str) -> str:
    """At which line of code a worker's task is, if it has been for long."""
    place = info.where.get(task)
    return f", at {place}" if place else ""


def _some(items: list[str]) -> str:
    shown = "; ".join(items[:_SHOWN])
    return shown if len(items) <= _SHOWN else f"{shown}; and {len(items) - _SHOWN} more"
