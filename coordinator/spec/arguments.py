"""Arguments of a recipe's entries: plain JSON that gives back the very values, or a refusal by name.

JSON has neither tuples nor NaN, bytes, enumerations, dtypes or functions. Such a value is written as the
plain value that is nearest to it, and the spec's `kinds` say beside it what it was: a list of [place, kind,
...] from the inside out, where a place is a path such as ["kwargs", "betas"] or ["args", 0, 2]. What `kinds`
does not list is what JSON says it is, as in specs from before there were kinds.
"""

from __future__ import annotations

import copy
import enum
import math
import sys
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from torchord.cache.errors import NotAllowed, RecipeError

Place: TypeAlias = tuple[str | int, ...]

_NUMPY = frozenset(
    {"bool", "float16", "float32", "float64"} | {f"{u}int{n}" for u in ("", "u") for n in (8, 16, 32, 64)}
)
_PLAIN = (str, int, float, list, tuple, dict, bytes)


@dataclass
class Encoder:
    """Writes the arguments of one entry.

    Args:
        entry: the entry's name, for messages.
        named: (place in words, value) -> entry of a spec for a callable, None for any other value; raises
            RecipeError for a callable that no worker can import.
        kinds: what was written so far and is not what JSON says it is.
    """

    entry: str
    named: Callable[[str, Any], dict[str, Any] | None]
    kinds: list[list[Any]] = field(default_factory=list)

    def argument(self, value: Any, place: Place, shown: str) -> Any:
        """Return an argument as plain JSON, with all that it holds; as `write`."""
        try:
            return self.write(value, place, shown)
        except RecursionError:
            raise self._refused(shown, "nested without an end, as something that contains itself") from None

    def write(self, value: Any, place: Place, shown: str) -> Any:
        """Return a value as plain JSON and note its kind.

        Args:
            place: where it lies.
            shown: that in words.

        Raises:
            RecipeError: it cannot arrive as what it is; the message says what to bind instead.
        """
        if value is None or type(value) in (bool, int, str):
            return value
        if type(value) is float:
            return value if math.isfinite(value) else self._noted(place, str(value), "float")
        if type(value) is list:
            return self._items(value, place, shown)
        if type(value) is tuple:
            return self._noted(place, self._items(value, place, shown), "tuple")
        if type(value) is dict:
            return self._dict(value, place, shown)
        if type(value) is bytes:
            return self._noted(place, value.hex(), "bytes")
        if type(value) is complex:
            return self._noted(place, str(value), "complex")
        if type(value) is range:
            return self._noted(place, [value.start, value.stop, value.step], "range")
        if type(value) is type(Path()):
            return self._noted(place, str(value), "path")
        if isinstance(value, enum.Enum):
            return self._member(value, place, shown)
        return self._foreign(value, place, shown)

    def _noted(self, place: Place, value: Any, kind: str, *more: str) -> Any:
        self.kinds.append([list(place), kind, *more])
        return value

    def _items(self, values: Sequence[Any], place: Place, shown: str) -> list[Any]:
        return [self.write(item, (*place, n), f"{shown}[{n}]") for n, item in enumerate(values)]

    def _dict(self, value: dict[Any, Any], place: Place, shown: str) -> Any:
        if all(type(key) is str for key in value):
            return {key: self.write(item, (*place, key), f"{shown}[{key!r}]") for key, item in value.items()}
        pairs = [
            [
                self.write(key, (*place, n, 0), f"the key {key!r} of {shown}"),
                self.write(item, (*place, n, 1), f"{shown}[{key!r}]"),
            ]
            for n, (key, item) in enumerate(value.items())
        ]
        return self._noted(place, pairs, "dict")

    def _member(self, value: enum.Enum, place: Place, shown: str) -> Any:
        if type(value).__members__.get(value.name or "") is not value:
            raise self._refused(shown, f"{value!r}, which is no single member; bind its value")
        target = self.named(shown, type(value))
        assert target is not None
        plain = value.value if isinstance(value.value, (str, int)) else value.name
        plain = str.__str__(plain) if isinstance(plain, str) else int(plain)
        return self._noted(place, plain, "enum", target["target"], value.name)

    def _foreign(self, value: Any, place: Place, shown: str) -> Any:
        """Values of numpy and torch, where they are loaded, and callables."""
        torch, numpy = sys.modules.get("torch"), sys.modules.get("numpy")
        if torch is not None:
            if type(value) is torch.Size:
                return self._noted(place, list(value), "torch.Size")
            if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
                return self._noted(place, str(value).removeprefix("torch."), "torch")
            if isinstance(value, torch.device):
                return self._noted(place, str(value), "torch.device")
        if numpy is not None and isinstance(value, numpy.generic):
            name = value.dtype.name
            if name in _NUMPY and type(value) is numpy.dtype(name).type:
                item = value.item()
                plain = str(item) if isinstance(item, float) and not math.isfinite(item) else item
                return self._noted(place, plain, "numpy", name)
        target = self.named(shown, value)
        if target is not None:
            return self._noted(place, target, "callable")
        raise self._refused(shown, _instead(value))

    def _refused(self, shown: str, why: str) -> RecipeError:
        return RecipeError(f"recipe entry {self.entry!r}: {shown} is {why}")


def _instead(value: Any) -> str:
    """What a value is that does not travel, and what to bind instead."""
    name = type(value).__name__
    if isinstance(value, Set):
        return (
            f"of type {name}, whose order differs between processes; bind a tuple such as tuple(sorted(...))"
        )
    for plain in _PLAIN:
        if isinstance(value, plain):
            return _lessened(name, plain.__name__)
    if isinstance(value, Mapping):
        return _lessened(name, "dict")
    return (
        f"of type {name}, which does not travel as JSON; bind numbers, strings, bytes, lists, tuples, dicts, "
        "paths, dtypes, members of enumerations and importable callables only, and make anything else inside "
        "a function of your module"
    )


def _lessened(name: str, plain: str) -> str:
    return f"of type {name}, which would arrive as a plain {plain}; bind {plain}(...) of it"


def restored(
    arguments: dict[str, Any],
    kinds: Sequence[Sequence[Any]],
    *,
    fetch: Callable[[str], Any],
    bind: Callable[[Any], Any],
) -> dict[str, Any]:
    """Return {"args": ..., "kwargs": ...} of a spec with every value as it was bound.

    Args:
        arguments: as the spec has them; they are not changed.
        kinds: of the same entry.
        fetch: "module:attribute" -> the object, within what this worker admits.
        bind: entry of a spec -> the callable, within what this worker admits.

    Raises:
        NotAllowed: an enumeration or callable may not be imported here.
        RecipeError: the spec is malformed, or an enumeration has no such member here.
    """
    if not kinds:
        return arguments
    root = copy.deepcopy(arguments)
    try:
        for place, kind, *more in kinds:
            *above, last = place
            holder: Any = root
            for step in above:
                holder = holder[step]
            holder[last] = _made(kind, holder[last], more, fetch, bind)
    except (NotAllowed, RecipeError):
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise RecipeError(f"its arguments are malformed: {type(error).__name__}: {error}") from error
    return root


def names_in(arguments: dict[str, Any], kinds: Sequence[Sequence[Any]]) -> set[str]:
    """Return every "module:attribute" that arguments name, at any depth.

    Raises:
        RecipeError: the spec is malformed.
    """
    names: set[str] = set()
    try:
        for place, kind, *more in kinds:
            if kind == "enum":
                names.add(str(more[0]))
            if kind == "callable":
                found: Any = arguments
                for step in place:
                    found = found[step]
                names |= {str(found["target"]), *names_in(found, found.get("kinds", ()))}
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise RecipeError(f"its arguments are malformed: {type(error).__name__}: {error}") from error
    return names


def _made(
    kind: str, value: Any, more: list[str], fetch: Callable[[str], Any], bind: Callable[[Any], Any]
) -> Any:
    if kind == "enum":
        return _member_of(fetch(more[0]), *more)
    if kind == "callable":
        return bind(value)
    if kind == "bytes":
        return bytes.fromhex(value)
    if kind == "range":
        return range(*value)
    if kind in _SIMPLE:
        return _SIMPLE[kind](value)
    if kind == "numpy" and more[0] in _NUMPY:
        import numpy

        return numpy.dtype(more[0]).type(value)
    return _of_torch(kind, value)


def _of_torch(kind: str, value: Any) -> Any:
    import torch

    if kind == "torch.Size":
        return torch.Size(value)
    if kind == "torch.device":
        return torch.device(value)
    found: Any = getattr(torch, value) if kind == "torch" else None
    if not isinstance(found, (torch.dtype, torch.layout, torch.memory_format)):
        raise ValueError(f"no {kind!r} is {value!r}")
    return found


def _member_of(found: Any, target: str, name: str) -> Any:
    members: Any = found.__members__ if isinstance(found, enum.EnumType) else {}
    member = members.get(name)
    if member is None:
        raise RecipeError(
            f"{target!r} is no enumeration with a member {name!r} on this worker; does it run the same "
            "code as the submitter?"
        )
    return member


_SIMPLE: dict[str, Callable[[Any], Any]] = {
    "float": float,
    "tuple": tuple,
    "dict": dict,
    "complex": complex,
    "path": Path,
}
