from __future__ import annotations

from functools import partial

import pytest
import torch

from tests.support import models
from tests.support.inprocess import resolved, same
from torchord.cache.blobs.tiered_store import TieredStore
from torchord.cache.errors import ChunkMissing, InvalidInput
from torchord.cache.ledger.records import SlotRecord
from torchord.cache.stores.gradients import GradientStore
from torchord.cache.testing.memory_chunks import MemoryChunkStore
from torchord.cache.testing.memory_ledger import MemoryLedger
from torchord.cache.testing.memory_plane import MemoryPlane
from torchord.coordinator.compute.sums import Accumulator
from torchord.coordinator.compute.trainer import Trainer
from torchord.coordinator.runtime.step_sum import StepSum
from torchord.coordinator.spec.codecs import parse
from torchord.coordinator.spec.config import TrainingConfig
from torchord.coordinator.spec.sum_tree import FanIn

SIZES = [3, 1, 4]
WIDE = partial(models.Mlp, hidden=512)  # too large to travel inside a slot's record


class Landed:
    """Three slots of one step, stored."""

    def __init__(self) -> None:
        self.trainer = Trainer.build(resolved(models.mlp(size=8, model=WIDE)), TrainingConfig())
        self.store = GradientStore(TieredStore(MemoryChunkStore(), None))
        self.ledger = MemoryLedger(MemoryPlane(), "r")
        self.tensors = [
            {name: torch.randn(p.shape) for name, p in self.trainer.replica.parameters.items()} for _ in SIZES
        ]
        self.packed: dict[str, torch.Tensor] = {}
        self.slots = [self.slot(shard) for shard in range(len(SIZES))]

    def slot(self, shard: int) -> SlotRecord:
        stored = self.store.put(self.ledger, 0, shard, self.tensors[shard])
        assert stored.packed is not None
        self.packed[stored.nonce] = stored.packed
        return SlotRecord(
            shard=shard, digest=stored.digest, nonce=stored.nonce, blob=stored.blob, manifest=stored.manifest,
            buffers=(), examples=SIZES[shard], loss=1.0, grad_norm=1.0, worker="w", attempt=1, seconds=0.1,
        )  # fmt: skip

    def expected(self) -> dict[str, torch.Tensor]:
        """The average of the tensors themselves."""
        total = Accumulator({}, sum(SIZES))
        for tensors, size in zip(self.tensors, SIZES, strict=True):
            total.add(tensors, {}, size)
        return total.result().gradients

    def sum(self) -> StepSum:
        return StepSum(FanIn(len(SIZES), len(SIZES)), sum(SIZES), self.trainer, self.store, parse)


def test_stored_slots_have_the_bits_of_their_tensors_sum() -> None:
    landed = Landed()
    step = landed.sum()
    for slot in landed.slots:
        step.add(slot)
    expected, found = landed.expected(), step.result().gradients
    assert all(same(found[name], expected[name]) for name in expected)


def test_an_unfinished_sum_has_no_result() -> None:
    landed = Landed()
    step = landed.sum()
    step.add(landed.slots[0])
    with pytest.raises(InvalidInput, match="of the step's"):
        step.result()


def test_a_slot_without_bytes_leaves_the_sum_as_it_was() -> None:
    landed = Landed()
    step = landed.sum()
    landed.store.delete([landed.slots[0].blob])
    with pytest.raises(ChunkMissing):
        step.add(landed.slots[0])
    for slot in (landed.slot(0), *landed.slots[1:]):
        step.add(slot)
    assert all(same(tensor, landed.expected()[name]) for name, tensor in step.result().gradients.items())


def test_bytes_that_are_at_hand_need_not_be_read_and_stay_as_they_are() -> None:
    landed = Landed()
    before = {nonce: packed.clone() for nonce, packed in landed.packed.items()}
    tree = FanIn(len(SIZES), len(SIZES))
    step = StepSum(
        tree, sum(SIZES), landed.trainer, landed.store, parse, read=lambda slot: landed.packed[slot.nonce]
    )
    landed.store.delete([slot.blob for slot in landed.slots])
    for slot in landed.slots:
        step.add(slot)
    assert all(same(tensor, landed.expected()[name]) for name, tensor in step.result().gradients.items())
    assert all(torch.equal(landed.packed[nonce], kept) for nonce, kept in before.items())
