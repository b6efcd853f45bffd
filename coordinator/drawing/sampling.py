"""Few points out of many, so that a curve looks as with all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence


def sampled(values: Sequence[float], points: int, first: int = 0, last: int | None = None) -> list[int]:
    """The places of at most `points` values, ascending, that show a curve as all of them would.

    The range is cut into stretches of equal length; of each its least and its greatest value stay, and one
    that is not finite if it has any, so that neither a spike nor a gap is lost. The range's two ends stay.

    Args:
        values: the curve.
        points: at least 8.
        first: where the range begins.
        last: where it ends, not included; None: at the end.

    Example:
        >>> sampled([0.0] * 50 + [9.0] + [0.0] * 49, 12)[3:6]
        [40, 50, 60]
    """
    last = len(values) if last is None else min(last, len(values))
    count = last - first
    if count <= points:
        return list(range(first, last))
    stretches = max(1, (points - 2) // 3)
    kept = {first, last - 1}
    for number in range(stretches):
        begin = first + number * count // stretches
        end = first + (number + 1) * count // stretches
        finite = [place for place in range(begin, end) if math.isfinite(values[place])]
        if len(finite) < end - begin:
            kept.add(next(place for place in range(begin, end) if not math.isfinite(values[place])))
        if finite:
            kept.add(min(finite, key=values.__getitem__))
            kept.add(max(finite, key=values.__getitem__))
    return sorted(kept)
