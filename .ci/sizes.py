"""Caps on the length of files, classes and functions, and the counts that say whether the house grows.

    python .ci/sizes.py      prints the counts, then what is over a cap; exit status 1 if anything is

A file and a class are counted as they stand; a function from `def` to its last line, without its docstring.
What may be longer is named in sizes.toml, with the reason. A name there that needs no exception any more is
an error too, so the list gets no longer than it must be.
"""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from product import PACKAGES, PRODUCT, ROOT, Module, arrows, files, longest_chain, modules

CAPS = Path(__file__).with_name("sizes.toml")
# As of commit 9ce0c74, before there were rooms, counted by this script; a circle of imports counted as one.
BEFORE = {
    "lines": 27643,
    "file": 1103,
    "class": 946,
    "function": 90,
    "rooms": 2,
    "files in a room": 67,
    "chain": 20,
}


@dataclass(frozen=True, order=True)
class Length:
    """How long one thing is.

    Attributes:
        lines: how many.
        kind: "file", "class" or "function".
        what: its path from the root, and for what is inside a file the name there, after a colon.
    """

    lines: int
    kind: str
    what: str


def lengths_in(module: Module) -> Iterator[Length]:
    """The lengths of a file's classes and functions, those in others too."""

    def visit(node: ast.AST, prefix: str) -> Iterator[Length]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                name, lines = f"{prefix}{child.name}", _lines(child)
                yield Length(lines, "class", f"{module.path.as_posix()}:{name}")
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                name, lines = f"{prefix}{child.name}", _lines(child)
                if ast.get_docstring(child) is not None:
                    lines -= _lines(child.body[0])
                yield Length(lines, "function", f"{module.path.as_posix()}:{name}")
            else:
                yield from visit(child, prefix)
                continue
            yield from visit(child, f"{name}.")

    yield from visit(module.tree, "")


def _lines(node: ast.stmt) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def lengths() -> list[Length]:
    """The length of every file, class and function of the product, Lua scripts among the files."""
    found: list[Length] = []
    for folder in PRODUCT:
        for path in [*files(folder, ".py"), *files(folder, ".lua")]:
            lines = len((ROOT / path).read_text(encoding="utf-8").splitlines())
            found.append(Length(lines, "file", path.as_posix()))
    for module in modules().values():
        found += lengths_in(module)
    return found


def problems(found: list[Length], caps: Mapping[str, Any]) -> list[str]:
    """What is over its cap and has no exception, and the exceptions that nothing needs.

    Args:
        found: every length.
        caps: "caps" by kind, and "exceptions", what -> why.
    """
    exceptions: Mapping[str, str] = caps["exceptions"]
    over = {each.what: each for each in found if each.lines > caps["caps"][each.kind]}
    bad = [
        f"{each.what}: this {each.kind} has {each.lines} lines, {caps['caps'][each.kind]} are allowed"
        for each in sorted(over.values(), reverse=True)
        if each.what not in exceptions
    ]
    for what, why in exceptions.items():
        if what not in over:
            bad.append(f"{what}: {CAPS.name} excepts it, and nothing there is too long")
        elif not why.strip():
            bad.append(f"{what}: its exception needs a reason")
    return bad


def counts(found: list[Length]) -> list[tuple[str, str, str]]:
    """(what is counted, how much today, how much before there were rooms)."""
    rows = []
    lines = sum(each.lines for each in found if each.kind == "file")
    rows.append(("product, lines with Lua", f"{lines:,}", f"{BEFORE['lines']:,}"))
    for kind in ("file", "class", "function"):
        longest = max(each for each in found if each.kind == kind)
        rows.append((f"longest {kind}, lines", f"{longest.lines:,}  {longest.what}", f"{BEFORE[kind]:,}"))
    rooms = {path.parent for folder in PACKAGES for path in files(folder, ".py")}
    crowd = max(sum(path.parent == room for path in files(room.parts[0], ".py")) for room in rooms)
    rows.append(("rooms", f"{len(rooms - {Path(folder) for folder in PACKAGES})}", f"{BEFORE['rooms']}"))
    rows.append(("most files in a room", f"{crowd}", f"{BEFORE['files in a room']}"))
    chain = longest_chain(arrows())
    ends = " > … > ".join((chain[0].removeprefix("torchord."), chain[-1].removeprefix("torchord.")))
    rows.append(("longest import chain, modules", f"{len(chain)}  {ends}", f"{BEFORE['chain']}"))
    return rows


def main() -> int:
    """Print the counts and what is wrong; 1 if anything is."""
    found = lengths()
    table = [("", "today", "before"), *counts(found)]
    widths = [max(len(row[i]) for row in table) for i in range(2)]
    for name, today, before in table:
        print(f"{name:{widths[0]}}  {today:{widths[1]}}  {before}".rstrip())
    bad = problems(found, tomllib.loads(CAPS.read_text(encoding="utf-8")))
    print(*([""] if bad else []), *bad, sep="\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
