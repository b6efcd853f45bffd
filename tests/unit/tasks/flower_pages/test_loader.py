"""Flower's own templates get torchord's links, and stay as they are where there is no place for them."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from flower import urls
from tornado.template import Template

from torchord.tasks.flower_pages.loader import Loader, linked

THEIRS = Path(str(urls.settings["template_path"]))


def test_the_tab_is_beside_flowers_own() -> None:
    text = linked("navbar.html", (THEIRS / "navbar.html").read_text())
    assert text.index("reverse_url('broker')") < text.index("reverse_url('torchord_runs')")
    assert text.index(">Runs</a>") < text.index("app-nav-secondary")
    assert text.count("<li") == text.count("</li>")


def test_a_tasks_page_leads_to_its_run() -> None:
    text = linked("task.html", (THEIRS / "task.html").read_text())
    assert text.index("detail-actions") < text.index("torchord_run") < text.index("task-terminate")


def test_another_release_of_flower_without_a_place_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert linked("navbar.html", "<nav></nav>") == "<nav></nav>"
    assert "no place for torchord's link in navbar.html" in caplog.text
    assert linked("tasks.html", "reverse_url('broker')</li>") == "reverse_url('broker')</li>"


@pytest.mark.parametrize(
    "name", ["torchord-runs.html", "torchord-run.html", "torchord-compare.html", "tasks.html"]
)
def test_every_template_is_found(name: str) -> None:
    assert isinstance(Loader(str(THEIRS)).load(name), Template)
