"""What is drawn: charts of lines, and the axes that their values ask for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_MOST = 1e300  # so that ranges are finite


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
        label: what it shows.
        x: ascending.
        y: as many values; one that is not finite is a gap.
        marks: whether its points are marked, since there are few.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    marks: bool = False

    def stretches(self) -> Iterator[list[tuple[float, float]]]:
        """Its points between gaps."""
        stretch: list[tuple[float, float]] = []
        for x, y in zip(self.x, self.y, strict=True):
            if abs(y) < _MOST:  # NaN is not
                stretch.append((x, y))
            elif stretch:
                yield stretch
                stretch = []
        if stretch:
            yield stretch


@dataclass(frozen=True)
class Chart:
    """Curves over one axis.

    Attributes:
        title: what they show.
        lines: the curves.
    """

    title: str
    lines: tuple[Line, ...]

    def ranges(self) -> tuple[float, float, float, float] | None:
        """Least and greatest x and y of what can be drawn, neither range empty; None if nothing can."""
        points = [point for line in self.lines for stretch in line.stretches() for point in stretch]
        if not points:
            return None
        xs, ys = [x for x, _ in points], [y for _, y in points]
        return (*_apart(min(xs), max(xs)), *_apart(min(ys), max(ys)))


def _apart(low: float, high: float) -> tuple[float, float]:
    if high - low > 1e-12 * max(abs(low), abs(high)):
        return low, high
    room = 0.5 * abs(low) or 0.5
    return low - room, high + room


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers between two others, at most `most` + 1 of them.

    Example:
        >>> ticks(0.0, 0.9)
        [0.0, 0.2, 0.4, 0.6, 0.8]
    """
    rough = (high - low) / most
    if not (math.isfinite(rough) and rough > 0):
        return [low]
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(size * power for size in (1, 2, 5, 10) if size * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [
        round(n * step, 12 - math.floor(math.log10(step)))
        for n in range(first, first + most + 2)
        if n * step <= high + 1e-9 * step
    ]


def figure(value: float) -> str:
    """A number at an axis."""
    return f"{value:.4g}"
