"""An in-memory twin of the control plane, for unit tests: the interface of `Ledger` and `Registry`.

Each method does by hand what its script does in Redis. A property test drives both side by side
and compares every answer and every key, so that the twin cannot drift from the scripts.
"""

from __future__ import annotations

import ast
import json
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any, Literal, cast

import redis

from torchord.cache import keys
from torchord.cache.blobs.notice import Notice, notices
from torchord.cache.errors import CacheError, RunNotFound
from torchord.cache.ledger.answers import (
    BeginVerdict,
    Begun,
    Committed,
    Event,
    Finished,
    Group,
    Lease,
    SlotVerdict,
)
from torchord.cache.ledger.figures import from_text, to_text
from torchord.cache.ledger.incarnation import revised, revision
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.ledger.records import GENESIS, Head, Launch, LedgerEntry, SlotRecord, VersionRecord
from torchord.cache.ledger.slots import (
    BACKUP_ASKED_ALWAYS,
    BACKUP_FACTOR,
    BACKUP_LOST_SECONDS,
    BACKUP_SECONDS,
    BACKUPS_MOST,
)
from torchord.cache.ledger.workers import Registry, WorkerInfo, read
from torchord.cache.servers.fast_client import Command

URL = "memory://"

Hash = dict[str, str]


class NoClient:
    """Stands where a connection would: any use of it is a method that the twin lacks."""

    def __getattr__(self, name: str) -> Any:
        raise NotImplementedError(f"the in-memory twin has no connection to ask for {name!r}; add the method")


class MemoryPlane:
    """What the twins share: the keys of one server, each with its deadline.

    Args:
        clock: Unix time in seconds; a test's own clock makes keys expire without waiting.
    """

    def __init__(self, *, clock: Callable[[], float] = time.time) -> None:
        self.clock = clock
        self.id = secrets.token_hex(20)
        self.changed = threading.Condition(threading.RLock())
        self._values: dict[str, Any] = {}
        self._deadlines: dict[str, float] = {}

    def get(self, key: str) -> Any:
        """The value of a key, None if there is none or it has expired."""
        if self._deadlines.get(key, float("inf")) <= self.clock():
            self.delete(key)
        return self._values.get(key)

    def put(self, key: str, value: Any, ttl_seconds: float | None = None) -> None:
        """Set a key; an empty container means no key, as in Redis."""
        with self.changed:
            if isinstance(value, (dict, set, list)) and not value:
                self.delete(key)
                return
            self._values[key] = value
            if ttl_seconds is not None:
                self.expire(key, ttl_seconds)
            self.changed.notify_all()

    def hash(self, key: str) -> Hash:
        """A copy of a hash, empty if there is none."""
        return dict(self.get(key) or {})

    def hset(self, key: str, fields: dict[str, Any], ttl_seconds: float | None = None) -> None:
        """Set fields of a hash; values become text as they do on the wire."""
        self.put(
            key, {**self.hash(key), **{str(name): str(value) for name, value in fields.items()}}, ttl_seconds
        )

    def hdel(self, key: str, *fields: object) -> None:
        """Delete fields of a hash."""
        gone = {str(name) for name in fields}
        if self.get(key) is not None:
            self.put(key, {name: value for name, value in self.hash(key).items() if name not in gone})

    def hincr(self, key: str, field: str, by: int = 1) -> int:
        """Add to a number in a hash and return it."""
        value = int(self.hash(key).get(field, 0)) + by
        self.hset(key, {field: value})
        return value

    def delete(self, *names: str) -> None:
        """Delete keys."""
        for name in names:
            self._values.pop(name, None)
            self._deadlines.pop(name, None)

    def expire(self, key: str, ttl_seconds: float) -> None:
        """Give a key that exists a deadline."""
        if key in self._values:
            self._deadlines[key] = self.clock() + ttl_seconds

    def ttl(self, key: str) -> float | None:
        """Seconds that a key has to live, None if for ever."""
        deadline = self._deadlines.get(key)
        return None if deadline is None else deadline - self.clock()

    def names(self) -> list[str]:
        """The keys that are there, sorted."""
        return sorted(key for key in list(self._values) if self.get(key) is not None)

    def push(self, queue: str, arguments: dict[str, Any]) -> None:
        """Put a message in a queue, as Celery words it."""
        self.put(queue, [json.dumps({"headers": {"kwargsrepr": repr(arguments)}}), *(self.get(queue) or [])])


class MemoryLedger(Ledger):
    """`Ledger` without a server.

    Args:
        plane: the keys, shared by all that talk to the same "server".
        run: the run's name.

    Example:
        >>> ledger = MemoryLedger(MemoryPlane(), "digits-01")
        >>> ledger.create({"recipe": {}, "config": {}}, incarnation="a") is None
        True
        >>> ledger.acquire(worker="w", node="n", queue="updates.n")[0]
        'acquired'
    """

    def __init__(self, plane: MemoryPlane, run: str) -> None:
        super().__init__(cast(redis.Redis, NoClient()), URL, run)
        self.plane = plane

    @property
    def _head(self) -> Hash:
        return self.plane.hash(self.keys.head)

    def _holds(self, token: int) -> bool:
        return int(self._head.get("token", -1)) == token

    def _event(self, event: str, data: dict[str, Any]) -> None:
        events = list(self.plane.get(self.keys.events) or [])
        last = int(events[-1].id.partition("-")[0]) if events else 0
        number = max(last + 1, int(self.plane.clock() * 1000))
        events.append(Event(f"{number}-0", event, from_text(to_text(data))))
        self.plane.put(self.keys.events, events[-keys.EVENTS_KEPT :], keys.RUN_TTL_SECONDS)

    # --- life of a run ------------------------------------------------------------------

    def create(
        self,
        spec: dict[str, Any],
        *,
        incarnation: str,
        version: int = 0,
        chain: str = GENESIS,
    ) -> dict[str, Any] | None:
        """See `Ledger.create`."""
        plane, names = self.plane, self.keys
        with plane.changed:
            there = plane.get(names.spec)
            if there is not None and plane.get(names.head):
                return cast(dict[str, Any], json.loads(there))
            plane.delete(*names.lasting(), names.slots(version), names.leases(version))
            now, ttl = plane.clock(), keys.RUN_TTL_SECONDS
            plane.put(names.spec, json.dumps(spec), ttl)
            head = {
                "status": "pending",
                "version": version,
                "chain": chain,
                "token": 0,
                "incarnation": incarnation,
                "skew": spec.get("config", {}).get("skew", "admit"),
                "submitted_at": now,
                "committed_at": now,
                "duplicates": 0,
                "late": 0,
            }
            plane.hset(names.head, head, ttl)
            plane.put(keys.RUNS, {**(plane.get(keys.RUNS) or {}), self.run: now}, ttl)
            plane.put(keys.ACTIVE, (plane.get(keys.ACTIVE) or set()) | {self.run}, ttl)
        return None

    def spec(self) -> dict[str, Any]:
        """See `Ledger.spec`."""
        text = self.plane.get(self.keys.spec)
        if text is None:
            raise RunNotFound(f"no run {self.run!r} is known in memory")
        return cast(dict[str, Any], json.loads(text))

    def respec(self, spec: dict[str, Any], *, incarnation: str, skew: str) -> bool:
        """See `Ledger.respec`."""
        with self.plane.changed:
            if self._head.get("status") not in ("paused", "failed"):
                return False
            self.plane.put(self.keys.spec, json.dumps(spec), keys.RUN_TTL_SECONDS)
            version = self._head["version"]
            self.plane.hset(
                self.keys.head, {"incarnation": incarnation, "skew": skew, "corrected_at": version}
            )
            self.plane.delete(self.keys.expected)
            return True

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
        """See `Ledger.switch`."""
        plane = self.plane
        with plane.changed:
            head = self._head
            status = head.get("status", "missing")
            if status not in ("pending", "running", "paused"):
                return status
            if head["incarnation"] == following:
                return "ok"
            if head["incarnation"] != incarnation:
                return "changed"
            if step > 0 and (step < int(head["version"]) + 2 or step < int(head.get("reached", -1)) + 2):
                return "late"
            plane.put(self.keys.spec, json.dumps(spec), keys.RUN_TTL_SECONDS)
            plane.hset(self.keys.head, {"incarnation": following})
            if total_steps is not None:
                plane.hset(self.keys.head, {"total_steps": total_steps})
            self.emit("switched", data)
            return "ok"

    def server_memory(self) -> str:
        """See `Ledger.server_memory`."""
        return str(self._head.get("memory", ""))

    def incarnation(self) -> str:
        """See `Ledger.incarnation`."""
        return str(self._head.get("incarnation", ""))

    def head(self) -> Head:
        """See `Ledger.head`."""
        fields = self._head
        if not fields:
            raise RunNotFound(f"no run {self.run!r} is known in memory")
        return Head.from_hash(fields)

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
        """See `Ledger.transition`."""
        plane, names = self.plane, self.keys
        with plane.changed:
            head = self._head
            if not head:
                return False, "missing"
            before = head["status"]
            version = int(head["version"])
            if token is not None and not self._holds(token):
                return False, before
            if incarnation is not None and revision(head["incarnation"]) != revision(incarnation):
                return False, before
            if shard is not None and (
                version > shard[0] or str(shard[1]) in plane.hash(names.slots(shard[0]))
            ):
                return False, before
            if before not in tuple(allowed):
                return False, before
            plane.hset(
                names.head, {"status": status, "changed": secrets.token_hex(6), "changed_from": before}
            )
            if error is None:
                plane.hdel(names.head, "error")
            elif error != "keep":
                plane.hset(names.head, {"error": to_text(error)})
            active = set(plane.get(keys.ACTIVE) or ())
            if status in ("running", "pending"):
                plane.hdel(names.head, "launched", "called")
                leases = names.leases(version if shard is None else shard[0])
                for lease_shard, text in plane.hash(leases).items():
                    plane.hset(leases, {lease_shard: json.dumps({**json.loads(text), "attempt": 0})})
                plane.put(keys.ACTIVE, active | {self.run}, keys.RUN_TTL_SECONDS)
            else:
                plane.put(keys.ACTIVE, active - {self.run})
            self._event(event, data or {})
            return True, before

    def retire(self, working_steps: Iterable[int] = ()) -> None:
        """See `Ledger.retire`."""
        for name in self.keys.lasting():
            self.plane.expire(name, keys.RESULT_TTL_SECONDS)
        for step in working_steps:
            self.plane.delete(self.keys.slots(step), self.keys.leases(step))

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
        """See `Ledger.begin`."""
        with self.plane.changed:
            wanted = step if version is None else version
            verdict, attempt, incarnation = self._begun(
                step, str(shard), worker, delivery, backup, environment, wanted
            )
            if verdict != "compute":
                return Begun(verdict, attempt, incarnation)
            record = self.version(wanted) if lacking else None
            return Begun(verdict, attempt, incarnation, record, self.server_memory())

    def _begun(
        self, step: int, field: str, worker: str, delivery: str, backup: bool, environment: str, version: int
    ) -> tuple[BeginVerdict, int, str]:
        """Verdict, attempt and incarnation, as scripts/begin_shard.lua decides."""
        plane, names = self.plane, self.keys
        with plane.changed:
            head = self._head
            incarnation = head.get("incarnation", "")
            if head.get("status") != "running":
                return "stopped", 0, incarnation
            present = int(head["version"])
            if step < present:
                plane.hincr(names.head, "late")
                return "late", 0, incarnation
            if version > present:
                return "early", 0, incarnation
            if field in plane.hash(names.slots(step)):
                plane.hincr(names.head, "duplicates")
                return "duplicate", 0, incarnation
            first = head.get("environment", "")
            if environment and not first:
                plane.hset(names.head, {"environment": environment})
            elif environment and environment != first and head["skew"] == "refuse":
                return "skewed", 0, incarnation
            attempt, more = 1, {}
            held = plane.hash(names.leases(step)).get(field)
            if held is not None:
                lease = json.loads(held)
                attempt = lease["attempt"] + 1
                if lease["open"] and (lease["delivery"], lease["worker"]) == (delivery, worker):
                    return "compute", lease["attempt"], incarnation
                if lease["open"] and plane.get(keys.worker(lease["worker"])) is not None:
                    if not backup:
                        plane.hincr(names.head, "duplicates")
                        return "held", lease["attempt"], incarnation
                    attempt = lease["attempt"]
                    more = {"backups": lease["backups"]} if "backups" in lease else {}
            lease = {"worker": worker, "attempt": attempt, "delivery": delivery, "open": True}
            lease |= {"since": plane.clock(), **more}
            plane.hset(names.leases(step), {field: json.dumps(lease)}, keys.WORK_TTL_SECONDS)
            return "compute", attempt, incarnation

    def head_and_slots(self, step: int) -> tuple[Head, dict[int, SlotRecord]]:
        """See `Ledger.head_and_slots`."""
        with self.plane.changed:
            return self.head(), self.slots(step)

    def end_lease(self, step: int, shard: int, *, worker: str, delivery: str, counts: bool = False) -> bool:
        """See `Ledger.end_lease`."""
        with self.plane.changed:
            held = self.plane.hash(self.keys.leases(step)).get(str(shard))
            lease = {} if held is None else json.loads(held)
            if (lease.get("worker"), lease.get("delivery")) != (worker, delivery):
                return False
            if lease["open"]:
                closed = {**lease, "open": False, "attempt": lease["attempt"] - (not counts)}
                self.plane.hset(self.keys.leases(step), {str(shard): json.dumps(closed)})
            return True

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
        """See `Ledger.finish_slot`; `then` is never sent."""
        with self.plane.changed:
            written = self._write(step, slot, incarnation, step if version is None else version, into)
            called = self.called(step)
            late = None if idle is None else self._late_shard(step, *idle, slot=slot)
            return Finished(*written, called, late=late)

    def _write(
        self, step: int, slot: SlotRecord, incarnation: str | None, version: int, into: Group | None
    ) -> tuple[SlotVerdict, int]:
        """Verdict and slots present, as scripts/write_slot.lua decides."""
        plane, names = self.plane, self.keys
        with plane.changed:
            head = self._head
            present = int(head.get("version", -1))
            if present < 0 or head["status"] in ("cancelled", "done"):
                return "stopped", 0
            if incarnation and revision(head["incarnation"]) != revision(incarnation):
                return "stopped", 0
            if step < present:
                plane.hincr(names.head, "late")
                return "late", 0
            if version > present:
                return "early", 0
            slots = plane.hash(names.slots(step))
            there = slots.get(str(slot.shard))
            if there is None:
                plane.hset(names.slots(step), {str(slot.shard): slot.to_json()}, keys.WORK_TTL_SECONDS)
                return self._written(step, into), len(slots) + 1
            first = json.loads(there)
            if first["nonce"] == slot.nonce:
                return self._written(step, into), len(slots)
            plane.hincr(names.head, "duplicates")
            if first["digest"] != slot.digest:
                plane.hincr(names.head, "divergent")
                return "divergent", len(slots)
            return "duplicate", len(slots)

    def _written(self, step: int, into: Group | None) -> SlotVerdict:
        slots = self.plane.hash(self.keys.slots(step))
        if into is None:
            return "written"
        if str(into.slot) in slots:
            return "spare"
        inputs = range(into.first, into.last + 1)
        return "group" if all(str(slot) in slots for slot in inputs) else "written"

    def late_shard(self, step: int, *, shards: int, seconds: float) -> int | None:
        """See `Ledger.late_shard`."""
        return self._late_shard(step, shards, seconds)

    def _late_shard(
        self, step: int, shards: int, seconds: float, *, slot: SlotRecord | None = None
    ) -> int | None:
        plane, names = self.plane, self.keys
        answered = 0 if slot is None else BACKUP_ASKED_ALWAYS
        with plane.changed:
            leases = {int(shard): json.loads(text) for shard, text in plane.hash(names.leases(step)).items()}
            written = plane.hash(names.slots(step))
            if self._head.get("status") != "running" or (answered and len(leases) < shards):
                return None
            missing = {shard for shard in range(shards) if str(shard) not in written}
            if slot is not None and json.loads(written.get(str(slot.shard), "{}")).get("nonce") != slot.nonce:
                return None
            if 0 < answered < len(missing) and len(missing).bit_count() != 1:
                return None
            if missing - leases.keys():
                return None
            waits: dict[int, float] = {}
            for shard, lease in leases.items():
                holder = plane.get(keys.worker(lease["worker"])) if lease["open"] else None
                if shard >= shards or str(shard) in written or holder is None:
                    continue
                if lease.get("backups", 0) >= BACKUPS_MOST:
                    continue
                if plane.clock() - lease.get("asked", 0.0) > BACKUP_LOST_SECONDS:
                    pace = json.loads(holder)["pace"].get(self.run, seconds)
                    waits[shard] = abs(pace - (plane.clock() - lease["since"]))
            late = max(waits, key=lambda shard: waits[shard], default=None)
            if late is None or waits[late] <= BACKUP_FACTOR * seconds + BACKUP_SECONDS:
                return None
            asked = {"backups": leases[late].get("backups", 0) + 1, "asked": plane.clock()}
            plane.hset(names.leases(step), {str(late): json.dumps({**leases[late], **asked})})
            plane.hincr(names.head, "backups")
            return late

    # --- the training server's side ---------------------------------------------------------

    def acquire(
        self, *, worker: str, node: str, queue: str, environment: str = "", memory: str = ""
    ) -> tuple[str, int | str]:
        """See `Ledger.acquire`."""
        plane, name = self.plane, self.keys.head
        with plane.changed:
            head = self._head
            if not head:
                return "missing", 0
            owner = head.get("owner", "")
            if owner not in ("", worker) and plane.get(keys.worker(owner)) is not None:
                if head.get("node") != node:
                    return "owned", head["queue"]
                plane.hset(name, {"shared": 1})
            if head.get("node") != node:
                plane.hdel(name, "shared")
            fixed = head.get("server_environment", "")
            if not fixed and environment:
                plane.hset(name, {"server_environment": environment})
            elif environment and environment != fixed and head.get("skew") == "refuse":
                return "skewed", fixed
            token = max(int(head["token"]) + 1, int(plane.clock() * 1_000_000))
            plane.hset(
                name, {"token": token, "owner": worker, "node": node, "queue": queue, "memory": memory}
            )
            return "acquired", token

    def release(self, token: int) -> bool:
        """See `Ledger.release`."""
        with self.plane.changed:
            if not self._holds(token):
                return False
            self.plane.hset(self.keys.head, {"owner": ""})
            return True

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
        """See `Ledger.initialise`."""
        plane, names, ttl = self.plane, self.keys, keys.RUN_TTL_SECONDS
        with plane.changed:
            if not self._holds(token):
                return "fenced"
            if self._head["status"] not in ("pending", "running"):
                return "stopped"
            plane.put(names.manifest, json.dumps(manifest), ttl)
            plane.hset(names.versions, {str(record.version): record.to_json()}, ttl)
            fields = {
                "status": "running",
                "version": record.version,
                "dataset_size": dataset_size,
                "total_steps": total_steps,
                "evaluation_size": evaluation_size,
                "dataset_digest": dataset_digest,
                "committed_at": plane.clock(),
            }
            plane.hset(names.head, fields)
            self._event("started", {"version": record.version, "total_steps": total_steps})
            return "ok"

    def slots(self, step: int) -> dict[int, SlotRecord]:
        """See `Ledger.slots`."""
        found = self.plane.hash(self.keys.slots(step))
        return {int(shard): SlotRecord.from_json(text) for shard, text in sorted(found.items())}

    def some_slots(self, step: int, numbers: Iterable[int]) -> tuple[dict[int, SlotRecord], int]:
        """See `Ledger.some_slots`."""
        found = self.slots(step)
        return {number: found[number] for number in numbers if number in found}, len(found)

    def slots_present(self, step: int) -> set[int]:
        """See `Ledger.slots_present`."""
        return {int(shard) for shard in self.plane.hash(self.keys.slots(step))}

    def leases(self, step: int) -> dict[int, Lease]:
        """See `Ledger.leases`."""
        result = {}
        for shard, text in self.plane.hash(self.keys.leases(step)).items():
            fields = json.loads(text)
            result[int(shard)] = Lease(shard=int(shard), **fields)
        return result

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
        """See `Ledger.drop_slot`."""
        plane, names = self.plane, self.keys
        with plane.changed:
            if token is not None and not self._holds(token):
                return "fenced"
            slots, version = plane.hash(names.slots(step)), int(self._head.get("version", -1))
            if version < 0 or version > step or (token is not None and version != step):
                return "stale"
            there = slots.get(str(shard))
            if there is None or json.loads(there)["nonce"] != nonce or str(into) in slots:
                return "stale"
            for slot in (shard, *below):
                plane.hdel(names.slots(step), slot)
                plane.hdel(names.leases(step), slot)
            if token is not None:
                plane.hdel(names.head, "launched", "called")
            return "ok"

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
        """See `Ledger.commit`."""
        plane, names = self.plane, self.keys
        with plane.changed:
            head = self._head
            if not self._holds(token):
                return Committed("fenced")
            version = int(head["version"])
            if not (version == step + 1 and head["chain"] == record.chain):
                if version != step:
                    return Committed("stale")
                if head["status"] != "running":
                    return Committed("stopped")
                if len(plane.hash(names.slots(step))) != shards:
                    return Committed("incomplete")
                if plane.hash(names.expected).get(str(step + 1), record.chain) != record.chain:
                    return Committed("diverged")
                self._move(step, entry, record)
                self._event("step", event)
            pins = plane.hash(names.pins)
            over = [v for v, until in pins.items() if int(until) < int(plane.clock() * 1000)]
            plane.hdel(names.pins, *over)
            launched = self._publish(launch)
            stored = plane.hash(names.versions)
            doomed = [str(v) for v in drop if str(v) in stored and (str(v) not in pins or str(v) in over)]
            plane.hdel(names.versions, *doomed)
            return Committed(
                "ok",
                tuple(int(v) for v in plane.hash(names.versions)),
                frozenset(int(v) for v in pins if v not in over),
                launched=launched,
                incarnation=self._head.get("incarnation", ""),
                dropped=tuple(VersionRecord.from_json(stored[v]) for v in doomed),
            )

    def _publish(self, launch: Launch | None) -> bool:
        """The launch with a commit."""
        plane, head = self.plane, self._head
        if launch is None or launch.incarnation != head.get("incarnation", ""):
            return False
        if int(head.get("launched", -1)) < launch.step:
            plane.put(launch.size_key, str(launch.size), launch.size_ttl_seconds)
            texts = [message.decode() for message in launch.messages]
            plane.put(launch.queue, [*reversed(texts), *(plane.get(launch.queue) or [])])
            reached = max(launch.step, int(head.get("reached", -1)))
            plane.hset(self.keys.head, {"launched": launch.step, "reached": reached})
            plane.hdel(self.keys.head, "called")
        return True

    def _move(self, step: int, entry: LedgerEntry, record: VersionRecord) -> None:
        """The write of a commit."""
        plane, names, field = self.plane, self.keys, str(step + 1)
        plane.hdel(names.expected, field)
        plane.hset(names.ledger, {field: entry.to_json()})
        plane.hset(names.versions, {field: record.to_json()})
        plane.hset(names.head, {"version": field, "chain": record.chain, "committed_at": plane.clock()})
        plane.delete(names.slots(step), names.leases(step))
        for name in (*names.lasting(), keys.ACTIVE, keys.RUNS):
            if name != names.pending_evaluations:
                plane.expire(name, keys.RUN_TTL_SECONDS)

    def _mark(self, what: str, step: int, token: int) -> str:
        with self.plane.changed:
            if not self._holds(token):
                return "fenced"
            if int(self._head["version"]) > step:
                return "stale"
            self.plane.hset(self.keys.head, {what: step})
            if what == "launched":
                self.plane.hdel(self.keys.head, "called")
                reached = max(step, int(self._head.get("reached", -1)))
                self.plane.hset(self.keys.head, {"reached": reached})
            return "ok"

    def mark_launched(self, step: int, *, token: int) -> str:
        """See `Ledger.mark_launched`."""
        return self._mark("launched", step, token)

    def mark_called(self, step: int, *, token: int) -> str:
        """See `Ledger.mark_called`."""
        return self._mark("called", step, token)

    def called(self, step: int) -> bool:
        """See `Ledger.called`."""
        return self._head.get("called") == str(step)

    def announce(self, name: str, notice: Notice) -> None:
        """See `Ledger.announce`."""
        self.plane.hset(self.keys.underway, {name: notice.to_json()}, keys.UNDERWAY_TTL_SECONDS)

    def underway(self, names: Sequence[str], step: int) -> tuple[dict[str, Notice], set[int]]:
        """See `Ledger.underway`."""
        told = self.plane.hash(self.keys.underway)
        return notices((name, told.get(name)) for name in names), self.slots_present(step)

    def claim_toolchain(self, toolchain: str) -> str:
        """See `Ledger.claim_toolchain`."""
        with self.plane.changed:
            if not self._head:
                return toolchain
            if "toolchain" not in self._head:
                self.plane.hset(self.keys.head, {"toolchain": toolchain})
            return str(self._head["toolchain"])

    def rollback(self, *, token: int, version: int, chain: str) -> tuple[bool, tuple[int, ...]]:
        """See `Ledger.rollback`."""
        plane, names = self.plane, self.keys
        with plane.changed:
            if not self._holds(token):
                return False, ()
            present = int(self._head["version"])
            for undone in range(version + 1, present + 1):
                entry = plane.hash(names.ledger).get(str(undone))
                if entry is not None:
                    plane.hset(names.expected, {str(undone): json.loads(entry)["chain"]})
                    plane.hdel(names.ledger, undone)
            plane.expire(names.expected, keys.RUN_TTL_SECONDS)
            corrected = int(self._head.get("corrected_at", -1))
            if version < present and (version < corrected or self._head["skew"] == "admit"):
                plane.delete(names.expected)
                for step in range(present, max(present, int(self._head.get("reached", 0))) + 3):
                    plane.delete(names.slots(step), names.leases(step))
                revision = revised(self._head["incarnation"])
                plane.hset(names.head, {"incarnation": revision, "corrected_at": min(version, corrected)})
            plane.hset(names.head, {"version": version, "chain": chain})
            plane.hdel(names.head, "launched", "called")
            if present > version:
                plane.hincr(names.head, "replayed", present - version)
                self._event("rollback", {"version": version, "from": present})
            return True, tuple(int(v) for v in plane.hash(names.versions) if int(v) > version)

    # --- versions -----------------------------------------------------------------------------

    def manifest(self) -> dict[str, Any]:
        """See `Ledger.manifest`."""
        text = self.plane.get(self.keys.manifest)
        if text is None:
            raise CacheError(f"run {self.run!r} has no parameters yet; a training server must start it first")
        return cast(dict[str, Any], json.loads(text))

    def version(self, version: int) -> VersionRecord | None:
        """See `Ledger.version`."""
        text = self.plane.hash(self.keys.versions).get(str(version))
        return None if text is None else VersionRecord.from_json(text)

    def versions(self) -> dict[int, VersionRecord]:
        """See `Ledger.versions`."""
        found = self.plane.hash(self.keys.versions)
        return {int(version): VersionRecord.from_json(text) for version, text in found.items()}

    def put_version(self, record: VersionRecord, *, token: int) -> bool:
        """See `Ledger.put_version`."""
        with self.plane.changed:
            if not self._holds(token):
                return False
            ttl = keys.RUN_TTL_SECONDS
            self.plane.hset(self.keys.versions, {str(record.version): record.to_json()}, ttl)
            return True

    def drop_versions(self, versions: Iterable[int], *, token: int) -> bool:
        """See `Ledger.drop_versions`."""
        with self.plane.changed:
            if not self._holds(token):
                return False
            self.plane.hdel(self.keys.versions, *versions)
            return True

    def pin(self, version: int, *, seconds: float) -> None:
        """See `Ledger.pin`."""
        until = int((self.plane.clock() + seconds) * 1000)
        self.plane.hset(self.keys.pins, {str(version): until}, keys.RUN_TTL_SECONDS)

    # --- ledger -------------------------------------------------------------------------------

    def entries(self, first: int = 1, last: int | None = None) -> list[LedgerEntry]:
        """See `Ledger.entries`."""
        found = [LedgerEntry.from_json(text) for text in self.plane.hash(self.keys.ledger).values()]
        kept = [e for e in found if e.version >= first and (last is None or e.version <= last)]
        return sorted(kept, key=lambda entry: entry.version)

    def ledger_size(self) -> int:
        """See `Ledger.ledger_size`."""
        return len(self.plane.hash(self.keys.ledger))

    def trim_entries(self, versions: Iterable[int]) -> None:
        """See `Ledger.trim_entries`."""
        self.plane.hdel(self.keys.ledger, *versions)

    # --- evaluation ---------------------------------------------------------------------------

    def write_part(
        self, version: int, part: int, value: dict[str, Any], *, parts: int
    ) -> tuple[str, list[Any]]:
        """See `Ledger.write_part`."""
        plane, name = self.plane, self.keys.parts(version)
        with plane.changed:
            if str(version) in plane.hash(self.keys.evaluations):
                return "done", []
            fields = {str(part): to_text(value), **plane.hash(name)}
            plane.hset(name, fields, keys.WORK_TTL_SECONDS)
            if len(fields) < parts:
                return "written", []
            return "complete", [from_text(fields[str(index)]) for index in range(parts)]

    def parts_present(self, version: int) -> set[int]:
        """See `Ledger.parts_present`."""
        return {int(part) for part in self.plane.hash(self.keys.parts(version))}

    def record_evaluation(self, version: int, metrics: dict[str, Any]) -> bool:
        """See `Ledger.record_evaluation`."""
        plane, names, field = self.plane, self.keys, str(version)
        with plane.changed:
            first = field not in plane.hash(names.evaluations)
            plane.hset(
                names.evaluations,
                {field: to_text(metrics), **plane.hash(names.evaluations)},
                keys.RUN_TTL_SECONDS,
            )
            plane.delete(names.parts(version))
            plane.hdel(names.pins, field)
            plane.hdel(names.pending_evaluations, field)
            if first:
                self._event("evaluation", {"version": version, "metrics": metrics})
            return first

    def launch_evaluation(self, version: int, parts: int, *, pin_seconds: float) -> bool:
        """See `Ledger.launch_evaluation`."""
        plane, names, field = self.plane, self.keys, str(version)
        with plane.changed:
            if field in plane.hash(names.evaluations):
                return False
            pending = plane.hash(names.pending_evaluations)
            plane.hset(names.pending_evaluations, {field: parts, **pending}, keys.RUN_TTL_SECONDS)
            self.pin(version, seconds=pin_seconds)
            return field not in pending

    def abandon_evaluation(self, version: int, reason: str) -> bool:
        """See `Ledger.abandon_evaluation`."""
        plane, names, field = self.plane, self.keys, str(version)
        with plane.changed:
            if field not in plane.hash(names.pending_evaluations):
                return False
            plane.hdel(names.pending_evaluations, field)
            plane.delete(names.parts(version))
            plane.hdel(names.pins, field)
            self._event("evaluation lost", {"version": version, "message": reason})
            return True

    def pending_evaluations(self) -> dict[int, int]:
        """See `Ledger.pending_evaluations`."""
        found = self.plane.hash(self.keys.pending_evaluations)
        return {int(version): int(parts) for version, parts in found.items()}

    def evaluations(self) -> dict[int, dict[str, float]]:
        """See `Ledger.evaluations`."""
        found = self.plane.hash(self.keys.evaluations)
        return {int(v): from_text(text) for v, text in sorted(found.items(), key=lambda item: int(item[0]))}

    # --- prediction ---------------------------------------------------------------------------

    def write_output(self, request: str, part: int, answer: dict[str, Any]) -> bool:
        """See `Ledger.write_output`."""
        name = self.keys.predict(request)
        with self.plane.changed:
            there = self.plane.hash(name)
            self.plane.hset(name, {str(part): json.dumps(answer), **there}, keys.PREDICT_TTL_SECONDS)
            return str(part) not in there

    def outputs(self, request: str) -> dict[int, dict[str, Any]]:
        """See `Ledger.outputs`."""
        found = self.plane.hash(self.keys.predict(request))
        return {int(part): json.loads(text) for part, text in found.items()}

    def drop_outputs(self, request: str) -> None:
        """See `Ledger.drop_outputs`."""
        self.plane.delete(self.keys.predict(request))

    # --- events -------------------------------------------------------------------------------

    def emit(self, event: str, data: dict[str, Any]) -> None:
        """See `Ledger.emit`."""
        with self.plane.changed:
            self._event(event, data)

    def read_events(self, after: str = "0-0", *, block_seconds: float = 0.0, count: int = 500) -> list[Event]:
        """See `Ledger.read_events`."""

        def order(id: str) -> tuple[int, int]:
            milliseconds, _, number = id.partition("-")
            return int(milliseconds), int(number or 0)

        def found() -> list[Event]:
            events = cast(list[Event], self.plane.get(self.keys.events) or [])
            return [event for event in events if order(event.id) > order(after)][:count]

        with self.plane.changed:
            if block_seconds > 0:
                self.plane.changed.wait_for(found, timeout=block_seconds)
            return found()


class MemoryRegistry(Registry):
    """`Registry` without a server.

    Args:
        plane: the keys, shared with the `MemoryLedger` of each run.
    """

    def __init__(self, plane: MemoryPlane) -> None:
        super().__init__(cast(redis.Redis, NoClient()), URL)
        self.plane = plane

    def beat(self, info: WorkerInfo) -> None:
        """See `Registry.beat`."""
        plane = self.plane
        with plane.changed:
            plane.put(keys.worker(info.id), json.dumps(asdict(info)), keys.WORKER_LEASE_MS / 1000)
            beats = {**(plane.get(keys.WORKERS) or {}), info.id: int(plane.clock() * 1000)}
            plane.put(keys.WORKERS, beats, keys.WORKER_INDEX_TTL_SECONDS)
            if info.placement:
                self._hold_placement(info.placement)

    def placement(self) -> str:
        """See `Registry.placement`."""
        return str(self.plane.get(keys.PLACEMENT) or "")

    def claim_placement(self, placement: str) -> str:
        """See `Registry.claim_placement`."""
        with self.plane.changed:
            there = self.placement() or placement
            if there == placement:
                self._hold_placement(there)
            return there

    def _hold_placement(self, placement: str) -> None:
        there = self.placement() or placement
        self.plane.put(keys.PLACEMENT, there, keys.WORKER_LEASE_MS / 1000)

    def leave(self, info: WorkerInfo) -> None:
        """See `Registry.leave`."""
        with self.plane.changed:
            self.plane.delete(keys.worker(info.id))
            self.plane.hdel(keys.WORKERS, info.id)

    def alive(self) -> dict[str, WorkerInfo]:
        """See `Registry.alive`."""
        found = {}
        for id in self.plane.hash(keys.WORKERS):
            text = self.plane.get(keys.worker(id))
            if text is not None:
                found[id] = read(text)
        return found

    def worker(self, id: str) -> WorkerInfo | None:
        """See `Registry.worker`."""
        return self.alive().get(id)

    def elect(self, worker: str, *, dead: str = "") -> str:
        """See `Registry.elect`."""
        with self.plane.changed:
            holder = self.plane.get(keys.SUPERVISOR)
            if holder not in (None, worker) and not (dead and holder == dead):
                return str(holder)
            self.plane.put(keys.SUPERVISOR, worker, keys.SUPERVISOR_LEASE_MS / 1000)
            return worker

    def step_down(self, worker: str) -> None:
        """See `Registry.step_down`."""
        with self.plane.changed:
            if self.plane.get(keys.SUPERVISOR) == worker:
                self.plane.delete(keys.SUPERVISOR)

    def active_runs(self) -> list[str]:
        """See `Registry.active_runs`."""
        return sorted(self.plane.get(keys.ACTIVE) or ())

    def forget_run(self, run: str) -> None:
        """See `Registry.forget_run`."""
        with self.plane.changed:
            if self.plane.hash(keys.RunKeys(run).head).get("status") not in ("pending", "running"):
                self.plane.put(keys.ACTIVE, set(self.active_runs()) - {run})

    def expire_queue(self, queue: str) -> None:
        """See `Registry.expire_queue`."""
        self.plane.expire(queue, keys.WORK_TTL_SECONDS)

    def queued(self, queue: str) -> list[dict[str, object]]:
        """See `Registry.queued`."""
        waiting = [json.loads(text)["headers"]["kwargsrepr"] for text in self.plane.get(queue) or []]
        return [ast.literal_eval(text) for text in waiting]

    def server_id(self) -> str:
        """See `Registry.server_id`."""
        return self.plane.id
