"""Curves are drawn whatever their values are, and never with more than fits."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET

import pytest

from torchord.coordinator.drawing.characters import characters
from torchord.coordinator.drawing.chart import Chart, Line, ticks
from torchord.coordinator.drawing.svg import svg

NAN = math.nan
CURVES = {
    "falling": [1 / (1 + n) for n in range(100)],
    "one": [3.0],
    "flat": [2.0] * 5,
    "gaps": [1.0, NAN, 3.0, math.inf, 2.0, -math.inf],
    "huge": [1e299, -1e299, 1.7e308, -1.7e308],
    "tiny": [1e-320, 2e-320],
    "nothing": [NAN, math.inf],
    "empty": [],
}


def chart(name: str) -> Chart:
    values = CURVES[name]
    return Chart(
        f"<{name}>", (Line("a & b", range(len(values)), values), Line("other", [0], [1.0], marks=True))
    )


@pytest.mark.parametrize("name", CURVES)
def test_any_curve_is_well_formed_svg_without_a_number_that_is_none(name: str) -> None:
    text = svg([chart(name), Chart(name, ())])
    ET.fromstring(text)
    assert "nan" not in text and "inf" not in text.replace("infinite", "") and "<empty>" not in text


@pytest.mark.parametrize("ascii_only", [False, True])
@pytest.mark.parametrize("name", CURVES)
def test_any_curve_fits_its_terminal(name: str, ascii_only: bool) -> None:
    lines = characters(chart(name), width=60, height=6, ascii_only=ascii_only)
    assert max(map(len, lines)) <= 60 and len(lines) <= 8
    if ascii_only:
        assert all(line.isascii() for line in lines)


def test_a_curve_falls_from_the_left_above_to_the_right_below() -> None:
    lines = characters(Chart("line", (Line("y", [0, 1], [1.0, 0.0]),)), width=31, height=4, ascii_only=True)
    assert [line.find("*") for line in lines[1:5]] == sorted(line.find("*") for line in lines[1:5])
    assert lines[1].startswith("        1 |*") and lines[4].startswith("        0 |")
    assert lines[5].split() == ["0", "1"]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (3, 97, [20, 40, 60, 80]),
        (-2e-9, 2e-9, [-2e-9, -1e-9, 0, 1e-9, 2e-9]),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == expected
