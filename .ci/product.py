"""The product's modules as the scripts beside this one see them: read from their syntax, imported never."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("cache", "coordinator", "tasks")
PRODUCT = (*PACKAGES, "torchord")  # torchord/ has links to the other three


@dataclass(frozen=True)
class Module:
    """One Python file.

    Attributes:
        name: dotted, as it is imported; a package's name for its `__init__`.
        path: from the repository's root.
    """

    name: str
    path: Path

    @cached_property
    def text(self) -> str:
        """Its source."""
        return (ROOT / self.path).read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        """Its syntax."""
        return ast.parse(self.text, str(self.path))


def files(folder: str, suffix: str) -> list[Path]:
    """The files below a folder of the repository, relative to its root; links are not followed."""
    return sorted(path.relative_to(ROOT) for path in (ROOT / folder).rglob(f"*{suffix}"))


@cache
def modules() -> dict[str, Module]:
    """Every module of the product by name."""
    found = {}
    for folder in PRODUCT:
        for path in files(folder, ".py"):
            parts = list(path.with_suffix("").parts)
            if parts[0] != "torchord":
                parts.insert(0, "torchord")
            if parts[-1] == "__init__":
                parts.pop()
            found[".".join(parts)] = Module(".".join(parts), path)
    return found


def imports(module: Module, known: Iterable[str]) -> set[str]:
    """The modules among `known` that a module imports, anywhere in it, for running or for its types."""
    found = set()
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in known else node.module)
    return {name for name in found if name in known} - {module.name}


@cache
def arrows() -> dict[str, set[str]]:
    """Each module's imports from the product."""
    known = modules()
    return {name: imports(module, known.keys()) for name, module in known.items()}


def longest_chain(graph: dict[str, set[str]]) -> list[str]:
    """The longest way along imports, its end last.

    Raises:
        ValueError: a module imports itself by way of others.
    """
    chains: dict[str, list[str]] = {}
    above: list[str] = []

    def chain(name: str) -> list[str]:
        if name in above:
            raise ValueError(f"imports go round: {' > '.join([*above[above.index(name) :], name])}")
        if name not in chains:
            above.append(name)
            chains[name] = [name, *max((chain(each) for each in sorted(graph[name])), key=len, default=[])]
            above.pop()
        return chains[name]

    return max((chain(name) for name in sorted(graph)), key=len)
