"""README.zh.md says what README.md says: the same commands, code, tables, links, sections and figures."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
ENGLISH, CHINESE = ((ROOT / name).read_text() for name in ("README.md", "README.zh.md"))


def prose(page: str) -> str:
    return re.sub(r"^```.*?^```", "", page, flags=re.DOTALL | re.MULTILINE)


def code(page: str) -> list[str]:
    """The blocks without their comments."""
    blocks = re.findall(r"^```.*?^```", page, re.DOTALL | re.MULTILINE)
    return [re.sub(r" *(?<!\\S)# .*", "", block) for block in blocks]


def commands(page: str) -> Counter[str]:
    """What stands between backticks in the text."""
    return Counter(re.findall(r"`([^`]+)`", prose(page)))


def tables(page: str) -> list[list[int]]:
    """Cells in each row of each table."""
    found = re.findall(r"(?:^\|.*\n)+", prose(page), re.MULTILINE)
    return [[line.count("|") for line in table.splitlines()] for table in found]


def links(page: str) -> list[str]:
    """What it leads to, in order; each page leads to the other one."""
    return [
        target.replace("README.zh.md", "README.md") for target in re.findall(r"\]\(([^)]+)\)", prose(page))
    ]


def sections(page: str) -> list[tuple[int, int]]:
    """Depth of each heading, and the points of the list below it."""
    parts = re.split(r"^(#+) .*$", prose(page), flags=re.MULTILINE)[1:]
    return [
        (len(depth), len(re.findall(r"^- ", text, re.MULTILINE)))
        for depth, text in zip(parts[::2], parts[1::2], strict=True)
    ]


def figures(page: str) -> list[Counter[str]]:
    """The numbers in each row of each table."""
    rows = re.findall(r"^\|.*", prose(page), re.MULTILINE)
    return [Counter(re.findall(r"\d+(?:\.\d+)?", row)) for row in rows]


RULES: list[Callable[[str], Any]] = [code, commands, tables, links, sections, figures]


@pytest.mark.parametrize("rule", RULES, ids=[rule.__name__ for rule in RULES])
def test_both_pages_are_in_step(rule: Callable[[str], Any]) -> None:
    assert rule(CHINESE) == rule(ENGLISH), rule.__doc__


@pytest.mark.parametrize(
    ("rule", "before", "after"),
    [
        (code, "epochs=5", "epochs=6"),
        (commands, "`make bench`", "`make test`"),
        (tables, "| 运维 |", "| 运维 | |"),
        (links, "docs/scale.md", "docs/gpu.md"),
        (sections, "- **恰好一次。**", "**恰好一次。**"),
        (figures, "0.25 s", "0.52 s"),
    ],
)
def test_a_difference_is_noticed(rule: Callable[[str], Any], before: str, after: str) -> None:
    assert before in CHINESE
    assert rule(CHINESE.replace(before, after)) != rule(ENGLISH)
