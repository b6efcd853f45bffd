"""A chart in a terminal: eight dots a character, or a star where there are no such characters."""

from __future__ import annotations

from collections.abc import Iterator

from torchord.coordinator.drawing.chart import Chart, Line, figure

_LABEL = 9
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # of a braille character, by row and column


def characters(chart: Chart, *, width: int = 80, height: int = 10, ascii_only: bool = False) -> list[str]:
    """A chart as lines of at most `width` columns: title, curve and the range of both axes.

    Args:
        height: rows of the curve.
        ascii_only: for an output that has no other characters.
    """
    found = chart.ranges()
    title = f"{chart.title} ({', '.join(line.label for line in chart.lines)})" if len(chart.lines) > 1 else ""
    lines = [(title or chart.title)[:width]]
    if found is None:
        return [*lines, "  nothing to draw yet"]
    left, right, low, high = found
    columns = width - _LABEL - 2
    across, down = (columns, height) if ascii_only else (2 * columns, 4 * height)

    def cell(x: float, y: float) -> tuple[int, int]:
        return (
            min(across - 1, int((x - left) / (right - left) * across)),
            min(down - 1, int((high - y) / (high - low) * down)),
        )

    dots = {dot for line in chart.lines for dot in _drawn(line, cell)}
    edge = "|" if ascii_only else "│"
    for row in range(height):
        label = figure(high) if row == 0 else figure(low) if row == height - 1 else ""
        text = "".join(_character(dots, column, row, ascii_only=ascii_only) for column in range(columns))
        lines.append(f"{label:>{_LABEL}} {edge}{text}".rstrip())
    ends = figure(left), figure(right)
    lines.append(" " * (_LABEL + 2) + ends[0] + ends[1].rjust(columns - len(ends[0])))
    return lines


def _drawn(line: Line, cell: object) -> Iterator[tuple[int, int]]:
    """The dots of a curve, without a hole between two points."""
    assert callable(cell)
    for stretch in line.stretches():
        before: tuple[int, int] = cell(*stretch[0])
        for point in stretch:
            after: tuple[int, int] = cell(*point)
            steps = max(abs(after[0] - before[0]), abs(after[1] - before[1]), 1)
            for n in range(steps + 1):
                yield (
                    round(before[0] + n / steps * (after[0] - before[0])),
                    round(before[1] + n / steps * (after[1] - before[1])),
                )
            before = after


def _character(dots: set[tuple[int, int]], column: int, row: int, *, ascii_only: bool) -> str:
    if ascii_only:
        return "*" if (column, row) in dots else " "
    bits = 0
    for y, pair in enumerate(_DOTS):
        for x, bit in enumerate(pair):
            if (2 * column + x, 4 * row + y) in dots:
                bits |= bit
    return chr(0x2800 + bits) if bits else " "
