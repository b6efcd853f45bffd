"""Charts as SVG that needs nothing beside itself: no script, no font, no network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from torchord.coordinator.drawing.chart import Chart, figure, ticks

COLOURS = ("#2b7bb9", "#d9720f", "#2e9e5b", "#a04db3")
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 12, 28, 24


def svg(charts: Sequence[Chart], *, width: int = 640, height: int = 210) -> str:
    """Charts below one another as one picture.

    Text has the colour of what is around it, so that it can be read on light and on dark.

    Args:
        width: of the picture, in its own units.
        height: of each chart.
    """
    named = ", ".join(chart.title for chart in charts)
    inside = "".join(
        f'<g transform="translate(0 {place * height})">{_chart(chart, width, height)}</g>'
        for place, chart in enumerate(charts)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {max(1, len(charts)) * height}" '
        f'width="{width}" style="max-width:100%;height:auto" role="img" aria-label="{escape(named)}" '
        f'font-family="system-ui, sans-serif" font-size="11" fill="currentColor">{inside}</svg>'
    )


def _chart(chart: Chart, width: int, height: int) -> str:
    found = chart.ranges()
    parts = [f'<text x="{_LEFT}" y="16" font-size="13" font-weight="600">{escape(chart.title)}</text>']
    if found is None:
        parts.append(f'<text x="{_LEFT}" y="{height / 2:.0f}" opacity="0.7">nothing to draw yet</text>')
        return "".join(parts)
    left, right, low, high = found

    def across(x: float) -> float:
        return _LEFT + (x - left) / (right - left) * (width - _LEFT - _RIGHT)

    def down(y: float) -> float:
        return height - _BOTTOM - (y - low) / (high - low) * (height - _TOP - _BOTTOM)

    for y in ticks(low, high, 4):
        parts.append(
            f'<path d="M{_LEFT} {down(y):.1f}H{width - _RIGHT}" stroke="currentColor" opacity="0.15"/>'
            f'<text x="{_LEFT - 6}" y="{down(y) + 4:.1f}" text-anchor="end">{figure(y)}</text>'
        )
    for x in ticks(left, right, 6):
        parts.append(f'<text x="{across(x):.1f}" y="{height - 8}" text-anchor="middle">{figure(x)}</text>')
    for place, line in enumerate(chart.lines):
        colour = COLOURS[place % len(COLOURS)]
        for stretch in line.stretches():
            drawn = "L".join(f"{across(x):.1f} {down(y):.1f}" for x, y in stretch)
            parts.append(f'<path d="M{drawn}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
            if line.marks or len(stretch) == 1:
                parts += [
                    f'<circle cx="{across(x):.1f}" cy="{down(y):.1f}" r="2.5" fill="{colour}"/>'
                    for x, y in stretch
                ]
    if len(chart.lines) > 1:
        labels = "".join(
            f'<tspan fill="{COLOURS[place % len(COLOURS)]}" dx="12">{escape(line.label)}</tspan>'
            for place, line in enumerate(chart.lines)
        )
        parts.append(f'<text x="{width - _RIGHT}" y="16" text-anchor="end">{labels}</text>')
    return "".join(parts)
