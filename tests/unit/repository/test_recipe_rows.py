"""Each row of the tables in docs/recipes.md is a test, and `tests/support/recipe_rows.toml` says which."""

from __future__ import annotations

import ast
import re
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs" / "recipes.md"
ROWS: dict[str, dict[str, list[str]]] = tomllib.loads(
    (ROOT / "tests" / "support" / "recipe_rows.toml").read_text()
)


def first_cells(page: str) -> list[tuple[str, str]]:
    """(heading, first cell) of each row of each table that is no table's head."""
    found, heading, inside = [], "", False
    for line in re.sub(r"^```.*?^```", "", page, flags=re.S | re.M).splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        if re.fullmatch(r"\|[ |-]+\|", line):
            inside = True
        elif not line.startswith("|"):
            inside = False
        elif inside:
            found.append((heading, re.split(r"(?<!\\)\|", line)[1].strip()))
    return found


def mismatches(page: str, rows: dict[str, dict[str, list[str]]]) -> list[str]:
    """Rows that have no test or several entries, and entries that have no row."""
    cells, wrong = first_cells(page), []
    used = set()
    for heading, cell in cells:
        fitting = [key for key in rows.get(heading, {}) if cell.startswith(key)]
        longest = max(fitting, key=len, default="")
        used.add((heading, longest))
        if not longest or sum(key == longest for key in fitting) != 1:
            wrong.append(f"the row {cell!r} under {heading!r} is no test")
    entries = [(heading, key) for heading, tests in rows.items() for key in tests]
    wrong += [f"no row under {h!r} begins with {key!r}" for h, key in entries if (h, key) not in used]
    wrong += [
        f"{key!r} names no test" for tests in rows.values() for key, named in tests.items() if not named
    ]
    return wrong


@cache
def source(path: Path) -> str:
    return path.read_text()


@cache
def functions(path: Path) -> frozenset[str]:
    return frozenset(n.name for n in ast.walk(ast.parse(source(path))) if isinstance(n, ast.FunctionDef))


def members(path: Path) -> str:
    """The text of a test file and of the support modules that it imports."""
    named = set(re.findall(r"tests\.support\.(\w+)", source(path)))
    for names in re.findall(r"from tests\.support import ([\w, ]+)", source(path)):
        named |= {each.split(" as ")[0].strip() for each in names.split(",")}
    support = [ROOT / "tests" / "support" / f"{name}.py" for name in sorted(named)]
    return "\n".join(source(each) for each in (path, *support))


def is_there(test: str) -> bool:
    """Whether there is such a test, and the member in brackets among what it is about."""
    found = re.fullmatch(r"([\w/]+\.py)::(test_\w+)(?:\[(.+)\])?", test)
    if found is None or not (path := ROOT / "tests" / found[1]).is_file():
        return False
    return found[2] in functions(path) and (found[3] is None or found[3] in members(path))


def test_each_row_is_a_test_and_each_entry_a_row() -> None:
    assert mismatches(PAGE.read_text(), ROWS) == []
    assert len(first_cells(PAGE.read_text())) > 100


def test_each_test_is_there() -> None:
    named = sorted({test for rows in ROWS.values() for tests in rows.values() for test in tests})
    assert [test for test in named if not is_there(test)] == []
    assert not is_there("unit/repository/test_recipe_rows.py::test_of_nothing")
    assert not is_there(
        "unit/repository/test_recipe_rows.py::test_each_test_is_there[" + "no member" * 2 + "]"
    )


@pytest.mark.parametrize(
    ("page", "rows", "said"),
    [
        ("## A\n| a | b |\n| --- | --- |\n| new | x |\n", {"A": {}}, "the row 'new' under 'A' is no test"),
        ("## A\n", {"A": {"old": ["x"]}}, "no row under 'A' begins with 'old'"),
        ("## A\n| a | b |\n| --- | --- |\n| it | x |\n", {"A": {"it": []}}, "'it' names no test"),
    ],
)
def test_what_does_not_fit_is_seen(page: str, rows: dict[str, dict[str, list[str]]], said: str) -> None:
    assert mismatches(page, rows) == [said]
