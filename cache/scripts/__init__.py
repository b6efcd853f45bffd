"""The Lua scripts: every multi-key write is one of them, and its header is its contract."""

from __future__ import annotations

from functools import cache
from importlib import resources


@cache
def source(name: str) -> str:
    """The text of the script `name` (without the ending)."""
    return resources.files(__name__).joinpath(f"{name}.lua").read_text(encoding="utf-8")
