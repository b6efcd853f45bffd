"""The Lua scripts: every multi-key write is one of them, and its header is its contract."""

from __future__ import annotations

import re
from functools import cache
from importlib import resources

_USES = re.compile(r"-- Uses (\w+)\.lua\n")


@cache
def source(name: str) -> str:
    """The text of the script `name` (without the ending), after that of the part that its first line uses."""
    text = resources.files(__name__).joinpath(f"{name}.lua").read_text(encoding="utf-8")
    used = _USES.match(text)
    return text if used is None else source(used[1]) + text
