"""The twin of scripts/ranked.lua."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torchord.cache import keys
from torchord.cache.testing.memory_plane import MemoryPlane

_RANK = re.compile(r'{"rank": ?"(-?\d+) ([\d.]+)"')
_MOST = 600.0


def rank_of(text: str) -> tuple[int, float] | None:
    """(priority, time) of a message, None if it has none."""
    found = _RANK.match(text)
    return None if found is None or float(found[2]) >= 1e12 else (int(found[1]), float(found[2]))


def put(
    plane: MemoryPlane, queue: str, run: str, messages: Sequence[str], *, flow: str = "", seconds: object = ""
) -> None:
    """Put messages of a run into the queue of shards, where its share has them taken.

    Args:
        flow: whose turn it is; "" for the run's own.
        seconds: that each will take; "" for what a shard does.
    """
    head, flow = plane.hash(keys.RunKeys(run).head), flow or run
    weight, priority = float(head.get("weight", 1)), int(head.get("priority", 0))
    each = float(str(seconds) or head.get("shard_seconds", 0.1)) / weight
    waiting: list[str] = list(plane.get(queue) or [])
    turns: dict[str, float] = dict(plane.get(keys.TURNS) or {})
    ranks = [rank for text in waiting[-8:] if (rank := rank_of(text)) is not None]
    now = ranks[-1][1] if ranks else max(turns.values(), default=0.0)
    turns = {name: time for name, time in turns.items() if time > now - _MOST}
    start = max(now - min(each * len(messages), _MOST), turns.get(flow, 0.0))
    for number, message in enumerate(messages):
        time = start + number * each
        place = 0  # as many as are overtaken
        while place < len(waiting):
            rank = rank_of(waiting[place])
            if rank is None or (-rank[0], rank[1]) <= (-priority, time):
                break
            place += 1
        waiting.insert(place, f'{{"rank": "{priority} {time:.6f}", {message[1:]}')
    plane.put(queue, waiting)
    plane.put(
        keys.TURNS, {**turns, flow: float(f"{start + len(messages) * each:.6f}")}, keys.WORK_TTL_SECONDS
    )
