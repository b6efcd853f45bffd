"""Curves are few points of what the entries say."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.support.control import entry, history, slot
from torchord.coordinator.pages.columns import SERIES, Columns
from torchord.coordinator.pages.curves import POINTS_LEAST, POINTS_MOST, curves


@pytest.fixture(scope="module")
def columns() -> Columns:
    """Ten thousand steps, one with a loss like no other, one skipped."""
    found = Columns()
    made = entry(1, [slot(0, 0)])
    for version in range(1, 10_001):
        loss = 99.0 if version == 7_000 else 1 / version
        changes = {"loss": loss, "committed_at": 1000.0 + version, "skipped": version == 500}
        found.add(replace(made, version=version, **changes))  # type: ignore[arg-type]
    return found


def test_every_curve_is_short_and_keeps_its_extremes(columns: Columns) -> None:
    found = curves(columns, {}, points=200)
    assert found["series"].keys() == set(SERIES) and found["skipped"] == [500]
    for curve in found["series"].values():
        assert len(curve["step"]) == len(curve["time"]) == len(curve["value"]) <= 200
    loss = found["series"]["loss"]
    assert dict(zip(loss["step"], loss["value"], strict=True))[7_000] == 99.0
    assert (loss["step"][0], loss["step"][-1], loss["time"][-1]) == (1, 10_000, 11_000.0)


@pytest.mark.parametrize("points", [-1, 0, 10**9])
def test_nobody_can_ask_for_too_many_points(columns: Columns, points: int) -> None:
    shown = len(curves(columns, {}, points=points)["series"]["loss"]["step"])
    assert (POINTS_LEAST // 2 < shown <= POINTS_LEAST) or (POINTS_MOST // 2 < shown <= POINTS_MOST)


def test_a_part_is_shown_in_detail(columns: Columns) -> None:
    loss = curves(columns, {}, points=200, first=6_950, last=7_049)["series"]["loss"]
    assert loss["step"] == list(range(6_950, 7_050))


def test_evaluations_have_the_time_of_their_version() -> None:
    found = Columns()
    for each in history(4, 1)[1:]:
        found.add(each)
    evaluations = {1: {"accuracy": 0.1}, 2: {"accuracy": 0.2, "loss": 0.5}, 4: {"accuracy": None}}
    metrics = curves(found, evaluations, points=100)["metrics"]  # type: ignore[arg-type]
    assert metrics["accuracy"] == {"step": [1, 2], "time": [None, 1000.0], "value": [0.1, 0.2]}
    assert metrics["loss"] == {"step": [2], "time": [1000.0], "value": [0.5]}
    assert curves(Columns(), {}, points=100)["metrics"] == {}


def test_what_steps_measure_is_a_curve_of_those_that_did() -> None:
    found, made = Columns(), entry(1, [slot(0, 0)])
    for version in range(1, 7):
        notes = {"metrics": {"reward": float(version)}} if version % 2 else {}
        found.add(replace(made, version=version, committed_at=1000.0 + version, notes=notes))
    curve = curves(found, {}, points=100)["measured"]["reward"]
    assert curve == {"step": [1, 3, 5], "time": [1001.0, 1003.0, 1005.0], "value": [1.0, 3.0, 5.0]}
    assert curves(found, {}, points=100, first=2, last=4)["measured"]["reward"]["step"] == [3]
    found.truncate(4)
    found.add(replace(made, version=5, notes={"metrics": {"reward": 9.0}}))
    assert curves(found, {}, points=100)["measured"]["reward"]["value"] == [1.0, 3.0, 9.0]
