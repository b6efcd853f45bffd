"""Names that a framework makes by counting what a process has made: `dense_3` here is `dense` there.

Such models are alike and their tensors' names are not, so they are matched by place. A count cannot be told
from a name that somebody has chosen, `fc1` beside `fc2`; that names change from one model of a process to the
next is what shows a count.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable

from torchord.cache.errors import InvalidInput, ManifestMismatch
from torchord.cache.tensors.codec import Manifest, require_same

_PARTS = re.compile(r"([./])")
_COUNT = re.compile(r"(?<=[^\W\d])_?(\d+)$")


def renamed(ours: Manifest, theirs: Manifest, counts: Callable[[], bool]) -> dict[str, str] | None:
    """Return our name -> theirs of two layouts whose names are counts; None where they have the same names.

    Args:
        counts: whether the next model of this process has other names; asked only where names differ.

    Raises:
        ManifestMismatch: the layouts are those of two models; names the first tensor that differs.
        InvalidInput: they may be of one, and counts do not say what is what.
    """
    if {spec.name for spec in ours.tensors} == {spec.name for spec in theirs.tensors}:
        return None
    try:
        require_same(ours, theirs)
    except ManifestMismatch as error:
        if len(ours.tensors) != len(theirs.tensors) or not counts():
            raise
        if (found := counterparts(ours, theirs)) is not None:
            return found
        raise InvalidInput(
            f"{error}; the model names its layers by a count, which is another in each process and does not "
            "say which is which: give them names of their own in the model function"
        ) from error
    return None


def counterparts(ours: Manifest, theirs: Manifest) -> dict[str, str] | None:
    """Return our name -> theirs of two layouts that differ in counts alone.

    Place by place, shapes and dtypes are the same, and names are but for numbers at the end of their parts;
    numbers alone, which are places in a sequence, are the same. One part of a name stands for one of theirs,
    and counts of one kind keep their order: sorted as words, the tenth would come before the second.

    Returns:
        None where they differ otherwise.
    """
    if len(ours.tensors) != len(theirs.tensors):
        return None
    parts: dict[str, str] = {}
    for own, other in zip(ours.tensors, theirs.tensors, strict=True):
        if (own.shape, own.dtype) != (other.shape, other.dtype):
            return None
        mine, its = _PARTS.split(own.name), _PARTS.split(other.name)
        if [_COUNT.sub("", part) for part in mine] != [_COUNT.sub("", part) for part in its]:
            return None
        for part, counterpart in zip(mine, its, strict=True):
            if parts.setdefault(part, counterpart) != counterpart:
                return None
    counts: dict[str, list[tuple[int, int]]] = {}
    for part, counterpart in parts.items():
        counts.setdefault(_COUNT.sub("", part), []).append((_count(part), _count(counterpart)))
    for pairs in counts.values():
        there = [other for _, other in sorted(pairs)]
        if any(first >= second for first, second in itertools.pairwise(there)):
            return None
    return {own.name: other.name for own, other in zip(ours.tensors, theirs.tensors, strict=True)}


def _count(part: str) -> int:
    """The number at the end of a part; the first of its kind has none, or 0."""
    found = _COUNT.search(part)
    return -1 if found is None else int(found[1])
