"""The twin of `RunLife`."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable
from typing import Any, Literal, cast

from torchord.cache import keys
from torchord.cache.errors import RunNotFound
from torchord.cache.ledger.figures import to_text
from torchord.cache.ledger.hardware import wanted
from torchord.cache.ledger.incarnation import revision
from torchord.cache.ledger.outbox import entry_text, subscribed
from torchord.cache.ledger.peoples_fields import checked_notes, checked_tags
from torchord.cache.ledger.records import GENESIS, Head
from torchord.cache.ledger.share import share_of
from torchord.cache.testing.memory_control_plane import MemoryControlPlane


class MemoryRunLife(MemoryControlPlane):
    """What happens to a run as a whole, without a server."""

    def create(
        self,
        spec: dict[str, Any],
        *,
        incarnation: str,
        version: int = 0,
        chain: str = GENESIS,
        sealed: str | None = None,
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
                **dict(zip(("weight", "priority"), share_of(spec), strict=True)),
            }
            if environment := wanted(spec):
                head |= {"environment": environment, "server_environment": environment}
            plane.hset(names.head, head | ({"on": on} if (on := subscribed(spec)) else {}), ttl)
            plane.put(keys.RUNS, {**(plane.get(keys.RUNS) or {}), self.run: now}, ttl)
            plane.put(keys.ACTIVE, (plane.get(keys.ACTIVE) or set()) | {self.run}, ttl)
        return None

    def label(self, *, tags: Iterable[str] | None = None, notes: str | None = None) -> str:
        """See `Ledger.label`."""
        plane = self.plane
        with plane.changed:
            if not (head := plane.hash(self.keys.head)):
                return "missing"
            said = {} if tags is None else {"tags": json.dumps(checked_tags(tags))}
            said |= {} if notes is None else {"notes": checked_notes(notes)}
            if said:
                plane.hset(self.keys.head, said)
        return head["status"]

    def share(self, *, weight: float | None = None, priority: int | None = None) -> str:
        """See `Ledger.share`."""
        plane = self.plane
        with plane.changed:
            if not (head := plane.hash(self.keys.head)):
                return "missing"
            said = {n: v for n, v in {"weight": weight, "priority": priority}.items() if v is not None}
            if any(head.get(name) != str(value) for name, value in said.items()):
                plane.hset(self.keys.head, said)
                self._event("share", said)
        return head["status"]

    def spec(self) -> dict[str, Any]:
        """See `Ledger.spec`."""
        text = self.plane.get(self.keys.spec)
        if text is None:
            raise RunNotFound(f"no run {self.run!r} is known in memory")
        return cast(dict[str, Any], json.loads(text))

    def sealed_spec(self) -> str:
        """See `Ledger.sealed_spec`."""
        return json.dumps(self.spec())

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
            if "stopped" in head:
                return "stopped"
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

    def extend(self, spec: dict[str, Any], *, incarnation: str, following: str, data: dict[str, Any]) -> str:
        """See `Ledger.extend`."""
        plane, names = self.plane, self.keys
        with plane.changed:
            head = self._head
            if head and head["incarnation"] == following:
                return "ok"
            if head.get("status") != "done":
                return str(head.get("status", "missing"))
            if head["incarnation"] != incarnation:
                return "changed"
            if "stopped" in head:
                return "stopped"
            ttl = keys.RUN_TTL_SECONDS
            plane.put(names.spec, json.dumps(spec), ttl)
            plane.hset(names.head, {"status": "pending", "incarnation": following})
            plane.hdel(names.head, "total_steps", "launched", "called", "round", "started_at")
            plane.put(keys.ACTIVE, (plane.get(keys.ACTIVE) or set()) | {self.run}, ttl)
            self._event("extended", data)
            for name in names.lasting():
                plane.expire(name, ttl)
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
            said, nonce = data or {}, secrets.token_hex(6)
            id = f"{event}-{said.get('version') if event == 'done' else nonce}"
            told = entry_text(event, plane.clock(), error if isinstance(error, dict) else {}, said)
            self._to_tell(event, id, told)
            return True, before

    def retire(self, working_steps: Iterable[int] = ()) -> None:
        """See `Ledger.retire`."""
        for name in self.keys.lasting():
            self.plane.expire(name, keys.RESULT_TTL_SECONDS)
        for step in working_steps:
            self.plane.delete(self.keys.slots(step), self.keys.leases(step))

    def claim_toolchain(self, toolchain: str) -> str:
        """See `Ledger.claim_toolchain`."""
        with self.plane.changed:
            if not self._head:
                return toolchain
            if "toolchain" not in self._head:
                self.plane.hset(self.keys.head, {"toolchain": toolchain})
            return str(self._head["toolchain"])

    def claim(self, what: str, text: str) -> dict[str, str]:
        """See `Ledger.claim`."""
        with self.plane.changed:
            if not self._head:
                return {what: text}
            if what not in self.claims():
                self.plane.hset(self.keys.claims, {what: text})
            self.plane.expire(self.keys.claims, keys.RUN_TTL_SECONDS)
            return self.claims()

    def claims(self) -> dict[str, str]:
        """See `Ledger.claims`."""
        return dict(self.plane.hash(self.keys.claims))
