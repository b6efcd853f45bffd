"""How a run goes, where there is a terminal and where there is none."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any, cast

import pytest

from torchord.cache.ledger.answers import Event
from torchord.cache.ledger.records import Head
from torchord.coordinator.master.progress import Progress, worded


def head(version: int, total: int | None = 100) -> Head:
    return cast(Head, SimpleNamespace(version=version, total_steps=total, status="running"))


def step(version: int, seconds: float = 2.0) -> Event:
    data = {"step": version - 1, "version": version, "loss": 0.5, "examples": 8, "seconds": seconds}
    return Event(f"{version}-0", "step", data)


class Watched:
    """A display whose clock a test turns.

    Args:
        of: class-level options of `Progress`.
    """

    def __init__(self, **of: Any) -> None:
        self.now = 0.0
        self.shown = Progress("digits", enabled=True, clock=lambda: self.now, **of)

    def steps(self, first: int, last: int, *, seconds: float) -> None:
        for version in range(first, last + 1):
            self.now += seconds
            self.shown.head(head(version))
            self.shown.event(step(version, seconds))


def test_without_a_terminal_there_is_a_line_every_five_percent(capsys: pytest.CaptureFixture[str]) -> None:
    watched = Watched()
    with watched.shown:
        watched.steps(1, 100, seconds=2.0)
        watched.shown.event(Event("101-0", "done", {"version": 100}))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "digits: step 1 of 100  loss 0.5000  4 ex/s  3 min left"
    assert [int(line.split()[2]) for line in lines[1:-1]] == [*range(6, 100, 5), 100]
    assert lines[-1] == "digits: done  loss 0.5000  4 ex/s" and max(map(len, lines)) <= 80


def test_slow_steps_are_a_line_every_thirty_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    watched = Watched()
    with watched.shown:
        watched.shown.head(head(0, 10_000))
        for version in range(1, 10):
            watched.now += 20
            watched.shown.event(step(version, 20.0))
    assert [line.split()[2] for line in capsys.readouterr().out.splitlines()] == ["1", "3", "5", "7", "9"]


def test_who_comes_later_reads_neither_old_steps_nor_their_replays_speed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    watched = Watched()
    with watched.shown:
        for version in range(1, 91):  # read at once, of a run that is at 90
            watched.shown.head(head(90))
            watched.shown.event(step(version))
    [*_, last] = capsys.readouterr().out.splitlines()
    assert last.split()[2] == "85" and last.endswith("4 ex/s  30 s left")


def test_a_terminal_has_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    watched = Watched()
    with watched.shown:
        watched.steps(1, 90, seconds=2.0)
        watched.shown.event(Event("91-0", "failed", {"message": "a NaN"}))
    out = capsys.readouterr().out
    assert "90/100" in out and "20 s left" in out and "failed: a NaN" in out and "{" not in out


@pytest.mark.parametrize(
    ("kind", "data", "said"),
    [
        ("paused", {}, "paused"),
        ("failed", {"message": "a NaN"}, "failed: a NaN"),
        ("rollback", {"version": 4, "reason": "lost"}, "rollback: version 4, reason lost"),
        ("evaluation", {"version": 4, "metrics": {"loss": 0.25}}, "evaluation: version 4, metrics.loss 0.25"),
    ],
)
def test_events_are_in_words(kind: str, data: dict[str, Any], said: str) -> None:
    assert worded(kind, data) == said


def test_what_a_step_measures_stands_beside_its_loss(capsys: pytest.CaptureFixture[str]) -> None:
    watched, metrics = Watched(), {"accuracy": 0.75, "reward": float("nan"), "third": 1.0}
    with watched.shown:
        event = step(1, 2.0)
        watched.shown.head(head(1))
        watched.shown.event(Event(event.id, "step", {**event.data, "metrics": metrics}))
    assert "loss 0.5000  accuracy 0.7500  reward nan  4 ex/s" in capsys.readouterr().out


# --- in a notebook --------------------------------------------------------------------------


class Page:
    """What IPython shows of one display, in the order in which it came."""

    def __init__(self) -> None:
        self.shown: list[str] = []

    def display(self, html: str, *, display_id: bool) -> Page:
        assert display_id
        self.shown.append(html)
        return self

    def update(self, html: str) -> None:
        self.shown.append(html)


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Page:
    """A notebook's page, as rich takes it for one."""
    made = Page()
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setitem(
        sys.modules, "IPython.display", cast(Any, SimpleNamespace(HTML=str, display=made.display))
    )
    monkeypatch.setitem(sys.modules, "IPython", cast(Any, SimpleNamespace()))
    return made


def test_a_notebook_has_one_display_that_ends_with_how_it_ended(
    page: Page, capsys: pytest.CaptureFixture[str]
) -> None:
    watched = Watched()
    with watched.shown:
        watched.shown.say("waits for <a worker>")
        watched.steps(1, 100, seconds=0.1)
        watched.shown.event(Event("101-0", "rollback", {"version": 90}))
    assert len(page.shown) < 30, "twice a second is enough"
    last = page.shown[-1]
    assert 'value="100" max="100"' in last and "100/100 loss 0.5000" in last
    assert (
        "<br>run &#x27;digits&#x27; waits for &lt;a worker&gt;" in last and "<br>rollback: version 90" in last
    )
    assert capsys.readouterr().out == ""


def test_where_there_is_no_ipython_after_all_there_are_lines(
    page: Page, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "IPython.display", cast(Any, None))
    watched = Watched()
    with watched.shown:
        watched.steps(1, 3, seconds=60)
    assert page.shown == [] and "step 3 of 100" in capsys.readouterr().out
