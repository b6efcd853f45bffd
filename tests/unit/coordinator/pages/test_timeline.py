"""A timeline has every shard at its worker, and what happened above it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.control import entry, slot
from torchord.cache.ledger.answers import Event
from torchord.coordinator.pages.columns import Columns
from torchord.coordinator.pages.timeline import timeline


def columns(steps: int, shards: int = 2, **of: Any) -> Columns:
    """Steps of 0.1 s whose shards take 0.01 s each, dealt to workers w0 and w1, and late a third."""
    found = Columns()
    for version in range(1, steps + 1):
        slots = [slot(version - 1, shard, worker=f"w{shard % 2}") for shard in range(shards)]
        if version == 3:
            slots[-1] = slot(2, shards - 1, worker="w2", attempt=2)
        token = 1 if version < 4 else 2
        changes = {"committed_at": 1000.0 + version, "token": token, "server": f"s{token}", **of}
        found.add(entry(version, slots, **changes))
    return found


def event(type: str, at: float, **data: Any) -> Event:
    return Event(f"{int(at * 1000)}-0", type, data)


def lanes(found: dict[str, Any]) -> dict[str, list[list[float]]]:
    return {lane["worker"]: lane["bars"] for lane in found["lanes"]}


def test_every_shard_is_a_bar_that_ends_with_its_step() -> None:
    found = timeline(columns(5, shards=4), [], {"w0"})
    bars = lanes(found)
    assert (found["first"], found["last"], found["group"]) == (1, 5, 1)
    assert sum(len(each) for each in bars.values()) == 20
    assert sorted(bar[1] for bar in bars["w0"])[-1] == 5.0
    first = sorted(bars["w0"])[:2]
    assert [pytest.approx(each) for each in ((0.8, 0.9), (0.9, 1.0))] == [tuple(bar[:2]) for bar in first]
    assert [bar[4] for bar in bars["w2"]] == [2] and {
        lane["worker"]: lane["alive"] for lane in found["lanes"]
    } == {
        "w0": True,
        "w1": False,
        "w2": False,
    }


def test_a_shard_longer_than_its_step_fills_it() -> None:
    bars = lanes(timeline(columns(1, seconds=0.001), [], ()))
    assert bars == {name: [[0.0, 1.0, 1.0, 1, 1, pytest.approx(0.01)]] for name in ("w0", "w1")}


def test_changes_of_server_and_events_are_marks() -> None:
    happened = [
        event("started", 999),
        event("evaluation", 1003.5, version=3, metrics={"loss": 0.5}),
        event("paused", 1004.5),
        event("failed", 1004.6, message="<b>a NaN</b>"),
        event("checkpoint", 1005, version=5, path="/x"),
    ]
    marks = timeline(columns(5), happened, ())["marks"]
    assert [(mark["step"], mark["kind"]) for mark in marks] == [
        (3, "evaluation"),
        (4, "server"),
        (4, "paused"),
        (4, "failed"),
    ]
    assert marks[1]["text"] == "served by s2" and marks[3]["text"] == "failed: message <b>a NaN</b>"


def test_many_steps_are_groups_of_a_bounded_number() -> None:
    made = columns(3000)
    found = timeline(made, [], (), first=1, last=3000)
    bars = lanes(found)
    assert found["group"] == 15 and all(len(each) <= 200 for each in bars.values())
    assert sum(bar[3] for each in bars.values() for bar in each) == 6000
    assert bars["w0"][1] == [15, 30, pytest.approx(0.1), 15, 1, pytest.approx(0.15)]
    assert bars["w2"] == [[0, 15, pytest.approx(0.01 / 1.5), 1, 2, pytest.approx(0.01)]]


@pytest.mark.parametrize(("first", "last"), [(None, None), (-5, 10**9), (7, 3), (10**9, None), (0, 0)])
def test_any_range_is_taken_to_one_that_is_there(first: int | None, last: int | None) -> None:
    for made in (Columns(), columns(5)):
        found = timeline(made, [], (), first=first, last=last)
        assert found["first"] >= 1 and found["last"] <= made.last


def test_a_fleet_has_a_bounded_number_of_lanes() -> None:
    made = Columns()
    made.add(entry(1, [slot(0, shard, worker=f"w{shard}") for shard in range(100)]))
    found = timeline(made, [], ())
    assert (len(found["lanes"]), found["left_out"]) == (48, 52)
