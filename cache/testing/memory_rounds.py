"""The twin of `Rounds`."""

from __future__ import annotations

import json

from torchord.cache import keys
from torchord.cache.ledger.incarnation import revision
from torchord.cache.ledger.records import SlotRecord, VersionRecord
from torchord.cache.ledger.rounds import KEPT_STEPS, Report, RoundState, Seat, Turn
from torchord.cache.testing.memory_plane import Hash
from torchord.cache.testing.memory_slots import MemorySlots

_LATE_BACKUPS_MOST = 2
_DIGESTS_KEPT = 16


class MemoryRounds(MemorySlots):
    """Rounds, without a server."""

    @property
    def _round(self) -> Hash:
        return self.plane.hash(self.keys.round)

    def open_round(self, first: int, last: int, *, token: int) -> str:
        """See `Ledger.open_round`."""
        plane, names = self.plane, self.keys
        with plane.changed:
            head = self._head
            if not self._holds(token):
                return "fenced"
            if head["status"] != "running":
                return "stopped"
            if int(head["version"]) != first:
                return "stale"
            plane.delete(names.round)
            plane.hset(names.round, {"token": token, "first": first, "last": last})
            reached = max(int(head.get("reached", -1)), last)
            plane.hset(names.head, {"round": last, "launched": last, "reached": reached})
            plane.hdel(names.head, "called")
            for name in names.lasting():
                plane.expire(name, keys.RUN_TTL_SECONDS)
            return "ok"

    def close_round(self, *, token: int, committed: int) -> bool:
        """See `Ledger.close_round`."""
        plane, names = self.plane, self.keys
        with plane.changed:
            if not self._holds(token):
                return False
            plane.hdel(names.head, "round", "launched", "called")
            spent = range(max(0, committed - KEPT_STEPS - 1), committed)
            plane.delete(names.round, *(names.slots(step) for step in spent))
            return True

    def forget_expected(self, first: int) -> None:
        """See `Ledger.forget_expected`."""
        doubtful = [version for version in self.plane.hash(self.keys.expected) if int(version) >= first]
        self.plane.hdel(self.keys.expected, *doubtful)

    def round(self) -> RoundState | None:
        """See `Ledger.round`."""
        found = self._round
        return RoundState.of(found) if found else None

    def leave_round(self, worker: str) -> None:
        """See `Ledger.leave_round`."""
        self.plane.hdel(self.keys.round, f"p:{worker}")

    # --- turns --------------------------------------------------------------------------------

    def turn(
        self,
        seat: Seat,
        step: int,
        *,
        shards: int,
        slot: SlotRecord | None = None,
        report: Report | None = None,
        late_seconds: float | None = None,
        wait_seconds: float | None = None,
    ) -> Turn:
        """See `Ledger.turn`; decides as scripts/take_turn.lua does."""
        with self.plane.changed:
            self._await_wake(seat, wait_seconds)
            head, version = self._head, int(self._head.get("version", -1))
            if self._is_fenced(seat) or step > version + (report is not None):
                return Turn("fenced")
            if revision(head["incarnation"]) != revision(seat.incarnation):
                return Turn("fenced")
            if head["status"] not in ("running", "paused"):
                return Turn("stopped")
            self._sit_down(seat)
            reported = ""
            if report is not None:
                found = self._report(seat, step, report)
                if isinstance(found, Turn):
                    return found
                reported = found
            written = "" if slot is None else self._slot_of_turn(step, slot)
            verdict = self._state_of_step(step, shards)
            if verdict == "complete":
                self._wake()
                return Turn(verdict, written, reported, slots=self.slots(step))
            if verdict == "open":
                return self._claim(seat, step, shards, late_seconds, (written, reported))
            return Turn(verdict, written, reported)

    def _await_wake(self, seat: Seat, seconds: float | None) -> None:
        if seconds is None:
            return
        plane, name = self.plane, self.keys.wake(seat.worker)
        if plane.changed.wait_for(lambda: plane.get(name), seconds):
            plane.put(name, plane.get(name)[1:])

    def _is_fenced(self, seat: Seat) -> bool:
        held = self._holds(seat.token) and "round" in self._head
        named = self._round.get("token"), self._round.get("first")
        return not held or named != (str(seat.token), str(seat.first))

    def _sit_down(self, seat: Seat) -> None:
        found = self._round
        if f"p:{seat.worker}" not in found:
            memory = seat.memory if found.get("memory", seat.memory) == seat.memory else ""
            self.plane.hset(self.keys.round, {f"p:{seat.worker}": seat.memory, "memory": memory})

    def _report(self, seat: Seat, step: int, report: Report) -> str | Turn:
        """What a report is: "first" or "same"; or the turn that it ends with."""
        plane, names, found = self.plane, self.keys, self._round
        version, entry = int(self._head["version"]), report.entry
        if version >= step:
            first = found.get(f"d{step}", entry.parameters)
            return "same" if first == entry.parameters else self._dispute(seat, step, entry.parameters)
        slots = plane.hash(names.slots(version))
        if found.get("published") == str(version) or len(slots) != report.slots:
            return Turn("behind")
        if plane.hash(names.expected).get(str(step), entry.chain) != entry.chain:
            return Turn("diverged")
        plane.hdel(names.expected, step)
        plane.hset(names.ledger, {str(step): entry.to_json()}, keys.RUN_TTL_SECONDS)
        plane.hset(names.head, {"version": step, "chain": entry.chain, "committed_at": entry.committed_at})
        plane.hset(names.round, {f"d{step}": entry.parameters, f"w{step}": seat.worker})
        plane.hdel(names.round, f"d{step - _DIGESTS_KEPT}", f"w{step - _DIGESTS_KEPT}")
        plane.delete(names.leases(version), names.slots(version - KEPT_STEPS))
        self._event("step", report.event)
        return "first"

    def _dispute(self, seat: Seat, step: int, parameters: str) -> Turn:
        plane, names, found = self.plane, self.keys, self._round
        if "disputed" not in found:
            other = f"{seat.worker} {parameters}"
            plane.hset(names.round, {"disputed": step, "ending": "disputed", "other": other})
        if "published" in found:
            plane.hdel(names.versions, found["published"])
            plane.hdel(names.round, "published")
        return Turn("divergent", other=found[f"w{step}"])

    def _slot_of_turn(self, step: int, slot: SlotRecord) -> str:
        plane, names = self.plane, self.keys
        if step < int(self._head["version"]):
            plane.hincr(names.head, "late")
            return "late"
        there = plane.hash(names.slots(step)).get(str(slot.shard))
        if there is None:
            plane.hset(names.slots(step), {str(slot.shard): slot.to_json()}, keys.WORK_TTL_SECONDS)
            return "written"
        first = json.loads(there)
        if first["nonce"] == slot.nonce:
            return "written"
        plane.hincr(names.head, "duplicates")
        if first["digest"] == slot.digest:
            return "duplicate"
        plane.hincr(names.head, "divergent")
        return "divergent"

    def _state_of_step(self, step: int, shards: int) -> str:
        """The verdict on a step, "open" if slots of it are still to be computed."""
        head, found = self._head, self._round
        present = int(head["version"]) == step
        if found.get("ending") == "disputed":
            return "behind"
        over = head["status"] == "paused" or "ending" in found or found.get("published") == str(step)
        if not shards or (over and present):
            return "end"
        if len(self.plane.hash(self.keys.slots(step))) >= shards:
            return "complete"
        return "open" if present else "behind"

    def _claim(
        self, seat: Seat, step: int, shards: int, late_seconds: float | None, answers: tuple[str, str]
    ) -> Turn:
        """Take the first shard that is free, or the one that has been under way for far too long."""
        plane, names = self.plane, self.keys
        written = plane.hash(names.slots(step))
        leases = {shard: json.loads(text) for shard, text in plane.hash(names.leases(step)).items()}
        late: list[tuple[float, int]] = []
        for shard in (shard for shard in range(shards) if str(shard) not in written):
            lease = leases.get(str(shard))
            if lease is None or not lease["open"]:
                attempt = 1 if lease is None else lease["attempt"] + 1
                return self._leased(seat, step, shard, attempt, None, answers)
            if lease["worker"] == seat.worker:
                return self._leased(seat, step, shard, lease["attempt"], lease.get("backups"), answers)
            if plane.get(keys.worker(lease["worker"])) is None:
                if lease["attempt"] < seat.attempts:
                    return self._leased(seat, step, shard, lease["attempt"] + 1, None, answers)
            elif lease.get("backups", 0) < _LATE_BACKUPS_MOST:
                late.append((lease["since"], shard))
        if late_seconds is None or not late or plane.clock() - min(late)[0] <= late_seconds:
            self._note_waiting(seat)
            return Turn("wait", *answers)
        shard = min(late)[1]
        lease = leases[str(shard)]
        plane.hincr(names.head, "backups")
        return self._leased(seat, step, shard, lease["attempt"], lease.get("backups", 0) + 1, answers)

    def _leased(
        self, seat: Seat, step: int, shard: int, attempt: int, backups: int | None, answers: tuple[str, str]
    ) -> Turn:
        lease = {"worker": seat.worker, "attempt": attempt, "delivery": "round", "open": True}
        lease |= {"since": self.plane.clock(), **({} if backups is None else {"backups": backups})}
        self.plane.hset(self.keys.leases(step), {str(shard): json.dumps(lease)}, keys.WORK_TTL_SECONDS)
        return Turn("compute", *answers, shard, attempt, self._round["memory"])

    def _note_waiting(self, seat: Seat) -> None:
        waiting = self._round.get("waiting", "")
        if seat.worker not in waiting.split(","):
            self.plane.hset(self.keys.round, {"waiting": f"{waiting},{seat.worker}"})

    def _wake(self) -> None:
        plane, waiting = self.plane, self._round.get("waiting", "")
        for worker in filter(None, waiting.split(",")):
            name = self.keys.wake(worker)
            plane.put(name, ["1", *(plane.get(name) or [])], keys.WAKE_TTL_SECONDS)
        if waiting:
            plane.hset(self.keys.round, {"waiting": ""})

    # --- the end ------------------------------------------------------------------------------

    def end_round(
        self,
        seat: Seat,
        version: int,
        *,
        record: VersionRecord | None = None,
        leaving: bool = False,
        wait_seconds: float | None = None,
    ) -> str:
        """See `Ledger.end_round`; decides as scripts/end_round.lua does."""
        plane, names = self.plane, self.keys
        with plane.changed:
            self._await_wake(seat, wait_seconds)
            found = self._round
            if self._is_fenced(seat):
                return "fenced"
            if found.get("published") == str(version):
                return "over"
            if int(self._head["version"]) != version or found.get("ending") == "disputed":
                return "behind"
            if record is not None:
                plane.hset(names.versions, {str(version): record.to_json()}, keys.RUN_TTL_SECONDS)
                self._wake()
                plane.hset(names.round, {"published": version, "waiting": ""})
                return "over"
            if leaving:
                others = [name[2:] for name in found if name[:2] == "p:" and name[2:] != seat.worker]
                if any(plane.get(keys.worker(other)) is not None for other in others):
                    self.leave_round(seat.worker)
                    return "over"
                plane.hset(names.round, {"ending": "left"})
            publisher = found.get("publisher", seat.worker)
            lives = plane.get(keys.worker(publisher)) is not None and f"p:{publisher}" in found
            if publisher == seat.worker or not lives:
                plane.hset(names.round, {"publisher": seat.worker})
                return "publish"
            self._note_waiting(seat)
            return "wait"
