"""Why a run is stopped, and what is said of an error: where it was raised, and what was being done."""

from __future__ import annotations

import logging
import os
import signal
import threading
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Self

from torchord.cache.ledger.ledger import Ledger
from torchord.coordinator.runtime.last_lines import of_worker

log = logging.getLogger(__name__)

_FRAMES_SHOWN = 4
_PYTHONS = os.path.dirname(os.__file__)
_WORKERS_OWN = ("billiard", "celery")  # whose handlers of signals raise to end a process


@dataclass(frozen=True)
class Failure:
    """Why a run was stopped, as its head and its event `failed` say it.

    Attributes:
        kind: class of the error, or "Poison" for what fails wherever it is tried.
        message: what happened, for people.
        details: what else is known: traceback, worker, step, shard, samples, ...; JSON-able.
    """

    kind: str
    message: str
    details: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, error: Exception, what: str, *, worker: str, **details: Any) -> Self:
        """What an error of somebody's code says, with where it was raised.

        Args:
            what: what failed, as in "part 1 of the evaluation of version 3".
            worker: id of the process that met it.
        """
        kind = type(error).__name__
        message = f"{what} failed on worker {worker}: {kind}: {error}{noted(error)}"
        return cls(kind, message, {"traceback": short_traceback(error), "worker": worker, **details})

    def stop(
        self,
        ledger: Ledger,
        *,
        allowed: Iterable[str] = ("running",),
        token: int | None = None,
        incarnation: str | None = None,
        shard: tuple[int, int] | None = None,
    ) -> None:
        """End the run as failed for this reason, and log it in a line; arguments: see `Ledger.transition`."""
        lines = of_worker(self.details.get("worker"))
        logged = {"log": lines} if lines else {}
        frames = "; ".join(str(self.details.get("traceback", "")).splitlines())
        log.error(
            "run %s failed: %s%s", ledger.run, " ".join(self.message.split()), frames and f" at {frames}"
        )
        ledger.transition(
            "failed",
            allowed=allowed,
            event="failed",
            data={"message": self.message},
            error={"kind": self.kind, "message": self.message, **self.details, **logged},
            token=token,
            incarnation=incarnation,
            shard=shard,
        )


class RecipeExit(Exception):
    """The recipe's code raised what ends a process or a thread, such as `sys.exit()`, and no error."""


@contextmanager
def contained() -> Iterator[None]:
    """Let what the recipe's code runs in here end its run, but neither the worker nor its thread.

    `SystemExit`, `KeyboardInterrupt` and their kin pass every `except Exception`: a worker's thread that
    one ends takes no task of any run any more. A signal's own still pass: Ctrl-C, and what Celery's
    handlers raise to end a process.

    Raises:
        RecipeExit: in the place of what was raised, with its traceback, its notes and the way out.
    """
    try:
        yield
    except Exception:
        raise
    except BaseException as end:
        if _signalled(end):
            raise
        found = RecipeExit(_said_of(end))
        for note in getattr(end, "__notes__", ()):
            found.add_note(note)
        raise found.with_traceback(end.__traceback__) from end


def _signalled(end: BaseException) -> bool:
    """Whether this was raised by the handler of a signal, and not by the code that it interrupted."""
    ctrl_c = isinstance(end, KeyboardInterrupt) and threading.current_thread() is threading.main_thread()
    if ctrl_c and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        return True  # which is no Python code: it leaves no frame of its own
    *_, (frame, _) = traceback.walk_tb(end.__traceback__)
    return _package(frame) in _WORKERS_OWN


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__")).partition(".")[0]


def _said_of(end: BaseException) -> str:
    kind = type(end).__name__
    frames = list(traceback.walk_tb(end.__traceback__))
    if _package(frames[-1][0]) == "argparse":
        caller, line = next(found for found in reversed(frames) if _package(found[0]) != "argparse")
        code = caller.f_code
        return (
            f"{kind}: {end}. argparse, called by {code.co_name} ({os.path.basename(code.co_filename)}:{line})"
            ", met the worker's command line, not yours, and would end the worker. Give the values as "
            "arguments of the recipe's entry, with functools.partial"
        )
    what = "sys.exit()" if isinstance(end, SystemExit) else f"a {kind}"
    return f"{kind}: {end}. {what} would end the worker, not the run: raise an error, such as RuntimeError"


def short_traceback(error: BaseException) -> str:
    """The last frames of an error, innermost last, one line each: enough to find the place.

    Of torch and what else is installed the innermost one alone, and of torchord none, as long as there is a
    frame of the user's own: those say what to mend.
    """
    walked = list(traceback.walk_tb(error.__traceback__))
    own = [place for place, (frame, _) in enumerate(walked) if _is_theirs(frame)]
    if own and own[-1] < len(walked) - 1:
        own.append(len(walked) - 1)
    kept = own[-_FRAMES_SHOWN:] or range(len(walked))[-_FRAMES_SHOWN:]
    frames = traceback.extract_tb(error.__traceback__)
    lines = [
        f"{os.path.basename(f.filename)}:{f.lineno} in {f.name}: {f.line or ''}".rstrip()
        for f in (frames[place] for place in kept)
    ]
    return "\n".join(lines)


def _is_theirs(frame: FrameType) -> bool:
    """Whether code is the user's: neither torchord's nor Python's nor an installed package's."""
    file = frame.f_code.co_filename
    return not (_package(frame) == "torchord" or file.startswith(("<", _PYTHONS)) or "site-packages" in file)


def noted(error: BaseException) -> str:
    """What was being done when the error was raised, from its notes (PEP 678)."""
    notes = [note.removeprefix("torchord: ") for note in getattr(error, "__notes__", ())]
    return f" ({'; '.join(notes)})" if notes else ""
