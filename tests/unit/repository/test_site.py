"""The site of the documentation: every page has its place, and links lead to places of the site."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
import pytest
import yaml

import docs_docstrings
import docs_site
import torchord
from tests import pictures

ROOT = Path(__file__).resolve().parents[3]


class Settings(yaml.SafeLoader):
    """mkdocs.yml, in which one entry names a function of Python's."""


Settings.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)
SETTINGS = yaml.load((ROOT / "mkdocs.yml").read_text(), Settings)


def entries(nav: Any) -> Iterator[str]:
    """The pages of a nav, at any depth."""
    if isinstance(nav, str):
        yield nav
    else:
        for each in nav.values() if isinstance(nav, dict) else nav:
            yield from entries(each)


def test_every_page_has_one_line_in_the_nav() -> None:
    listed = list(entries(SETTINGS["nav"]))
    for page in docs_site.pages():
        name = docs_site.place(page)
        assert listed.count(name) == 1, (
            f"{page} is {listed.count(name)} times in the nav of mkdocs.yml; add the line "
            f"`- Its title: {name}` to the section where a reader looks for it"
        )
    known = {*map(docs_site.place, docs_site.pages()), *docs_site.reference()}
    assert set(listed) - known == set(), "the nav of mkdocs.yml names pages that are not there"


def test_nothing_is_asked_of_other_hosts_by_the_settings() -> None:
    assert SETTINGS["theme"]["font"] is False
    assert not {"repo_url", "site_url", "extra_javascript", "edit_uri"} & SETTINGS.keys()


@pytest.mark.parametrize(
    ("page", "text", "expected"),
    [
        ("docs/a.md", "[x](b.md#c) [y](#d)", "[x](b.md#c) [y](#d)"),
        ("docs/a.md", "[x](../README.md)", "[x](index.md)"),
        ("docs/a.md", "[x](../deploy/users.acl)", "[x](files/deploy/users.acl)"),
        ("README.md", "[x](docs/b.md#c) ![p](docs/p.png)", "[x](b.md#c) ![p](p.png)"),
        ("README.md", '<img src="docs/p.png">', '<img src="p.png">'),
        ("benchmarks/README.md", "[x](results/a.png)", "[x](files/benchmarks/results/a.png)"),
        ("benchmarks/README.md", "[y](overhead.md)", "[y](benchmarks-overhead.md)"),
        ("docs/a.md", "[x](https://e.org/a) [m](mailto:a@e.org)", "[x](https://e.org/a) [m](mailto:a@e.org)"),
        ("README.md", "```\n[x](docs/b.md)\n```\n[x](docs/b.md)", "```\n[x](docs/b.md)\n```\n[x](b.md)"),
    ],
)
def test_a_link_leads_to_the_sites_own_place(page: str, text: str, expected: str) -> None:
    assert docs_site.relinked(text, page) == expected


def test_the_reference_names_all_that_is_public() -> None:
    page = docs_site.reference()["reference.md"]
    for name in torchord.__all__:
        assert name == "app" or f"::: torchord.{name}\n" in page


def test_each_picture_is_small_shown_and_taken_by_a_command() -> None:
    found = {path.stem: path for path in (ROOT / "docs" / "pictures").iterdir()}
    shown = {name for page in docs_site.pages() for name in docs_site.targets((ROOT / page).read_text())}
    assert found.keys() == pictures.PICTURES.keys()
    for name, path in found.items():
        assert path.stat().st_size <= pictures.MOST_NBYTES and f"pictures/{name}.png" in shown


def documented(thing: griffe.Object | griffe.Alias) -> Iterator[griffe.Object | griffe.Alias]:
    """What is shown of a module, class or function: itself, and what it defines that is public."""
    yield thing
    for member in thing.members.values():
        if not member.is_alias and not member.name.startswith("_") and (thing.is_class or thing.is_module):
            yield from documented(member)


def test_docstrings_of_the_reference_are_understood(caplog: pytest.LogCaptureFixture) -> None:
    """A parameter that is none, or a section whose continued lines are not indented further, is a warning."""
    caplog.set_level(logging.WARNING, "griffe")
    package = griffe.load(
        "torchord",
        search_paths=[ROOT],
        docstring_parser="google",
        extensions=griffe.load_extensions(docs_docstrings.Docstrings()),
    )
    shown = [package[name] for name in torchord.__all__ if name != "app"]
    shown += [package[name.removeprefix("torchord.")] for name in (*docs_site.MODULES, docs_site.ERRORS)]
    for thing in shown:
        for each in documented(thing.final_target if thing.is_alias else thing):
            if each.docstring is not None:
                assert each.docstring.parsed
    assert [record.getMessage() for record in caplog.records] == []


@pytest.mark.parametrize(
    ("ours", "shown"),
    [
        ("Equation:\n    a = w\n    b = v\n", "Equation:\n    ```text\n    a = w\n    b = v\n    ```\n"),
        ("Equation:\n    a = w", "Equation:\n    ```text\n    a = w\n    ```\n"),
        ("Example:\n    >>> mean()\n", "Examples:\n    >>> mean()\n"),
        (
            "Args:\n    a, b: of\n        both.\n    c: it.\n",
            "Args:\n    a: of\n        both.\n    b: of\n        both.\n    c: it.\n",
        ),
    ],
)
def test_sections_of_our_docstrings_are_what_the_site_knows(ours: str, shown: str) -> None:
    assert docs_docstrings.shown(ours).rstrip() == shown.rstrip()
