"""Data that can only be read one after the other, as a dataset with places: `Streamed`.

A recipe names it: `dataset=partial(Streamed, open=one_part, parts=[...], sizes=[...])`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, islice
from typing import Any

from torchord.cache.errors import InvalidInput


class Streamed:
    """The examples of some parts, each of which is an iterable of a stated size, as a map-style dataset.

    Example i is what the iterable of its part gives at its place: a part is read through, from its start, by
    whoever needs one of its examples, and kept. So parts should fit into memory a few at a time, and
    `order=torchord.coordinator.orders.by_parts` visits one after the other; in any other order each batch
    reads all parts that it has examples of.

    Args:
        open: (part) -> iterable of the part's examples; each call gives the same ones in the same order. The
            global generators are seeded for the run and the part while it is read, and put back.
        parts: what `open` is called with, one argument a part: a path, say, or a number.
        sizes: the examples of each part.
        kept: how many parts are kept in memory, the last ones that were asked for.

    Raises:
        InvalidInput: parts and sizes do not agree, or there is no example.

    Example:
        >>> data = Streamed(range, parts=[3, 2], sizes=[3, 2])
        >>> len(data), data[1], data[4], data.__getitems__([3, 0])
        (5, 1, 1, [0, 0])
    """

    def __init__(
        self, open: Callable[[Any], Iterable[Any]], parts: Sequence[Any], sizes: Sequence[int], kept: int = 4
    ) -> None:
        import torch

        if len(parts) != len(sizes) or not parts or min(sizes) < 0:
            raise InvalidInput(
                "a Streamed dataset needs the size of each of its parts, a number of examples from 0; it has "
                f"{len(parts)} parts and {len(sizes)} sizes"
            )
        if kept < 1:
            raise InvalidInput(f"kept must be a number of parts, at least 1, not {kept!r}")
        self.sizes = tuple(sizes)
        self._open = open
        self._parts = tuple(parts)
        self._kept = kept
        self._ends = list(accumulate(sizes))
        self._seed = torch.initial_seed()  # the run's, while its dataset is made
        self._read: OrderedDict[int, list[Any]] = OrderedDict()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} is outside 0 to {len(self) - 1}")
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Return some examples; each part is read at most once for them."""
        places = [self._place(index) for index in indices]
        found: list[Any] = [None] * len(places)
        for part in dict.fromkeys(part for part, _ in places):
            examples = self._part(part)
            for number, (home, place) in enumerate(places):
                if home == part:
                    found[number] = examples[place]
        return found

    def _place(self, index: int) -> tuple[int, int]:
        part = bisect_right(self._ends, index)
        return part, index - (self._ends[part] - self.sizes[part])

    def _part(self, part: int) -> list[Any]:
        examples = self._read.get(part)
        if examples is None:
            examples = self._read[part] = self._through(part)
        self._read.move_to_end(part)
        while len(self._read) > self._kept:
            self._read.popitem(last=False)
        return examples

    def _through(self, part: int) -> list[Any]:
        from torchord.coordinator.compute.determinism import generators, seed_everything, set_generators
        from torchord.coordinator.spec.plan import derive_seed

        size = self.sizes[part]
        before = generators()
        try:
            seed_everything(derive_seed(self._seed, "part", part))
            examples = list(islice(iter(self._open(self._parts[part])), size + 1))
        finally:
            set_generators(before)
        if len(examples) != size:
            given = f"more than {size}" if len(examples) > size else len(examples)
            raise InvalidInput(
                f"part {self._parts[part]!r} of the Streamed dataset gives {given} examples, and its size "
                f"says {size}; count them and give the right size"
            )
        return examples
