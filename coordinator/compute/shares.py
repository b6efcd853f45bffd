"""What the shards of a step count beside each other, by their weights and examples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from torch import Tensor


class Shares:
    """What each of some shards counts beside the others, in examples of the first that weighs anything.

    Attributes:
        unit: weight an example of that first one; None before it.
        total: of all of them; the number of their examples if they weigh alike.

    Example:
        >>> shares = Shares()
        >>> shares.take(4, None), shares.take(4, 1.0), shares.total
        (4, 1.0, 5.0)
    """

    def __init__(self) -> None:
        self.unit: float | None = None
        self.total: float = 0

    def take(self, examples: float, weight: float | None) -> float:
        """What the next shard counts.

        Args:
            examples: in it.
            weight: of it; None: its examples.
        """
        scale = self.scale(1.0 if weight is None else weight / examples)
        share = examples if scale == 1.0 else examples * scale
        self.total += share
        return share

    def scale(self, unit: float) -> float:
        """What an example of so much weight counts."""
        if self.unit is None and unit:
            self.unit = unit
        return 0.0 if self.unit is None else unit / self.unit

    def divide(self, sums: Mapping[str, Tensor], examples: int) -> None:
        """Turn sums over a whole step into averages, in place.

        Args:
            sums: of gradients, each multiplied by its shard's share of the step's examples.
            examples: in the step.
        """
        if self.total and self.total != examples:
            for value in sums.values():
                value.div_(self.total / examples)


def mean_loss(shards: Iterable[tuple[float, int, float | None]]) -> float:
    """The weighted mean loss of some shards, summed in their order; NaN if they weigh nothing together.

    Args:
        shards: mean loss, examples and weight (None: the examples) of each.

    Example:
        >>> mean_loss([(1.0, 4, None), (6.0, 4, 1.0)])
        2.0
    """
    shares, total = Shares(), 0.0
    for loss, examples, weight in shards:
        if share := shares.take(examples, weight):
            total += loss * share
    return total / shares.total if shares.total else math.nan


def total_weight(shards: Iterable[tuple[int, float | None]]) -> float | None:
    """The weight of some shards together, of examples and weight each; None: all weigh their examples."""
    found = list(shards)
    if all(weight is None for _, weight in found):
        return None
    return math.fsum(examples if weight is None else weight for examples, weight in found)
