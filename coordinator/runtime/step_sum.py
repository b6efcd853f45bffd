"""The sum of one step, taken slot by slot.

What is summed here are the roots of the step's tree: its shards, or partial sums of them. They may land
in any order; they are added in slot order, so the sum has the same bits each time.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from torchord.cache.ledger.records import SlotRecord
from torchord.cache.stores.gradients import GradientStore
from torchord.coordinator.compute.determinism import pinned
from torchord.coordinator.compute.robust import accumulator
from torchord.coordinator.compute.shard import decoded
from torchord.coordinator.compute.sums import Aggregate, Partial, PartialSum
from torchord.coordinator.compute.trainer import Trainer
from torchord.coordinator.spec.codecs import CodecOf
from torchord.coordinator.spec.sum_tree import FanIn


class StepSum:
    """The average of one step's slots.

    Args:
        tree: the step's slots, from the plan; its roots are summed here.
        examples: examples of all slots together, from the plan.
        trainer: holds the version that the step starts from.
        gradients: where the slots' bytes are.
        codec_of: finds the codec of each slot, see `ResolvedRecipe.codec`.
        read: reads the bytes of a slot; None: from `gradients`.
        look: is shown each shard's gradients before they are added, and raises what it finds.
    """

    def __init__(
        self,
        tree: FanIn,
        examples: int,
        trainer: Trainer,
        gradients: GradientStore,
        codec_of: CodecOf,
        *,
        read: Callable[[SlotRecord], Tensor] | None = None,
        look: Callable[[dict[str, Tensor]], None] | None = None,
    ) -> None:
        self._roots = tree.roots
        self._trainer = trainer
        self._gradients = gradients
        self._codec_of = codec_of
        self._read = read
        self._look = look
        held = trainer.replica.held()
        self._held = held
        rules = trainer.replica.rules
        config = trainer.config
        self._accumulator = accumulator(
            held, examples, rules, aggregation=config.aggregation, faults=config.aggregation_faults
        )
        self._sums = PartialSum(examples, rules) if tree.partials else None  # used in the accumulator's place
        self._taken = 0  # how many slots are in the sum: the first so many of the roots

    def add(self, slot: SlotRecord) -> None:
        """Add the next slot in slot order.

        Raises:
            ChunkMissing, ChunkCorrupt: its bytes are lost; nothing was added.
        """
        assert slot.shard == self._roots[self._taken], "slots are added in slot order"
        payload, buffers = self._gradients.get(slot, self._read)
        replica = self._trainer.replica
        config = replica.config
        if self._sums is not None and slot.total is not None:
            with pinned(config.threads, config.deterministic, replica.device):
                self._sums.add(Partial.of(payload, slot.total.notes, slot.examples))
            self._taken += 1
            return
        gradients = decoded(payload, replica, self._codec_of(slot.compression))
        if self._look is not None:
            self._look(gradients)
        with pinned(config.threads, config.deterministic, replica.device):
            self._accumulator.add(gradients, buffers, slot.examples, slot.weight)
        self._taken += 1

    def result(self) -> Aggregate:
        """The average; the tensors are the caller's to change.

        Raises:
            InvalidInput: a slot is missing.
        """
        if self._sums is not None:
            return self._sums.average(self._held)
        return self._accumulator.result()
