"""What the supervisor remembers from round to round: since when something looks wrong, what was sent."""

from __future__ import annotations

from collections.abc import Callable

IDLE_SECONDS = 1.0  # a heartbeat is up to 0.3 s old: what looks idle for less may not be
UNSEEN_SECONDS = 0.75  # between a queue and its lease a message takes milliseconds, on a stalled machine more
REPEAT_SECONDS = 2.0


class Memory:
    """What the rounds before have seen and sent.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._since: dict[tuple[object, ...], float] = {}
        self._seen: set[tuple[object, ...]] = set()
        self._sent: dict[tuple[object, ...], float] = {}
        self._counts: dict[tuple[object, ...], int] = {}
        self._kept: dict[tuple[object, ...], float] = {}  # seconds to remember a sending, if more than 60

    def begin_round(self) -> None:
        """Start a round: nothing is reported yet."""
        self._seen.clear()

    def end_round(self) -> None:
        """Forget what this round did not report, and what was sent long ago."""
        for key in [key for key in self._since if key not in self._seen]:
            del self._since[key]
        now = self._clock()
        for key in [key for key, at in self._sent.items() if now - at > self._kept.get(key, 60.0)]:
            self._kept.pop(key, None)
            del self._sent[key]
            self._counts.pop(key, None)

    def lasted(self, key: tuple[object, ...]) -> float:
        """Seconds since `key` was first reported, in every round since."""
        self._seen.add(key)
        now = self._clock()
        return now - self._since.setdefault(key, now)

    def lasting(self, key: tuple[object, ...], seconds: float) -> bool:
        """Whether `key` has been reported in every round for `seconds`."""
        return self.lasted(key) >= seconds

    def due(self, key: tuple[object, ...], seconds: float) -> bool:
        """Whether nothing was sent for `key` in the last `seconds`; now something is."""
        now = self._clock()
        if now - self._sent.get(key, float("-inf")) < seconds:
            return False
        self._sent[key] = now
        if seconds > 60.0:
            self._kept[key] = min(seconds, 24 * 3600.0)
        return True

    def once(self, key: tuple[object, ...], seconds: float, send: Callable[[], None]) -> None:
        """Send, but not again within `seconds` for the same reason."""
        if self.due(key, seconds):
            send()

    def count(self, key: tuple[object, ...]) -> int:
        """How often this was asked about `key`, this time included."""
        self._counts[key] = self._counts.get(key, 0) + 1
        return self._counts[key]
