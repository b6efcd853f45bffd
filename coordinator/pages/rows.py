"""One line of the list of runs."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from torchord.cache.ledger.records import Head, LedgerEntry
from torchord.coordinator.master.reports import RunStatus
from torchord.coordinator.messages.waits import Wait

if TYPE_CHECKING:
    from torchord.coordinator.pages.subject import Seen

RECENT = 8
"""How many of the last steps say how fast a run goes now."""

ENDED = ("done", "failed", "cancelled")
ON_DISK = "on disk"
UNREADABLE = "unreadable"


def row(
    name: str,
    head: Head,
    status: RunStatus | None,
    recent: Sequence[LedgerEntry],
    evaluations: dict[int, dict[str, float]],
) -> dict[str, Any]:
    """A run that Redis knows.

    Args:
        status: None of a run that has ended.
        recent: its last steps, as far as Redis has them.
        evaluations: metrics of each evaluated version.
    """
    last = recent[-1] if recent else None
    state = head.status if status is None else status.state
    evaluated = max(evaluations, default=None)
    moving = state in ("running", "pending")
    seconds = median(entry.seconds for entry in recent) if recent else 0.0
    total = head.total_steps
    return {
        "name": name,
        "state": state,
        "version": head.version,
        "total": total,
        "left_seconds": (total - head.version) * seconds if moving and total and recent else None,
        "loss": None if last is None else last.loss,
        "measured": {} if last is None else last.metrics,
        "metrics": {} if evaluated is None else evaluations[evaluated],
        "evaluated": evaluated,
        "rate": sum(entry.examples for entry in recent) / total_seconds
        if moving and (total_seconds := sum(entry.seconds for entry in recent)) > 0
        else None,
        "workers": len({slot.worker for entry in recent for slot in entry.slots}) if moving else None,
        "submitted_at": head.submitted_at,
        "committed_at": head.committed_at if head.version else None,
        "waits": [said(wait) for wait in status.waits] if status else [],
        "error": str((head.error or {}).get("message", "")) if state == "failed" else "",
    }


def disk_row(name: str, seen: Seen) -> dict[str, Any]:
    """A run that Redis does not know, by what lies on disk."""
    evaluated = max(seen.evaluations, default=None)
    return {
        **empty(name, ON_DISK),
        "version": seen.version,
        "metrics": {} if evaluated is None else seen.evaluations[evaluated],
        "evaluated": evaluated,
    }


def empty(name: str, state: str, problem: str = "") -> dict[str, Any]:
    """A run of which nothing is known but this."""
    unknown = ("version", "total", "left_seconds", "loss", "evaluated", "rate", "workers")
    blank: dict[str, Any] = dict.fromkeys((*unknown, "submitted_at", "committed_at"))
    return {
        "name": name,
        "state": state,
        **blank,
        "measured": {},
        "metrics": {},
        "waits": [],
        "error": problem,
    }


def said(wait: Wait) -> dict[str, Any]:
    """One thing that a run waits for: what, since when, and who ends it."""
    return {"kind": wait.kind.value, "what": wait.what, "ends": wait.ends, "since": wait.since}
