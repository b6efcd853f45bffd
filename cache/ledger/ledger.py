"""The control plane of one run: head, slots, ledger, events. One method per operation.

The ledger is the truth and Celery's chord is only the fast path: each method here is one
atomic script (or a single command), may be sent twice without harm, and decides by itself
whether the caller came early, late or a second time.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, cast

import redis

from torchord.cache import keys
from torchord.cache.blobs.read_ahead import Notice, notices
from torchord.cache.errors import CacheError, RunNotFound
from torchord.cache.ledger.records import (
    GENESIS,
    Head,
    Launch,
    LedgerEntry,
    SlotRecord,
    VersionRecord,
    revision,
)
from torchord.cache.scripts import source
from torchord.cache.servers.fast_client import Command, Lane, LaneClosed, script_command
from torchord.cache.servers.redis_client import translated

BeginVerdict = Literal["compute", "duplicate", "late", "early", "held", "stopped", "skewed"]
SlotVerdict = Literal["written", "group", "spare", "duplicate", "divergent", "late", "early", "stopped"]
CommitVerdict = Literal["ok", "fenced", "stale", "incomplete", "stopped", "diverged"]


BACKUP_FACTOR = 1.5  # a holder may keep an idle worker waiting for so many of the idle one's shards,
BACKUP_SECONDS = 0.05  # and so much longer: what a backup costs, and what a machine's hiccups are
BACKUPS_MOST = 2
BACKUP_LOST_SECONDS = 5.0  # a backup that nobody began by then was lost
BACKUP_ASKED_ALWAYS = 8  # with so few shards missing each question of an idle worker is answered


@dataclass(frozen=True, slots=True)
class Lease:
    """Who is at a shard.

    Attributes:
        shard: number of the shard in its step.
        worker: id of the worker process.
        attempt: which try it is, counted from 1; a hand-back counts as none.
        delivery: id of the Celery task.
        open: whether the hold is in force.
        since: Unix time (s) at which it was taken, by the server's clock.
        backups: how many backups of the shard were asked for.
        asked: Unix time (s) of the last of them, 0.0 once it was begun.
    """

    shard: int
    worker: str
    attempt: int
    open: bool
    delivery: str = ""
    since: float = 0.0
    backups: int = 0
    asked: float = 0.0


class Group(NamedTuple):
    """The slots that one partial sum adds up.

    Attributes:
        slot: number of the partial sum.
        first: the first slot that goes into it.
        last: the last one.
    """

    slot: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Committed:
    """The answer to a commit.

    Attributes:
        verdict: "ok", or why nothing changed.
        stored: on "ok", which versions are stored.
        pinned: those that readers hold.
        launched: whether the step that was to be launched with the commit is.
        incarnation: the one in force.
        dropped: records of the versions that the commit dropped; the caller deletes their bytes.
    """

    verdict: CommitVerdict
    stored: tuple[int, ...] = ()
    pinned: frozenset[int] = frozenset()
    launched: bool = field(default=False, compare=False)
    incarnation: str = field(default="", compare=False)
    dropped: tuple[VersionRecord, ...] = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class Begun:
    """The answer to a Client that wants to compute a shard: see scripts/begin_shard.lua.

    Attributes:
        verdict: "compute", or why not.
        attempt: which try it is.
        incarnation: of the run.
        record: where the version is that the shard is computed at; None if it was not asked for, or
            is not stored.
        memory: what `Ledger.server_memory` would say, with the verdict "compute".
    """

    verdict: BeginVerdict
    attempt: int
    incarnation: str
    record: VersionRecord | None = None
    memory: str = ""


@dataclass(frozen=True, slots=True)
class Event:
    """One line of a run's event stream: its id (resume point), type and data."""

    id: str
    type: str
    data: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Finished:
    """The answer to a Client that has written a slot: see scripts/write_slot.lua.

    Attributes:
        verdict: "written", or what was there before.
        present: slots written in the step.
        called: the step's chord has called back already, before its last slot was in (see
            `Ledger.mark_called`): then the last slot's writer has to call.
        answer: to the command that was to follow; None if it was not sent.
        late: a shard that its holder takes far too long for, None if there is none or nobody asked.
    """

    verdict: SlotVerdict
    present: int
    called: bool
    answer: Any = None
    late: int | None = None


class Ledger:
    """Operations on one run's control keys.

    Args:
        client: a connection from `torchord.cache.servers.redis_client`.
        url: its URL, for messages.
        run: the run's name.
        lane: a shorter way to the same server; None: everything goes over `client`.

    Raises:
        CacheUnreachable: from any method, when the server stays away longer than the
            connection's patience.
    """

    def __init__(self, client: redis.Redis, url: str, run: str, *, lane: Lane | None = None) -> None:
        self.client = client
        self.url = url
        self.lane = lane
        self.run = keys.check_name(run)
        self.keys = keys.RunKeys(run)

    def _during(self, what: str, link: str = " of") -> AbstractContextManager[None]:
        return translated(self.url, f"{what}{link} run {self.run!r}")

    def _script(self, name: str, names: list[str], args: list[Any]) -> Any:
        if self.lane is not None:
            with suppress(LaneClosed):
                return self.lane.script(name, names, args)
        script = self.client.register_script(source(name))
        return script(keys=names, args=args)

    # --- life of a run ------------------------------------------------------------------

    def create(
        self,
        spec: dict[str, Any],
        *,
        incarnation: str,
        version: int = 0,
        chain: str = GENESIS,
    ) -> dict[str, Any] | None:
        """Create the run, once.

        Args:
            spec: recipe and config as JSON-able dicts.
            incarnation: unique id of this life of the name; caches are keyed by it.
            version: head to start from (above 0 when restored from a checkpoint).
            chain: chain of that version.

        Returns:
            None if this call created it, else the spec of the run that is there.
        """
        names = self.keys
        left_behind = [name for name in names.lasting() if name not in (names.spec, names.head)]
        with self._during("create", ""):
            verdict, text = self._script(
                "create_run",
                [
                    *(names.spec, names.head, keys.RUNS, keys.ACTIVE),
                    *left_behind,
                    *(names.slots(version), names.leases(version)),
                ],
                [
                    self.run,
                    json.dumps(spec),
                    time.time(),
                    keys.RUN_TTL_SECONDS,
                    incarnation,
                    version,
                    chain,
                    spec.get("config", {}).get("skew", "admit"),
                ],
            )
        return None if verdict == "created" else cast(dict[str, Any], json.loads(text))

    def spec(self) -> dict[str, Any]:
        """Recipe and config as submitted.

        Raises:
            RunNotFound: if no run of that name is known here.
        """
        with self._during("read the spec"):
            text = self.client.get(self.keys.spec)
        if text is None:
            raise RunNotFound(
                f"no run {self.run!r} is known at {keys.PREFIX} on this server; see Master.runs()"
            )
        return cast(dict[str, Any], json.loads(cast(str, text)))

    def respec(self, spec: dict[str, Any], *, incarnation: str, skew: str) -> bool:
        """Replace the spec of a run that stands still.

        Args:
            spec: recipe and config, as `create` takes them.
            incarnation: from `records.revised`: the same life of the name, another revision.
            skew: "refuse" or "admit" workers of another environment from now on.

        Returns:
            False if the run is not paused or failed; nothing changed then.
        """
        with self._during("replace the spec"):
            return bool(
                self._script(
                    "respec",
                    [self.keys.spec, self.keys.head, self.keys.expected],
                    [json.dumps(spec), keys.RUN_TTL_SECONDS, incarnation, skew],
                )
            )

    def switch(
        self,
        spec: dict[str, Any],
        *,
        step: int,
        incarnation: str,
        following: str,
        total_steps: int | None,
        data: dict[str, Any],
    ) -> str:
        """Change the config from a step on: see scripts/switch.lua.

        Args:
            spec: with the switch among its "switches".
            incarnation: what the caller read; `following` replaces it.
            total_steps: of the whole run after the switch, None before the run is initialised.
            data: for the event.
        """
        with self._during(f"switch the config from step {step} on"):
            return cast(
                str,
                self._script(
                    "switch",
                    [self.keys.spec, self.keys.head, self.keys.events],
                    [
                        json.dumps(spec),
                        step,
                        incarnation,
                        following,
                        "" if total_steps is None else total_steps,
                        keys.RUN_TTL_SECONDS,
                        json.dumps(data),
                        keys.EVENTS_KEPT,
                    ],
                ),
            )

    def server_memory(self) -> str:
        """Identity of the memory that the training server shares with its host; "" for none."""
        with self._during("ask where the training server is"):
            return cast(str | None, self.client.hget(self.keys.head, "memory")) or ""

    def incarnation(self) -> str:
        """The incarnation in force; "" if the run is unknown."""
        with self._during("read the incarnation"):
            return cast(str | None, self.client.hget(self.keys.head, "incarnation")) or ""

    def head(self) -> Head:
        """The present head.

        Raises:
            RunNotFound: if no run of that name is known here.
        """
        if self.lane is not None:
            with suppress(LaneClosed):
                found = self.lane.call(("HGETALL", self.keys.head))[0]
                if found:
                    return Head.from_hash(_pairs(found))
        with self._during("read the head"):
            fields = cast(dict[str, str], self.client.hgetall(self.keys.head))
        if not fields:
            raise RunNotFound(f"no run {self.run!r} is known on this server; see Master.runs()")
        return Head.from_hash(fields)

    def head_and_slots(self, step: int) -> tuple[Head, dict[int, SlotRecord]]:
        """The present head and the slots of a step, in one round trip.

        Raises:
            RunNotFound: if no run of that name is known here.
        """
        if self.lane is not None:
            with suppress(LaneClosed):
                head, slots = self.lane.call(("HGETALL", self.keys.head), ("HGETALL", self.keys.slots(step)))
                if head:
                    return Head.from_hash(_pairs(head)), _slots(_pairs(slots))
        return self.head(), self.slots(step)

    def transition(
        self,
        status: str,
        *,
        allowed: Iterable[str],
        event: str,
        data: dict[str, Any] | None = None,
        error: dict[str, Any] | Literal["keep"] | None = "keep",
        token: int | None = None,
        incarnation: str | None = None,
        shard: tuple[int, int] | None = None,
    ) -> tuple[bool, str]:
        """Change the status if the present one is in `allowed`.

        Args:
            error: stored as the reason; None clears it, "keep" leaves it.
            token: the training server's fencing token, None for anybody else.
            incarnation: life of the run that the change is about, None for any.
            shard: (step, shard) that the change is about: nothing changes once its slot is written
                or its step committed, as when a straggler fails.

        Returns:
            (done, status before).
        """
        reason = "-" if error == "keep" else "" if error is None else json.dumps(error)
        with self._during(f"set status {status!r}"):
            step = self.client.hget(self.keys.head, "version") or 0 if shard is None else shard[0]
            verdict, before = self._script(
                "transition",
                [
                    self.keys.head,
                    keys.ACTIVE,
                    self.keys.events,
                    self.keys.slots(int(cast(str, step))),
                    self.keys.leases(int(cast(str, step))),
                ],
                [
                    self.run,
                    status,
                    "," + ",".join(allowed) + ",",
                    event,
                    json.dumps(data or {}),
                    reason,
                    keys.RUN_TTL_SECONDS,
                    keys.EVENTS_KEPT,
                    "" if token is None else token,
                    secrets.token_hex(6),
                    incarnation or "",
                    "" if shard is None else shard[0],
                    "" if shard is None else shard[1],
                ],
            )
        return verdict == "ok", before

    def retire(self, working_steps: Iterable[int] = ()) -> None:
        """Give every key of a run at rest its last TTL and delete its working set."""
        with self._during("retire the keys"):
            pipe = self.client.pipeline(transaction=False)
            for name in self.keys.lasting():
                pipe.expire(name, keys.RESULT_TTL_SECONDS)
            for step in working_steps:
                pipe.delete(self.keys.slots(step), self.keys.leases(step))
            pipe.execute()

    # --- a Client's side ------------------------------------------------------------------

    def begin(
        self,
        step: int,
        shard: int,
        *,
        worker: str,
        delivery: str,
        backup: bool = False,
        environment: str = "",
        version: int | None = None,
        lacking: bool = True,
    ) -> Begun:
        """Ask whether to compute a shard, and take its lease.

        Args:
            worker: id under which this process keeps its heartbeat.
            delivery: id of the Celery task, so that a request sent twice is known again.
            backup: compute beside a live holder (a backup task).
            environment: what of the worker could change bits; "" if that does not matter.
            version: what the step is computed at; None: the version of its own number.
            lacking: whether the caller has to load that version and wants its record.
        """
        wanted = step if version is None else version
        arguments = self._begin(step, shard, worker, delivery, backup, environment, wanted)
        record = None
        with self._during(f"begin shard {shard} of step {step}"):
            answer, text = None, None
            if self.lane is not None and lacking:
                with suppress(LaneClosed):
                    answer, text = self.lane.call(
                        script_command("begin_shard", *arguments),
                        ("HGET", self.keys.versions, wanted),
                    )
                    compute = answer[0] == "compute"
                    record = VersionRecord.from_json(text) if compute and text is not None else None
            if answer is None:
                answer = self._script("begin_shard", *arguments)
                record = self.version(wanted) if lacking and answer[0] == "compute" else None
        verdict, attempt, incarnation, *memory = answer
        if verdict != "compute":
            return Begun(verdict, int(attempt), incarnation)
        return Begun(verdict, int(attempt), incarnation, record, *memory)

    def _begin(
        self,
        step: int,
        shard: int,
        worker: str,
        delivery: str,
        backup: bool,
        environment: str,
        version: int,
    ) -> tuple[list[str], list[Any]]:
        """Keys and arguments of scripts/begin_shard.lua."""
        names = [self.keys.head, self.keys.slots(step), self.keys.leases(step)]
        lease = [step, shard, worker, keys.worker(""), int(backup), keys.WORK_TTL_SECONDS, delivery]
        return names, [*lease, environment, version]

    def end_lease(self, step: int, shard: int, *, worker: str, delivery: str, counts: bool = False) -> bool:
        """Hand a shard back so that it can be computed elsewhere at once.

        Args:
            counts: whether the try counts towards `max_attempts`.

        Returns:
            False if the lease is not this delivery's (any more).
        """
        with self._during(f"hand back shard {shard} of step {step}"):
            return bool(
                self._script("end_lease", [self.keys.leases(step)], [shard, worker, delivery, int(counts)])
            )

    def finish_slot(
        self,
        step: int,
        slot: SlotRecord,
        *,
        incarnation: str | None = None,
        version: int | None = None,
        into: Group | None = None,
        then: Command | None = None,
        idle: tuple[int, float] | None = None,
    ) -> Finished:
        """Write a gradient slot, or a partial sum's, once; its bytes are already stored.

        Args:
            incarnation: what `begin` answered: another run of the same name takes no slot of this one.
                None if that is not known.
            version: what it was computed at; None: the version of the step's own number.
            into: the partial sum that the slot goes into, None for none.
            then: a command of the caller's that may follow in the same round trip.
            idle: what the caller asks `late_shard` with (shards, seconds), None if it does not.
        """
        names = [self.keys.head, self.keys.slots(step)]
        arguments = [
            step,
            slot.shard,
            slot.to_json(),
            slot.nonce,
            slot.digest,
            keys.WORK_TTL_SECONDS,
            revision(incarnation or ""),
            step if version is None else version,
            *(("", "", "") if into is None else into),
        ]
        asked = None if idle is None else self._late(step, *idle, slot=slot)
        if self.lane is not None:
            with suppress(LaneClosed):
                last = () if asked is None else (script_command("late_shard", *asked),)
                (verdict, present), called, *answers = self.lane.call(
                    script_command("write_slot", names, arguments),
                    ("HGET", self.keys.head, "called"),
                    *(() if then is None else (then,)),
                    *last,
                )
                late = int(answers.pop()) if last else -1
                answer = answers[0] if answers else None
                found = None if late < 0 else late
                return Finished(verdict, int(present), called == str(step), answer, found)
        with self._during(f"write slot {slot.shard} of step {step}"):
            verdict, present = self._script("write_slot", names, arguments)
            late = -1 if asked is None else int(self._script("late_shard", *asked))
        return Finished(verdict, int(present), self.called(step), late=None if late < 0 else late)

    def late_shard(self, step: int, *, shards: int, seconds: float) -> int | None:
        """Ask, with nothing else to do, for a shard that its holder takes far too long for.

        Args:
            shards: how many the step has.
            seconds: what the asker takes for a shard.

        Returns:
            The shard to compute once more, None if there is none: see scripts/late_shard.lua.
        """
        with self._during(f"look for a late shard of step {step}"):
            shard = int(self._script("late_shard", *self._late(step, shards, seconds)))
        return None if shard < 0 else shard

    def _late(
        self, step: int, shards: int, seconds: float, *, slot: SlotRecord | None = None
    ) -> tuple[list[str], list[Any]]:
        """Keys and arguments of scripts/late_shard.lua."""
        names = [self.keys.head, self.keys.slots(step), self.keys.leases(step)]
        limits = [BACKUP_FACTOR, BACKUP_SECONDS, BACKUPS_MOST, BACKUP_LOST_SECONDS]
        own = (0, "", "") if slot is None else (BACKUP_ASKED_ALWAYS, slot.shard, slot.nonce)
        return names, [step, shards, seconds, *limits, keys.worker(""), self.run, *own]

    # --- the training server's side ---------------------------------------------------------

    def acquire(
        self, *, worker: str, node: str, queue: str, environment: str = "", memory: str = ""
    ) -> tuple[str, int | str]:
        """Take the run over.

        Args:
            memory: identity of the memory that the taker shares with its host; "" for none.
            environment: what of the taker could change bits; "" if that does not matter.

        Returns:
            ("acquired", token), ("owned", queue of the live owner), ("skewed", environment that the
            run's updates need) or ("missing", 0).
        """
        with self._during("take over", ""):
            verdict, value = self._script(
                "acquire", [self.keys.head], [worker, node, keys.worker(""), queue, environment, memory]
            )
        return verdict, int(value) if verdict == "acquired" else value

    def release(self, token: int) -> bool:
        """Give the run up, if it is still ours: a standby may take it at once."""
        with self._during("release", ""):
            return bool(self._script("release", [self.keys.head], [token]))

    def initialise(
        self,
        *,
        token: int,
        manifest: dict[str, Any],
        record: VersionRecord,
        dataset_size: int,
        evaluation_size: int,
        total_steps: int,
        dataset_digest: str = "",
    ) -> str:
        """Record the first version and start the run; returns "ok", "fenced" or "stopped".

        Args:
            dataset_digest: of the training dataset's content, "" if it does not know it.
        """
        with self._during("initialise", ""):
            return cast(
                str,
                self._script(
                    "initialise",
                    [self.keys.head, self.keys.manifest, self.keys.versions, self.keys.events],
                    [
                        token,
                        json.dumps(manifest),
                        record.version,
                        record.to_json(),
                        dataset_size,
                        total_steps,
                        keys.RUN_TTL_SECONDS,
                        time.time(),
                        keys.EVENTS_KEPT,
                        evaluation_size,
                        dataset_digest,
                    ],
                ),
            )

    def slots(self, step: int) -> dict[int, SlotRecord]:
        """The slots that are written, by shard."""
        with self._during(f"read the slots of step {step}"):
            found = cast(dict[str, str], self.client.hgetall(self.keys.slots(step)))
        return _slots(found)

    def some_slots(self, step: int, numbers: Iterable[int]) -> tuple[dict[int, SlotRecord], int]:
        """Chosen slots (at least one), where they are written, and how many of the step are in all."""
        wanted = list(numbers)
        with self._during(f"read slots of step {step}"):
            pipe = self.client.pipeline(transaction=True)
            pipe.hmget(self.keys.slots(step), [str(number) for number in wanted])
            pipe.hlen(self.keys.slots(step))
            texts, present = cast(tuple[list[str | None], int], pipe.execute())
        found = {n: SlotRecord.from_json(text) for n, text in zip(wanted, texts, strict=True) if text}
        return found, int(present)

    def slots_present(self, step: int) -> set[int]:
        """Which shards of a step are written."""
        with self._during(f"count the slots of step {step}"):
            return {int(shard) for shard in cast(list[str], self.client.hkeys(self.keys.slots(step)))}

    def announce(self, name: str, notice: Notice) -> None:
        """Tell of a blob that is on its way; it replaces what was told under this name.

        Args:
            name: `keys.slot_underway` of a slot, or `keys.PARAMETERS_UNDERWAY`.
        """
        with self._during(f"tell of {name}"):
            args = [name, notice.to_json(), keys.UNDERWAY_TTL_SECONDS]
            self._script("announce", [self.keys.underway], args)

    def underway(self, names: Sequence[str], step: int) -> tuple[dict[str, Notice], set[int]]:
        """What was told of blobs on their way, by name, and which slots of a step are written.

        Args:
            names: as for `announce`; at least one.
        """
        told, slots = self.keys.underway, self.keys.slots(step)
        found: list[list[str]] | None = None
        if self.lane is not None:
            with suppress(LaneClosed):
                found = self.lane.call(("HMGET", told, *names), ("HKEYS", slots))
        if found is None:
            with self._during(f"look what is on its way to step {step}"):
                pipe = self.client.pipeline(transaction=False)
                pipe.hmget(told, list(names))
                pipe.hkeys(slots)
                found = cast(list[list[str]], pipe.execute())
        return notices(zip(names, found[0], strict=True)), {int(slot) for slot in found[1]}

    def leases(self, step: int) -> dict[int, Lease]:
        """Who is at which shard of a step."""
        with self._during(f"read the leases of step {step}"):
            found = cast(dict[str, str], self.client.hgetall(self.keys.leases(step)))
        result = {}
        for shard, text in found.items():
            fields = json.loads(text)
            result[int(shard)] = Lease(shard=int(shard), **fields)
        return result

    def commit(
        self,
        *,
        step: int,
        token: int,
        shards: int,
        entry: LedgerEntry,
        record: VersionRecord,
        event: dict[str, Any],
        drop: Iterable[int] = (),
        launch: Launch | None = None,
    ) -> Committed:
        """Move the head from `step` to `step + 1`: see scripts/commit.lua.

        Args:
            drop: versions that nobody needs once this one is there; pinned ones stay.
            launch: the chord of a further step that this commit makes possible.
        """
        names = self.keys
        now = time.time()
        published: list[Any] = []
        if launch is not None:
            published = [
                launch.step,
                launch.incarnation,
                launch.size,
                launch.size_ttl_seconds,
                *launch.messages,
            ]
        with self._during(f"commit version {step + 1}"):
            reply = self._script(
                "commit",
                [
                    names.head,
                    names.slots(step),
                    names.leases(step),
                    names.ledger,
                    names.versions,
                    names.pins,
                    names.events,
                    names.expected,
                    names.spec,
                    names.manifest,
                    names.evaluations,
                    keys.ACTIVE,
                    keys.RUNS,
                    *([] if launch is None else [launch.size_key, launch.queue]),
                ],
                [
                    step,
                    token,
                    shards,
                    entry.to_json(),
                    record.to_json(),
                    record.chain,
                    now,
                    keys.RUN_TTL_SECONDS,
                    json.dumps(event),
                    keys.EVENTS_KEPT,
                    int(now * 1000),
                    ",".join(map(str, drop)),
                    *published,
                ],
            )
        if reply[0] != "ok":
            return Committed(cast(CommitVerdict, reply[0]))
        first = reply.index("|", 3)
        second = reply.index("|", first + 1)
        return Committed(
            "ok",
            tuple(int(v) for v in reply[3:first]),
            frozenset(int(v) for v in reply[first + 1 : second]),
            launched=reply[1] == "1",
            incarnation=reply[2],
            dropped=tuple(VersionRecord.from_json(text) for text in reply[second + 1 :]),
        )

    def drop_slot(
        self,
        step: int,
        shard: int,
        *,
        nonce: str,
        token: int | None,
        into: int | None = None,
        below: Iterable[int] = (),
    ) -> str:
        """Open a slot again whose bytes are lost; returns "ok", "fenced" or "stale".

        Args:
            nonce: of the slot that was read, so that a newer one stays.
            token: the training server's fencing token; None for a Client that adds slots up.
            into: the partial sum that the Client was to make.
            below: the slots that this one was made from, whose bytes are gone, too.
        """
        names = self.keys
        with self._during(f"open slot {shard} of step {step} again"):
            reply = self._script(
                "drop_slot",
                [names.head, names.slots(step), names.leases(step)],
                [
                    *("" if token is None else token, step, shard, nonce),
                    *("" if into is None else into, *below),
                ],
            )
        return cast(str, reply)

    def mark_launched(self, step: int, *, token: int) -> str:
        """Record that the chord of the present step was published; returns "ok", "fenced" or "stale"."""
        with self._during(f"record the launch of step {step}"):
            return cast(str, self._script("mark", [self.keys.head], [token, step, "launched"]))

    def mark_called(self, step: int, *, token: int) -> str:
        """Record that the chord of the present step called back; returns "ok", "fenced" or "stale"."""
        with self._during(f"record the callback of step {step}"):
            return cast(str, self._script("mark", [self.keys.head], [token, step, "called"]))

    def called(self, step: int) -> bool:
        """Whether the chord of a step called back already: then nobody calls when its last slot is in."""
        with self._during(f"read the callback of step {step}"):
            return bool(self.client.hget(self.keys.head, "called") == str(step))

    def claim_toolchain(self, toolchain: str) -> str:
        """Say what compiles a run's kernels here; returns what the first worker said, which is in force."""
        with self._during("claim the toolchain"):
            return cast(str, self._script("claim_toolchain", [self.keys.head], [toolchain]))

    def rollback(self, *, token: int, version: int, chain: str) -> tuple[bool, tuple[int, ...]]:
        """Take the head back to `version`.

        Returns:
            (done, versions above it whose records are still stored).
        """
        names = self.keys
        with self._during(f"roll back to version {version}"):
            fields = cast(list[str | None], self.client.hmget(names.head, ["version", "reached"]))
            present, reached = (int(field or 0) for field in fields)
            under_way = range(present, max(present, reached) + 3)  # more may be launched than is recorded
            reply = self._script(
                "rollback",
                [
                    *(names.head, names.ledger, names.expected, names.versions, names.events),
                    *(key(step) for step in under_way for key in (names.slots, names.leases)),
                ],
                [token, version, chain, keys.RUN_TTL_SECONDS, keys.EVENTS_KEPT],
            )
        return reply[0] == "ok", tuple(int(v) for v in reply[1:])

    # --- versions -----------------------------------------------------------------------------

    def manifest(self) -> dict[str, Any]:
        """Layout of the parameters.

        Raises:
            CacheError: before a training server has initialised the run.
        """
        with self._during("read the manifest"):
            text = self.client.get(self.keys.manifest)
        if text is None:
            raise CacheError(f"run {self.run!r} has no parameters yet; a training server must start it first")
        return cast(dict[str, Any], json.loads(cast(str, text)))

    def version(self, version: int) -> VersionRecord | None:
        """Where a version is stored, None if it is not (any more)."""
        with self._during(f"look up version {version}"):
            text = self.client.hget(self.keys.versions, str(version))
        return None if text is None else VersionRecord.from_json(cast(str, text))

    def versions(self) -> dict[int, VersionRecord]:
        """All stored versions."""
        with self._during("list the versions"):
            found = cast(dict[str, str], self.client.hgetall(self.keys.versions))
        return {int(version): VersionRecord.from_json(text) for version, text in found.items()}

    def put_version(self, record: VersionRecord, *, token: int) -> bool:
        """Record or replace a stored version (its state was published after the commit).

        Returns:
            False if another server has taken the run over; then nothing changed.
        """
        with self._during(f"record version {record.version}"):
            reply = self._script(
                "put_version",
                [self.keys.head, self.keys.versions],
                [token, record.version, record.to_json(), keys.RUN_TTL_SECONDS],
            )
        return bool(reply == "ok")

    def drop_versions(self, versions: Iterable[int], *, token: int) -> bool:
        """Forget stored versions; the caller then deletes their bytes.

        Returns:
            False if another server has taken the run over; then nothing changed.
        """
        with self._during("drop versions"):
            reply = self._script("drop_versions", [self.keys.head, self.keys.versions], [token, *versions])
        return bool(reply == "ok")

    def pin(self, version: int, *, seconds: float) -> None:
        """Keep a version stored for a while, beyond its place in the retention."""
        with self._during(f"pin version {version}"):
            pipe = self.client.pipeline(transaction=True)
            pipe.hset(self.keys.pins, str(version), int((time.time() + seconds) * 1000))
            pipe.expire(self.keys.pins, keys.RUN_TTL_SECONDS)
            pipe.execute()

    # --- ledger -------------------------------------------------------------------------------

    def entries(self, first: int = 1, last: int | None = None) -> list[LedgerEntry]:
        """Ledger entries still in Redis, versions `first` to `last`, in order."""
        with self._during("read the ledger"):
            if last is None:
                texts = cast(dict[str, str], self.client.hgetall(self.keys.ledger)).values()
                found = [LedgerEntry.from_json(text) for text in texts]
                return sorted((e for e in found if e.version >= first), key=lambda entry: entry.version)
            if last < first:
                return []
            wanted = [str(version) for version in range(first, last + 1)]
            listed = cast(list[str | None], self.client.hmget(self.keys.ledger, wanted))
        return [LedgerEntry.from_json(text) for text in listed if text is not None]

    def ledger_size(self) -> int:
        """How many entries Redis holds."""
        with self._during("measure the ledger"):
            return self.client.hlen(self.keys.ledger)

    def trim_entries(self, versions: Iterable[int]) -> None:
        """Drop entries that are safe on disk."""
        fields = [str(version) for version in versions]
        if fields:
            with self._during("trim the ledger"):
                self.client.hdel(self.keys.ledger, *fields)

    # --- evaluation ---------------------------------------------------------------------------

    def write_part(
        self, version: int, part: int, value: dict[str, Any], *, parts: int
    ) -> tuple[str, list[Any]]:
        """Write one part of an evaluation once: see scripts/write_part.lua."""
        with self._during(f"write part {part} of the evaluation of version {version}"):
            reply = self._script(
                "write_part",
                [self.keys.parts(version), self.keys.evaluations],
                [part, json.dumps(value), parts, keys.WORK_TTL_SECONDS, version],
            )
        return reply[0], [json.loads(text) for text in reply[1:]]

    def parts_present(self, version: int) -> set[int]:
        """Which parts of an evaluation are written."""
        with self._during(f"count the parts of the evaluation of version {version}"):
            return {int(part) for part in cast(list[str], self.client.hkeys(self.keys.parts(version)))}

    def record_evaluation(self, version: int, metrics: dict[str, Any]) -> bool:
        """Record the metrics of a version once; True if this call did."""
        with self._during(f"record the evaluation of version {version}"):
            return bool(
                self._script(
                    "record_evaluation",
                    [
                        self.keys.evaluations,
                        self.keys.parts(version),
                        self.keys.pins,
                        self.keys.events,
                        self.keys.pending_evaluations,
                    ],
                    [
                        version,
                        json.dumps(metrics),
                        json.dumps({"version": version, "metrics": metrics}),
                        keys.RUN_TTL_SECONDS,
                        keys.EVENTS_KEPT,
                    ],
                )
            )

    def launch_evaluation(self, version: int, parts: int, *, pin_seconds: float) -> bool:
        """Record that a version is being evaluated and keep it stored; False if that is done or under way."""
        with self._during(f"record the evaluation of version {version}"):
            names = self.keys
            return bool(
                self._script(
                    "launch_evaluation",
                    [names.evaluations, names.pending_evaluations, names.pins],
                    [version, parts, int((time.time() + pin_seconds) * 1000), keys.RUN_TTL_SECONDS],
                )
            )

    def abandon_evaluation(self, version: int, reason: str) -> bool:
        """Give an evaluation under way up, because its version is lost; True if this call did.

        Event `evaluation lost`: version, and `message` with the reason.
        """
        with self._during(f"give the evaluation of version {version} up"):
            names = self.keys
            return bool(
                self._script(
                    "abandon_evaluation",
                    [names.pending_evaluations, names.parts(version), names.pins, names.events],
                    [
                        version,
                        json.dumps({"version": version, "message": reason}),
                        keys.RUN_TTL_SECONDS,
                        keys.EVENTS_KEPT,
                    ],
                )
            )

    def pending_evaluations(self) -> dict[int, int]:
        """Evaluations under way: version -> number of parts."""
        with self._during("list the evaluations under way"):
            found = cast(dict[str, str], self.client.hgetall(self.keys.pending_evaluations))
        return {int(version): int(parts) for version, parts in found.items()}

    def evaluations(self) -> dict[int, dict[str, float]]:
        """Metrics by version, in order."""
        with self._during("read the evaluations"):
            found = cast(dict[str, str], self.client.hgetall(self.keys.evaluations))
        return {int(v): json.loads(text) for v, text in sorted(found.items(), key=lambda item: int(item[0]))}

    # --- prediction ---------------------------------------------------------------------------

    def write_output(self, request: str, part: int, answer: dict[str, Any]) -> bool:
        """Write one part of a prediction once; True if this call did."""
        key = self.keys.predict(request)
        with self._during(f"write part {part} of a prediction"):
            pipe = self.client.pipeline(transaction=True)
            pipe.hsetnx(key, str(part), json.dumps(answer))
            pipe.expire(key, keys.PREDICT_TTL_SECONDS)
            return bool(pipe.execute()[0])

    def outputs(self, request: str) -> dict[int, dict[str, Any]]:
        """The parts of a prediction that are written."""
        with self._during("read a prediction"):
            found = cast(dict[str, str], self.client.hgetall(self.keys.predict(request)))
        return {int(part): json.loads(text) for part, text in found.items()}

    def drop_outputs(self, request: str) -> None:
        """Delete what a prediction left."""
        with self._during("delete a prediction"):
            self.client.delete(self.keys.predict(request))

    # --- events -------------------------------------------------------------------------------

    def emit(self, event: str, data: dict[str, Any]) -> None:
        """Append one event."""
        with self._during(f"emit {event!r}"):
            pipe = self.client.pipeline(transaction=True)
            pipe.xadd(
                self.keys.events,
                {"type": event, "data": json.dumps(data)},
                maxlen=keys.EVENTS_KEPT,
                approximate=True,
            )
            pipe.expire(self.keys.events, keys.RUN_TTL_SECONDS)
            pipe.execute()

    def read_events(self, after: str = "0-0", *, block_seconds: float = 0.0, count: int = 500) -> list[Event]:
        """Events after an id, waiting up to `block_seconds` for the first."""
        with self._during("read the events"):
            block = None if block_seconds <= 0 else max(1, int(block_seconds * 1000))
            reply = cast(list[Any], self.client.xread({self.keys.events: after}, count=count, block=block))
        found = reply[0][1] if reply else []
        return [Event(id, fields["type"], json.loads(fields["data"])) for id, fields in found]


def _pairs(flat: list[str]) -> dict[str, str]:
    """A hash as the protocol's second version sends it: field, value, field, value."""
    return dict(zip(flat[::2], flat[1::2], strict=True))


def _slots(found: dict[str, str]) -> dict[int, SlotRecord]:
    return {int(shard): SlotRecord.from_json(text) for shard, text in sorted(found.items())}
