"""The twin of `Commits`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from torchord.cache import keys
from torchord.cache.ledger.answers import Committed
from torchord.cache.ledger.hardware import fits
from torchord.cache.ledger.incarnation import revised
from torchord.cache.ledger.launch import Launch
from torchord.cache.ledger.records import LedgerEntry, VersionRecord
from torchord.cache.testing import memory_turns
from torchord.cache.testing.memory_control_plane import MemoryControlPlane


class MemoryCommits(MemoryControlPlane):
    """Taking a run over and committing its steps, without a server."""

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
            if environment and environment != fixed and fits(fixed, environment):
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
            if "started_at" not in self._head:
                fields["started_at"] = plane.clock()
            plane.hset(names.head, fields)
            self._event("started", {"version": record.version, "total_steps": total_steps})
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
            elif str(version) not in plane.hash(names.versions):
                plane.hset(names.versions, {str(version): record.to_json()})
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
            plane.hset(self.keys.head, {"shard_seconds": launch.seconds})
            memory_turns.put(plane, launch.queue, self.run, texts, seconds=launch.seconds)
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

    def stop(self, version: int, *, rule: str, reason: str, token: int) -> str:
        """See `Ledger.stop`."""
        plane, head = self.plane, self._head
        verdict = {"version": version, "rule": rule, "reason": reason}
        with plane.changed:
            if not self._holds(token):
                return "fenced"
            if int(head["version"]) != version:
                return "stale"
            if "stopped" not in head:
                if head["status"] != "running":
                    return str(head["status"])
                plane.hset(self.keys.head, {"stopped": json.dumps(verdict), "total_steps": version})
                self._event("stopped", verdict)
            return "ok"

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
                for step in range(min(version, present), max(present, int(self._head.get("reached", 0))) + 3):
                    plane.delete(names.slots(step), names.leases(step))
                revision = revised(self._head["incarnation"])
                plane.hset(names.head, {"incarnation": revision, "corrected_at": min(version, corrected)})
            plane.hset(names.head, {"version": version, "chain": chain})
            plane.hdel(names.head, "launched", "called", "round")
            if present > version:
                plane.hincr(names.head, "replayed", present - version)
                self._event("rollback", {"version": version, "from": present})
            return True, tuple(int(v) for v in plane.hash(names.versions) if int(v) > version)
