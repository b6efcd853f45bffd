"""Docstrings as the site shows them: an extension of griffe, which reads them for mkdocstrings.

Its sections are Google's, and two of ours are not among them: `Example:` is what Google's `Examples:` is, and
the lines of an `Equation:` are shown as they stand. What is said of several arguments is
said of each of them.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

EQUATION = re.compile(r"^( *)Equation:\n((?:\1 +\S.*\n|\n(?=\1 ))+)", re.MULTILINE)
SEVERAL = re.compile(r"^( +)(\w+(?:, \w+)+): (.*(?:\n\1 +\S.*)*)", re.MULTILINE)


def shown(docstring: str) -> str:
    """The docstring with both sections as griffe and Markdown know them."""
    text = re.sub(r"^( *)Example:$", r"\1Examples:", docstring, flags=re.MULTILINE)
    text = SEVERAL.sub(
        lambda found: "\n".join(f"{found[1]}{name}: {found[3]}" for name in found[2].split(", ")), text
    )
    return EQUATION.sub(r"\1Equation:\n\1    ```text\n\2\1    ```\n", f"{text}\n")


class Docstrings(Extension):
    """Called for each module, class, function and attribute when it has been read."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        """Change the docstring before it is parsed."""
        if obj.docstring is not None:
            obj.docstring.value = shown(obj.docstring.value)
