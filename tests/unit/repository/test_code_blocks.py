"""Python on the pages: it parses, and what it imports of torchord and each field that it names is there.

Whole programs on the pages run in tests of their own; this is what holds for each block, fragments too.
"""

from __future__ import annotations

import ast
import importlib
import re
import textwrap
from dataclasses import fields
from pathlib import Path

import pytest

from torchord import Recipe, TrainingConfig

ROOT = Path(__file__).resolve().parents[3]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])
KNOWN = {
    "Recipe": {each.name for each in fields(Recipe)},
    "TrainingConfig": {each.name for each in fields(TrainingConfig)},
}


def blocks(text: str) -> list[str]:
    return [
        textwrap.dedent(code)
        for code in re.findall(r"^ *```python\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    ]


def faults(code: str) -> list[str]:
    """What cannot be as it stands there; "..." is whatever else a call is given."""
    code = re.sub(r",\s*\.\.\.(?=\s*\))", "", code)
    try:
        tree = ast.parse(code)
    except SyntaxError as error:
        try:  # arguments, as they stand in a call
            tree = ast.parse(f"f({code}\n)")
        except SyntaxError:
            return [f"line {error.lineno}: {error.msg}"]
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "torchord":
            module = importlib.import_module(node.module or "")
            found += [
                f"no {each.name} in {node.module}" for each in node.names if not hasattr(module, each.name)
            ]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in KNOWN:
            given = {keyword.arg for keyword in node.keywords if keyword.arg}
            found += [f"{node.func.id} has no {name}" for name in sorted(given - KNOWN[node.func.id])]
    return found


def test_each_block_of_each_page_can_be_as_it_stands() -> None:
    found = {
        f"{page.relative_to(ROOT)}: {fault}"
        for page in PAGES
        for code in blocks(page.read_text())
        for fault in faults(code)
    }
    assert found == set()
    assert sum(len(blocks(page.read_text())) for page in PAGES) > 40


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("def f(:", ["line 1: invalid syntax"]),
        ("from torchord import Nothing", ["no Nothing in torchord"]),
        ("from torchord.coordinator.averages import mean", ["no mean in torchord.coordinator.averages"]),
        ("TrainingConfig(..., epoch=1)", ["TrainingConfig has no epoch"]),
        ("metrics={'a': a},", []),
        ("Recipe(..., average=x)", []),
        ("Recipe(average=x, ...)", []),
    ],
)
def test_what_cannot_be_is_noticed(code: str, said: list[str]) -> None:
    assert faults(code) == said
