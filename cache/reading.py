"""Reading JSON that anybody may have written: bounds first, then fields of the right kind, or one error.

Whoever can write to Redis or to a folder of checkpoints can write anything. What is read here is refused with
one sentence that names the field, before it takes memory or time, and reaches nobody as a KeyError.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torchord.cache.errors import RecordDamaged, TorchordError

MOST_NBYTES = 256 << 20
"""Of one record's text: the largest honest one names 16 digits a chunk and 60 signs a tensor."""

MOST_DEPTH = 64
"""How deep JSON may nest."""

_NOT_BRACKETS = bytes(sign for sign in range(256) if sign not in b"[]{}")
_SQUARE = bytes.maketrans(b"{}", b"[]")
_TEXTS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

FOREIGN = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What code raises that meets values of another kind than it expects."""


def parsed(
    text: str | bytes,
    what: str,
    *,
    error: type[TorchordError] = RecordDamaged,
    hook: Callable[[dict[str, Any]], Any] | None = None,
    most_nbytes: int = MOST_NBYTES,
) -> Any:
    """JSON that is neither too long nor nested too deep.

    Args:
        what: it is, for messages.
        error: to raise.
        hook: as json's `object_hook`.
    """
    if len(text) > most_nbytes:
        raise error(f"{what} has {len(text):,} signs; at most {most_nbytes:,} are read")
    try:
        if nested(text):
            raise error(f"{what} nests deeper than {MOST_DEPTH} levels")
        if isinstance(text, bytes):
            text = text.decode()
        if _SURROGATE.search(text):  # half a sign, which no server takes and no file has: a ValueError
            json.dumps(json.loads(text), ensure_ascii=False).encode()
        return json.loads(text, object_hook=hook)
    except (ValueError, RecursionError) as failure:
        raise error(f"{what} is no JSON ({type(failure).__name__}: {failure!s:.100})") from None


def nested(text: str | bytes) -> bool:
    """Whether JSON nests deeper than `MOST_DEPTH`, found without building anything."""
    if isinstance(text, str):
        if text.count("[") + text.count("{") <= MOST_DEPTH:
            return False
        text = text.encode("utf-8", "surrogatepass")
    elif text.count(b"[") + text.count(b"{") <= MOST_DEPTH:
        return False
    outside = _TEXTS.sub(b"", text) if b"\\" in text else b"".join(text.split(b'"')[::2])
    left = outside.translate(_SQUARE, _NOT_BRACKETS)
    for _ in range(MOST_DEPTH):
        shorter = left.replace(b"[]", b"")  # the innermost level is gone
        if len(shorter) == len(left):
            return left.startswith(b"[" * MOST_DEPTH)  # no JSON: the parser finds that out, if it may try
        left = shorter
    return bool(left)


class Kind(NamedTuple):
    """What a field may hold.

    Attributes:
        types: exactly these, no subclasses: a bool is no int.
        fits: whether a value of these types is in range; None: each is.
        words: the kind in words, for messages.
    """

    types: frozenset[type]
    fits: Callable[[Any], bool] | None
    words: str

    def or_none(self) -> Kind:
        """The same, or None."""
        fits = self.fits
        inner = None if fits is None else lambda value: value is None or fits(value)
        return Kind(self.types | {type(None)}, inner, f"{self.words} or null")


def _of(*types: type) -> frozenset[type]:
    return frozenset(types)


TEXT = Kind(_of(str), None, "a text")
COUNT = Kind(_of(int), lambda value: 0 <= value < 1 << 63, "a whole number from 0 to 2**63 - 1")
FIGURE = Kind(_of(float, int), lambda value: type(value) is float or -(1 << 63) < value < 1 << 63, "a number")
FINITE = Kind(
    _of(float, int),
    lambda value: math.isfinite(value) if type(value) is float else -(1 << 63) < value < 1 << 63,
    "a finite number",
)
FLAG = Kind(_of(bool), None, "true or false")
OBJECT = Kind(_of(dict), None, "an object")
LIST = Kind(_of(list), None, "a list")
TEXTS = Kind(_of(list, tuple), lambda value: all(type(each) is str for each in value), "a list of texts")
COUNTS = Kind(
    _of(list, tuple), lambda value: all(type(each) is int and each >= 0 for each in value), "a list of counts"
)
FIGURES = Kind(
    _of(list, tuple),
    lambda value: all(type(each) is float or (type(each) is int and abs(each) < 1 << 63) for each in value),
    "a list of numbers",
)
ROWS = Kind(
    _of(list),
    lambda value: all(type(row) is list and len(row) >= 3 and type(row[0]) is int for row in value),
    "a list of rows, each of a number and at least two more",
)
NAMED_FIGURES = Kind(
    _of(dict),
    lambda value: all(
        type(each) is float or (type(each) is int and abs(each) < 1 << 63) for each in value.values()
    ),
    "an object of numbers",
)
NAMED_TEXTS = Kind(
    _of(dict), lambda value: all(type(each) is str for each in value.values()), "an object of texts"
)
ANY = Kind(_of(dict, list, str, int, float, bool, type(None)), None, "JSON")


class Fields:
    """The fields of one kind of object.

    Args:
        what: the object, for messages.
        needed: name -> kind of what has to be there.
        optional: name -> kind of what may be.
        open: whether other fields are passed over.
        error: what is raised.

    Example:
        >>> Fields("a point", {"x": FINITE}).of({"x": 3})
        {'x': 3}
    """

    def __init__(
        self,
        what: str,
        needed: Mapping[str, Kind],
        optional: Mapping[str, Kind] | None = None,
        *,
        open: bool = False,
        error: type[TorchordError] = RecordDamaged,
    ) -> None:
        self.what = what
        self._error = error
        self._kinds = {**needed, **(optional or {})}
        self._needed = [(name, *kind[:2]) for name, kind in needed.items()]
        self._optional = [(name, *kind[:2]) for name, kind in (optional or {}).items()]
        self._open = open

    def of(self, value: Any) -> dict[str, Any]:
        """The object itself, all its fields being of their kinds.

        Raises:
            RecordDamaged: or another error of the constructor's choice; it names the field.
        """
        if type(value) is not dict:
            raise self._error(f"{self.what} is a {_named(value)}, not an object")
        for name, types, fits in self._needed:
            try:
                found = value[name]
            except KeyError:
                raise self._error(f"{self.what} has no field {name!r}") from None
            if type(found) not in types or (fits is not None and not fits(found)):
                raise self._unlike(name, found)
        for name, types, fits in self._optional:
            if name in value:
                found = value[name]
                if type(found) not in types or (fits is not None and not fits(found)):
                    raise self._unlike(name, found)
        if not self._open and len(value) > len(self._needed):
            for name in value:
                if name not in self._kinds:
                    raise self._error(
                        f"{self.what} has a field {name[:100]!r} that this torchord does not know"
                    )
        return value

    def read(self, text: str | bytes, hook: Callable[[dict[str, Any]], Any] | None = None) -> dict[str, Any]:
        """`of` JSON text; arguments as for `parsed`."""
        return self.of(parsed(text, self.what, error=self._error, hook=hook))

    def _unlike(self, name: str, found: Any) -> TorchordError:
        shown = f"{found!r:.60}" if type(found) in (str, float, bool) else _named(found)
        return self._error(f"field {name!r} of {self.what} is {shown}, not {self._kinds[name].words}")


def _named(value: Any) -> str:
    kinds = {dict: "object", list: "list", str: "text", type(None): "null"}
    return kinds.get(type(value), type(value).__name__)


def number_of(text: str, what: str, *, error: type[TorchordError] = RecordDamaged) -> int:
    """A count that is the name of a field of a hash."""
    if text.isascii() and text.isdigit() and len(text) <= 18:
        return int(text)
    raise error(f"{what} is {text:.60}, not a whole number from 0 on")
