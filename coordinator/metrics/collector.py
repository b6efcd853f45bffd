"""Reads the figures of a scrape: bounded state of the control plane, and of a run only its new steps."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torchord.cache import keys
from torchord.cache.errors import CacheUnreachable, RunNotFound
from torchord.cache.ledger.incarnation import life
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.ledger.quarantine import quarantined
from torchord.cache.ledger.records import Head, LedgerEntry
from torchord.cache.ledger.workers import WorkerInfo
from torchord.coordinator.messages.task_names import GRADIENTS, QUEUES, UPDATES, short_name
from torchord.coordinator.metrics import families
from torchord.coordinator.metrics.families import Samples
from torchord.coordinator.runtime.control_plane import ControlPlane

log = logging.getLogger(__name__)

MOST_RUNS = 100
"""Told of in a scrape: those that are not at rest, then the newest."""

ROLES = {"client": GRADIENTS, "server": UPDATES}
STATES = ("pending", "running", "paused", "failed", "cancelled", "done", "unreadable")

_RECENT = 32
_MOST_STEPS = 500  # of a run, read in one scrape
_MOST_WORKERS = 10_000  # whose counters are remembered
_LOOKUPS = {
    ("process", "yes"): "process.hits",
    ("process", "no"): "process.misses",
    ("host", "yes"): "host.hits",
    ("host", "no"): "host.misses",
    ("store", "yes"): "store.reads",
}
_BYTES = {
    ("host", "read"): "host.nbytes",
    ("store", "read"): "store.nbytes",
    ("store", "written"): "store.written_nbytes",
}


@dataclass
class _Seen:
    """What this process knows of a run.

    Attributes:
        life: incarnation of the run.
        version: up to which its steps are counted.
        recent: its last steps.
        token: fencing token of the last of them.
    """

    life: str
    version: int
    recent: list[LedgerEntry] = field(default_factory=list)
    token: int = 0
    examples: int = 0
    nbytes: int = 0
    retries: int = 0
    recoveries: int = 0
    recovery_seconds: float = 0.0

    def count(self, entry: LedgerEntry) -> None:
        """Take one more step into account."""
        again = sum(max(0, slot.attempt - 1) for slot in entry.slots)
        self.examples += entry.examples
        self.nbytes += sum(slot.nbytes for slot in entry.slots)
        self.retries += again
        if again or (self.token and entry.token != self.token):
            self.recoveries += 1
            self.recovery_seconds += entry.seconds
        self.token = entry.token
        self.recent = [*self.recent[-_RECENT + 1 :], entry]


class Collector:
    """Collects a scrape, and remembers what counters need. Threads may share it: one scrapes at a time.

    Args:
        plane: connections of this process.
        clock: Unix time (s).
    """

    def __init__(self, plane: ControlPlane, *, clock: Callable[[], float] = time.time) -> None:
        self.plane = plane
        self._clock = clock
        self._lock = threading.Lock()
        self._runs: dict[str, _Seen] = {}
        self._cache: Counter[str] = Counter()
        self._said: dict[str, Mapping[str, float]] = {}  # worker -> its counters as last seen

    def text(self) -> str:
        """A scrape as Prometheus reads it."""
        return self.scrape().text()

    def scrape(self) -> Samples:
        """A scrape; where the store does not answer, one that says so."""
        with self._lock:
            began, samples = time.monotonic(), Samples()
            try:
                self._fleet(samples, alive := self.plane.registry.alive())
                self._all_runs(samples, alive)
            except Exception as error:  # noqa: BLE001  # whatever it is, whoever is on call is told
                log.warning("a scrape came to nothing: %s: %s", type(error).__name__, error)
                samples = Samples()
                samples.add(families.UP, 0)
            else:
                samples.add(families.UP, 1)
            samples.add(families.SECONDS, time.monotonic() - began)
            return samples

    # --- the fleet ------------------------------------------------------------------------

    def _fleet(self, samples: Samples, alive: Mapping[str, WorkerInfo]) -> None:
        registry = self.plane.registry
        for role, queue in ROLES.items():
            serving = [info for info in alive.values() if queue in info.queues]
            samples.add(families.WORKERS, len(serving), role)
            samples.add(families.BUSY, sum(bool(info.task) for info in serving), role)
        samples.add(families.DEAF, sum(info.deaf for info in alive.values()))
        samples.add(families.DISTRUSTED, len(registry.distrusted()))
        samples.add(families.SUPERVISOR, bool(registry.supervisor()))
        for queue, length in registry.lengths(QUEUES).items():
            samples.add(families.QUEUE, length, short_name(queue))
        samples.add(families.SET_ASIDE, quarantined(registry.client, registry.url))
        if (memory := registry.memory()) is not None:
            samples.add(families.MEMORY, memory.used)
            samples.add(families.LIMIT, memory.limit)
        self._count(alive)
        for (tier, found), name in _LOOKUPS.items():
            samples.add(families.LOOKUPS, self._cache[name], tier, found)
        for (tier, way), name in _BYTES.items():
            samples.add(families.BYTES, self._cache[name], tier, way)

    def _count(self, alive: Mapping[str, WorkerInfo]) -> None:
        """Add what each process has counted since it was seen last: the sum never falls when one ends."""
        known = {*_LOOKUPS.values(), *_BYTES.values()}
        for info in alive.values():
            before = self._said.get(info.id, {})
            for name in known & info.cache.keys():
                self._cache[name] += max(0, info.cache[name] - before.get(name, 0))  # type: ignore[assignment]
        self._said = {info.id: info.cache for info in list(alive.values())[:_MOST_WORKERS]}

    # --- the runs -------------------------------------------------------------------------

    def _all_runs(self, samples: Samples, alive: Mapping[str, WorkerInfo]) -> None:
        names = self._names()
        self._runs = {name: self._runs[name] for name in names if name in self._runs}
        states: Counter[str] = Counter()
        for name in names:
            try:
                state = self._run(found := Samples(), self.plane.ledger(name), alive)
                samples.take(found)
            except RunNotFound:
                continue
            except CacheUnreachable:
                raise
            except Exception:  # noqa: BLE001  # its records are none; the others' are
                state = "unreadable"
            samples.add(families.STATE, 1, name, state)
            states[state] += 1
        for state in STATES:
            samples.add(families.RUNS, states[state], state)

    def _names(self) -> Sequence[str]:
        active = [name for name in self.plane.registry.active_runs() if keys.is_name(name)][:MOST_RUNS]
        newest = [name for name in reversed(self.plane.runs.newest(MOST_RUNS)) if keys.is_name(name)]
        return list(dict.fromkeys([*active, *newest]))[:MOST_RUNS]

    def _run(self, samples: Samples, ledger: Ledger, alive: Mapping[str, WorkerInfo]) -> str:
        """A run's samples; its state."""
        run, head = ledger.run, ledger.head()
        seen = self._seen(ledger, head)
        state = head.status if head.status in STATES else "unreadable"
        samples.add(families.STEPS, head.version, run)
        if head.total_steps is not None:
            samples.add(families.PLANNED, head.total_steps, run)
        self._recent(samples, run, seen.recent)
        if state == "running":
            samples.add(families.LAG, max(0.0, self._clock() - head.committed_at), run)
        samples.add(families.EXAMPLES, seen.examples, run)
        samples.add(families.GRADIENTS, seen.nbytes, run)
        samples.add(families.RETRIES, seen.retries, run)
        samples.add(families.RECOVERIES, seen.recoveries, run)
        samples.add(families.RECOVERY, seen.recovery_seconds, run)
        samples.add(families.DUPLICATES, head.duplicates, run)
        samples.add(families.LATE, head.late, run)
        samples.add(families.DIVERGENT, head.divergent, run)
        samples.add(families.BACKUPS, head.backups, run)
        samples.add(families.REPLAYED, head.replayed, run)
        if state in ("pending", "running"):
            samples.add(families.REFUSING, sum(run in info.refuses for info in alive.values()), run)
            samples.add(families.HINDERED, any(run in info.hindered for info in alive.values()), run)
        if head.on:
            waiting = Counter("dead" if each.dead else "waiting" for each in ledger.outbox())
            for each in ("waiting", "dead"):
                samples.add(families.UNTOLD, waiting[each], run, each)
        return state

    def _seen(self, ledger: Ledger, head: Head) -> _Seen:
        """What is known of a run, with the steps that it has committed since it was looked at last."""
        seen, of = self._runs.get(ledger.run), life(head.incarnation)
        if seen is None or seen.life != of:
            seen = self._runs[ledger.run] = _Seen(of, max(0, head.version - _RECENT))
        seen.version = min(seen.version, head.version)  # after a rollback
        if head.version > seen.version:
            first = max(seen.version + 1, head.version - _MOST_STEPS + 1)
            for entry in ledger.entries(first, head.version):
                seen.count(entry)
            seen.version = head.version
        return seen

    def _recent(self, samples: Samples, run: str, recent: Sequence[LedgerEntry]) -> None:
        if not recent:
            return
        last, steps = recent[-1], len(recent)
        whole = sum(entry.seconds for entry in recent)
        compute = sum(
            min(entry.seconds, max((slot.seconds for slot in entry.slots), default=0.0)) for entry in recent
        )
        samples.add(families.LOSS, last.loss, run)
        samples.add(families.NORM, last.grad_norm, run)
        if whole > 0:
            samples.add(families.RATE, sum(entry.examples for entry in recent) / whole, run)
        for part, seconds in (("whole", whole), ("compute", compute), ("other", whole - compute)):
            samples.add(families.STEP, seconds / steps, run, part)
