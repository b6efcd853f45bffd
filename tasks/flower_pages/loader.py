"""Finds the templates: torchord's own, and Flower's, two of which get a link each."""

from __future__ import annotations

import logging
from pathlib import Path

from tornado import template

from torchord.tasks.flower_pages.words import run_of

log = logging.getLogger(__name__)

_OURS = Path(__file__).parent / "templates"
_PREFIX = "torchord-"

_TAB = """
        <li class="nav-item">
          <a class="nav-link{% if active_tab == 'runs' %} active{% end %}"
            href="{{ reverse_url('torchord_runs') }}"
            {% if active_tab == 'runs' %}aria-current="page"{% end %}>Runs</a>
        </li>"""
_RUN = """
      {% if run_of(task) %}
      <a class="btn btn-outline-primary" href="{{ reverse_url('torchord_run', run_of(task)) }}">Run {{
        run_of(task) }}</a>
      {% end %}"""
_LINKS: dict[str, tuple[str, str, str]] = {
    # file of Flower's: (what comes before the place, the first of this after it, the link)
    "navbar.html": ("reverse_url('broker')", "</li>", _TAB),
    "task.html": ("detail-page-header", '<div class="detail-actions">', _RUN),
}


class Loader(template.Loader):
    """Loads templates by name; those that begin with "torchord-" are torchord's.

    Args:
        theirs: the folder of Flower's.
    """

    def __init__(self, theirs: str) -> None:
        super().__init__(theirs, namespace={"run_of": run_of})

    def _create_template(self, name: str) -> template.Template:
        folder = _OURS if name.startswith(_PREFIX) else Path(self.root)
        text = (folder / name).read_text(encoding="utf-8")
        return template.Template(linked(name, text), name=name, loader=self)


def linked(name: str, text: str) -> str:
    """One of Flower's templates with torchord's link in it, as it is where it has no place for the link."""
    if name not in _LINKS:
        return text
    before, place, link = _LINKS[name]
    found, rest = text.partition(before)[1:]
    at = rest.find(place)
    if not found or at < 0:
        log.warning("this release of Flower has no place for torchord's link in %s", name)
        return text
    end = len(text) - len(rest) + at + len(place)
    return text[:end] + link + text[end:]
