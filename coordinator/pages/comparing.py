"""In what runs differ: recipe and config, entry by entry."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

_DEEPEST = 6
ABSENT = "—"


def differences(specs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The entries in which specs differ, by name, each with its value in every one of them.

    Args:
        specs: with "recipe", "config" and maybe "switches".

    Returns:
        [{"name": "config.seed", "values": ["0", "1"]}]; a value is JSON, or `ABSENT`.

    Example:
        >>> differences([{"config": {"seed": 0, "epochs": 2}}, {"config": {"seed": 1, "epochs": 2}}])
        [{'name': 'config.seed', 'values': ['0', '1']}]
    """
    entries = [
        _entries({part: spec.get(part, {}) for part in ("recipe", "config", "switches")}) for spec in specs
    ]
    names = sorted({name for each in entries for name in each})
    found = [{"name": name, "values": [each.get(name, ABSENT) for each in entries]} for name in names]
    return [each for each in found if len(set(each["values"])) > 1]


def _entries(value: Any, name: str = "", depth: int = 0) -> dict[str, str]:
    if isinstance(value, Mapping) and value and depth < _DEEPEST:
        found: dict[str, str] = {}
        for key, inner in value.items():
            found.update(_entries(inner, f"{name}.{key}" if name else str(key), depth + 1))
        return found
    return {} if value == {} else {name: json.dumps(value, sort_keys=True, default=str)}
