"""A report shows what a run's records hold as text, whatever they hold."""

from __future__ import annotations

import math
from html.parser import HTMLParser
from typing import Any

from torchord.coordinator.commands.report_page import page

EVIL = "<script>alert('1')</script>\"&"


class Tags(HTMLParser):
    """The names of a page's tags and attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags |= {tag, *(f"@{name}" for name, _ in attrs)}

    def handle_data(self, data: str) -> None:
        self.text += data


def told(**changes: Any) -> str:
    run = {
        "name": EVIL,
        "state": EVIL,
        "now": 1e9,
        "version": 3,
        "total": None,
        "reason": EVIL,
        "loss": math.nan,
        "metrics": {EVIL: 1.0},
        "evaluated": 2,
        "submitted_at": 1e9,
        "committed_at": None,
        "environment": EVIL,
        "counted": {"duplicates ignored": 0, "backups sent": 2},
        "checkpoints": [2],
        "failure": {"message": EVIL, "traceback": EVIL, "worker": "w0", "log": [EVIL]},
        "evaluations": [(2, {EVIL: math.inf})],
        "crew": [{"worker": EVIL, "shards": 1, "seconds": 0.5, "again": 0}],
        "events": [{"at": 1e9, "type": EVIL, "data": {EVIL: EVIL}}],
        "recipe": {EVIL: {"target": EVIL}},
        "config": {"epochs": EVIL},
        **changes,
    }
    curve = {"step": [1, 2, 3], "value": [1.0, math.nan, None]}
    series = dict.fromkeys(("loss", "grad_norm", "lr", "rate", "nbytes"), curve)
    curves = {"series": series, "measured": {EVIL: curve}, "metrics": {EVIL: curve}}
    bar = [0.0, 1.0, 1.0, 1, 2, 0.5]
    timeline = {
        "first": 1,
        "last": 3,
        "lanes": [{"worker": EVIL, "bars": [bar]}],
        "marks": [{"step": 2, "text": EVIL}],
    }
    return page(run, curves, timeline, {"ok": False, "said": EVIL, "problems": [EVIL]})


def test_nothing_that_a_run_holds_is_markup() -> None:
    found = Tags(told())
    assert found.tags.isdisjoint({"script", "img", "link", "a", "iframe", "@onload", "@src", "@href"})
    assert found.text.count(EVIL) >= 14


def test_a_run_of_which_little_is_known_has_a_report() -> None:
    nothing: dict[str, Any] = {"message": "", "traceback": "", "worker": "", "log": []}
    text = told(
        failure=nothing,
        reason="",
        evaluations=[],
        events=[],
        crew=[],
        submitted_at=None,
        environment="",
        checkpoints=[],
    )
    assert "none seen from here" in text and "unknown" in text and ">Failed<" not in text
