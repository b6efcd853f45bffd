"""The table of docs/events.md has each type of event that the code can write, with its fields."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

from product import modules
from torchord.coordinator.runtime import step_result

ROOT = Path(__file__).resolve().parents[3]
# Types whose calls have no literal: the event of a notice, settled in scripts/settle_telling.lua.
SETTLED = {"told", "not told"}


def table() -> dict[str, set[str]]:
    """Type -> the fields that its row names."""
    found: dict[str, set[str]] = {}
    for line in (ROOT / "docs" / "events.md").read_text().splitlines():
        cells = line.split(" | ")
        if line.startswith("| `"):
            for name in re.findall(r"`([^`]+)`", cells[0]):
                assert name not in found, f"{name} has two rows"
                found[name] = set(re.findall(r"`(\w+)`", cells[-1]))
    return found


def literal(node: ast.expr | None) -> str:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def fields_of(node: ast.expr | None) -> set[str]:
    return {literal(key) for key in node.keys} - {""} if isinstance(node, ast.Dict) else set()


def written() -> dict[str, set[str]]:
    """Type -> the fields that calls and scripts name, as far as they are literals."""
    found: dict[str, set[str]] = defaultdict(set)
    for module in modules().values():
        for node in ast.walk(module.tree):
            if not isinstance(node, ast.Call):
                continue
            keywords = {each.arg: each.value for each in node.keywords}
            name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            if name == "emit" and len(node.args) == 2 and (type_ := literal(node.args[0])):
                found[type_] |= fields_of(node.args[1])
            elif name == "transition" and (type_ := literal(keywords.get("event"))):
                found[type_] |= fields_of(keywords.get("data"))
            elif name in ("extend", "switch") and "data" in keywords:
                found[{"extend": "extended", "switch": "switched"}[name]] |= fields_of(keywords["data"])
    for script in (ROOT / "cache" / "scripts").glob("*.lua"):
        for call in re.findall(
            r"'type', '([^']+)', 'data',\s*((?:cjson\.encode\(\{.*?\}\))?)", script.read_text(), re.S
        ):
            found[call[0]] |= set(re.findall(r"(\w+) = ", call[1]))
    tree = ast.parse(Path(step_result.__file__).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == "event_of":
            found["step"] |= fields_of(next(each for each in ast.walk(node) if isinstance(each, ast.Dict)))
    return found


def test_each_type_of_event_has_a_row() -> None:
    assert len(written()) > 18
    assert {*written(), *SETTLED} == table().keys()


def test_a_row_names_the_fields_that_are_written() -> None:
    rows, found = table(), written()
    assert {"loss", "lr", "grad_norm", "nbytes"} <= found["step"] and {"version", "from"} <= found["rollback"]
    for type_, fields in found.items():
        assert fields <= rows[type_], f"{type_}: docs/events.md lacks {sorted(fields - rows[type_])}"
