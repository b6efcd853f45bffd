"""Writes what is known of runs into the database that outlives Redis, beside the supervisor's work."""

from __future__ import annotations

import logging
import threading

from torchord.cache.errors import CheckpointError, RunNotFound, TorchordError
from torchord.cache.files.run_store import RunStore, store_of
from torchord.coordinator.runtime.known_runs import rebuild, record_of
from torchord.coordinator.runtime.services import Services

log = logging.getLogger(__name__)

LOOK_SECONDS = 2.0
_ALL_EVERY = 30  # looks, after which runs at rest are looked at again: people may have labelled them
_SAY_EVERY = 150  # looks that failed


class Recorder:
    """Fills the database of runs for the one supervisor of a fleet, in a thread of its own: a disk may hang.

    Args:
        services: connections and stores of the process.
    """

    def __init__(self, services: Services) -> None:
        self._services = services
        self._store: RunStore | None = None
        self._written: dict[str, tuple[object, ...]] = {}
        self._looks = self._failed = 0
        self._wanted = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="torchord-recorder", daemon=True)

    def want(self) -> None:
        """The process is the supervisor now; the first call begins."""
        self._wanted = True
        if self._thread.ident is None and not self._stop.is_set():
            self._thread.start()

    def stop(self) -> None:
        """End, after one more look where this process was the supervisor."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2.0)

    def _run(self) -> None:
        try:
            self._store = store_of(self._services.settings)
        except Exception as error:  # noqa: BLE001  nothing depends on it
            log.error("no database of runs is kept: %s: %s", type(error).__name__, error)
        while self._store is not None:
            ends = self._stop.wait(LOOK_SECONDS)
            if self._wanted:
                self._wanted = False  # until the supervisor's next round
                self._guarded(self._store)
            if ends:
                return

    def _guarded(self, store: RunStore) -> None:
        try:
            self.look(store)
            self._failed = 0
        except Exception as error:  # noqa: BLE001  nothing depends on it
            if self._failed % _SAY_EVERY == 0:
                log.warning("the database of runs is not written: %s: %s", type(error).__name__, error)
            self._failed += 1
            if "file is not a database" in str(error) or "malformed" in str(error):
                store.set_aside()
                self._written.clear()

    def look(self, store: RunStore) -> None:
        """Write the records of the runs that have changed.

        Raises:
            CheckpointError: the database does not answer.
            CacheUnreachable: Redis does not.
        """
        known = self._services.runs.known()
        if not store.exists() or not self._written:
            if not store.exists() or not store.records():
                rebuild(store, self._services.settings.checkpoint_dir, known)
            self._written = {"": ()}
        whole = self._looks % _ALL_EVERY == 0
        self._looks += 1
        moving = set(self._services.registry.active_runs())
        records = []
        for name in known:
            if name in self._written and not whole and name not in moving:
                before = self._written[name]
                if before[1] in ("done", "cancelled", "failed"):
                    continue
            try:
                ledger = self._services.ledger(name)
                head = ledger.head()
                evaluations = ledger.evaluations()
                now = (head.incarnation, head.status, head.version, head.tags, head.notes, len(evaluations))
                if self._written.get(name) != now:
                    records.append(record_of(ledger, head, evaluations))
                    self._written[name] = now
            except RunNotFound:
                self._written.pop(name, None)
            except CheckpointError:
                raise
            except TorchordError as error:  # its records are none; the others' are
                log.debug("run %s is not recorded: %s", name, error)
        if records:
            try:
                store.put(records)
            except BaseException:
                for record in records:
                    self._written.pop(record.name, None)
                raise
