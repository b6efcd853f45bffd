"""Fingerprints of the sources that a recipe names: what their code does, whatever is written beside it."""

from __future__ import annotations

import ast
import hashlib
import io
import tokenize
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torchord.coordinator.spec.admission import source_file
from torchord.coordinator.spec.recipe import modules_of

_CODE = "code:"  # of a digest that covers the code alone; one without covers all bytes of the file


def source_of(module: str) -> bytes | None:
    """Return the source of a module of the user's own as it lies here now, None for any other."""
    file = source_file(module)
    return None if file is None else file.read_bytes()


def fingerprint(
    spec: Mapping[str, Any], *, like: str = "", read: Callable[[str], bytes | None] = source_of
) -> str:
    """Return digests of the user's own source files that a spec names.

    Covered are the modules that contain the named callables, where they are Python files
    outside installed packages, the standard library and torch; modules that those import are
    not. A module that cannot be found here is left out. Comments, docstrings, blank lines and white
    space at line ends do not count.

    Args:
        spec: from `Recipe.to_spec`.
        like: a fingerprint that this one is to be compared with; of modules whose digest there covers all
            bytes, as in runs that were submitted before, it covers all bytes here.
        read: finds a module's source.

    Returns:
        "module=code:digest" (BLAKE2b, 16 hex digits), comma-separated and sorted by module; equal code gives
        equal strings. Compare with `skewed`.
    """
    theirs = digests_of(like)
    found = []
    for module in modules_of(spec):
        source = read(module)
        if source is not None:
            whole = module in theirs and not theirs[module].startswith(_CODE)
            found.append(f"{module}={_digest(source, whole=whole)}")
    return ",".join(found)


def skewed(ours: str, theirs: str) -> list[str]:
    """Return the modules whose sources differ between two fingerprints, among those in both."""
    mine, other = digests_of(ours), digests_of(theirs)
    return sorted(module for module in mine.keys() & other.keys() if mine[module] != other[module])


def digests_of(found: str) -> dict[str, str]:
    """Return module -> digest of a fingerprint."""
    return dict(item.split("=", 1) for item in found.split(",") if item)


def _digest(data: bytes, *, whole: bool) -> str:
    try:
        covered = data if whole else _code(data).encode()
    except (SyntaxError, ValueError, tokenize.TokenError):  # its import will say more
        covered = data
    digest = hashlib.blake2b(covered, digest_size=8).hexdigest()
    return digest if whole else _CODE + digest


def _code(data: bytes) -> str:
    """A module's text without what does nothing: the same on every version of Python."""
    encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
    lines = data.decode(encoding).splitlines()
    comments = [
        token.start
        for token in tokenize.generate_tokens(io.StringIO("\n".join(lines)).readline)
        if token.type == tokenize.COMMENT
    ]
    for row, column in comments:
        lines[row - 1] = lines[row - 1][:column]
    for first, last in _docstrings(ast.parse(data)):
        lines[first - 1 : last] = [""] * (last - first + 1)
    return "\n".join(line.rstrip() for line in lines if line.strip())


def _docstrings(tree: ast.Module) -> Iterator[tuple[int, int]]:
    """First and last line of every docstring that has lines of its own."""
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        first = node.body[0] if node.body else None
        if not (isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)):
            continue
        alone = isinstance(node, ast.Module) or first.lineno > node.lineno
        if isinstance(first.value.value, str) and alone and len(node.body) > 1:
            following = node.body[1].lineno
            if following > (first.end_lineno or first.lineno):
                yield first.lineno, first.end_lineno or first.lineno
