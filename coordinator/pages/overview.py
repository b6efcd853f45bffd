"""What a run's page says in words and tables."""

from __future__ import annotations

import time
from collections.abc import Container
from typing import Any

from torchord.coordinator.master.reports import stop_reason
from torchord.coordinator.master.standing import untold
from torchord.coordinator.pages.subject import Seen, Subject

_EVENTS_SHOWN = 300
_EVALUATIONS_SHOWN = 300
_WORKERS_SHOWN = 100
_UNTOLD_SHOWN = 50
_STEPS_LOOKED_AT = 2000
"""Of who works: the last steps say it."""


def overview(subject: Subject, seen: Seen, line: dict[str, Any], alive: Container[str]) -> dict[str, Any]:
    """Where a run stands.

    Args:
        subject: with its history read as far as it goes.
        seen: where the run stands.
        line: of the list.
        alive: the living workers' ids.
    """
    head, history = seen.head, subject.history
    place, checkpoints = subject.checkpoints(seen.incarnation)
    error = {} if head is None else head.error or {}
    evaluations = sorted(seen.evaluations.items())
    return {
        **line,
        "now": time.time(),
        "incarnation": seen.incarnation,
        "reason": "" if head is None else stop_reason(head),
        "server": "" if head is None else head.owner,
        "environment": "" if head is None else head.environment,
        "counted": {}
        if head is None
        else {
            "duplicates ignored": head.duplicates,
            "late shards ignored": head.late,
            "backups sent": head.backups,
            "steps replayed": head.replayed,
            "gradients that differed": head.divergent,
        },
        "failure": {
            "message": str(error.get("message", "")),
            "traceback": str(error.get("traceback", "")),
            "worker": str(error.get("worker", "")),
            "log": [str(line) for line in error.get("log") or ()]
            if isinstance(error.get("log"), list)
            else [],
        },
        "recipe": seen.spec.get("recipe", {}),
        "config": seen.spec.get("config", {}),
        "switches": seen.spec.get("switches", {}),
        "evaluations": evaluations[-_EVALUATIONS_SHOWN:],
        "evaluations_left_out": max(0, len(evaluations) - _EVALUATIONS_SHOWN),
        "checkpoints": checkpoints,
        "checkpoint_dir": place,
        "untold": _untold(subject) if head is not None and head.on else [],
        "events": [event.as_row() for event in list(history.events)[-_EVENTS_SHOWN:]],
        "crew": _crew(subject, alive),
        "loaded": history.loaded,
        "steps_known": len(history.columns),
        "problem": history.problem,
    }


def _untold(subject: Subject) -> list[str]:
    """What others were to be told of the run and could not be, or not at once, in words."""
    return [said for telling in subject.ledger.outbox() if (said := untold(telling))][:_UNTOLD_SHOWN]


def _crew(subject: Subject, alive: Container[str]) -> list[dict[str, Any]]:
    """Who computed the last steps: the shards and seconds of each, those with the most first."""
    columns = subject.history.columns
    found: dict[str, dict[str, Any]] = {}
    for row in range(max(0, len(columns) - _STEPS_LOOKED_AT), len(columns)):
        for shard in columns.shards(row):
            one = found.setdefault(
                shard.worker,
                {
                    "worker": shard.worker,
                    "shards": 0,
                    "seconds": 0.0,
                    "again": 0,
                    "alive": shard.worker in alive,
                },
            )
            one["shards"] += 1
            one["seconds"] += shard.seconds
            one["again"] += shard.attempt > 1
            one["last"] = columns.versions[row]
    return sorted(found.values(), key=lambda one: -one["shards"])[:_WORKERS_SHOWN]
