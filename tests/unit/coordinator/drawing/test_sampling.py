"""Few points show a curve as all of them would."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from torchord.coordinator.drawing.sampling import sampled

VALUES = st.lists(st.floats(-100, 100) | st.just(math.nan) | st.just(math.inf), max_size=400)


@given(values=VALUES, points=st.integers(8, 60))
def test_points_are_few_ascending_and_hold_the_ends_and_extremes(values: list[float], points: int) -> None:
    places = sampled(values, points)
    assert len(places) <= max(points, 0) and places == sorted(set(places))
    if values:
        assert places[0] == 0 and places[-1] == len(values) - 1
        finite = [value for value in values if math.isfinite(value)]
        shown = [values[place] for place in places if math.isfinite(values[place])]
        assert not finite or (min(shown), max(shown)) == (min(finite), max(finite))
        assert any(not math.isfinite(values[place]) for place in places) == (len(finite) < len(values))


def test_a_hundred_thousand_steps_keep_one_spike() -> None:
    values = [1.0] * 100_000
    values[77_777] = 50.0
    places = sampled(values, 1000)
    assert 77_777 in places and len(places) <= 1000


def test_a_range_is_shown_in_more_detail() -> None:
    values = [float(place) for place in range(10_000)]
    assert sampled(values, 50, 200, 240) == list(range(200, 240))
