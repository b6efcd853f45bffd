"""A run's curves in few points: what each step and each evaluation measured."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from torchord.coordinator.drawing.sampling import sampled
from torchord.coordinator.pages.columns import SERIES, Columns

POINTS_LEAST, POINTS_MOST = 50, 4000


def curves(
    columns: Columns,
    evaluations: dict[int, dict[str, float]],
    *,
    points: int,
    first: int = 0,
    last: int | None = None,
) -> dict[str, Any]:
    """The curves between two versions, at most `points` points each.

    Args:
        columns: the steps.
        evaluations: metrics of each evaluated version.
        points: taken to be between `POINTS_LEAST` and `POINTS_MOST`.
        first: the first version.
        last: the last one; None: the newest.

    Returns:
        {"series": {name: curve}, "measured": {name: curve}, "metrics": {name: curve}, "skipped": [versions
        whose update was left out]}: "measured" by steps, "metrics" by evaluations; a curve is {"step":
        [version], "time": [Unix time (s) of its commit], "value": [...]}.
    """
    points = max(POINTS_LEAST, min(points, POINTS_MOST))
    begin, end = columns.row(first), len(columns) if last is None else columns.row(last + 1)

    def curve(values: array[float], rows: Sequence[int] | None = None) -> dict[str, Any]:
        """A column's, or that of values at some rows."""
        inside = (begin, end) if rows is None else (bisect_left(rows, begin), bisect_left(rows, end))
        places = sampled(values, points, *inside)
        found = places if rows is None else [rows[place] for place in places]
        return {
            "step": [columns.versions[row] for row in found],
            "time": [columns.times[row] for row in found],
            "value": [values[place] for place in places],
        }

    skipped = [columns.versions[row] for row in range(begin, end) if columns.skipped[row]]
    inside = [v for v in sorted(evaluations) if v >= first and (last is None or v <= last)]
    names = sorted({name for version in inside for name in evaluations[version]})
    return {
        "series": {name: curve(columns.values(name)) for name in SERIES},
        "measured": {name: curve(values, rows) for name, (rows, values) in sorted(columns.metrics().items())},
        "metrics": {name: _metric(columns, evaluations, inside, name, points) for name in names},
        "skipped": skipped[-points:],
    }


def _metric(
    columns: Columns, evaluations: dict[int, dict[str, float]], inside: list[int], name: str, points: int
) -> dict[str, Any]:
    found = [(v, evaluations[v][name]) for v in inside if isinstance(evaluations[v].get(name), int | float)]
    rows = sampled([value for _, value in found], points)
    versions = [found[row][0] for row in rows]
    return {
        "step": versions,
        "time": [_time(columns, version) for version in versions],
        "value": [found[row][1] for row in rows],
    }


def _time(columns: Columns, version: int) -> float | None:
    """When a version was committed, None if its entry is not there."""
    row = columns.row(version)
    return columns.times[row] if row < len(columns) and columns.versions[row] == version else None
