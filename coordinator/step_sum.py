"""The sum of one step, taken slot by slot as the slots land.

Slots may land in any order; they are added in slot order, each as soon as those before it are in.
So most of the sum is done when the last slot lands, and its bits are those of a sum done at the end.
"""

from __future__ import annotations

from collections.abc import Mapping

from cache.gradients import GradientStore
from cache.records import SlotRecord
from coordinator.aggregate import Accumulator, Aggregate
from coordinator.determinism import pinned
from coordinator.optimize import Trainer
from coordinator.shard_work import decoded


class StepSum:
    """The average of one step's slots, as far as they have landed.

    Args:
        step: the global step.
        shards: how many slots the step has.
        examples: examples of all slots together, from the plan.
        trainer: holds the version that the step starts from.
        gradients: where the slots' bytes are.
        allowed: the worker's allow-list, for codecs that are imported.
    """

    def __init__(
        self,
        step: int,
        shards: int,
        examples: int,
        trainer: Trainer,
        gradients: GradientStore,
        *,
        allowed: tuple[str, ...] | None,
    ) -> None:
        self.step = step
        self.shards = shards
        self._trainer = trainer
        self._gradients = gradients
        self._allowed = allowed
        held = {name: buffer.cpu() for name, buffer in trainer.replica.buffers.items()}
        self._accumulator = Accumulator(held, examples)
        self._taken: list[str] = []  # the nonce of each slot that is in the sum, in slot order

    @property
    def taken(self) -> int:
        """How many slots are in the sum: the first so many. The next one to add has this number."""
        return len(self._taken)

    @property
    def complete(self) -> bool:
        """Whether every slot is in the sum."""
        return self.taken == self.shards

    def agrees(self, present: Mapping[int, SlotRecord]) -> bool:
        """Whether the slots in the sum are still the ledger's; if not, make a new sum."""
        return all(
            shard in present and present[shard].nonce == nonce for shard, nonce in enumerate(self._taken)
        )

    def add(self, slot: SlotRecord) -> None:
        """Add the next slot: the one whose number is `taken`.

        Raises:
            ChunkMissing, ChunkCorrupt: its bytes are lost; nothing was added.
        """
        assert slot.shard == self.taken, "slots are added in slot order"
        payload, buffers = self._gradients.get(slot)
        replica = self._trainer.replica
        config = replica.config
        gradients = decoded(payload, replica, slot.compression, self._allowed)
        with pinned(config.threads, config.deterministic, replica.device):
            self._accumulator.add(gradients, buffers, slot.examples)
        self._taken.append(slot.nonce)

    def result(self) -> Aggregate:
        """The average; the tensors are the caller's to change.

        Raises:
            InvalidInput: a slot is missing.
        """
        return self._accumulator.result()
