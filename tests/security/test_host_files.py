"""Files that processes of a host share: closed to other users, no link is followed, none is a program."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash

from tests.support.other_user import as_another_user, only_root_becomes_another
from tests.support.processes import responds
from torchord import LocalCluster
from torchord.cache.blobs import host_files
from torchord.cache.blobs.blob import BlobRef
from torchord.cache.blobs.host_tier import HostTier
from torchord.cache.datasets.chunk_cache import DiskTier
from torchord.cache.datasets.content import Chunk
from torchord.cache.errors import NoWorker
from torchord.cache.tensors.codec import as_bytes
from torchord.cache.tensors.pieces import checksums, split
from torchord.coordinator.local_cluster.guardian import Guardian

COLD = True
CHUNK = 1 << 16
NO_LIBRARY = re.compile("invalid ELF|not a mach-o|too short")


@pytest.fixture
def shared() -> Iterator[Path]:
    """A directory for temporary files, as a host has one: everybody may make files there."""
    path = Path(tempfile.mkdtemp(prefix="torchord-shared-", dir="/tmp"))
    path.chmod(0o1777)
    yield path
    shutil.rmtree(path)


def program() -> Path:
    """A library that Python has loaded: its bytes are a program."""
    spec = importlib.util.find_spec("xxhash._xxhash")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin)


def reference(data: torch.Tensor, key: str = "t:0") -> BlobRef:
    found = checksums(split(as_bytes(data), CHUNK))
    return BlobRef(key, data.numel(), CHUNK, tuple(found))


def chunk_of(data: np.ndarray) -> Chunk:
    checksum = xxhash.xxh3_64_hexdigest(data.data)
    return Chunk("ab" + checksum, checksum, data.size)


def put(tier: HostTier, way: str, data: torch.Tensor) -> BlobRef:
    """Have a blob in the tier, in one of the ways in which one comes there; it is mapped, too."""
    ref = reference(data)
    if way == "published":
        assert tier.publish(ref, data)
    elif way == "fetched":
        assert tier.fetch(ref, lambda part: part.__setitem__(slice(None), as_bytes(data))) is not None
    else:
        draft = tier.draft(data.numel())
        assert draft is not None
        draft.copy_(data)
        assert tier.show(ref, draft)
    found = tier.get(ref)
    assert found is not None and torch.equal(found, data)
    return ref


# --- no file is a program -------------------------------------------------------------


@pytest.mark.parametrize("way", ["published", "fetched", "drafted"])
def test_no_blob_can_be_loaded_as_a_library(tmp_path: Path, way: str) -> None:
    shutil.copy(program(), tmp_path / "library")
    ctypes.CDLL(str(tmp_path / "library"))  # as a file of its own it can be
    tier = HostTier(tmp_path / "tier")
    put(tier, way, torch.from_numpy(np.fromfile(program(), dtype=np.uint8)))
    files = [path for path in (tmp_path / "tier").iterdir() if path.stat().st_size > 1000]
    assert files
    for path in files:
        with pytest.raises(OSError, match=NO_LIBRARY):
            ctypes.CDLL(str(path))
        with pytest.raises(OSError):
            torch.ops.load_library(str(path))
        assert not path.read_bytes()[:4096].strip(b"\0")
    tier.close()


def test_no_chunk_of_a_dataset_can_be_loaded_as_a_library(tmp_path: Path) -> None:
    data = np.fromfile(program(), dtype=np.uint8)
    disk = DiskTier(tmp_path / "disk", 10 * data.size)
    chunk = chunk_of(data)
    disk.save({chunk.address: data})
    assert np.array_equal(disk.load([chunk])[chunk.address], data)
    (path,) = (tmp_path / "disk").glob("??/*")
    with pytest.raises(OSError, match=NO_LIBRARY):
        ctypes.CDLL(str(path))


# --- other users ----------------------------------------------------------------------


def test_modes(tmp_path: Path) -> None:
    tier = HostTier(tmp_path / "tier")
    data = torch.arange(200, dtype=torch.uint8)
    put(tier, "published", data)
    assert tier.identity()
    disk = DiskTier(tmp_path / "disk", 10_000)
    disk.save({chunk_of(data.numpy()).address: data.numpy()})
    for path in tmp_path.rglob("*"):
        mode = stat.S_IMODE(path.lstat().st_mode)
        assert mode == 0o700 if path.is_dir() else mode in (0o400, 0o600), path


@only_root_becomes_another
def test_another_user_can_neither_read_nor_plant(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_files, "_SHARED_MEMORY", shared)
    tier = HostTier()
    assert tier.directory is not None and tier.directory.parent == shared
    ref = put(tier, "published", torch.arange(200, dtype=torch.uint8))
    path = tier._path(ref)

    def attempt() -> list[str]:
        tries = {
            "read": path.read_bytes,
            "list": lambda: list(path.parent.iterdir()),
            "write": lambda: path.write_bytes(b"mine"),
            "plant": lambda: (path.parent / "more").touch(),
            "replace": lambda: path.parent.rename(shared / "away"),
            "remove": path.unlink,
        }
        got = []
        for name, one in tries.items():
            try:
                one()
                got.append(name)
            except PermissionError:
                pass
        return got

    assert as_another_user(attempt) == []
    tier.close()


@only_root_becomes_another
@pytest.mark.parametrize("trick", ["directory", "open directory", "link", "file"])
def test_a_name_that_another_user_took_first_is_left_alone(
    shared: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, trick: str
) -> None:
    first, second = shared / "shm", shared / "tmp"
    for folder in (first, second):
        folder.mkdir()
        folder.chmod(0o1777)
    monkeypatch.setattr(host_files, "_SHARED_MEMORY", first)
    monkeypatch.setattr(host_files.tempfile, "gettempdir", lambda: str(second))
    name, target = f"torchord-{os.geteuid()}", shared / "target"
    target.mkdir(mode=0o700)

    def squat(folder: Path) -> None:
        place = folder / name
        if trick == "link":
            place.symlink_to(target)
        elif trick == "file":
            place.touch()
        else:
            place.mkdir(mode=0o700)
            place.chmod(0o777 if trick == "open directory" else 0o700)

    as_another_user(lambda: squat(first))
    tier = HostTier()
    assert tier.directory == second / name, "the second place serves"
    tier.close()
    shutil.rmtree(second / name)
    as_another_user(lambda: squat(second))
    none = HostTier()
    assert none.directory is None and not any(target.iterdir())
    data = torch.arange(200, dtype=torch.uint8)
    assert none.get(reference(data)) is None and not none.publish(reference(data), data)
    assert (
        caplog.text.count("it must be a directory of this user, closed to others")
        + caplog.text.count("Not a directory")
        == 3
    )


def test_a_link_in_the_tier_leads_nowhere(tmp_path: Path) -> None:
    """Were somebody of this user to lay one: what it names is neither read, written nor locked."""
    tier = HostTier(tmp_path / "tier")
    data = torch.arange(200, dtype=torch.uint8)
    ref = reference(data)
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(host_files._LEAD_NBYTES) + data.numpy().tobytes())
    tier._path(ref).symlink_to(secret)
    before = secret.read_bytes()
    assert tier.get(ref) is None and not tier._path(ref).is_symlink()
    tier._part(ref).symlink_to(secret)
    assert not tier.publish(ref, data)
    assert secret.read_bytes() == before
    tier.close()


@pytest.mark.parametrize("mode", [0o644, 0o460, 0o606])
def test_a_file_that_others_may_open_is_made_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int
) -> None:
    tier = HostTier(tmp_path / "tier")
    data = torch.arange(200, dtype=torch.uint8)
    ref = put(tier, "published", data)
    tier._path(ref).chmod(mode)
    assert tier.get(ref) is None and "closed to others" in caplog.text
    put(tier, "fetched", data)
    tier.close()


# --- the disk of datasets -------------------------------------------------------------


@only_root_becomes_another
def test_planted_chunks_are_not_read(shared: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = np.arange(200, dtype=np.uint8)
    chunk = chunk_of(data)

    def plant(folder: Path) -> None:
        folder.mkdir()
        folder.chmod(0o777)
        DiskTier(folder, 10_000).save({chunk.address: data})

    as_another_user(lambda: plant(shared / "disk"))
    disk = DiskTier(shared / "disk", 10_000)
    assert disk.load([chunk]) == {}
    disk.save({chunk.address: data})
    assert "closed to what others write" in caplog.text and disk.load([chunk]) == {}


def test_no_link_to_a_chunk_is_followed(tmp_path: Path) -> None:
    data = np.arange(200, dtype=np.uint8)
    chunk, disk = chunk_of(data), DiskTier(tmp_path / "disk", 10_000)
    disk.save({chunk.address: data})
    (path,) = (tmp_path / "disk").glob("??/*")
    path.rename(tmp_path / "away")
    path.symlink_to(tmp_path / "away")
    assert disk.load([chunk]) == {}
    disk.save({chunk.address: data})
    assert not path.is_symlink() and np.array_equal(disk.load([chunk])[chunk.address], data)


# --- logs -----------------------------------------------------------------------------


@pytest.mark.parametrize("trick", ["link", "pipe"])
def test_a_log_that_is_no_file_of_ours_is_not_written(tmp_path: Path, trick: str) -> None:
    log, target = tmp_path / "client1.log", tmp_path / "target"
    target.touch()
    log.symlink_to(target) if trick == "link" else os.mkfifo(log)
    guardian = Guardian()
    try:
        with pytest.raises(OSError, match=r"could not start echo.*client1\.log"):
            guardian.spawn(["echo", "words"], log=log)
    finally:
        guardian.close()
    assert target.read_bytes() == b""


@only_root_becomes_another
def test_a_log_of_another_user_is_not_written(shared: Path) -> None:
    as_another_user((shared / "server.log").touch)
    with pytest.raises(NoWorker, match=r"server\.log"), LocalCluster(1, log_dir=shared) as cluster:
        assert not responds(cluster.broker)


def test_a_log_is_its_owners(tmp_path: Path) -> None:
    guardian = Guardian()
    try:
        guardian.spawn(["echo", "words"], log=tmp_path / "x.log").wait(10)
    finally:
        guardian.close()
    assert (tmp_path / "x.log").read_text() == "words\n"
    assert stat.S_IMODE((tmp_path / "x.log").stat().st_mode) == 0o600
