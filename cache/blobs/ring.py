"""Consistent hashing: which node holds a key, so that a node more or less moves few keys.

Each node owns many points on a circle of 2**64; a key belongs to the node whose point follows
the key's hash (Karger et al., "Consistent Hashing and Random Trees", STOC 1997). With N nodes of
equal weight, adding one moves about 1/(N+1) of the keys, all of them to it; removing one moves
only its own. Pure and deterministic: the same names give the same ring in every process.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping

import xxhash

from torchord.cache.errors import InvalidInput

POINTS_PER_NODE = 160
"""Points of a node of weight 1: the share of a node then strays from 1/N by some 8 %."""


class Ring:
    """The circle.

    Args:
        weights: node name -> relative share of the keys, above 0; 1.0 for equal nodes. The order
            does not matter.
        points_per_node: points of a node of weight 1.

    Raises:
        InvalidInput: no node, or a weight that is not above 0.

    Example:
        >>> Ring({"a": 1.0, "b": 1.0, "c": 2.0}).owner("blob:7")
        'c'
    """

    def __init__(self, weights: Mapping[str, float], *, points_per_node: int = POINTS_PER_NODE) -> None:
        if not weights:
            raise InvalidInput("a ring needs at least one node")
        for name, weight in weights.items():
            if not 0 < weight < float("inf"):
                raise InvalidInput(f"the weight of node {name!r} must be above 0, not {weight}")
        points = sorted(
            (_hash(f"{name}#{i}"), name)
            for name, weight in weights.items()
            for i in range(max(1, round(points_per_node * weight)))
        )
        self.names = tuple(sorted(weights))
        self._hashes = [point for point, _ in points]
        self._owners = [name for _, name in points]

    def owner(self, key: str) -> str:
        """The node of a key."""
        if len(self.names) == 1:
            return self.names[0]
        return self._owners[bisect_right(self._hashes, _hash(key)) % len(self._owners)]

    def order(self, key: str) -> Iterator[str]:
        """Every node once: the owner of the key, then the ones that take over in turn.

        The first `1 + replicas` are where a replicated key belongs. Removing a node from the ring
        removes it from this order and changes nothing else in it.
        """
        start = bisect_right(self._hashes, _hash(key))
        seen: set[str] = set()
        for i in range(len(self._owners)):
            name = self._owners[(start + i) % len(self._owners)]
            if name not in seen:
                seen.add(name)
                yield name
                if len(seen) == len(self.names):
                    return


def _hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode())
