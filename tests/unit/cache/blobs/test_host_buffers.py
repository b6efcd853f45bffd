"""Drafts of the same-host tier: written in place, shown, and used again once nobody reads them."""

import multiprocessing

import pytest
import torch

from torchord.cache.blobs.blob import BlobRef
from torchord.cache.blobs.host_tier import HostTier
from torchord.cache.blobs.tiered_store import TieredStore
from torchord.cache.errors import CacheUnreachable
from torchord.cache.tensors.codec import as_bytes
from torchord.cache.tensors.pieces import checksums, split
from torchord.cache.testing.memory_chunks import MemoryChunkStore

NBYTES = 300_000
CHUNK = 64 << 10
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def tier(tmp_path):
    return HostTier(tmp_path / "tier")


def written(tier, value, key="k"):
    """A draft full of a value, and the reference to it."""
    buffer = tier.draft(NBYTES)
    buffer.fill_(value)
    return buffer, BlobRef(key, NBYTES, CHUNK, checksums(split(as_bytes(buffer), CHUNK)))


def files(tier):
    return sorted(path.name for path in tier.directory.iterdir())


def test_a_draft_is_seen_by_others_once_it_is_shown(tier, tmp_path):
    buffer, ref = written(tier, 1)
    other = HostTier(tmp_path / "tier")
    assert other.get(ref) is None
    assert tier.show(ref, buffer) and torch.equal(other.get(ref), buffer)


def test_its_memory_is_used_again_once_the_blob_is_gone_and_nobody_maps_it(tier):
    buffer, ref = written(tier, 1)
    tier.show(ref, buffer)
    assert tier.draft(NBYTES).data_ptr() != buffer.data_ptr()  # it is shown
    reader = tier.get(ref)
    tier.discard([ref])
    assert tier.draft(NBYTES).data_ptr() != buffer.data_ptr()  # it is mapped
    assert bool((reader == 1).all())
    del reader
    assert tier.draft(NBYTES).data_ptr() == buffer.data_ptr()


def test_a_late_reader_of_memory_that_is_used_again_gets_nothing(tier, tmp_path):
    buffer, ref = written(tier, 1)
    tier.show(ref, buffer)
    path = tier._path(ref)
    kept = tmp_path / "kept"
    kept.hardlink_to(path)  # as if it had been opened in time
    tier.discard([ref])
    again, other = written(tier, 2, "other")
    assert again.data_ptr() == buffer.data_ptr() and tier.show(other, again)
    kept.rename(path)
    assert tier.get(ref) is None and bool((tier.get(other) == 2).all())


def test_a_sweep_leaves_the_drafts_of_the_living_and_removes_those_of_the_dead(tier, tmp_path):
    _draft = written(tier, 1)
    HostTier(tmp_path / "tier").sweep(keep_spares=False)
    assert len(files(tier)) == 1

    def die(folder):
        HostTier(folder).draft(NBYTES)

    child = FORK.Process(target=die, args=(tmp_path / "tier",))
    child.start()
    child.join()
    assert len(files(tier)) == 2
    tier.sweep()
    assert len(files(tier)) == 1


def test_a_forked_child_does_not_write_to_its_parents_drafts(tier):
    buffer, ref = written(tier, 1)
    tier.show(ref, buffer)
    tier.discard([ref])

    def child():
        as_bytes(tier.draft(NBYTES))[:] = bytes([9]) * NBYTES  # no torch operator: they may hang after a fork

    process = FORK.Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == 0 and bool((buffer == 1).all())


def test_closing_the_tier_removes_free_drafts_and_keeps_what_others_map(tier, tmp_path):
    buffer, ref = written(tier, 1)
    tier.show(ref, buffer)
    reader = HostTier(tmp_path / "tier").get(ref)
    tier.close()
    assert len(files(tier)) == 1 and bool((reader == 1).all())
    del reader, buffer
    tier.close()
    assert files(tier) == []


def test_a_draft_that_cannot_be_stored_is_given_back(tmp_path, monkeypatch):
    tier = HostTier(tmp_path / "tier")
    store = TieredStore(MemoryChunkStore(), tier)
    nbytes = 512 << 10
    buffer = store.draft(nbytes)
    assert tier.drafted(buffer)

    def refuse(*args, **kwargs):
        raise CacheUnreachable("no server")

    monkeypatch.setattr(store.chunks, "put", refuse)
    with pytest.raises(CacheUnreachable):
        store.put("k", buffer, ttl_seconds=60)
    assert not tier.drafted(buffer) and not [name for name in files(tier) if name.endswith(".part")]
    buffer.fill_(7)  # whoever still holds it may
    assert store.draft(nbytes).data_ptr() != buffer.data_ptr()


def test_a_stored_draft_is_shown_without_a_copy(tmp_path):
    store = TieredStore(MemoryChunkStore(), HostTier(tmp_path / "tier"))
    for put in (store.put, store.put_local):
        buffer = store.draft(512 << 10)
        buffer.fill_(3)
        ref = put(put.__name__, buffer, ttl_seconds=60)
        found = store.host.get(ref)
        buffer[0] = 4  # breaking the rule shows that it is the same memory
        assert found[0] == 4


@pytest.mark.parametrize("drafted", [True, False])
def test_what_is_on_this_host_alone_outlives_spares_and_its_writer(tmp_path, drafted):
    """A shard may take minutes, and the first gradient of its step lies there without a reader meanwhile."""
    tier = HostTier(tmp_path / "tier", spare_nbytes=0, idle_seconds=0.0)
    store = TieredStore(MemoryChunkStore(), tier)
    nbytes = 512 << 10
    refs = {}
    for put in (store.put_local, store.put):
        buffer = store.draft(nbytes) if drafted else torch.empty(nbytes, dtype=torch.uint8)
        buffer.fill_(3)
        refs[put.__name__] = put(put.__name__, buffer, ttl_seconds=60)
        del buffer
    store.close()
    other = HostTier(tier.directory, spare_nbytes=0, idle_seconds=0.0)
    other.sweep(keep_spares=False)
    assert other.get(refs["put"]) is None
    assert bool((other.get(refs["put_local"]) == 3).all())
    TieredStore(MemoryChunkStore(), other).delete(refs.values())
    assert other.get(refs["put_local"]) is None
