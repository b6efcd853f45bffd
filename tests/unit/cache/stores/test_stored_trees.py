"""Stored trees: slot states, optimizer states, and the inputs and outputs of predictions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from torchord.cache.blobs.host_tier import HostTier
from torchord.cache.blobs.tiered_store import TieredStore
from torchord.cache.errors import CheckpointError, ChunkMissing, ManifestMismatch
from torchord.cache.ledger.records import StateRecord
from torchord.cache.stores.gradients import GradientStore
from torchord.cache.stores.predictions import PredictionStore
from torchord.cache.testing.memory_chunks import MemoryChunkStore
from torchord.cache.testing.memory_ledger import MemoryLedger
from torchord.cache.testing.memory_plane import MemoryPlane

TREES: list[Any] = [
    {"a": torch.arange(6.0).reshape(2, 3), "b": [1, (None, torch.tensor(7))], 3: "text"},
    {"nothing": None},
    {"empty": torch.empty(0, 4), "n": 2},
    torch.arange(100_000),
]


@pytest.fixture
def memory() -> MemoryChunkStore:
    return MemoryChunkStore()


@pytest.fixture
def ledger() -> MemoryLedger:
    return MemoryLedger(MemoryPlane(), "run-1")


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and all(map(same, one, other))
    return bool(one == other)


def test_a_slots_state_is_kept_for_a_round_alone_until_it_is_part_of_a_version(
    memory: MemoryChunkStore, ledger: MemoryLedger, tmp_path: Path
) -> None:
    """Where all who read it share memory, it is there and nowhere else; its digest is the same anywhere."""
    chunks = TieredStore(memory, HostTier(tmp_path))
    store, value = GradientStore(chunks), {"a": torch.arange(100_000)}
    by_memory = [store.put_state(ledger, 3, 0, value, readers=them) for them in (chunks.memory_id, "", None)]
    near, far, lasting = (kept.blob for kept in by_memory)
    assert near is not None and far is not None and lasting is not None
    assert (near.local, far.local, lasting.local) == (True, False, False)
    assert near.digest == far.digest == lasting.digest
    assert not any(key.startswith(near.key) for key in memory.chunks)
    elsewhere = GradientStore(TieredStore(memory, None))
    for kept in by_memory:
        assert same(elsewhere.get_state(store.lasting(ledger, 4, 0, kept)), value)
    store.delete([near])
    with pytest.raises(ChunkMissing):
        store.lasting(ledger, 4, 0, by_memory[0])
    small = store.put_state(ledger, 3, 0, {"n": torch.ones(3)}, readers=chunks.memory_id)
    assert store.lasting(ledger, 4, 0, small) == small, "it travels in its record"


@pytest.mark.parametrize("value", TREES, ids=["mixed", "no tensor", "an empty tensor", "one tensor"])
def test_a_tree_comes_back_as_it_was(memory: MemoryChunkStore, ledger: MemoryLedger, value: Any) -> None:
    """Through the JSON that messages and records carry; what has no bytes takes no room in the store."""
    store = GradientStore(TieredStore(memory, None))
    kept = store.put_state(ledger, 3, 0, value)
    assert same(store.get_state(StateRecord.from_dict(kept.as_dict())), value)

    predictions = PredictionStore(TieredStore(memory, None))
    given = predictions.put_inputs(ledger, "q", 0, value)
    assert same(predictions.get(StateRecord.from_dict(given.as_dict())), value)
    predictions.delete([given])
    assert not any("predict" in key for key in memory.chunks)


def test_an_answer_is_the_outputs_or_why_there_are_none(
    memory: MemoryChunkStore, ledger: MemoryLedger
) -> None:
    store = PredictionStore(TieredStore(memory, None))
    outputs = {"logits": torch.arange(4.0)}
    store.answer(ledger, "q", 0, store.put_outputs(ledger, "q", 0, outputs))
    store.answer(ledger, "q", 1, "part 1 failed")
    store.answer(ledger, "q", 0, "a second worker's answer comes too late")
    found = store.answers(ledger, "q")
    assert isinstance(found[0], StateRecord)
    assert same(store.get(found[0]), outputs)
    assert found[1] == "part 1 failed"


def test_inputs_that_were_lost_are_stored_again_under_their_name(
    memory: MemoryChunkStore, ledger: MemoryLedger
) -> None:
    store = PredictionStore(TieredStore(memory, None))
    batch = torch.arange(10.0)
    record = store.put_inputs(ledger, "q", 0, batch)
    memory.chunks.clear()
    with pytest.raises(ChunkMissing, match="prediction torchord:blob:run-1:predict:q:0:inputs"):
        store.get(record)
    store.keep_inputs(record, batch)
    assert torch.equal(store.get(record), batch)
    written = dict(memory.chunks)
    store.keep_inputs(record, torch.zeros(10))  # what is there is not written again
    assert {key: part for key, (part, _) in memory.chunks.items()} == {
        key: part for key, (part, _) in written.items()
    }


def test_a_record_that_does_not_fit_its_bytes_is_refused(
    memory: MemoryChunkStore, ledger: MemoryLedger
) -> None:
    store = GradientStore(TieredStore(memory, None))
    kept = store.put_state(ledger, 3, 0, {"a": torch.zeros(100)})
    other = store.put_state(ledger, 3, 1, {"a": torch.zeros(200)})
    with pytest.raises(ManifestMismatch, match="slot state"):
        store.get_state(replace(kept, blob=other.blob))
    with pytest.raises(CheckpointError, match="damaged"):
        store.get_state(replace(kept, skeleton={"tensor": "b"}))
