"""A run's event stream: what happened, for whoever follows it."""

from __future__ import annotations

from typing import Any, cast

from torchord.cache import keys
from torchord.cache.errors import RecordDamaged
from torchord.cache.ledger.answers import (
    Event,
)
from torchord.cache.ledger.control_plane import ControlPlane
from torchord.cache.ledger.fields import EVENT, EVENT_DATA
from torchord.cache.ledger.figures import from_text, to_text


class Events(ControlPlane):
    """A run's event stream."""

    def emit(self, event: str, data: dict[str, Any]) -> None:
        """Append one event."""
        with self._during(f"emit {event!r}"):
            pipe = self.client.pipeline(transaction=True)
            pipe.xadd(
                self.keys.events,
                {"type": event, "data": to_text(data)},
                maxlen=keys.EVENTS_KEPT,
                approximate=True,
            )
            pipe.expire(self.keys.events, keys.RUN_TTL_SECONDS)
            pipe.execute()

    def heard(self) -> dict[str, str]:
        """Up to which event each callback of the run has been told."""
        with self._during("ask what callbacks have heard"):
            return cast(dict[str, str], self.client.hgetall(self.keys.heard))

    def hear(self, callback: str, id: str) -> None:
        """Note that a callback has been told up to an event."""
        with self._during("note what callbacks have heard"):
            pipe = self.client.pipeline(transaction=True)
            pipe.hset(self.keys.heard, callback, id)
            pipe.expire(self.keys.heard, keys.RUN_TTL_SECONDS)
            pipe.execute()

    def read_events(self, after: str = "0-0", *, block_seconds: float = 0.0, count: int = 500) -> list[Event]:
        """Events after an id, waiting up to `block_seconds` for the first."""
        with self._during("read the events"):
            block = None if block_seconds <= 0 else max(1, int(block_seconds * 1000))
            reply = cast(list[Any], self.client.xread({self.keys.events: after}, count=count, block=block))
            found = reply[0][1] if reply else []
            return [_event(id, fields) for id, fields in found]


def _event(id: str, fields: dict[str, str]) -> Event:
    """An event; of what is none, one that says so: who follows the stream goes on from its id."""
    try:
        read = EVENT.of(fields)
        return Event(id, read["type"], EVENT_DATA.of(from_text(read["data"])))
    except RecordDamaged as error:
        return Event(id, "unreadable", {"message": f"an event that is none: {error}"})
