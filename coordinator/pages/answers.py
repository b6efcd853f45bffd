"""What programs ask of runs, beside what the pages show. Every method blocks, as those of `Pages`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchord.cache import keys
from torchord.cache.errors import InvalidInput
from torchord.coordinator.master.answers import as_tensors, in_lists
from torchord.coordinator.master.master import Master
from torchord.coordinator.pages import rows
from torchord.coordinator.pages.columns import SERIES
from torchord.coordinator.pages.pages import Pages
from torchord.coordinator.spec.submission import read

STEPS_MOST, EVENTS_MOST = 5000, 500
_HISTORY_SECONDS = 20.0


class Answers(Pages):
    """What this process tells programs. Threads may share it."""

    def steps(self, name: str, *, after: int = 0, limit: int = 1000) -> dict[str, Any]:
        """Committed steps, oldest first.

        Args:
            after: the version that the first of them comes after.
            limit: at most so many, and `STEPS_MOST`.

        Returns:
            {"steps": [...], "version": the run's, "next": what `after` is to be for those that follow, None
            at the end}; a step has version, committed_at (Unix time, s), seconds, skipped, and `SERIES`.

        Raises:
            RunNotFound: neither Redis nor the checkpoint directory knows the run.
        """
        limit = max(1, min(limit, STEPS_MOST))
        subject, until = self._subject(name), time.monotonic() + _HISTORY_SECONDS
        seen = subject.seen()
        with subject.lock:
            history = subject.history
            while True:
                history.look(seen.incarnation, seen.version)
                columns = history.columns
                begin = columns.row(after + 1)
                enough = len(columns) - begin >= limit or history.loaded >= seen.version
                if enough or time.monotonic() > until:
                    break
            found = [
                {
                    "version": columns.versions[row],
                    "committed_at": columns.times[row],
                    "seconds": columns.seconds[row],
                    "skipped": bool(columns.skipped[row]),
                    **{quantity: columns.values(quantity)[row] for quantity in SERIES},
                }
                for row in range(begin, min(begin + limit, len(columns)))
            ]
        last = found[-1]["version"] if found else after
        return {
            "steps": found,
            "version": seen.version,
            "next": last if last < seen.version and found else None,
        }

    def events(self, name: str, *, after: str = "0-0", limit: int = EVENTS_MOST) -> dict[str, Any]:
        """Events after an id, steps among them, and whether the run rests.

        Raises:
            InvalidInput: `after` is no id of an event.
            RunNotFound: Redis does not know the run.
        """
        first, dash, second = after.partition("-")
        if not (dash and first.isdecimal() and second.isdecimal() and len(after) < 40 and after.isascii()):
            raise InvalidInput(f"an event's id is two numbers with a dash between them, not {after!r:.50}")
        ledger = self._subject(name, keep=False).ledger
        head = ledger.head()
        found = ledger.read_events(after, count=max(1, min(limit, EVENTS_MOST)))
        return {
            "events": [event.as_row() for event in found],
            "state": head.status,
            "ended": head.status in rows.ENDED,
        }

    def recipes(self, folder: str) -> list[dict[str, Any]]:
        """What may be submitted: name and adjustable fields of each file of the allow-list."""
        found = []
        for path in sorted(Path(folder).glob("*.toml")) if folder else []:
            try:
                adjustable = list(read(path.read_text(encoding="utf-8")).adjustable)
            except (OSError, UnicodeDecodeError, ValueError):
                continue  # whoever submits it is told why
            found.append({"recipe": path.stem, "adjustable": adjustable})
        return found

    def submit(
        self, folder: str, recipe: str, *, name: str | None = None, config: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Submit a run by the name of its recipe.

        Args:
            folder: where the files are that may be submitted, NAME.toml each.
            recipe: name of one of them.
            name: of the run; None: the file's, or one made from the time.
            config: fields in place of the file's, of those that it says are adjustable.

        Raises:
            InvalidInput: there is no such recipe, or it lets nobody choose a field of that name.
            TorchordError: as `Master.submit`.
        """
        path = Path(folder) / f"{recipe}.toml"
        if not folder or not keys.is_name(recipe) or not path.is_file():
            raise InvalidInput(
                f"no recipe {recipe!r:.120} may be submitted here; GET /api/recipes lists those that may"
            )
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidInput(f"recipe {recipe!r} cannot be read here: {error}") from error
        said = read(text).adjusted(config or {})
        master = Master(self._services.settings.url, checkpoint_dir=self._services.settings.checkpoint_dir)
        run = master.submit(said.recipe, said.config, name=name or said.name, **said.options())
        return {"name": run.name, "state": run.status().state}

    def predict(
        self, name: str, inputs: Any, *, version: int | None, batch_size: int, timeout: float
    ) -> dict[str, Any]:
        """The outputs for some inputs, computed by the workers, and the version that they are of.

        Args:
            inputs: rows of numbers as nested lists, or a mapping of such.
            version: None for the newest.
            timeout: seconds.

        Raises:
            TorchordError: as `Run.predict`.
        """
        run, given = self._subject(name).run, as_tensors(inputs)
        if version is None:
            version, found = run.predict_newest(given, batch_size, timeout=timeout)
        else:
            found = run.predict(given, batch_size, version=version, timeout=timeout)
        return {"version": version, "outputs": in_lists(found)}
