"""The twin of `Slots`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from torchord.cache import keys
from torchord.cache.blobs.notice import Notice, notices
from torchord.cache.ledger.answers import BeginVerdict, Begun, Finished, Group, Lease, SlotVerdict
from torchord.cache.ledger.hardware import fits
from torchord.cache.ledger.incarnation import revision
from torchord.cache.ledger.records import Head, SlotRecord
from torchord.cache.ledger.slots import (
    BACKUP_ASKED_ALWAYS,
    BACKUP_FACTOR,
    BACKUP_LOST_SECONDS,
    BACKUP_SECONDS,
    BACKUPS_MOST,
)
from torchord.cache.servers.fast_client import Command
from torchord.cache.testing.memory_control_plane import MemoryControlPlane


class MemorySlots(MemoryControlPlane):
    """Leases and slots, without a server."""

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
            if environment and environment != first and fits(first, environment):
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
