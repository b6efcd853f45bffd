"""Which slots a step has: its shards, the tree of sums over them, and its checks; numbers alone.

A step of K shards with a fan-in F has K slots for gradients, numbered 0 to K - 1. While a level has more
than F slots, it is cut into ⌈n / F⌉ contiguous groups whose sizes differ by at most one (the larger
first), and each group gets a slot for its *partial sum* on the next level, numbered on from the last one.
The training server sums the slots of the last level, the *roots*. So the order of every addition follows
from K and F, not from who computed what or when. Up to F shards there is nothing but the shards.

    K = 20, F = 8:   shards 0..6   7..13   14..19
                          20        21       22      roots

Some steps have *checks* beside these: slots that hold a shard once more, computed in fresh copies of model
and dataset, to be compared with the shard's own slot (see `Plan.checked`). They are numbered on from the
tree's last slot, and nothing is summed from them.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property, lru_cache


@dataclass(frozen=True)
class FanIn:
    """The slots of one step.

    Args:
        shards: gradient slots, at least 1.
        fan_in: tensors that are summed in one place, at least 2.
        checked: the shards that are computed twice, each in a slot of its own.

    Example:
        >>> tree = FanIn(20, 8)
        >>> tree.total, list(tree.roots), list(tree.inputs(21)), tree.parent(13)
        (23, [20, 21, 22], [7, 8, 9, 10, 11, 12, 13], 21)
        >>> checked = FanIn(4, 8, (2, 3))
        >>> checked.total, list(checked.checks), checked.shard_of(4), checked.shard_of(1)
        (6, [4, 5], 2, 1)
    """

    shards: int
    fan_in: int
    checked: tuple[int, ...] = ()

    @cached_property
    def _groups(self) -> tuple[list[int], range]:
        """(first input of each partial sum, in order of their numbers, and the end; roots)."""
        starts: list[int] = []
        level = range(self.shards)
        while len(level) > self.fan_in:
            groups = -(-len(level) // self.fan_in)
            each, extra = divmod(len(level), groups)
            starts += [level.start + group * each + min(group, extra) for group in range(groups)]
            level = range(level.stop, level.stop + groups)
        return [*starts, level.start], level

    @property
    def roots(self) -> range:
        """The slots that the training server sums, in this order."""
        return self._groups[1]

    @property
    def total(self) -> int:
        """Slots in all, partial sums and checks included."""
        return self.roots.stop + len(self.checked)

    @property
    def partials(self) -> range:
        """The slots of partial sums; empty if the server sums the shards itself."""
        return range(self.shards, self.roots.stop)

    @property
    def checks(self) -> range:
        """The slots of checks, in the order of `checked`."""
        return range(self.roots.stop, self.total)

    @property
    def gradients(self) -> list[int]:
        """The slots that gradient tasks write: shards and checks."""
        return [*range(self.shards), *self.checks]

    def shard_of(self, slot: int) -> int:
        """The shard that a slot holds the gradient of: a check's, or the slot's own number."""
        return self.checked[slot - self.checks.start] if slot in self.checks else slot

    def inputs(self, slot: int) -> range:
        """The slots that a partial sum adds up, in this order; none for a shard or a check."""
        if slot not in self.partials:
            return range(0)
        starts = self._groups[0]
        return range(starts[slot - self.shards], starts[slot - self.shards + 1])

    def parent(self, slot: int) -> int | None:
        """The partial sum that a slot goes into, None for a root."""
        if slot >= self.roots.start:
            return None
        return self.shards + bisect_right(self._groups[0], slot) - 1

    def below(self, slot: int) -> list[int]:
        """Every slot that a partial sum is made from, its inputs' inputs included, in order."""
        found: list[int] = []
        level = list(self.inputs(slot))
        while level:
            found = [*level, *found]
            level = [deeper for each in level for deeper in self.inputs(each)]
        return found

    def ready(self, present: set[int]) -> list[int]:
        """The partial sums that are missing and whose inputs are all there."""
        return [
            slot
            for slot in self.partials
            if slot not in present and all(each in present for each in self.inputs(slot))
        ]


@lru_cache(maxsize=64)
def fan_in(shards: int, limit: int, checked: tuple[int, ...] = ()) -> FanIn:
    """The slots of a step, kept for the next one."""
    return FanIn(shards, limit, checked)
