"""JSON of records that hold figures: a loss, norm or metric may be NaN or infinite, and JSON has neither.

What is kept is strict JSON that gives the figures back: one that is not finite is {"figure": "nan"},
"inf" or "-inf". What is printed for other programs has null there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

from torchord.cache.reading import parsed

_TAG = "figure"
_NONFINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_strict = json.JSONEncoder(allow_nan=False, separators=(",", ":"))


def to_text(value: Any) -> str:
    """Strict JSON of a JSON-able value in which floats may be NaN or infinite; `from_text` reads it.

    Example:
        >>> to_text({"loss": math.inf, "step": 3})
        '{"loss":{"figure":"inf"},"step":3}'
    """
    try:
        return _strict.encode(value)
    except ValueError:
        return _strict.encode(tagged(value))


def from_text(text: str | bytes) -> Any:
    """The inverse of `to_text`; reads Python's NaN and Infinity, too, which older records have.

    Raises:
        RecordDamaged: it is not JSON, or nests too deep.
    """
    return parsed(text, "a record", hook=figures_in(text))


def figures_in(text: str | bytes) -> Callable[[dict[str, Any]], Any] | None:
    """What gives the figures of JSON text back as it is parsed; None if it has none."""
    return _untag if (_TAG if isinstance(text, str) else _TAG.encode()) in text else None  # type: ignore[operator]


def for_others(value: Any) -> str:
    """Strict JSON for other programs to read: null where a figure is NaN or infinite."""
    return json.dumps(_replaced(value, lambda _: None), allow_nan=False)


def tagged(value: Any) -> Any:
    """A JSON-able value with its NaN and infinite figures as tags; `untagged` takes them back."""
    return _replaced(value, lambda figure: {_TAG: str(figure)})


def untagged(value: Any) -> Any:
    """The inverse of `tagged`."""
    if isinstance(value, dict):
        return _untag({name: untagged(item) for name, item in value.items()})
    return [untagged(item) for item in value] if isinstance(value, list) else value


def _replaced(value: Any, replace: Callable[[float], Any]) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else replace(value)
    if isinstance(value, dict):
        return {name: _replaced(item, replace) for name, item in value.items()}
    return [_replaced(item, replace) for item in value] if isinstance(value, (list, tuple)) else value


def _untag(value: dict[str, Any]) -> Any:
    if len(value) == 1 and isinstance(kind := value.get(_TAG), str):
        return _NONFINITE.get(kind, value)
    return value
