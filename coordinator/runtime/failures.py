"""Why a run is stopped, and what is said of an error: where it was raised, and what was being done."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from torchord.cache.ledger.ledger import Ledger

_FRAMES_SHOWN = 4


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
        """End the run as failed for this reason; arguments as for `Ledger.transition`."""
        ledger.transition(
            "failed",
            allowed=allowed,
            event="failed",
            data={"message": self.message},
            error={"kind": self.kind, "message": self.message, **self.details},
            token=token,
            incarnation=incarnation,
            shard=shard,
        )


def short_traceback(error: BaseException) -> str:
    """The last frames of an error, innermost last, one line each: enough to find the place."""
    frames = traceback.extract_tb(error.__traceback__)[-_FRAMES_SHOWN:]
    lines = [
        f"{os.path.basename(f.filename)}:{f.lineno} in {f.name}: {f.line or ''}".rstrip() for f in frames
    ]
    return "\n".join(lines)


def noted(error: BaseException) -> str:
    """What was being done when the error was raised, from its notes (PEP 678)."""
    notes = [note.removeprefix("torchord: ") for note in getattr(error, "__notes__", ())]
    return f" ({'; '.join(notes)})" if notes else ""
