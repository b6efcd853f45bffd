"""What `submit(..., callbacks=[...])` names: by import path, under the allow-list of recipes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torchord.cache.errors import InvalidInput, RecipeError
from torchord.coordinator.spec.resolving import resolve_entry
from torchord.coordinator.spec.targets import Entry, Target, check_kind, decode, encode

MOST = 8
"""Of one run."""


def described(callbacks: Sequence[Entry]) -> list[dict[str, Any]]:
    """The callbacks as a spec has them.

    Raises:
        InvalidInput: there are too many, or no list.
        RecipeError: one cannot be imported by others.
    """
    if isinstance(callbacks, str | Target) or not isinstance(callbacks, Sequence):
        raise InvalidInput("callbacks is a list: of classes, partials of classes, or 'package.module:Class'")
    if len(callbacks) > MOST:
        raise InvalidInput(f"{len(callbacks)} callbacks are too many; a run has at most {MOST}")
    found = []
    for number, entry in enumerate(callbacks):
        check_kind(f"callbacks.{number}", entry)
        found.append(encode(f"callbacks.{number}", entry).to_json())
    return found


def named(spec: Any) -> list[tuple[str, Any]]:
    """(import path, entry) of each callback of a spec; of what is none of ours nothing."""
    entries = spec.get("callbacks")
    if not isinstance(entries, list):
        return []
    return [
        (str(entry.get("target", "")) if isinstance(entry, dict) else "", entry) for entry in entries[:MOST]
    ]


def resolved(
    number: int, entry: Any, *, allowed: tuple[str, ...] | None, directory: Path | None = None
) -> Callable[[], Any]:
    """What makes a callback, imported in this process.

    Raises:
        NotAllowed: its module may not be imported here.
        RecipeError: it does not exist, or is malformed.
    """
    name = f"callbacks.{number}"
    target = decode(name, entry)
    if not target.target:
        raise RecipeError(f"{name} names nothing")
    return resolve_entry(name, target, allowed=allowed, directory=directory)
