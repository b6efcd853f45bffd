"""What keeps a process from the next move of a run: said, tried again, and given up if it does not pass.

A server that does not answer or is full passes, however long that takes. Anything else that a store answers
may be for ever (a right that is missing, a value that is too large, a disk that stays full): it is tried so
often and for so long, and then the run is paused with the reason, which costs it nothing: `resume` goes on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torchord.cache.errors import CacheUnreachable, TorchordError, is_full
from torchord.cache.ledger.ledger import Ledger

log = logging.getLogger(__name__)

TRIES = 10
SECONDS = 300.0
MOST_PAUSE_SECONDS = 60.0
_KEPT = 64


class Teller(Protocol):
    """Where it is said: the process's heartbeat."""

    def hindered(self, run: str, reason: str | None) -> None:
        """Say what keeps this process from a run's next move; None takes it back."""


@dataclass
class _Hindrance:
    """One thing that failed.

    Attributes:
        place: where, such as a step and a slot.
        tries: so often in a row.
        since: when it first failed (monotonic clock, s).
        at: when it last did.
        text: what is said of it; "" while it is in nobody's way.
    """

    place: tuple[int, ...]
    tries: int
    since: float
    at: float
    text: str = ""


class Hindrances:
    """Counts what fails time after time, by run and by what was tried.

    Args:
        teller: says it.
        clock: monotonic seconds.
    """

    def __init__(self, teller: Teller, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._teller = teller
        self._clock = clock
        self._lock = threading.Lock()
        self._found: OrderedDict[tuple[str, str], _Hindrance] = OrderedDict()

    def met(
        self,
        ledger: Ledger,
        what: str,
        place: tuple[int, ...],
        error: TorchordError,
        *,
        token: int | None = None,
        seconds: float = SECONDS,
    ) -> None:
        """Hear that something failed for a run; pauses the run if it did so too often and for too long.

        Args:
            what: was tried, as in "checkpoint".
            place: where; at another one than before it is counted anew.
            token: as for `Ledger.transition`.
            seconds: for how long it is tried at least.
        """
        now, run, passes = self._clock(), ledger.run, _passes(error)
        with self._lock:
            found = self._found.get((run, what))
            if found is None or found.place != place:
                found = self._found[run, what] = _Hindrance(place, 0, now, now)
            found.tries, found.at = found.tries + 1, now
            found.text = f"try {found.tries}{'' if passes else f' of {TRIES}'}: {error}"
            self._found.move_to_end((run, what))
            forgotten = [self._found.popitem(last=False)[0][0] for _ in range(len(self._found) - _KEPT)]
            hopeless = not passes and found.tries >= TRIES and now - found.since >= seconds
            if hopeless:
                del self._found[run, what]
        for name in (*forgotten, run):
            self._tell(name)
        if hopeless:
            self._pause(ledger, found, error, token)

    def passed(self, run: str, what: str, *, moved: bool = True) -> None:
        """Hear that it went well.

        Args:
            moved: whether the run is further than before; else the tries are not forgotten.
        """
        if (run, what) not in self._found:
            return
        with self._lock:
            found = self._found.pop((run, what), None)
            if found is not None and not moved:
                self._found[run, what] = found
                found.text = ""
        self._tell(run)

    def due(self, run: str, what: str) -> bool:
        """Whether it is time to try again: after 1 s, 2 s, 4 s and so on, up to a minute."""
        with self._lock:
            found = self._found.get((run, what))
            if found is None:
                return True
            return self._clock() - found.at >= min(MOST_PAUSE_SECONDS, 2.0 ** (found.tries - 1))

    def waits(self, run: str, what: str) -> bool:
        """Whether it has failed and not gone well since."""
        return (run, what) in self._found

    def _tell(self, run: str) -> None:
        with self._lock:
            texts = [found.text for (name, _), found in self._found.items() if name == run and found.text]
        self._teller.hindered(run, "; ".join(texts) or None)

    def _pause(self, ledger: Ledger, found: _Hindrance, error: TorchordError, token: int | None) -> None:
        seconds = self._clock() - found.since
        message = (
            f"run {ledger.run!r} was paused, since this failed {found.tries} times in {seconds:.0f} s: "
            f"{error}; mend that, then run.resume() goes on"
        )
        log.error("%s", message)
        ledger.transition(
            "paused",
            allowed=("pending", "running"),
            event="paused",
            data={"message": message},
            error={"kind": type(error).__name__, "message": message},
            token=token,
        )


def _passes(error: TorchordError) -> bool:
    """Whether it passes without anybody's doing, or is a full server, which is said as such."""
    return isinstance(error, CacheUnreachable) or is_full(error)
