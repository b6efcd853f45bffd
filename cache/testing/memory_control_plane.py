"""What the twins of the ledger's parts have in common."""

from __future__ import annotations

from typing import Any, cast

import redis

from torchord.cache import keys
from torchord.cache.ledger.answers import Event
from torchord.cache.ledger.figures import from_text, to_text
from torchord.cache.ledger.ledger import Ledger
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

    def _event(self, event: str, data: dict[str, Any]) -> None:
        events = list(self.plane.get(self.keys.events) or [])
        last = int(events[-1].id.partition("-")[0]) if events else 0
        number = max(last + 1, int(self.plane.clock() * 1000))
        events.append(Event(f"{number}-0", event, from_text(to_text(data))))
        self.plane.put(self.keys.events, events[-keys.EVENTS_KEPT :], keys.RUN_TTL_SECONDS)
