"""The twin of `Events`."""

from __future__ import annotations

from typing import Any, cast

from torchord.cache import keys
from torchord.cache.ledger.answers import Event
from torchord.cache.testing.memory_control_plane import MemoryControlPlane


class MemoryEvents(MemoryControlPlane):
    """The event stream, without a server."""

    def emit(self, event: str, data: dict[str, Any]) -> None:
        """See `Ledger.emit`."""
        with self.plane.changed:
            self._event(event, data)

    def heard(self) -> dict[str, str]:
        """See `Ledger.heard`."""
        return self.plane.hash(self.keys.heard)

    def hear(self, callback: str, id: str) -> None:
        """See `Ledger.hear`."""
        self.plane.hset(self.keys.heard, {callback: id}, keys.RUN_TTL_SECONDS)

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
