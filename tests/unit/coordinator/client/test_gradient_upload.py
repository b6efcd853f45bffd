"""Gradients that go to the store while the backward runs: the same blob as when they go afterwards."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.support import hooked, models, recipes_more
from tests.support.inprocess import resolved, same
from tests.support.waiting import wait_until
from torchord.cache.blobs.blob import BlobRef
from torchord.cache.blobs.tiered_store import TieredStore
from torchord.cache.blobs.upload import Upload
from torchord.cache.errors import CacheUnreachable
from torchord.cache.keys import WORK_TTL_SECONDS
from torchord.cache.stores.gradients import GradientStore, GradientUpload, StoredGradient
from torchord.cache.tensors.codec import Manifest, layout, pack
from torchord.cache.testing.memory_chunks import MemoryChunkStore
from torchord.cache.testing.memory_ledger import MemoryLedger
from torchord.cache.testing.memory_plane import MemoryPlane
from torchord.coordinator.client.gradient_upload import Outgoing
from torchord.coordinator.compute.batch import open_dataset
from torchord.coordinator.compute.determinism import seed_everything
from torchord.coordinator.compute.gradient import ShardGradient, compute
from torchord.coordinator.compute.replica import Replica
from torchord.coordinator.spec.config import TrainingConfig
from torchord.coordinator.spec.plan import Plan
from torchord.coordinator.spec.recipe import Recipe

CHUNK_NBYTES = 64
PLAIN: dict[str, Any] = {"batch_size": 8, "shards": 4, "seed": 3}
CASES: dict[str, tuple[Callable[[], Recipe], dict[str, Any]]] = {
    "mlp": (models.mlp, {}),
    "BatchNorm": (models.cnn, {}),
    "channels last": (models.cnn, {"memory_format": "channels_last"}),
    "tied": (recipes_more.tied_gpt, {}),
    "bf16": (models.gpt, {"precision": "bf16"}),
    "fp16, unscaled afterwards": (models.gpt, {"precision": "fp16"}),
    "fp16, overflow": (models.gpt, {"precision": "fp16", "loss_scale": 2.0**100}),
    "unused, frozen, buffers": (models.odd, {}),
    "a parameter that some shards reach": (lambda: models.mlp(model=models.Branching), {}),
    "a NaN": (lambda: models.mlp(dataset=nan_points), {}),
    "two backwards in a shard": (
        lambda: models.mlp(step=hooked.accumulating_step, loss=None, metrics=None),
        {},
    ),
    "a backward in a backward": (lambda: models.mlp(model=hooked.Nested), {}),
    "gradients that change afterwards": (lambda: models.mlp(model=hooked.Rewriting), {}),
    "strides": (lambda: models.mlp(model=hooked.Strided), {}),
}  # fmt: skip


def nan_points() -> Any:
    return models.poisoned(at=1)


class Bench:
    """A Client's computing and its store of small chunks, in one process."""

    def __init__(self, recipe: Recipe, **config: Any) -> None:
        self.recipe, self.config = resolved(recipe), TrainingConfig(**{**PLAIN, **config})
        self.dataset = open_dataset(self.recipe, self.config)
        self.plan = Plan(len(self.dataset), self.config)
        self.replica = Replica.build(self.recipe, self.config, computing=True)
        self.replica.load(self.replica.pack())
        self.memory = MemoryChunkStore(chunk_nbytes=CHUNK_NBYTES)
        self.store = GradientStore(TieredStore(self.memory, None))
        self.ledger = MemoryLedger(MemoryPlane(), "r")

    def compute(self, shard: int, **more: Any) -> ShardGradient:
        indices = self.plan.indices(0, shard)
        seed_everything(99)
        return compute(self.replica, self.recipe, self.config, self.dataset, indices, 0, shard, **more)

    def afterwards(self, tensors: dict[str, torch.Tensor]) -> tuple[BlobRef, Manifest]:
        """Store tensors whole; not by `GradientStore.put`, which lets small ones travel in the record."""
        manifest = layout(tensors)
        return self.memory.put("whole", pack(tensors, manifest), ttl_seconds=60), manifest

    def upload(self, known: dict[str, torch.Tensor], spare: int = 4096) -> GradientUpload:
        manifest = layout(known)
        buffer = torch.full((manifest.nbytes + spare,), 0xAB, dtype=torch.uint8)
        return self.store.upload(self.ledger, 0, 0, manifest.tensors, buffer)

    def ahead(
        self, shard: int, known: dict[str, torch.Tensor]
    ) -> tuple[ShardGradient, StoredGradient | None, int]:
        upload = self.upload(known)
        found = self.compute(shard, watched=Outgoing(upload, self.replica.parameters).during_backward)
        early = upload.early
        return found, upload.finish({**found.gradients, **found.buffers}), early


@pytest.mark.parametrize("case", CASES)
def test_what_goes_ahead_is_the_blob_that_would_have_gone_afterwards(case: str) -> None:
    recipe, config = CASES[case]
    bench = Bench(recipe(), **config)
    for shard in range(bench.plan.shards_in(0)):
        plain = bench.compute(shard)
        tensors = {**plain.gradients, **plain.buffers}
        expected, manifest = bench.afterwards(tensors)
        found, stored, early = bench.ahead(shard, plain.gradients)
        assert repr((found.loss, found.grad_norm)) == repr((plain.loss, plain.grad_norm))
        assert stored is not None
        assert (stored.digest, stored.manifest) == (expected.digest, manifest.to_json())
        assert torch.equal(bench.memory.get(stored.blob), bench.memory.get(expected))
        assert all(same(found.gradients[name], plain.gradients[name]) for name in plain.gradients)
        assert early > 0 or bench.compute(shard).gradients.keys() == set()
        assert not any(
            parameter._post_accumulate_grad_hooks for parameter in bench.replica.parameters.values()
        )


def test_another_layout_than_was_expected_is_given_up() -> None:
    """Shards that reach other parameters, and buffers that do not fit: nothing of them stays behind."""
    bench = Bench(models.mlp(model=models.Branching))
    found = {shard: bench.compute(shard).gradients for shard in range(4)}
    sizes = {len(gradients) for gradients in found.values()}
    assert len(sizes) == 2, "this seed has shards of both kinds"
    few = next(shard for shard, g in found.items() if len(g) == min(sizes))
    many = next(g for g in found.values() if len(g) == max(sizes))
    _, stored, early = bench.ahead(few, many)
    assert early > 0
    assert stored is None
    wait_until(lambda: not bench.memory.chunks, message="the chunks that were sent to be deleted")

    odd = Bench(models.odd())
    plain = odd.compute(0)
    upload = odd.upload(plain.gradients, spare=0)
    assert upload.finish({**plain.gradients, **plain.buffers}) is None


def test_a_shard_that_fails_leaves_nothing() -> None:
    bench = Bench(models.mlp(model=hooked.Nested))
    upload = bench.upload(bench.compute(0).gradients)
    outgoing = Outgoing(upload, bench.replica.parameters)
    with pytest.raises(RuntimeError), outgoing.during_backward(None):
        for name in list(bench.replica.parameters)[:4]:
            parameter = bench.replica.parameters[name]
            parameter.sum().backward()
        wait_until(lambda: bench.memory.chunks, message="chunks to be sent")
        raise RuntimeError("the recipe's own")
    upload.give_up()
    wait_until(lambda: not bench.memory.chunks, message="the chunks that were sent to be deleted")
    upload.give_up()


def test_a_hook_that_cannot_do_its_work_fails_no_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(models.mlp())
    plain = bench.compute(0)
    expected, _ = bench.afterwards(plain.gradients)
    monkeypatch.setattr(GradientUpload, "written", lambda self, name: 1 / 0)
    _, stored, early = bench.ahead(0, plain.gradients)
    assert stored is not None and stored.digest == expected.digest and early == 0


class Slow(MemoryChunkStore):
    """A store that is held up until the test lets it go on, and may then fail."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__(chunk_nbytes=4)
        self.go_on = threading.Event()
        self.at_work = threading.Event()
        self.error = error
        self.stored: list[list[int]] = []

    def put_parts(self, key: str, view: memoryview, numbers: Any, *, ttl_seconds: int) -> list[str]:
        self.at_work.set()
        assert self.go_on.wait(60) and ttl_seconds == WORK_TTL_SECONDS
        if self.error is not None:
            raise self.error
        self.stored.append(list(numbers))
        return super().put_parts(key, view, numbers, ttl_seconds=ttl_seconds)


def upload_to(store: MemoryChunkStore, buffer: torch.Tensor, due: list[int]) -> Upload:
    return Upload(store, "k", buffer, due, ttl_seconds=WORK_TTL_SECONDS)


def test_a_chunk_goes_out_when_all_its_bytes_are_done() -> None:
    store, buffer = Slow(), torch.arange(14, dtype=torch.uint8)
    store.go_on.set()
    upload = upload_to(store, buffer, [4, 3, 4])
    upload.done(0, 0)
    upload.done(2, 3)  # the rest of chunk 0's is missing, and two bytes of chunk 1
    assert upload.early == 0
    upload.done(6, 7)
    assert upload.early == 2
    upload.done(0, 2)
    assert upload.early == 3
    blob = upload.finish(14)
    assert torch.equal(store.get(blob), buffer)
    assert blob == store.put("k", buffer, ttl_seconds=60)
    assert sorted(number for numbers in store.stored for number in numbers) == [0, 1, 2, 3]


def test_a_chunk_that_changes_while_it_is_sent_is_sent_again() -> None:
    store, buffer = Slow(), torch.arange(12, dtype=torch.uint8)
    upload = upload_to(store, buffer, [4, 4, 4])
    upload.done(0, 8)
    assert store.at_work.wait(60)
    buffer[5] = 77
    upload.changed(5, 1)
    upload.changed(9, 1)  # was not sent yet
    store.go_on.set()
    blob = upload.finish(12)
    assert torch.equal(store.get(blob), buffer)
    assert store.stored[0] == [0, 1] and store.stored[1] == [1, 2]


def test_a_store_that_fails_is_reported_at_the_end_and_nothing_is_kept() -> None:
    store, buffer = Slow(CacheUnreachable("away")), torch.arange(8, dtype=torch.uint8)
    upload = upload_to(store, buffer, [4, 4])
    store.go_on.set()
    upload.done(0, 8)
    with pytest.raises(CacheUnreachable, match="away"):
        upload.finish(8)
    assert not store.chunks


def test_a_store_that_fails_before_the_end_leaves_nothing_either() -> None:
    """Its first chunks are stored, then it fails; the shard itself fails before `finish`."""
    store, buffer = Slow(), torch.arange(8, dtype=torch.uint8)
    store.go_on.set()
    upload = upload_to(store, buffer, [4, 4])
    upload.done(0, 4)
    wait_until(lambda: bool(store.chunks), message="the first chunk to be stored")
    store.error = CacheUnreachable("away")
    upload.done(4, 4)
    assert upload._thread is not None
    upload._thread.join(60)
    assert store.chunks
    upload.give_up()
    assert not store.chunks


def test_an_upload_that_is_given_up_deletes_what_is_on_its_way() -> None:
    store, buffer = Slow(), torch.arange(8, dtype=torch.uint8)
    upload = upload_to(store, buffer, [4, 4])
    upload.done(0, 4)
    assert store.at_work.wait(60)
    upload.give_up()
    store.go_on.set()
    wait_until(lambda: store.stored and not store.chunks, message="the chunk to be deleted again")
    finished = upload_to(store, buffer, [4, 4])
    blob = finished.finish(8)
    finished.give_up()
    assert torch.equal(store.get(blob), buffer)
