"""What the pages about runs ask for. Every method blocks: a web server calls them in threads."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torchord.cache.errors import CacheUnreachable, CheckpointError, InvalidInput, TorchordError
from torchord.cache.settings import Settings
from torchord.coordinator.messages.broker import celery_url, publisher, transport_options
from torchord.coordinator.messages.sender import Sender
from torchord.coordinator.pages import rows
from torchord.coordinator.pages.comparing import differences
from torchord.coordinator.pages.curves import curves
from torchord.coordinator.pages.overview import overview
from torchord.coordinator.pages.subject import Subject
from torchord.coordinator.pages.timeline import timeline
from torchord.coordinator.runtime.services import Services

_SUBJECTS_KEPT = 32
_ROWS_KEPT = 2000
_DISK_SECONDS = 30.0  # between two looks at the checkpoint directory
_DISK_RUNS_MOST = 500
_PROBLEMS_SHOWN = 50
COMPARED_MOST = 8


class Pages:
    """All that this process shows of runs. Threads may share it.

    Args:
        settings: where the servers and the checkpoints are.
    """

    def __init__(self, settings: Settings) -> None:
        self._services = Services(settings)
        self._sender = Sender(publisher(celery_url(settings.url), transport_options(settings.url)))
        self._lock = threading.Lock()
        self._subjects: OrderedDict[str, Subject] = OrderedDict()
        self._rows: OrderedDict[str, tuple[tuple[Any, ...], dict[str, Any]]] = OrderedDict()
        self._disk: tuple[float, list[dict[str, Any]]] = (float("-inf"), [])

    # --- the list -----------------------------------------------------------------------

    def listed(self) -> dict[str, Any]:
        """Every run that Redis or the checkpoint directory knows, the newest first, as `rows` has them.

        Raises:
            CacheUnreachable: Redis does not answer.
        """
        names = self._services.runs.known()
        found = [self._row(name) for name in names]
        found.reverse()
        known = set(names)
        found += [row for row in self._rows_on_disk() if row["name"] not in known]
        return {"now": time.time(), "runs": found, "workers": len(self._services.registry.alive())}

    def _row(self, name: str) -> dict[str, Any]:
        """One run's line, whatever is wrong with its records."""
        try:
            return self._readable_row(name)
        except CacheUnreachable:
            raise
        except Exception as error:  # noqa: BLE001  # one run's records hide no other run
            return rows.empty(name, rows.UNREADABLE, _sentence(error))

    def _readable_row(self, name: str) -> dict[str, Any]:
        ledger = self._services.ledger(name)
        head = ledger.head()
        key = (head.incarnation, head.status, head.version, head.submitted_at)
        if head.status in rows.ENDED:
            with self._lock:
                kept = self._rows.get(name)
            if kept is not None and kept[0] == key:
                return kept[1]
        status = None if head.status in rows.ENDED else self._subject(name, keep=False).run.status()
        recent = ledger.entries(max(1, head.version - rows.RECENT + 1), head.version)
        found = rows.row(name, head, status, recent, ledger.evaluations())
        with self._lock:
            self._rows[name] = (key, found)
            while len(self._rows) > _ROWS_KEPT:
                self._rows.popitem(last=False)
        return found

    def _rows_on_disk(self) -> list[dict[str, Any]]:
        from torchord.cache.files.checkpoint import runs_in

        with self._lock:
            looked, found = self._disk
        if time.monotonic() - looked < _DISK_SECONDS:
            return found
        found = []
        try:
            names = runs_in(self._services.settings.checkpoint_dir)[-_DISK_RUNS_MOST:]
        except CheckpointError:  # a place that this process cannot see has nothing to show
            names = []
        for name in names:
            try:
                seen = self._subject(name, keep=False).on_disk()
            except Exception as error:  # noqa: BLE001  # as above
                found.append(rows.empty(name, rows.UNREADABLE, _sentence(error)))
            else:
                found += [] if seen is None else [rows.disk_row(name, seen)]
        with self._lock:
            self._disk = (time.monotonic(), found)
        return found

    def compared(self, names: Sequence[str]) -> dict[str, Any]:
        """The lines of some runs, and the entries of recipe and config in which they differ.

        Raises:
            RunNotFound: one is not known.
            InvalidInput: there are more than `COMPARED_MOST`.
        """
        if len(names) > COMPARED_MOST:
            raise InvalidInput(f"{len(names)} runs are too many to compare; choose at most {COMPARED_MOST}")
        seen = [self._subject(name).seen() for name in names]
        lines = [
            self._row(name) if one.head else rows.disk_row(name, one)
            for name, one in zip(names, seen, strict=True)
        ]
        return {"now": time.time(), "runs": lines, "differences": differences([one.spec for one in seen])}

    # --- one run ------------------------------------------------------------------------

    def overview(self, name: str) -> dict[str, Any]:
        """Where a run stands, what happened to it and what it was submitted as: see `overview`.

        Raises:
            RunNotFound: neither Redis nor the checkpoint directory knows it.
        """
        subject = self._subject(name)
        seen = subject.seen()
        line = self._row(name) if seen.head else rows.disk_row(name, seen)
        with subject.lock:
            subject.history.look(seen.incarnation, seen.version)
            return overview(subject, seen, line, self._services.registry.alive())

    def curves(
        self, name: str, *, points: int, first: int = 0, last: int | None = None, have: str = ""
    ) -> dict[str, Any]:
        """A run's curves (see `curves`), and how far they are read.

        Args:
            have: the mark of the curves that the asker has; while they are the same, no curve is told.

        Raises:
            RunNotFound: neither Redis nor the checkpoint directory knows the run.
        """
        subject = self._subject(name)
        seen = subject.seen()
        with subject.lock:
            history = subject.history
            history.look(seen.incarnation, seen.version)
            stamp = (seen.incarnation, history.loaded, len(history.columns), len(seen.evaluations), points)
            mark = ".".join(map(str, (*stamp, first, last)))
            told = {"mark": mark, "loaded": history.loaded, "version": seen.version, "now": time.time()}
            if mark == have:
                return told
            found = curves(history.columns, seen.evaluations, points=points, first=first, last=last)
            return {**told, **found}

    def timeline(self, name: str, *, first: int | None = None, last: int | None = None) -> dict[str, Any]:
        """Who computed which shard when: see `timeline`.

        Raises:
            RunNotFound: neither Redis nor the checkpoint directory knows the run.
        """
        subject = self._subject(name)
        seen = subject.seen()
        moving = seen.head is not None and seen.head.status not in rows.ENDED
        alive = self._services.registry.alive()
        with subject.lock:
            history = subject.history
            history.look(seen.incarnation, seen.version)
            found = timeline(history.columns, history.events, alive, first=first, last=last)
        return {**found, "moving": moving, "newest": history.columns.last}

    def audit(self, name: str) -> dict[str, Any]:
        """The audit of a run's ledger, as `Run.verify` makes it; takes as long as the run has steps.

        Raises:
            RunNotFound: Redis does not know the run.
        """
        found = self._subject(name).run.verify()
        problems = list(found.problems)
        return {
            "ok": found.ok,
            "said": str(found),
            "problems": problems[:_PROBLEMS_SHOWN],
            "left_out": max(0, len(problems) - _PROBLEMS_SHOWN),
        }

    def write_weights(self, name: str, path: str) -> int:
        """Write the newest version's weights, as `Run.model` gives them, as a safetensors file; its version.

        Raises:
            VersionMissing: no version is stored.
            RunNotFound: Redis does not know the run.
        """
        from safetensors.torch import save_file

        from torchord.coordinator.compute.averaging import ENTRY

        version, tensors = self._subject(name).run.tensors()
        kept = {
            entry: tensors.get(f"{ENTRY}/{entry}", tensor).clone()
            for entry, tensor in tensors.items()
            if "/" not in entry  # what has one is no parameter and no buffer
        }
        save_file(kept, path, metadata={"run": name, "version": str(version)})
        return version

    def act(self, name: str, verb: str) -> dict[str, Any]:
        """Do to a run what a person has asked for; its state afterwards.

        Args:
            verb: "pause", "resume" or "cancel".

        Raises:
            RunError: the run's state does not admit it.
            RunNotFound: there is no such run.
        """
        run = self._subject(name).run
        {"pause": run.pause, "resume": run.resume, "cancel": run.cancel}[verb]()
        return {"state": run.status().state}

    # --- parts --------------------------------------------------------------------------

    def _subject(self, name: str, *, keep: bool = True) -> Subject:
        """What is kept of a run; of those that were looked at last, with their histories.

        Raises:
            InvalidInput: no run can have that name.
        """
        with self._lock:
            found = self._subjects.get(name)
            if found is None:
                found = Subject(self._services, self._sender, name)
            if keep:
                self._subjects[name] = found
                self._subjects.move_to_end(name)
                while len(self._subjects) > _SUBJECTS_KEPT:
                    self._subjects.popitem(last=False)
        return found


def _sentence(error: Exception) -> str:
    """What is wrong, for people."""
    if isinstance(error, TorchordError):
        return str(error)
    return f"its records cannot be read: {type(error).__name__}: {error}"
