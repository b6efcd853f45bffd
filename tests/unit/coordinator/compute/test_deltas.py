"""Parameters as compressed deltas: both halves come to the same bytes, and nothing wrong is ever loaded."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support import models
from tests.support.inprocess import resolved
from torchord.cache.blobs.tiered_store import TieredStore
from torchord.cache.keys import RunKeys
from torchord.cache.ledger.records import VersionRecord
from torchord.cache.stores.parameters import ParameterCache
from torchord.cache.tensors import tree
from torchord.cache.tensors.codec import layout, pack
from torchord.cache.testing.memory_chunks import MemoryChunkStore
from torchord.coordinator.compute.deltas import Delta, DeltaEncoder, advanced, forward
from torchord.coordinator.compute.determinism import pinned
from torchord.coordinator.compute.replica import Replica
from torchord.coordinator.compute.trainer import Trainer
from torchord.coordinator.spec.codecs import parse
from torchord.coordinator.spec.config import TrainingConfig

SPECS = ("int8", "fp16:on", "sign", "topk:0.05,values=int8", "powersgd:1,values=int8")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def random(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", SPECS)
def test_both_halves_have_the_same_bytes(spec: str, dtype: torch.dtype) -> None:
    state = {
        "w": random((40, 50), 0, dtype),
        "b": random((7,), 1, dtype),
        "frozen": random((30, 30), 2, dtype),
    }
    server = {name: torch.nn.Parameter(value.clone()) for name, value in state.items()}
    buffer = torch.arange(5)
    manifest = layout({**state, "count": buffer})
    flat, encoder = pack({**state, "count": buffer}, manifest), DeltaEncoder(spec, parse(spec))
    for step in range(4):
        before = {name: p.detach().clone() for name, p in server.items()}
        with torch.no_grad():
            server["w"] += 0.01 * random((40, 50), 10 + step).to(dtype)
            server["b"] += 0.01 * random((7,), 20 + step).to(dtype)
        buffer = buffer + 1
        delta = encoder.encode(before, server, {"count": buffer})
        flat = advanced(flat, manifest, delta, parse(delta.compression))
        expected = pack({**{name: p.detach() for name, p in server.items()}, "count": buffer}, manifest)
        assert torch.equal(flat, expected)
        assert not any(name.startswith("frozen") for name in delta.payload), (
            "what does not move sends nothing"
        )
        assert layout(delta.tensors()).nbytes < manifest.nbytes


@pytest.mark.parametrize("spec", SPECS)
def test_what_is_held_back_arrives_later(spec: str) -> None:
    """Whatever the codec, the workers' copy stays within the memory of where the steps alone lead."""
    parameter, encoder = torch.nn.Parameter(torch.zeros(40, 50)), DeltaEncoder(spec, parse(spec))
    wanted = torch.zeros(40, 50)
    for step in range(30):
        before = {"w": parameter.detach().clone()}
        moved = random((40, 50), step)
        wanted += moved
        with torch.no_grad():
            parameter += moved
        encoder.encode(before, {"w": parameter}, {})
    torch.testing.assert_close(parameter.detach() + encoder.memory["w"], wanted, rtol=0, atol=1e-4)


def trainer_of(**fields: Any) -> Trainer:
    config = TrainingConfig(parameter_compression="topk:0.1", **fields)
    return Trainer.build(resolved(models.mlp(model=partial(models.Mlp, hidden=300))), config)


def step(trainer: Trainer, number: int) -> bytes:
    gradients = {name: random(tuple(p.shape), number) for name, p in trainer.replica.parameters.items()}
    trainer.apply(gradients, {}, step=number, loss=1.0)
    return trainer.replica.pack().numpy().tobytes()


def test_a_trainer_goes_on_with_the_same_bits_from_its_state() -> None:
    one, other = trainer_of(), trainer_of()
    for number in range(3):
        step(one, number)
    other.replica.load(one.replica.pack())
    skeleton, tensors = tree.flatten(one.state())
    other.load_state(tree.unflatten(skeleton, {name: value.clone() for name, value in tensors.items()}))
    assert one.state_nbytes() == other.state_nbytes() > one.replica.manifest.nbytes
    assert [step(one, n) for n in (3, 4)] == [step(other, n) for n in (3, 4)]
    forgetful = trainer_of()
    forgetful.replica.load(one.replica.pack())
    forgetful.load_state({**one.state(), "deltas": None})
    assert step(forgetful, 5) != step(one, 5), "what was held back counts"


def test_a_skipped_step_has_no_delta_and_changes_no_memory() -> None:
    trainer = trainer_of(nonfinite="skip")
    step(trainer, 0)
    before, kept = trainer.replica.pack(), trainer.state()["deltas"]["memory"]
    gradients = {name: torch.full_like(p, torch.nan) for name, p in trainer.replica.parameters.items()}
    assert trainer.apply(gradients, {}, step=1, loss=1.0).skipped and trainer.delta is None
    assert torch.equal(trainer.replica.pack(), before)
    after = trainer.state()["deltas"]["memory"]
    assert kept.keys() == after.keys() and all(torch.equal(kept[name], after[name]) for name in kept)


# --- a Client's way from version to version -----------------------------------------------


class Versions:
    """The ledger as far as a fetch asks it, and a training server that fills it."""

    def __init__(self, count: int) -> None:
        self.run, self.keys, self.digest = "run-1", RunKeys("run-1"), ""
        self.cache = ParameterCache(TieredStore(MemoryChunkStore(), None))
        self.trainer = trainer_of()
        self.flats = [self.trainer.replica.pack()]
        self.records = {0: self._published(0)}
        for number in range(count):
            step(self.trainer, number)
            self.flats.append(self.trainer.replica.pack())
            record, delta = self._published(number + 1), self.trainer.delta
            assert delta is not None
            self.records[number + 1] = self.cache.publish_delta(
                self, record, self.records[number], delta.compression, delta.payload, delta.buffers
            )  # type: ignore[arg-type]

    def _published(self, version: int) -> VersionRecord:
        return self.cache.publish(self, version, self.flats[version], chain="")  # type: ignore[arg-type]

    def version(self, number: int) -> VersionRecord | None:
        return self.records.get(number)

    def replica(self, version: int) -> Replica:
        made = Replica.build(resolved(models.mlp(model=partial(models.Mlp, hidden=300))), self.trainer.config)
        made.load(self.flats[version])
        made.digest = self.records[version].digest
        return made

    def forward(self, replica: Replica, version: int) -> bool:
        return forward(replica, self.cache, self, version, parse)  # type: ignore[arg-type]


def test_deltas_lead_from_any_version_that_is_held() -> None:
    versions = Versions(3)
    for held, wanted in ((0, 1), (1, 3), (2, 2)):
        replica = versions.replica(held)
        assert versions.forward(replica, wanted)
        assert replica.flat is not None and torch.equal(replica.flat, versions.flats[wanted])
        assert replica.digest == versions.records[wanted].digest
    assert versions.cache.counters.deltas == 3
    assert versions.cache.counters.nbytes < versions.flats[0].numel()


def test_records_survive_json() -> None:
    for record in Versions(1).records.values():
        assert VersionRecord.from_json(record.to_json()) == record
    assert record.delta is not None and record.delta.blob in record.blobs()


def test_without_a_whole_chain_the_version_is_downloaded() -> None:
    versions = Versions(3)
    newest, second = versions.records[3], versions.replica(2)
    assert not versions.forward(versions.replica(3), 2), "there is no way back"
    del versions.records[2]
    assert not versions.forward(versions.replica(1), 3)
    versions.records[3] = replace(newest, delta=None)
    assert not versions.forward(second, 3)


def test_lost_damaged_or_foreign_deltas_are_not_applied() -> None:
    versions = Versions(2)
    record = versions.records[2]
    assert record.delta is not None
    foreign = versions.records[1].delta
    assert foreign is not None
    other_bytes = replace(record.delta, blob=foreign.blob, manifest=foreign.manifest)
    other_codec = replace(record.delta, compression="int8")
    for wrong in (other_bytes, other_codec):
        versions.records[2] = replace(record, delta=wrong)
        replica = versions.replica(1)
        assert not versions.forward(replica, 2)
        assert replica.flat is not None and torch.equal(replica.flat, versions.flats[1]), "left as it was"
    versions.cache.chunks.delete([record.delta.blob])
    versions.records[2] = record
    assert not versions.forward(versions.replica(1), 2)


def test_a_delta_that_saves_nothing_is_not_stored() -> None:
    versions = Versions(1)
    record = replace(versions.records[1], delta=None)
    before = versions.records[0]
    for payload in ({}, {"w": torch.zeros(2 * record.blob.nbytes)}):
        same = versions.cache.publish_delta(versions, record, before, "int8", payload, {})  # type: ignore[arg-type]
        assert same == record


def test_buffers_come_whole() -> None:
    state = {"w": torch.zeros(100), "mean": torch.zeros(3)}
    manifest = layout(state)
    delta = Delta("none", {"w": torch.ones(100)}, {"mean": torch.full((3,), 2.0)})
    with pinned(1, True):
        found = advanced(pack(state, manifest), manifest, delta, parse(delta.compression))
    assert torch.equal(found, pack({"w": torch.ones(100), "mean": torch.full((3,), 2.0)}, manifest))
