"""A run's curves in few points: what each step and each evaluation measured."""

from __future__ import annotations

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
        {"series": {name: curve}, "metrics": {name: curve}, "skipped": [versions whose update was left
        out]}; a curve is {"step": [version], "time": [Unix time (s) of its commit], "value": [...]}.
    """
    points = max(POINTS_LEAST, min(points, POINTS_MOST))
    begin, end = columns.row(first), len(columns) if last is None else columns.row(last + 1)
    series = {}
    for name in SERIES:
        values = columns.values(name)
        rows = sampled(values, points, begin, end)
        series[name] = {
            "step": [columns.versions[row] for row in rows],
            "time": [columns.times[row] for row in rows],
            "value": [values[row] for row in rows],
        }
    skipped = [columns.versions[row] for row in range(begin, end) if columns.skipped[row]]
    inside = [v for v in sorted(evaluations) if v >= first and (last is None or v <= last)]
    names = sorted({name for version in inside for name in evaluations[version]})
    return {
        "series": series,
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
