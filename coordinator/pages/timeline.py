"""Who computed which shard when, and what happened meanwhile."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Container, Iterable
from typing import Any

from torchord.cache.ledger.answers import Event
from torchord.coordinator.pages.columns import Columns

STEPS_SHOWN = 60
_BARS_MOST = 2000
_GROUPS = 200
_SHARDS_LOOKED_AT = 60_000
_LANES_MOST = 48
_MARKS_MOST = 200
_NOT_MARKED = ("checkpoint", "started", "probe")


def timeline(
    columns: Columns,
    events: Iterable[Event],
    alive: Container[str],
    *,
    first: int | None = None,
    last: int | None = None,
) -> dict[str, Any]:
    """The lanes of the workers over some steps, and marks above them.

    A step is one unit wide, version `v` from `v - 1` to `v`. A shard's bar is as long as its part of the
    step's seconds, and ends with the step: the ledger keeps how long a shard took, not when it began. Many
    steps together are groups, whose bars say which part of the time a worker computed.

    Args:
        columns: the steps.
        events: those that are no step's.
        alive: the living workers' ids.
        first: the first version; None: so that the last `STEPS_SHOWN` are shown.
        last: the last version; None: the newest.

    Returns:
        {"first", "last": versions shown, "group": steps a bar, "every": so many-th step is looked at, "from",
        "to": times of the first and last commit, "lanes": [{"worker", "alive", "bars"}], "left_out": workers
        without a lane, "marks": [{"step", "at", "kind", "text"}]}; a bar is [from, to, share of the time,
        shards, most attempts, seconds].
    """
    last = columns.last if last is None else min(last, columns.last)
    first = max(1, last - STEPS_SHOWN + 1) if first is None else max(1, min(first, last))
    begin, end = columns.row(first), columns.row(last + 1)
    steps = max(1, last - first + 1)
    shards = sum(1 for row in range(begin, min(end, begin + 20)) for _ in columns.shards(row))
    a_step = max(1.0, shards / max(1, min(end, begin + 20) - begin))
    group = 1 if steps * a_step <= _BARS_MOST else max(1, -(-steps // _GROUPS))
    every = max(1, int((end - begin) * a_step / _SHARDS_LOOKED_AT))
    bars = _bars(columns, range(begin, end, every), group, first)
    lanes = sorted(bars, key=lambda worker: -sum(bar[3] for bar in bars[worker]))
    shown = sorted(lanes[:_LANES_MOST])
    return {
        "first": first,
        "last": last,
        "group": group,
        "every": every,
        "from": columns.times[begin] if begin < end else None,
        "to": columns.times[end - 1] if begin < end else None,
        "lanes": [{"worker": name, "alive": name in alive, "bars": bars[name]} for name in shown],
        "left_out": max(0, len(lanes) - _LANES_MOST),
        "marks": _marks(columns, events, begin, end, first, last),
    }


def _bars(columns: Columns, rows: range, group: int, first: int) -> dict[str, list[list[float]]]:
    """The bars of each worker."""
    found: dict[str, list[list[float]]] = defaultdict(list)
    if group == 1:
        for row in rows:
            version, stacked = columns.versions[row], defaultdict[str, float](float)
            shards = list(columns.shards(row))
            for shard in shards:
                stacked[shard.worker] += shard.seconds
            whole = max([columns.seconds[row], *stacked.values()]) or 1.0
            ends = dict.fromkeys(stacked, float(version))
            for shard in reversed(shards):
                to = ends[shard.worker]
                ends[shard.worker] = since = to - shard.seconds / whole
                found[shard.worker].append([since, to, 1.0, 1, shard.attempt, shard.seconds])
        return found
    spans: dict[int, float] = defaultdict(float)
    cells: dict[tuple[str, int], list[float]] = defaultdict(lambda: [0, 0, 0.0])
    for row in rows:
        number = (columns.versions[row] - first) // group
        busy: dict[str, float] = defaultdict(float)
        for shard in columns.shards(row):
            cell = cells[shard.worker, number]
            cell[0] += 1
            cell[1] = max(cell[1], shard.attempt)
            cell[2] += shard.seconds
            busy[shard.worker] += shard.seconds
        spans[number] += max([columns.seconds[row], *busy.values()])
    for (worker, number), (shards_, attempt, seconds) in sorted(cells.items()):
        since = first - 1 + number * group
        share = min(1.0, seconds / spans[number]) if spans[number] else 1.0
        found[worker].append([since, since + group, share, shards_, attempt, seconds])
    return found


def _marks(
    columns: Columns, events: Iterable[Event], begin: int, end: int, first: int, last: int
) -> list[dict[str, Any]]:
    """Changes of the server, by the ledger, and events, by their version or else their time."""
    found = [
        {
            "step": columns.versions[row],
            "at": columns.times[row],
            "kind": "server",
            "text": f"served by {columns.server(row)}",
        }
        for row in range(max(begin, 1), end)
        if columns.tokens[row] != columns.tokens[row - 1]
    ]
    found += [
        {
            "step": columns.versions[row],
            "at": columns.times[row],
            "kind": "skipped",
            "text": "skipped: the gradients were not finite, and the update was left out",
        }
        for row in range(begin, end)
        if columns.skipped[row]
    ]
    for event in events:
        if event.type in _NOT_MARKED:
            continue
        at = event.at
        version = event.data.get("version")
        if not isinstance(version, int):
            row = bisect_left(columns.times, at)
            version = columns.versions[row - 1] if row else 0
        if first - 1 <= version <= last:
            said = _words({name: value for name, value in event.data.items() if name != "version"})
            text = f"{event.type}{': ' if said else ''}{said}"
            found.append({"step": version, "at": at, "kind": event.type, "text": text[:500]})
    return sorted(found, key=lambda mark: (mark["step"], mark["at"]))[-_MARKS_MOST:]


def _words(value: Any) -> str:
    """What an event holds, for people."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_words(inner)}" for name, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(_words, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)
