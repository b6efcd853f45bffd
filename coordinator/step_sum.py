"""The sum of one step, taken slot by slot as the slots land.

What is summed here are the roots of the step's tree: its shards, or partial sums of them. They may land
in any order; they are added in slot order, each as soon as those before it are in. So most of the sum is
done when the last one lands, and its bits are those of a sum done at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from cache.gradients import GradientStore
from cache.records import SlotRecord
from coordinator.aggregate import Accumulator, Aggregate
from coordinator.determinism import pinned
from coordinator.fan_in import FanIn
from coordinator.optimize import Trainer
from coordinator.partial import Partial, PartialSum
from coordinator.shard_work import decoded


class StepSum:
    """The average of one step's slots, as far as they have landed.

    Args:
        step: the global step.
        tree: the step's slots, from the plan; its roots are summed here.
        examples: examples of all slots together, from the plan.
        trainer: holds the version that the step starts from.
        gradients: where the slots' bytes are.
        allowed: the worker's allow-list, for codecs that are imported.
        read: reads the bytes of a slot; None: from `gradients`.
    """

    def __init__(
        self,
        step: int,
        tree: FanIn,
        examples: int,
        trainer: Trainer,
        gradients: GradientStore,
        *,
        allowed: tuple[str, ...] | None,
        read: Callable[[SlotRecord], Tensor] | None = None,
    ) -> None:
        self.step = step
        self.roots = tree.roots
        self._trainer = trainer
        self._gradients = gradients
        self._allowed = allowed
        self._read = read
        held = trainer.replica.held()
        self._held = held
        self._accumulator = Accumulator(held, examples)
        self._sums = PartialSum(examples) if tree.partials else None  # used in the accumulator's place
        self._taken: list[str] = []  # the nonce of each slot that is in the sum, in slot order

    @property
    def taken(self) -> int:
        """How many slots are in the sum: the first so many of its roots."""
        return len(self._taken)

    @property
    def wanted(self) -> int:
        """The number of the next slot to add."""
        return self.roots.start + len(self._taken)

    @property
    def complete(self) -> bool:
        """Whether every slot is in the sum."""
        return self.taken == len(self.roots)

    def agrees(self, present: Mapping[int, SlotRecord]) -> bool:
        """Whether the slots in the sum are still the ledger's; if not, make a new sum."""
        return all(
            slot in present and present[slot].nonce == nonce
            for slot, nonce in zip(self.roots, self._taken, strict=False)
        )

    def add(self, slot: SlotRecord) -> None:
        """Add the next slot: the one whose number is `wanted`.

        Raises:
            ChunkMissing, ChunkCorrupt: its bytes are lost; nothing was added.
        """
        assert slot.shard == self.wanted, "slots are added in slot order"
        payload, buffers = self._gradients.get(slot, self._read)
        replica = self._trainer.replica
        config = replica.config
        if self._sums is not None and slot.total is not None:
            with pinned(config.threads, config.deterministic, replica.device):
                self._sums.add(Partial.of(payload, slot.total.notes, slot.examples))
            self._taken.append(slot.nonce)
            return
        gradients = decoded(payload, replica, slot.compression, self._allowed)
        with pinned(config.threads, config.deterministic, replica.device):
            self._accumulator.add(gradients, buffers, slot.examples)
        self._taken.append(slot.nonce)

    def result(self) -> Aggregate:
        """The average; the tensors are the caller's to change.

        Raises:
            InvalidInput: a slot is missing.
        """
        if self._sums is not None:
            return self._sums.average(self._held)
        return self._accumulator.result()
