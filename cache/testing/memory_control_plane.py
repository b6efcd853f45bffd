"""What the twins of the ledger's parts have in common."""

from __future__ import annotations

import re
from typing import Any, cast

import redis

from torchord.cache import keys
from torchord.cache.ledger.answers import Event
from torchord.cache.ledger.figures import from_text, to_text
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.ledger.outbox import entry_arguments
from torchord.cache.testing.memory_plane import URL, Hash, MemoryPlane, NoClient


class MemoryControlPlane(Ledger):
    """One run's control keys on a plane.

    Args:
        plane: the keys, shared by all that talk to the same "server".
        run: the run's name.
    """

    def __init__(self, plane: MemoryPlane, run: str) -> None:
        super().__init__(cast(redis.Redis, NoClient()), URL, run)
        self.plane = plane

    @property
    def _head(self) -> Hash:
        return self.plane.hash(self.keys.head)

    def _holds(self, token: int) -> bool:
        return int(self._head.get("token", -1)) == token

    def _to_tell(self, event: str, id: str, text: str) -> None:
        plane, names = self.plane, self.keys
        found = re.search(f",{event}=(\\d),", self._head.get("on", ""))
        _, _, most, full = entry_arguments(event, id, text)
        for place in range(int(found[1]) if found else 0):
            there = plane.hash(names.outbox)
            if len(there) >= most:
                self._event("not told", from_text(full))
                continue
            plane.hset(names.outbox, {f"{id}.{place}": text, **there}, keys.RUN_TTL_SECONDS)
            plane.put(keys.TELLING, set(plane.get(keys.TELLING) or ()) | {self.run}, keys.RUN_TTL_SECONDS)

    def _event(self, event: str, data: dict[str, Any]) -> None:
        events = list(self.plane.get(self.keys.events) or [])
        last = int(events[-1].id.partition("-")[0]) if events else 0
        number = max(last + 1, int(self.plane.clock() * 1000))
        events.append(Event(f"{number}-0", event, from_text(to_text(data))))
        self.plane.put(self.keys.events, events[-keys.EVENTS_KEPT :], keys.RUN_TTL_SECONDS)
