"""A worker process's lease, renewed from a thread of its own, and what it says of itself with each beat."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from torchord.cache import keys
from torchord.cache.errors import CacheError
from torchord.cache.ledger.distrusted import Distrusted
from torchord.cache.ledger.whereabouts import place_of
from torchord.cache.ledger.workers import Registry, WorkerInfo

log = logging.getLogger(__name__)

_BEATS_PER_LEASE = 5
PERIOD_SECONDS = keys.WORKER_LEASE_MS / 1000 / _BEATS_PER_LEASE
LONG_SECONDS = 5.0  # after so long at one task, the beats say at which line it is
_PACES_KEPT = 4  # runs


class Heartbeat:
    """Renews one process's lease from a daemon thread until stopped.

    Args:
        registry: where to.
        info: what to say; `doing` changes it.
        after: called from the thread with what a beat has said, once that has arrived.
        counters: what the tiers of the model cache have done in this process, as `WorkerInfo.cache` has it.

    Attributes:
        distrusted: whom nobody trusts, by node, as of the last beat.
    """

    def __init__(
        self,
        registry: Registry,
        info: WorkerInfo,
        *,
        after: Callable[[WorkerInfo], None] | None = None,
        counters: Callable[[], dict[str, float]] = dict,
    ) -> None:
        self.registry = registry
        self._info = info
        self._after = after
        self._counters = counters
        self.distrusted: dict[str, Distrusted] = {}
        self._doing: dict[int, tuple[str, float]] = {}  # thread -> task, since when by the monotonic clock
        self._since = 0.0
        self._worked: dict[str, tuple[float, ...]] = {}
        self._silent: float | None = None  # None: nobody says whether the loop turns
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="torchord-heartbeat", daemon=True)

    @property
    def info(self) -> WorkerInfo:
        """Who this process is; what it is at, and how fast, only the beats say."""
        return self._info

    def _said(self) -> WorkerInfo:
        """What the next beat says: made for each beat, since a task changes it several times."""
        with self._lock:
            pace = {name: min(seconds) for name, seconds in self._worked.items() if seconds}
            doing = "; ".join(task for task, _ in self._doing.values())
            return replace(
                self._info,
                task=doing,
                since=self._since,
                pace=pace,
                silent=self._silent or 0.0,
                where=self._where(),
                cache=self._counters(),
            )

    def _where(self) -> dict[str, str]:
        """At which line those threads are that have been at one task for long."""
        now = time.monotonic()
        return {
            task: place
            for thread, (task, began) in self._doing.items()
            if now - began > LONG_SECONDS and (place := place_of(thread))
        }

    def start(self) -> None:
        """Beat once, now, then from the thread."""
        try:
            self.distrusted = self.registry.beat(self._said())
        except CacheError as error:
            log.warning("heartbeat: %s", error)
        self._thread.start()

    def doing(self, task: str, environment: str | None = None) -> None:
        """Say what the calling thread is at; "" when idle. Sent with the next beat."""
        with self._lock:
            if task:
                self._doing[threading.get_ident()] = (task, time.monotonic())
            else:
                self._doing.pop(threading.get_ident(), None)
            self._since = time.time()
            if environment:
                self._info = replace(self._info, environment=environment)

    def turned(self) -> None:
        """The event loop that takes this process's messages turns: called by it, once in a while."""
        self._silent = 0.0

    def rests(self) -> None:
        """This process is told to end: its event loop will not turn any more, and nobody looks after it."""
        self._silent = self._after = None

    def worked(self, run: str, seconds: float) -> None:
        """Say what a shard of a run took here: who is idle can then tell how long this process will need.

        The first one counts for nothing, since it loads the recipe and the data; and of two the lesser,
        so that one hiccup makes nobody slow.
        """
        with self._lock:
            if run not in self._worked:
                self._worked[run] = ()
                for oldest in list(self._worked)[:-_PACES_KEPT]:
                    del self._worked[oldest]
                return
            self._worked[run] = (*self._worked[run][-1:], seconds)

    def refuse(self, run: str, reason: str | None) -> bool:
        """Say why this process may not work on a run; None takes it back.

        Returns:
            Whether that is news.
        """
        with self._lock:
            if self._info.refuses.get(run) == reason:
                return False
            refuses = {name: why for name, why in self._info.refuses.items() if name != run}
            if reason is not None:
                refuses[run] = reason
            self._info = replace(self._info, refuses=refuses)
            return True

    def hindered(self, run: str, reason: str | None) -> None:
        """Say what keeps this process from a run's next move; None takes it back."""
        with self._lock:
            others = {name: why for name, why in self._info.hindered.items() if name != run}
            hindered = others if reason is None else {**others, run: reason}
            self._info = replace(self._info, hindered=hindered)

    def discarded(self, wrong: dict[str, str]) -> None:
        """Say in which queues messages are thrown away, as the supervisor found."""
        with self._lock:
            self._info = replace(self._info, discarded=wrong)

    def stop(self) -> None:
        """Stop beating and end the lease."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2.0)
        try:
            self.registry.leave(self._info)
        except CacheError as error:
            log.debug("heartbeat: %s", error)

    def _run(self) -> None:
        while not self._stop.wait(PERIOD_SECONDS):
            try:
                said = self._said()
                self.distrusted = self.registry.beat(said)
            except CacheError as error:
                log.warning("heartbeat: %s", error)
                continue
            # In beats that arrived, not by the clock: a process that was stopped, or whose threads all waited
            # for one of them or for Redis, has not been deaf meanwhile.
            if self._silent is not None:
                self._silent += PERIOD_SECONDS
            if self._after is not None:
                self._after(said)
