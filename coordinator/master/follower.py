"""Following a run from outside, through outages: Redis may be away for a while, or come back empty."""

from __future__ import annotations

import time

from torchord.cache.errors import CacheUnreachable, RunNotFound
from torchord.cache.ledger.answers import Event
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.ledger.records import Head

OUTAGE_SECONDS = 90.0  # as long as workers wait for Redis
UNKNOWN_SECONDS = 15.0  # a supervisor creates a run again that Redis has lost
_PAUSE_SECONDS = 0.25


class Follower:
    """Reads head and events of a run again and again.

    Args:
        ledger: of the run.
        after: id of the last event seen.
    """

    def __init__(self, ledger: Ledger, after: str = "0-0") -> None:
        self._ledger = ledger
        self._after = after
        self._seen: float | None = None

    def look(self, *, block_seconds: float, resting: tuple[str, ...]) -> tuple[Head | None, list[Event]]:
        """The head, and the events since the last look.

        Args:
            block_seconds: how long to wait for an event.
            resting: states in which there is nothing to wait for.

        Returns:
            (None, []) while Redis is away, or does not know the run that it knew before.

        Raises:
            CacheUnreachable: Redis was away for too long, or from the start.
            RunNotFound: there is no such run; after an outage, nobody created it again.
        """
        now = time.monotonic()
        try:
            head = self._ledger.head()
            block = 0.0 if head.status in resting else block_seconds
            events = self._ledger.read_events(self._after, block_seconds=block)
        except CacheUnreachable:
            if self._seen is None or now - self._seen > OUTAGE_SECONDS:
                raise
        except RunNotFound as error:
            if self._seen is None:
                raise
            if now - self._seen > UNKNOWN_SECONDS:
                raise RunNotFound(
                    f"run {self._ledger.run!r} is no longer known: its Redis has lost its data. resume() "
                    "creates it from its newest checkpoint"
                ) from error
        else:
            self._seen = now
            if events:
                self._after = events[-1].id
            return head, events
        time.sleep(_PAUSE_SECONDS)
        return None, []
