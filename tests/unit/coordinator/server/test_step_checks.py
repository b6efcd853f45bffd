from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from torchord.cache.blobs.tiered_store import TieredStore
from torchord.cache.ledger.records import SlotRecord, combined_digest
from torchord.cache.stores.gradients import GradientStore
from torchord.cache.testing.memory_chunks import MemoryChunkStore
from torchord.cache.testing.memory_ledger import MemoryLedger
from torchord.cache.testing.memory_plane import MemoryPlane
from torchord.coordinator.server.step_checks import difference

STORE = GradientStore(TieredStore(MemoryChunkStore(), None))
LEDGER = MemoryLedger(MemoryPlane(), "r")


def slot(
    gradients: dict[str, Tensor], buffers: dict[str, Tensor] | None = None, state: Any = None, **more: Any
) -> SlotRecord:
    """A slot whose bytes are stored."""
    buffers = buffers or {}
    stored = STORE.put(LEDGER, 0, 0, {**gradients, **buffers})
    kept = None if state is None else STORE.put_state(LEDGER, 0, 0, state)
    digest = stored.digest if kept is None else combined_digest(stored.digest, kept)
    made = SlotRecord(
        shard=0, digest=digest, nonce=stored.nonce, blob=stored.blob, manifest=stored.manifest,
        buffers=tuple(buffers), examples=2, loss=1.0, grad_norm=1.0, worker="w", attempt=1, seconds=0.1,
        state=kept,
    )  # fmt: skip
    return replace(made, **more)


A, B = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.5, 3.0])
COUNT = torch.tensor(3)


def test_the_same_bytes_are_no_difference() -> None:
    one, other = (slot({"w": A}, {"n": COUNT}, {"inner": [A]}, loss=math.nan) for _ in range(2))
    assert one.nonce != other.nonce
    assert difference(one, other, STORE) == ""


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        (slot({"v": A, "w": A}), slot({"v": A, "w": B}), "the gradient of 'w' differs by 0.5"),
        (slot({"w": A}), slot({"w": -A * 0}), "the gradient of 'w' differs by 3"),
        (slot({"w": A * 0}), slot({"w": -A * 0}), "the gradient of 'w' differs in its bits"),
        (slot({"w": A}), slot({"w": A.double()}), "the gradient of 'w' was torch.float32 of shape (3,)"),
        (slot({"w": A}), slot({}), "the gradient of 'w' was there the first time only"),
        (slot({}), slot({"w": A}), "the gradient of 'w' was there the second time only"),
        (slot({"w": A}, {"n": COUNT}), slot({"w": A}, {"n": COUNT + 1}), "buffer 'n' differs by 1"),
        (
            slot({"w": A}, state={"inner": {"step": 1}, "residual": [A]}),
            slot({"w": A}, state={"inner": {"step": 1}, "residual": [B]}),
            "what the slot keeps as 'residual.0' differs by 0.5",
        ),
        (
            slot({"w": A}, state={"inner": {"step": 1}, "residual": [A]}),
            slot({"w": A}, state={"inner": {"step": 2}, "residual": [A]}),
            "what the slot keeps as 'inner.step' was 1 and then 2",
        ),
        (slot({"w": A}, compression="int8"), slot({"w": B}, compression="int8"), "what is sent for 'w'"),
        (slot({"w": A}), slot({"w": A}, loss=1.5), "the loss was 1.0 and then 1.5"),
        (slot({"w": A}, weight=2.0), slot({"w": A}, weight=3.0), "the weight was 2.0 and then 3.0"),
        (slot({"w": A.to(torch.complex64)}), slot({"w": A * 1j}), "the gradient of 'w' differs by 4.24"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_first_thing_that_differs_is_named(one: SlotRecord, other: SlotRecord, said: str) -> None:
    assert difference(one, other, STORE).startswith(said)


def test_the_same_tensors_in_another_order_are_no_difference() -> None:
    """A model may register them in the order of a set."""
    assert difference(slot({"v": A, "w": B}), slot({"w": B, "v": A}), STORE) == ""


def test_bytes_that_are_gone_are_a_difference_all_the_same() -> None:
    one, other = slot({"w": torch.randn(100_000)}), slot({"w": torch.randn(100_000)})
    STORE.delete([one.blob])
    assert "differ, and cannot be looked at any more" in difference(one, other, STORE)
