"""What a worker's log holds of its tasks: at INFO a line a second at the most, and no failure twice."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from typing import Any

_RUN = re.compile(r"'run': '([^']*)'")
_STEP = re.compile(r"'(?:step|version)': (\d+)")
_EVERY_SECONDS = 10.0
_RECEIVED, _TRACED = "celery.worker.strategy", "celery.app.trace"
_CHORDS = ("celery.backends.redis", "celery.backends.base")


class Brief(logging.Filter):
    """Puts torchord's tasks in a line every ten seconds, in place of two lines each with the whole receipt.

    The first one is said at once, so that one sees that the worker works. A task that the recipe's code ended
    is left to the line that says why (`torchord.coordinator.runtime.failures`). Tasks of others pass.

    Args:
        clock: seconds that only grow, replaced in tests.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._said = float("-inf")
        self._counted: dict[tuple[str, str], list[int]] = {}  # (run, task) -> [tasks, first step, last step]

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is logged; one that is may say something else than before."""
        data: Any = getattr(record, "data", None)
        if not isinstance(data, dict) or not str(data.get("name", "")).startswith("torchord."):
            return True
        if record.levelno > logging.INFO:
            return True
        if "return_value" not in data:  # received; or an error, which is told unless it has its own line
            return "exc" in data and not str(data["exc"]).startswith("ShardFailed(")
        self._count(str(data["name"]).removeprefix("torchord."), str(data["return_value"]))
        now = self._clock()
        if now - self._said < _EVERY_SECONDS:
            return False
        self._said = now
        record.msg, record.args = "%s", (self._line(),)
        return True

    def _count(self, task: str, receipt: str) -> None:
        run, step = _RUN.search(receipt), _STEP.search(receipt)
        at = int(step[1]) if step else 0
        found = self._counted.setdefault((run[1] if run else "?", task), [0, at, at])
        found[0] += 1
        found[1:] = min(found[1], at), max(found[2], at)

    def _line(self) -> str:
        parts = [
            f"run {run}: {count} {task}, "
            + (f"step {first}" if first == last else f"steps {first} to {last}")
            for (run, task), (count, first, last) in sorted(self._counted.items())
        ]
        self._counted.clear()
        return "; ".join(parts)


def _no_chord_of_ours(record: logging.LogRecord) -> bool:
    """Drop Celery's word on a chord that ended since the recipe's code raised: that has its own line."""
    said = record.getMessage() if str(record.msg).startswith("Chord %r raised") else ""
    return "ShardFailed(" not in said


def shorten(*, receipts: bool | None) -> None:
    """Have this process log so.

    Args:
        receipts: whether Celery's two lines a task are logged; None: a line every ten seconds.
    """
    for name in _CHORDS:
        logging.getLogger(name).addFilter(_no_chord_of_ours)
    if receipts is None:
        brief = Brief()
        for name in (_RECEIVED, _TRACED):
            logger = logging.getLogger(name)
            if not any(isinstance(each, Brief) for each in logger.filters):
                logger.addFilter(brief)
    elif not receipts:
        for name in (_RECEIVED, _TRACED):
            logging.getLogger(name).setLevel(logging.WARNING)
