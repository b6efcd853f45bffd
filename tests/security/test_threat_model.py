"""docs/security.md says of each threat what becomes of it, and which test shows that."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "security.md"
WHO = (
    "Who may only submit",
    "Who has a worker's credential",
    "Who reaches the REST interface",
    "Who can write to Redis",
    "A worker that is malicious or broken",
    "A bystander on the host",
    "Somebody on the network",
)
NEEDS_NO_TEST = ("accepted", "see ")


def threats() -> list[tuple[str, str, str, str]]:
    """(heading, what is tried, verdict, test) of each row."""
    rows, heading = [], ""
    for line in PAGE.read_text().splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if heading in WHO and len(cells) == 3 and cells[0] != "what" and not set(cells[0]) <= set("- "):
            rows.append((heading, *cells))
    return rows


def test_everybody_has_rows() -> None:
    assert {heading for heading, *_ in threats()} == set(WHO)


@pytest.mark.parametrize(("heading", "what", "verdict", "shown"), threats())
def test_a_verdict_is_shown_by_a_test_that_there_is(
    heading: str, what: str, verdict: str, shown: str
) -> None:
    assert re.match(r"(with keys )?(prevented|detected|accepted|see \[)", verdict), verdict
    tests = re.findall(r"`([\w/]+\.py)::(\w+)`", shown)
    if not tests:
        assert verdict.startswith(NEEDS_NO_TEST) or "no open port" in verdict, f"{what}: no test shows it"
    for path, name in tests:
        found = ast.walk(ast.parse((ROOT / "tests" / path).read_text()))
        assert name in {each.name for each in found if isinstance(each, ast.FunctionDef)}, f"{path}::{name}"
