"""The same-host tier: one download per host, nothing left behind, and never in the way."""

import errno
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import xxhash

from torchord.cache.blobs import host_files as host
from torchord.cache.blobs.blob import BlobRef
from torchord.cache.blobs.host_tier import HostTier
from torchord.cache.errors import CacheUnreachable, ChunkMissing
from torchord.cache.tensors.codec import memory
from torchord.cache.testing.memory_chunks import MemoryChunkStore

NBYTES = 300_000
SPAWN = multiprocessing.get_context("spawn")


def file_of(ref: BlobRef) -> str:
    """Name of a blob's file: its content and its key."""
    return f"{ref.digest}-{xxhash.xxh3_64_hexdigest(ref.key.encode())}"


def blob(seed=0, nbytes=NBYTES):
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def store():
    return MemoryChunkStore(chunk_nbytes=64 << 10)


@pytest.fixture
def tier(tmp_path):
    return HostTier(tmp_path / "tier")


def reference(store, seed=0, nbytes=NBYTES):
    return store.put(f"t:{seed}", blob(seed, nbytes), ttl_seconds=60)


def never(view):
    raise AssertionError("this must not be downloaded")


def fill(seed=0):
    def download(view):
        view[:] = memory(blob(seed, len(view)))

    return download


def names(tier):
    return sorted(path.name for path in tier.directory.iterdir())


@pytest.mark.parametrize("nbytes", [0, 1, 4096, NBYTES])
def test_the_second_fetch_maps_what_the_first_downloaded(store, tier, nbytes):
    ref = reference(store, nbytes=nbytes)
    first = tier.fetch(ref, fill())
    second = HostTier(tier.directory).fetch(ref, never)
    assert torch.equal(first, blob(nbytes=nbytes)) and torch.equal(second, first)
    assert first.dtype == torch.uint8 and first.shape == (nbytes,)
    assert (tier.counters.hits, tier.counters.misses) == (0, 1)


def test_it_is_called_with_the_chunk_store(store, tier):
    ref = reference(store)
    tensor = tier.fetch(ref, lambda view: store.read_into(ref, view))
    assert torch.equal(tensor, blob())


def test_what_is_published_is_found(store, tier):
    ref = reference(store)
    assert tier.get(ref) is None
    assert tier.publish(ref, blob()) and tier.publish(ref, blob())
    assert torch.equal(HostTier(tier.directory).get(ref), blob())
    assert names(tier) == [file_of(ref)]


def test_a_write_stays_in_its_process_and_mapping(store, tier):
    ref = reference(store)
    mine = tier.fetch(ref, fill())
    mine.zero_()
    assert torch.equal(tier.get(ref), blob())


def test_a_mapping_outlives_its_file_and_its_tier(store, tier):
    tensor = tier.fetch(reference(store), fill())
    tier.discard([reference(store)])
    assert names(tier) == []
    del tier
    assert torch.equal(tensor, blob())


def test_only_the_owner_may_look(store, tier):
    ref = reference(store)
    tier.publish(ref, blob())
    assert tier.directory.stat().st_mode & 0o777 == 0o700
    assert (tier.directory / file_of(ref)).stat().st_mode & 0o777 == 0o400


# --- one download for all --------------------------------------------------------------------


def test_threads_download_once(store, tier):
    ref = reference(store)
    calls = []

    def download(view):
        calls.append(1)
        fill()(view)

    with ThreadPoolExecutor(8) as pool:
        tensors = list(pool.map(lambda _: tier.fetch(ref, download), range(16)))
    assert len(calls) == 1 and all(torch.equal(tensor, blob()) for tensor in tensors)


def _fetch_in_process(directory, ref, results):
    calls = []

    def download(view):
        calls.append(1)
        fill()(view)

    tensor = HostTier(directory).fetch(ref, download)
    results.put((len(calls), bytes(memory(tensor)) == bytes(memory(blob()))))


@pytest.mark.slow
def test_processes_download_once(store, tier):
    ref = reference(store)
    results = SPAWN.Queue()
    children = [
        SPAWN.Process(target=_fetch_in_process, args=(tier.directory, ref, results)) for _ in range(3)
    ]
    for child in children:
        child.start()
    found = [results.get(timeout=60) for _ in children]
    for child in children:
        child.join()
    assert sorted(found) == [(0, True), (0, True), (1, True)]


HANG = """
import sys, time
from torchord.cache.blobs.blob import BlobRef
from torchord.cache.blobs.host_tier import HostTier
ref = BlobRef("t:0", 300000, 65536, tuple(sys.argv[2:]))
def download(view):
    view[:1000] = bytes(1000)
    print("downloading", flush=True)
    time.sleep(600)
HostTier(sys.argv[1]).fetch(ref, download)
"""


def test_a_killed_downloader_is_succeeded_at_once_and_leaves_nothing(store, tier):
    ref = reference(store)
    with subprocess.Popen(
        [sys.executable, "-c", HANG, str(tier.directory), *ref.checksums], stdout=subprocess.PIPE
    ) as child:
        assert child.stdout.readline() == b"downloading\n"
        assert names(tier) == [f"{file_of(ref)}.part"]
        tier.sweep()
        assert names(tier) == [f"{file_of(ref)}.part"], "a part in use is left alone"
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(tier.fetch, ref, fill())
            child.send_signal(signal.SIGKILL)
            assert torch.equal(waiting.result(timeout=60), blob())
    assert names(tier) == [file_of(ref)]


def test_a_waiter_gives_up_on_a_stuck_downloader(store, tier, caplog):
    ref = reference(store)
    with subprocess.Popen(
        [sys.executable, "-c", HANG, str(tier.directory), *ref.checksums], stdout=subprocess.PIPE
    ) as child:
        assert child.stdout.readline() == b"downloading\n"
        assert HostTier(tier.directory, wait_seconds=0.01).fetch(ref, never) is None
        child.kill()
    assert "another process has had it locked" in caplog.text
    assert HostTier(tier.directory).publish(ref, blob())


@pytest.mark.parametrize("error", [ChunkMissing("gone"), CacheUnreachable("away"), KeyboardInterrupt()])
def test_a_failed_download_is_the_callers_and_leaves_nothing(store, tier, error):
    def download(view):
        view[:10] = bytes(10)
        raise error

    with pytest.raises(type(error)):
        tier.fetch(reference(store), download)
    assert names(tier) == []
    assert torch.equal(tier.fetch(reference(store), fill()), blob())


# --- nothing accumulates ------------------------------------------------------------------------


def test_unused_files_go_by_age_and_by_size_and_used_ones_stay(store, tmp_path):
    filling = HostTier(tmp_path / "tier")
    tier = HostTier(tmp_path / "tier", spare_nbytes=NBYTES, idle_seconds=60)
    refs = [reference(store, seed) for seed in range(5)]
    for age, ref in enumerate(refs):
        filling.publish(ref, blob(age))
        os.utime(tier.directory / file_of(ref), (0, time.time() + 5 + 10 * age))
    used = tier.get(refs[0])
    os.utime(tier.directory / file_of(refs[0]), (0, 0))
    tier.sweep()
    assert names(tier) == sorted(file_of(refs[n]) for n in (0, 3, 4)), "in use; two newest within the budget"
    for ref in refs[3:]:
        os.utime(tier.directory / file_of(ref), (0, 0))
    tier.sweep()
    assert names(tier) == [file_of(refs[0])]
    del used
    tier.close()
    assert names(tier) == []


def test_what_is_to_be_kept_is_kept_by_every_process(store, tmp_path):
    tier = HostTier(tmp_path / "tier", spare_nbytes=0, idle_seconds=1.0)
    ref = reference(store)
    tier.publish(ref, blob(), keep_seconds=3600.0)
    assert tier.identity() == HostTier(tier.directory).identity() != ""
    for seed in range(1, 4):
        tier.publish(reference(store, seed), blob(seed))
    assert tier.get(ref) is not None
    tier.close()
    assert names(tier) == sorted([file_of(ref), "identity"])
    tier.discard([ref])
    assert names(tier) == ["identity"]


def test_equal_content_under_two_keys_has_two_lives(store, tier):
    one = store.put("t:one", blob(), ttl_seconds=60)
    two = store.put("t:two", blob(), ttl_seconds=60)
    assert one.digest == two.digest
    tier.publish(one, blob()), tier.publish(two, blob())
    tier.discard([one])
    assert tier.get(one) is None and torch.equal(tier.get(two), blob())


def test_parts_and_files_of_dead_processes_go_at_the_next_start(store, tmp_path):
    old = HostTier(tmp_path / "tier")
    old.publish(reference(store), blob())
    os.utime(old.directory / file_of(reference(store)), (0, 0))
    (old.directory / "0123.part").write_bytes(b"half")
    assert names(HostTier(tmp_path / "tier")) == []


def test_a_tier_of_many_versions_stays_small(store, tmp_path):
    tier = HostTier(tmp_path / "tier", spare_nbytes=2 * NBYTES)
    current = None
    for version in range(30):
        current = tier.fetch(reference(store, version), fill(version))
        assert len(names(tier)) <= 5
    assert torch.equal(current, blob(29))


# --- never in the way ----------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [b"short", None, bytes(NBYTES)])
def test_other_content_than_expected_is_noticed_and_replaced(store, tier, damage, caplog):
    ref = reference(store)
    tier.publish(ref, blob())
    path = tier.directory / file_of(ref)
    path.unlink()
    if damage is None:
        path.symlink_to("/etc/passwd")
    else:
        path.write_bytes(damage)
        path.chmod(0o400)
    assert torch.equal(tier.fetch(ref, fill()), blob()) and not path.is_symlink()
    assert ("closed to others" if damage is None else "is not what blob t:0 contains") in caplog.text


def test_a_directory_of_somebody_else_is_not_used(store, tmp_path, caplog):
    (tmp_path / "open").mkdir(mode=0o755)
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("open", "file", "link", "no/such/place"):
        tier = HostTier(tmp_path / name)
        assert tier.directory is None and tier.fetch(reference(store), never) is None
        assert tier.get(reference(store)) is None and not tier.publish(reference(store), blob())
        tier.discard([reference(store)]), tier.sweep(), tier.close()
    assert caplog.text.count("cannot share fetched tensors") == 4


def test_the_directory_for_temporary_files_is_the_second_choice(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(host, "_SHARED_MEMORY", tmp_path / "no" / "shm")
    monkeypatch.setattr(host.tempfile, "gettempdir", lambda: str(tmp_path))
    assert HostTier().directory == tmp_path / f"torchord-{os.geteuid()}"
    assert caplog.records[0].levelno == logging.WARNING


def test_a_full_file_system_is_swept_and_then_done_without(store, tier, monkeypatch, caplog):
    spare = reference(store, 1)
    tier.publish(spare, blob(1))
    room = [NBYTES]

    def fallocate(fd, offset, nbytes):
        if (tier.directory / file_of(spare)).exists() or nbytes > room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        os.truncate(fd, offset + nbytes)

    monkeypatch.setattr(host.os, "posix_fallocate", fallocate)
    ref = reference(store)
    assert torch.equal(tier.fetch(ref, fill()), blob()), "what nobody uses made room"
    assert not caplog.records
    tier.close()
    room[0] = 10
    assert tier.fetch(ref, never) is None
    assert "No space left on device; going on without" in caplog.text and names(tier) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_publishing_to_a_full_file_system_is_done_without(store, tier, monkeypatch, caplog):
    def pwrite(fd, view, offset):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(host.os, "pwrite", pwrite)
    assert not tier.publish(reference(store), blob())
    assert "going on without" in caplog.text and names(tier) == []
