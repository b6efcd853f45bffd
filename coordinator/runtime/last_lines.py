"""The last lines that a worker logged: they go into the reason of a run that fails on it."""

from __future__ import annotations

import logging
import re
from collections import deque

KEPT, MOST = 20, 300
_PASSWORD = re.compile(r"(://[^/\s:@]*:)[^@\s]+@")
_FORM = logging.Formatter("%(asctime)s %(levelname)s %(message)s")


class LastLines(logging.Handler):
    """Keeps the newest `KEPT` lines of a process's log, each of `MOST` characters at the most.

    Args:
        worker: id of the process, as failures name it.
    """

    def __init__(self, worker: str) -> None:
        super().__init__(logging.INFO)
        self.worker = worker
        self._lines: deque[str] = deque(maxlen=KEPT)
        self.setFormatter(_FORM)

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
        try:
            said = self.format(record)
        except Exception:  # noqa: BLE001  # somebody's arguments do not fit their message
            said = str(record.msg)
        for line in said.splitlines()[-KEPT:]:
            self._lines.append(_PASSWORD.sub(r"\1***@", line)[:MOST])

    @property
    def lines(self) -> list[str]:
        """They, oldest first."""
        return list(self._lines)


def keep(worker: str) -> None:
    """Keep this process's last lines from now on, in the place of those of a process that forked it."""
    root = logging.getLogger()
    for handler in [each for each in root.handlers if isinstance(each, LastLines)]:
        root.removeHandler(handler)
    root.addHandler(LastLines(worker))


def of_worker(worker: object) -> list[str]:
    """The last lines of this process if it is that worker, else none: of others nothing is known here."""
    found = (each for each in logging.getLogger().handlers if isinstance(each, LastLines))
    return next((each.lines for each in found if each.worker == worker), [])
