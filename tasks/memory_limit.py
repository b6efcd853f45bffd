"""A worker that has grown to the memory that it may have ends after its task, and starts anew.

What leaks does so in code of recipes, in libraries and in allocators. The kernel ends a process that takes
too much in the middle of its work, and with it perhaps others; this ends it between two tasks.
"""

from __future__ import annotations

import atexit
import logging
import resource
import sys
from collections.abc import Callable
from pathlib import Path

from celery.worker import state

from torchord.cache.errors import InvalidInput
from torchord.tasks.renewal import AGAIN, run_again

log = logging.getLogger(__name__)


def resident() -> int:
    """Bytes of memory that this process holds; where there is no /proc, the most that it ever held."""
    try:
        pages = Path("/proc/self/statm").read_text().split()[1]
    except OSError:
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most << 10
    return int(pages) * resource.getpagesize()


def beyond(nbytes: int, held: Callable[[], int] = resident) -> str:
    """What is to be said where this process holds as much as it may; "" if it does not, or has no limit."""
    if not nbytes or (holds := held()) < nbytes:
        return ""
    return f"it holds {holds >> 20} MiB, and may have {nbytes >> 20} (TORCHORD_MEMORY_LIMIT_BYTES)"


class MemoryLimit:
    """Looks at this process's memory with each beat, until it has reached the limit once.

    Args:
        nbytes: the limit; 0 for none.
        end: ends the worker once it has done what it is at; told why.
        held: how much memory there is.

    Raises:
        InvalidInput: the worker holds as much before its first task, and would start anew for ever.
    """

    def __init__(
        self, nbytes: int, end: Callable[[str], None], *, held: Callable[[], int] = resident
    ) -> None:
        self._nbytes = nbytes
        self._end = end
        self._held = held
        if nbytes and (holds := held()) >= nbytes:
            raise InvalidInput(
                f"a worker holds {holds >> 20} MiB before its first task, and may have {nbytes >> 20} "
                "(TORCHORD_MEMORY_LIMIT_BYTES); give it more, or leave the setting out"
            )

    def look(self) -> bool:
        """Whether the worker is to end."""
        if why := beyond(self._nbytes, self._held):
            self._nbytes = 0
            self._end(why)
        return bool(why)


def end_after_task(why: str) -> None:
    """Have Celery end this worker as at a SIGTERM, and run its program anew, as at a SIGHUP.

    What it is at is handed back, as ever when a worker ends in order. Where the program cannot be run again,
    it ends with the exit code `AGAIN`.
    """
    log.critical("this worker takes no more tasks, and starts anew: %s", why)
    atexit.register(run_again)
    state.should_stop = AGAIN
