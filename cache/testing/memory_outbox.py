"""The twin of `Outbox`."""

from __future__ import annotations

import json
from typing import Any, Literal

from torchord.cache import keys
from torchord.cache.ledger.outbox import Telling
from torchord.cache.testing.memory_control_plane import MemoryControlPlane


class MemoryOutbox(MemoryControlPlane):
    """A run's outbox, without a server."""

    def claim_telling(self, worker: str, *, seconds: float) -> Telling | None:
        """See `Ledger.claim_telling`."""
        plane, names = self.plane, self.keys
        with plane.changed:
            now, waiting = plane.clock(), [each for each in self.outbox() if not each.dead]
            if not waiting:
                there = set(plane.get(keys.TELLING) or ())
                if self.run in there:
                    plane.put(keys.TELLING, there - {self.run})
                return None
            standings = {each.id: self._standing(each.id) for each in waiting}
            for standing in standings.values():
                if "holder" in standing and plane.get(keys.worker(standing["holder"])) is None:
                    standing["due"] = 0.0
            taken = min(waiting, key=lambda each: standings[each.id].get("due", 0.0))
            standing = standings[taken.id]
            if standing.get("due", 0.0) > now:
                return None
            made = {**standing, "tries": taken.tries + 1, "due": now + seconds, "holder": worker}
            plane.hset(names.telling, {taken.id: json.dumps(made)}, keys.RUN_TTL_SECONDS)
            return Telling(taken.id, taken.event, taken.place, taken.at, taken.data, taken.tries + 1)

    def settle_telling(
        self,
        telling: Telling,
        worker: str,
        verdict: Literal["told", "again", "dead"],
        *,
        seconds: float = 0.0,
        error: str = "",
        to: str = "",
    ) -> None:
        """See `Ledger.settle_telling`."""
        plane, names, id = self.plane, self.keys, telling.id
        data = {"id": id, "event": telling.event, "to": to, "tries": telling.tries}
        with plane.changed:
            if id not in plane.hash(names.outbox):
                return
            if verdict == "told":
                plane.hdel(names.outbox, id)
                plane.hdel(names.telling, id)
                self._event("told", data)
                return
            standing = self._standing(id)
            if standing.get("holder") != worker:
                return
            made = {"tries": standing["tries"], "due": plane.clock() + seconds, "error": error}
            if verdict == "dead":
                made["dead"] = True
                self._event("not told", {**data, "message": error} if error else data)
            plane.hset(names.telling, {id: json.dumps(made)}, keys.RUN_TTL_SECONDS)

    def outbox(self) -> list[Telling]:
        """See `Ledger.outbox`."""
        fields = ("tries", "due", "error", "dead")
        found = [
            Telling.of(
                id, text, **{name: value for name, value in self._standing(id).items() if name in fields}
            )
            for id, text in self.plane.hash(self.keys.outbox).items()
        ]
        return sorted(found, key=lambda each: (each.at, each.id))

    def tell_again(self) -> int:
        """See `Ledger.tell_again`."""
        plane = self.plane
        with plane.changed:
            dead = [each.id for each in self.outbox() if each.dead]
            if dead:
                plane.hdel(self.keys.telling, *dead)
                plane.put(keys.TELLING, set(plane.get(keys.TELLING) or ()) | {self.run}, keys.RUN_TTL_SECONDS)
            return len(dead)

    def _standing(self, id: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.plane.hash(self.keys.telling).get(id, "{}"))
        return found
