"""Stored datasets: what is put comes back bit by bit, in few bytes, and nothing is lost in silence."""

from __future__ import annotations

import itertools
import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from tests.support import models
from tests.support.inprocess import same
from torchord import Master, stored_dataset
from torchord.cache import keys
from torchord.cache.datasets.cache_place import CachePlace
from torchord.cache.datasets.chunk_cache import ChunkCache, DiskTier, ReadCounters
from torchord.cache.datasets.content import Bytes, Chunk, ContentStore
from torchord.cache.datasets.datasets import Datasets, StoredDataset
from torchord.cache.datasets.place import place_of
from torchord.cache.datasets.samples import DatasetManifest
from torchord.cache.errors import (
    CacheError,
    CacheUnreachable,
    DatasetChanged,
    DatasetDamaged,
    DatasetExists,
    DatasetMissing,
    InvalidInput,
    NotAllowed,
)
from torchord.cache.settings import Settings
from torchord.cache.tensors.codec import has_layout
from torchord.coordinator.compute.batch import load_batch
from torchord.coordinator.spec.resolving import resolve

DAY = 24 * 3600
_bounds = itertools.count(64 << 20)


def fresh(settings: Settings) -> Settings:
    """Settings that no chunk cache of this process was made for yet."""
    return replace(settings, dataset_memory_bytes=next(_bounds))


@pytest.fixture
def settings(redis_url: str) -> Settings:
    return fresh(Settings(url=redis_url))


@pytest.fixture
def datasets(settings: Settings) -> Datasets:
    return Datasets(settings)


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as found:
        yield found


def chunk_keys(client: redis.Redis) -> dict[str, int]:
    """Key of each chunk -> remaining life in seconds."""
    return {key.decode(): client.ttl(key) for key in client.scan_iter(match="torchord:chunk:*", count=1000)}


def equal(one: Any, other: Any) -> bool:
    """Whether two samples agree in structure, types, dtypes, shapes and bits."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return same(one, other)
    if isinstance(one, np.ndarray | np.generic):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(equal, one, other))
    return repr(one) == repr(other)


def check(found: StoredDataset, expected: Sequence[Any]) -> None:
    """Every sample alone, all of them together, and some in disorder and twice."""
    assert len(found) == len(expected)
    order = [len(expected) - 1, 0, *range(0, len(expected), 3), 0]
    assert all(equal(found[i], expected[i]) for i in range(len(expected)))
    assert all(map(equal, found.__getitems__(list(range(len(expected)))), list(expected)))
    assert all(equal(got, expected[i]) for i, got in zip(order, found.__getitems__(order), strict=True))


class Samples(Dataset[Any]):
    """Samples made by a function, with or without `__getitems__`."""

    def __init__(self, make: Callable[[int], Any], size: int) -> None:
        self.make = make
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        return self.make(index)


# --- round trips ------------------------------------------------------------------------

DTYPES = [
    dtype
    for name in (
        *("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64"),
        *("complex64", "complex128", "uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2"),
    )
    if (dtype := getattr(torch, name, None)) is not None
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_every_dtype(datasets: Datasets, dtype: torch.dtype) -> None:
    count, raw = 23, torch.randint(0, 256, (23, 3, 2 * dtype.itemsize), dtype=torch.uint8)
    rows = (raw % 2 if dtype is torch.bool else raw).view(dtype)
    scalars = rows[:, 0, 0].clone()
    report = datasets.put("d", TensorDataset(rows, scalars), chunk_nbytes=100)
    assert (report.info.samples, report.info.nbytes) == (count, rows.nbytes + scalars.nbytes)
    check(datasets.open("d"), [(rows[i], scalars[i]) for i in range(count)])


@pytest.mark.parametrize(
    "dtype", ["?", "i1", "<u8", ">i4", "<f2", "<f8", "<c8", "<M8[ns]", "<m8[s]", "<U5", "S3"]
)
def test_numpy_arrays_of_every_kind(datasets: Datasets, dtype: str) -> None:
    rows = np.arange(60).reshape(20, 3).astype(dtype)
    datasets.put("d", {"rows": rows, "scalars": rows[:, 0]}, chunk_nbytes=64)
    check(datasets.open("d"), [{"rows": rows[i], "scalars": rows[i, 0]} for i in range(20)])


@pytest.mark.parametrize("chunk_nbytes", [1, 7, 24, 25, 1000, 1 << 20])
def test_any_chunk_size_gives_the_same_samples(datasets: Datasets, chunk_nbytes: int) -> None:
    rows = torch.randn(31, 6).t().contiguous().t()  # not contiguous
    datasets.put("d", rows, chunk_nbytes=chunk_nbytes)
    check(datasets.open("d"), list(rows))


def test_columns_may_be_nested_and_empty_rows_are_rows(datasets: Datasets) -> None:
    columns = {"x": (torch.zeros(5, 0, 3), np.zeros((5, 2, 0))), 7: torch.arange(5.0)}
    datasets.put("d", columns)
    made = [{"x": (columns["x"][0][i], columns["x"][1][i]), 7: columns[7][i]} for i in range(5)]
    check(datasets.open("d"), made)


def fixed(i: int) -> Any:
    return {"image": torch.full((2, 3), i), "meta": [i, i / 3, i % 2 == 0, None], "array": np.array(i)}


def varying(i: int) -> Any:
    return (
        torch.arange(i * 2, dtype=torch.float64).reshape(i, 2),
        np.arange(i, dtype=np.int16),
        "héllo\udcff " * i,
        b"\x00\xff" * (i % 4),
        np.float32(i),
    )


def ragged(i: int) -> Any:
    return [torch.ones((2,) * (i % 4)), (np.ones((i % 3, 2)), {}), ()]


@pytest.mark.parametrize("make", [fixed, varying, ragged])
@pytest.mark.parametrize("chunk_nbytes", [16, 50, 4096])
def test_samples_of_any_structure(datasets: Datasets, make: Callable[[int], Any], chunk_nbytes: int) -> None:
    made = [make(i) for i in range(41)]
    datasets.put("d", Samples(make, 41), chunk_nbytes=chunk_nbytes)
    check(datasets.open("d"), made)
    assert datasets.put("d", made).uploaded == 0  # a list is a dataset, too, and the bytes are the same


def test_a_value_may_differ_only_late(datasets: Datasets) -> None:
    made = [torch.ones(4) * i for i in range(50)] + [torch.zeros(0), torch.ones(2, 2)]
    datasets.put("d", made, chunk_nbytes=64)
    check(datasets.open("d"), made)


def test_a_dataset_is_read_by_getitems_where_it_offers_that(datasets: Datasets) -> None:
    source = models.Batched(70)  # refuses single access
    datasets.put("d", source)
    check(datasets.open("d"), [tuple(sample) for sample in source.__getitems__(list(range(70)))])


def test_batches_have_the_bytes_of_the_dataset_in_memory(datasets: Datasets) -> None:
    for name, source in (("points", models.points(50)), ("images", models.Images(50, augment=False))):
        datasets.put(name, source, chunk_nbytes=512)
        indices = [3, 49, 0, 3, 17]
        ours, theirs = load_batch(datasets.open(name), indices), load_batch(source, indices)
        assert type(ours) is type(theirs) and all(map(same, ours, theirs))


@pytest.mark.parametrize("chunk_nbytes", [512, 100])
def test_samples_lie_alike_alone_and_among_others(datasets: Datasets, chunk_nbytes: int) -> None:
    """What a dataset around it multiplies has the same bits, whatever else was asked for with the sample."""
    rows = torch.randn(20, 5, 3)
    samples = [(row, row.numpy(), row[: 1 + i % 4, 0]) for i, row in enumerate(rows)]
    datasets.put("d", samples, chunk_nbytes=chunk_nbytes)
    found = datasets.open("d")
    for some in (found.__getitems__([7, 3, 4, 19]), [found[7]], [found[3]]):
        for whole, array, ragged in some:
            assert has_layout(whole) and has_layout(torch.from_numpy(array)) and has_layout(ragged)


def test_indices(datasets: Datasets) -> None:
    datasets.put("d", torch.arange(10))
    found = datasets.open("d")
    assert [int(x) for x in found.__getitems__([np.int64(-1), 0, -10, 4, 4])] == [9, 0, 0, 4, 4]
    assert found.__getitems__([]) == []
    assert [int(x) for x in found] == list(range(10))
    for index in (10, -11):
        with pytest.raises(IndexError, match="'d' has 10 samples"):
            found[index]
    with pytest.raises(TypeError):
        found[1.5]  # type: ignore[index]


def test_a_sample_may_be_written_to(datasets: Datasets) -> None:
    datasets.put("d", (torch.zeros(4, 2), np.zeros((4, 2))))
    found = datasets.open("d")
    for part in found[1]:
        part += 1
    assert equal(found[1], (torch.zeros(2), np.zeros(2)))


def test_threads_share_a_dataset(datasets: Datasets) -> None:
    rows = torch.randn(500, 5)
    datasets.put("d", rows, chunk_nbytes=100)
    found = datasets.open("d")
    orders = [torch.randperm(500, generator=torch.Generator().manual_seed(i)).tolist() for i in range(8)]
    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(found.__getitems__, orders))
    assert all(same(torch.stack(got), rows[order]) for got, order in zip(results, orders, strict=True))
    assert found.counters.fetched == 100


# --- what cannot be stored --------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "no samples"),
        (torch.zeros(0, 3), "at least one"),
        ((), "no columns"),
        ((torch.zeros(3), torch.zeros(4)), r"data\[0\] has 3, data\[1\] has 4"),
        ((torch.zeros(3), 5), r"data\[1\] is a int without rows"),
        ({"x": torch.tensor(1.0)}, r"data\['x'\] is a Tensor without rows"),
        (iter([1, 2]), "no data to store"),
        ([1, object()], r"sample 1 cannot be stored: sample is a builtins.object"),
        ([{"a": {1}}], r"sample 0 .* sample\['a'\] is a builtins.set"),
        ([(1, 2.0), (1, 2)], r"sample 1 .* sample\[1\] is int int64, but float float64 in the first"),
        ([(1, 2), (1, 2, 3)], "sample 1 .* a tuple of 3, but a tuple of 2"),
        ([(1, 2), [1, 2]], "sample 1 .* a list of 2, but a tuple of 2"),
        ([{"a": 1}, {"b": 1}], "sample 1 .* lacks the key 'a'"),
        ([None, 1], "sample 1 .* is a int, but None"),
        ([1, None], "sample 1 .* is None, but int"),
        ([1 << 63], "does not fit 64 bits"),
        ([{1.5: 1}], "keys must be str or int"),
        ([torch.ones(2), torch.ones(2).double()], "tensor float64, but tensor float32"),
        ([torch.ones(2).to_sparse()], "only dense"),
        ([np.array([object()])], "only numbers, dates and strings"),
    ],
)
def test_what_cannot_be_stored_is_named(datasets: Datasets, data: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        datasets.put("d", data)
    assert datasets.list() == []


def test_arguments_are_checked(datasets: Datasets) -> None:
    rows = torch.zeros(2)
    with pytest.raises(InvalidInput, match="dataset name 'a/b' cannot be used"):
        datasets.put("a/b", rows)
    for size in (0, 1 << 30):
        with pytest.raises(InvalidInput, match="chunk_nbytes"):
            datasets.put("d", rows, chunk_nbytes=size)
    with pytest.raises(InvalidInput, match="ttl"):
        datasets.put("d", rows, ttl=0)
    with pytest.raises(InvalidInput, match=r"__getitems__ returned 1 samples for 5"):
        broken = Samples(lambda i: i, 5)
        broken.__getitems__ = lambda indices: [0]  # type: ignore[attr-defined]
        datasets.put("d", broken)


def test_what_a_dataset_raises_says_where(datasets: Datasets) -> None:
    with pytest.raises(OSError, match="cannot read sample 7") as caught:
        datasets.put("d", models.Raising(7, size=10))
    assert "while reading sample 7" in caught.value.__notes__[0]


# --- few bytes --------------------------------------------------------------------------


def test_equal_content_is_stored_once(datasets: Datasets, client: redis.Redis) -> None:
    images = torch.randint(0, 256, (64, 100), dtype=torch.uint8)
    first = datasets.put("a", (images, torch.arange(64)), chunk_nbytes=800)  # 8 images a chunk
    assert (first.uploaded, first.reused) == (8 + 1 + 1, 0)  # images, labels, manifest
    assert first.uploaded_nbytes > images.nbytes
    before = chunk_keys(client)

    again = datasets.put("a", (images, torch.arange(64)))
    assert (again.uploaded, again.reused) == (0, 10)
    assert chunk_keys(client).keys() == before.keys()

    other = datasets.put("b", (images, torch.ones(64, dtype=torch.int64)), chunk_nbytes=800)
    assert (other.uploaded, other.reused, other.reused_nbytes) == (2, 8, images.nbytes)
    assert len(chunk_keys(client)) == 12
    assert other.info.digest != first.info.digest == again.info.digest

    zeros = datasets.put("c", torch.zeros(800, dtype=torch.uint8), chunk_nbytes=100)
    assert (zeros.uploaded, zeros.reused) == (2, 7)  # one chunk of zeros, and the manifest


def test_an_interrupted_put_goes_on_where_it_was(datasets: Datasets, client: redis.Redis) -> None:
    rows = torch.randint(0, 256, (3000, 5000), dtype=torch.uint8)
    broken = [True]

    def read(i: int) -> Tensor:
        if i == 2500 and broken[0]:
            raise KeyboardInterrupt
        return rows[i]

    with pytest.raises(KeyboardInterrupt):
        datasets.put("d", Samples(read, 3000), chunk_nbytes=50_000)
    stored = chunk_keys(client)
    assert 60 <= len(stored) < 250  # groups in flight may be cut off
    assert max(stored.values()) <= keys.DATASET_UPLOAD_TTL_SECONDS  # it would not stay for long
    assert datasets.list() == []

    broken[0] = False
    report = datasets.put("d", Samples(read, 3000), chunk_nbytes=50_000)
    assert report.reused >= len(stored) and report.uploaded <= 301 - len(stored)
    assert min(chunk_keys(client).values()) > 29 * DAY
    assert same(datasets.open("d")[2999], rows[2999])


def test_only_the_chunks_of_the_samples_are_fetched(datasets: Datasets) -> None:
    rows = torch.randint(0, 256, (100, 10), dtype=torch.uint8)
    datasets.put("d", (rows, torch.arange(100)), chunk_nbytes=40)  # 4 rows or 5 labels a chunk
    found = datasets.open("d")
    assert found.counters == ReadCounters()
    found.__getitems__([0, 1, 3, 97])
    assert found.counters == ReadCounters(fetched=4, fetched_nbytes=160)
    found.__getitems__([2, 4])
    assert found.counters == ReadCounters(fetched=5, fetched_nbytes=200, memory_hits=2)


def test_the_memory_bound_is_kept(settings: Settings) -> None:
    bounded = replace(settings, dataset_memory_bytes=1000)
    datasets = Datasets(bounded)
    rows = torch.randint(0, 256, (100, 100), dtype=torch.uint8)
    datasets.put("d", rows, chunk_nbytes=100)
    found = datasets.open("d")
    cache = found._cache
    for start in range(0, 100, 20):
        found.__getitems__(list(range(start, start + 20)))
        assert cache.nbytes == 1000
    assert found.counters.fetched == 100
    found.__getitems__(list(range(90, 100)))  # the last ten are kept
    assert found.counters == ReadCounters(fetched=100, fetched_nbytes=10_000, memory_hits=10)
    found.__getitems__(list(range(99, -1, -1)))
    assert found.counters.fetched == 190 and cache.nbytes == 1000


def pieces(count: int, nbytes: int = 100) -> list[tuple[Chunk, Bytes]]:
    """Chunks and their bytes."""
    made = [np.random.default_rng(i).integers(0, 256, nbytes, dtype=np.uint8) for i in range(count)]
    return [(Chunk.of(data.data), data) for data in made]


def supply(made: list[tuple[Chunk, Bytes]]) -> Callable[[Sequence[Chunk]], list[Bytes]]:
    """A fetch over these chunks."""
    known = {chunk.address: data for chunk, data in made}
    return lambda chunks: [known[chunk.address].copy() for chunk in chunks]


def test_the_least_recently_used_chunk_goes_first() -> None:
    made = pieces(5)
    fetch, counters, cache = supply(made), ReadCounters(), ChunkCache(250)
    for number in (0, 1, 0, 2, 0, 1):
        cache.get([made[number][0]], fetch, counters)
        assert cache.nbytes <= 250
    assert (counters.fetched, counters.memory_hits) == (4, 2)
    big = pieces(1, 251)
    assert cache.get([big[0][0]], supply(big), counters)[big[0][0].address].size == 251  # not kept
    assert cache.nbytes == 200
    none = ChunkCache(0)
    none.get([chunk for chunk, _ in made], fetch, counters)
    assert none.nbytes == 0


def test_a_chunk_that_several_threads_want_is_fetched_once() -> None:
    made = pieces(2)
    cache, counters, fetched = ChunkCache(1000), ReadCounters(), []
    begun, go = threading.Event(), threading.Event()

    def slow(chunks: Sequence[Chunk]) -> list[Bytes]:
        fetched.append([chunk.address for chunk in chunks])
        begun.set()
        assert go.wait(30)
        return supply(made)(chunks)

    with ThreadPoolExecutor(4) as threads:
        first = threads.submit(cache.get, [made[0][0]], slow, counters)
        assert begun.wait(30)
        others = [threads.submit(cache.get, [made[0][0]], slow, counters) for _ in range(3)]
        go.set()
        results = [one.result()[made[0][0].address] for one in (first, *others)]
    assert len(fetched) == 1 and counters.fetched == 1
    assert counters.shared + counters.memory_hits == 3
    assert all(np.array_equal(result, made[0][1]) for result in results)


def test_a_thread_that_waited_for_a_failed_fetch_tries_by_itself() -> None:
    made = pieces(1)
    cache, counters = ChunkCache(1000), ReadCounters()
    begun, go = threading.Event(), threading.Event()

    def failing(chunks: Sequence[Chunk]) -> list[Bytes]:
        begun.set()
        assert go.wait(30)
        raise CacheUnreachable("away")

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(cache.get, [made[0][0]], failing, counters)
        assert begun.wait(30)
        second = threads.submit(cache.get, [made[0][0]], supply(made), counters)
        go.set()
        with pytest.raises(CacheUnreachable):
            first.result()
        assert np.array_equal(second.result()[made[0][0].address], made[0][1])


def test_the_disk_tier_serves_other_processes(settings: Settings, tmp_path: Path) -> None:
    with_disk = replace(settings, dataset_disk=str(tmp_path / "disk"))
    rows = torch.randint(0, 256, (50, 100), dtype=torch.uint8)
    Datasets(with_disk).put("d", rows, chunk_nbytes=100)
    first = Datasets(fresh(with_disk)).open("d")
    first.__getitems__(list(range(30)))
    second = Datasets(fresh(with_disk)).open("d")  # a chunk cache of its own, as in another process
    check(second, list(rows))
    assert (second.counters.disk_hits, second.counters.fetched) == (30, 20)


def test_the_disk_tier_is_bounded_and_checks_what_it_reads(tmp_path: Path) -> None:
    made = pieces(60)
    disk = DiskTier(tmp_path / "disk", 1000)
    for chunk, data in made:
        disk.save({chunk.address: data})
    files = [path for path in (tmp_path / "disk").rglob("*") if path.is_file()]
    assert 8 <= len(files) <= 10
    assert (tmp_path / "disk").stat().st_mode & 0o077 == 0
    (kept,) = disk.load([made[-1][0]]).values()
    assert np.array_equal(kept, made[-1][1])
    path = next(path for path in files if path.name == made[-1][0].address)
    for damaged in (b"", b"short", bytes(100)):
        path.write_bytes(damaged)
        assert disk.load([made[-1][0]]) == {}


def test_a_file_of_the_disk_tier_has_its_name_once_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may read it at any moment."""
    [(chunk, data)] = pieces(1)
    rename, renamed = os.replace, []

    def noted(source: str, target: Path) -> None:
        assert Path(source).read_bytes().endswith(data.tobytes())
        assert not target.exists() and disk.load([chunk]) == {}
        rename(source, target)
        renamed.append(target.name)

    monkeypatch.setattr(os, "replace", noted)
    disk = DiskTier(tmp_path, 1000)
    disk.save({chunk.address: data})
    assert renamed == [chunk.address]
    assert np.array_equal(disk.load([chunk])[chunk.address], data)


def test_a_disk_that_is_full_keeps_what_it_has_and_no_half_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [(chunk, data)] = pieces(1)
    DiskTier(tmp_path, 1000).save({chunk.address: data})
    before = sorted(tmp_path.rglob("*"))
    open_descriptor = os.fdopen

    def full(descriptor: int, mode: str) -> Any:
        file = open_descriptor(descriptor, mode, buffering=0)
        file.write(b"half")
        file.close()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fdopen", full)
    DiskTier(tmp_path, 1000).save({chunk.address: data})
    assert sorted(tmp_path.rglob("*")) == before
    assert np.array_equal(DiskTier(tmp_path, 1000).load([chunk])[chunk.address], data)


def test_a_disk_that_cannot_be_written_to_is_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    made = pieces(3)
    counters, cache = ReadCounters(), ChunkCache(0, disk=DiskTier(tmp_path / "file", 1000))
    for _ in range(2):
        cache.get([chunk for chunk, _ in made], supply(made), counters)
    assert counters.fetched == 6
    assert len([record for record in caplog.records if "no more chunks are kept" in record.message]) == 1


# --- damage -----------------------------------------------------------------------------


def key_of(found: StoredDataset, column: int, number: int) -> str:
    """The Redis key of one chunk."""
    return f"torchord:chunk:{found._manifest.columns[column].data.chunk(number).address}:0"


@pytest.mark.parametrize("damage", ["missing", "changed", "shorter"])
def test_a_damaged_chunk_is_named_and_repaired(
    settings: Settings, datasets: Datasets, client: redis.Redis, redis_url: str, damage: str
) -> None:
    columns = {"x": torch.randint(0, 256, (40, 10), dtype=torch.uint8), "y": torch.arange(40)}
    datasets.put("digits", columns, chunk_nbytes=100)
    found = datasets.open("digits")
    key = key_of(found, 0, 2)
    if damage == "missing":
        client.delete(key)
    else:
        client.set(key, b"?" * (100 if damage == "changed" else 9), keepttl=True)
    check_rows = found.__getitems__(list(range(20)))  # its neighbours are whole
    assert equal([sample["x"] for sample in check_rows], list(columns["x"][:20]))
    with pytest.raises(DatasetDamaged) as caught:
        found[25]
    for part in ("'digits'", "['x']", key, redis_url.rpartition("@")[2], "verify=True"):
        assert part in str(caught.value)
    assert not isinstance(caught.value, CacheError)  # a Client would send the shard round for ever

    if damage != "missing":  # a chunk that has its name counts as there, unless it is looked at
        assert datasets.put("digits", columns).uploaded == 0
    report = datasets.put("digits", columns, verify=True)
    assert report.uploaded == 1
    check(found, [{"x": columns["x"][i], "y": columns["y"][i]} for i in range(40)])


def test_a_damaged_manifest_is_named_and_repaired(datasets: Datasets, client: redis.Redis) -> None:
    datasets.put("d", torch.arange(10))
    place = place_of(datasets._settings, None)
    record = place.record("d")
    assert record is not None
    key = f"torchord:chunk:{record.manifest.chunk(0).address}:0"
    client.set(key, b"?", keepttl=True)
    with pytest.raises(DatasetDamaged, match=r"'d' .* cannot be opened: .* is not what was written"):
        datasets.open("d")
    datasets.put("d", torch.arange(10), verify=True)
    check(datasets.open("d"), list(torch.arange(10)))

    client.hset(keys.dataset("d"), "record", '{"format": 9}')
    with pytest.raises(DatasetDamaged, match="format 9, this version of torchord reads 1"):
        datasets.info("d")
    assert datasets.list() == []
    datasets.put("d", torch.arange(10))
    assert datasets.info("d").samples == 10
    client.hset(keys.dataset("d"), "record", "{")
    datasets.delete("d")
    with pytest.raises(DatasetMissing):
        datasets.info("d")


def test_a_server_that_is_away_is_a_cache_error(settings: Settings) -> None:
    away = Datasets(replace(settings, cache_urls=("redis://127.0.0.1:1/0",)))
    with pytest.raises(CacheUnreachable):
        away.put("d", torch.arange(10))
    Datasets(settings).put("d", torch.arange(10))
    with pytest.raises(CacheUnreachable):
        away.open("d")
    with pytest.raises(CacheUnreachable):
        Datasets(Settings(url="redis://127.0.0.1:1/0")).list()


def test_chunks_that_vanish_while_they_are_put_are_sent_again(
    datasets: Datasets, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = CachePlace.commit
    lost: list[str] = []

    def commit(self: CachePlace, *args: Any, **kwargs: Any) -> Any:
        answer = original(self, *args, **kwargs)
        if not lost:  # somebody deletes a dataset that shares chunks
            lost.append(next(iter(chunk_keys(client))))
            client.delete(*lost)
        return answer

    monkeypatch.setattr(CachePlace, "commit", commit)
    rows = torch.randint(0, 256, (50, 10), dtype=torch.uint8)
    report = datasets.put("d", rows, chunk_nbytes=100)
    assert report.uploaded == 6 + 1 and lost[0] in chunk_keys(client)
    check(datasets.open("d"), list(rows))


def test_a_node_that_keeps_nothing_is_reported(datasets: Datasets, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ContentStore, "write", lambda *_: None)
    with pytest.raises(CacheError, match="does a node evict keys"):
        datasets.put("d", torch.arange(10))
    assert datasets.list() == []


def test_a_manifest_from_a_stranger_is_refused(datasets: Datasets) -> None:
    datasets.put("d", [(i, torch.ones(i), "x") for i in range(5)])
    good = json.loads(datasets.open("d")._manifest.to_json())
    DatasetManifest.from_json(json.dumps(good).encode())

    def changed(path: Sequence[Any], value: Any) -> bytes:
        copy = json.loads(json.dumps(good))
        place = copy
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value
        return json.dumps(copy).encode()

    for path, value in [
        (("samples",), 6),
        (("samples",), 0),
        (("skeleton",), {"leaf": 3}),
        (("skeleton",), {"call": []}),
        (("skeleton",), 5),
        (("columns",), []),
        (("columns", 0, "kind"), "object"),
        (("columns", 0, "dtype"), "float64"),
        (("columns", 1, "dtype"), "load"),
        (("columns", 1, "ends"), None),
        (("columns", 1, "shapes"), None),
        (("columns", 0, "shape"), [-1]),
        (("columns", 0, "data", "nbytes"), 41),
        (("columns", 0, "data", "nbytes"), 10**9),
        (("columns", 0, "data", "chunk_nbytes"), 0),
        (("columns", 0, "data", "addresses"), "../../etc/passwd"),
        (("columns", 0, "data", "checksums"), ""),
    ]:
        with pytest.raises(DatasetDamaged, match="the manifest cannot be used"):
            DatasetManifest.from_json(changed(path, value))
    for text in (b"", b"[]", b"{}", b"\xff", b"null"):
        with pytest.raises(DatasetDamaged):
            DatasetManifest.from_json(text)


# --- names ------------------------------------------------------------------------------


def test_a_name_keeps_its_content_unless_told_otherwise(datasets: Datasets, client: redis.Redis) -> None:
    first = datasets.put("d", torch.arange(1000), chunk_nbytes=800).info
    old = set(chunk_keys(client))
    with pytest.raises(
        DatasetExists, match=rf"'d' exists with other content: 1000 samples of .*{first.digest}"
    ):
        datasets.put("d", torch.arange(1001))
    assert set(chunk_keys(client)) == old  # nothing was sent for it
    with pytest.raises(DatasetExists, match="in chunks of 800 bytes, not 400"):
        datasets.put("d", torch.arange(1000), chunk_nbytes=400)
    assert datasets.info("d") == first

    second = datasets.put("d", torch.arange(550, 2000), replace=True).info
    assert datasets.info("d") == second != first
    ttls = chunk_keys(client)
    assert all(ttls[key] <= keys.DATASET_GRACE_SECONDS for key in old)  # 0..999 in 100s: none is shared
    assert all(ttls[key] > 29 * DAY for key in set(ttls) - old)
    check(datasets.open("d"), list(torch.arange(550, 2000)))


def test_of_two_puts_of_a_name_the_first_counts(
    datasets: Datasets, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = CachePlace.commit
    first: list[Any] = []

    def commit(self: CachePlace, *args: Any, **kwargs: Any) -> Any:
        if not first:
            first.append(None)
            first[0] = datasets.put("d", torch.arange(10)).info
        return original(self, *args, **kwargs)

    monkeypatch.setattr(CachePlace, "commit", commit)
    with pytest.raises(DatasetExists, match="'d' exists with other content: 10 samples"):
        datasets.put("d", torch.arange(20))
    assert datasets.info("d") == first[0]
    assert sorted(ttl <= keys.DATASET_GRACE_SECONDS for ttl in chunk_keys(client).values()) == [
        False,
        False,
        True,
        True,
    ]


def test_replacing_a_dataset_in_use_is_found(datasets: Datasets, client: redis.Redis) -> None:
    datasets.put("d", torch.arange(100), chunk_nbytes=80)
    found = datasets.open("d")
    found[0]
    old = found.digest
    new = datasets.put("d", torch.arange(1000), replace=True).info.digest
    assert int(found[99]) == 99  # for as long as its chunks live
    client.delete(*(key_of(found, 0, i) for i in range(10)))
    with pytest.raises(DatasetChanged, match=rf"'d' \({old}\) was replaced by {new} while it was in use"):
        found[50]
    with pytest.raises(DatasetChanged, match="it was replaced"):
        datasets.open("d", digest=old)
    assert datasets.open("d", digest=new).digest == new
    datasets.delete("d")
    with pytest.raises(DatasetChanged, match="was deleted while it was in use"):
        found[51]


def test_delete_leaves_what_others_share(datasets: Datasets, client: redis.Redis) -> None:
    images = torch.randint(0, 256, (64, 100), dtype=torch.uint8)
    datasets.put("a", (images, torch.arange(64)), chunk_nbytes=800)
    of_a = set(chunk_keys(client))
    datasets.put("b", (images, torch.ones(64)), chunk_nbytes=800)
    shared = {key_of(datasets.open("b"), 0, i) for i in range(8)}
    assert shared < of_a and [info.name for info in datasets.list()] == ["a", "b"]

    datasets.delete("a")
    ttls = chunk_keys(client)
    assert {key for key, ttl in ttls.items() if ttl <= keys.DATASET_GRACE_SECONDS} == of_a - shared
    assert [info.name for info in datasets.list()] == ["b"]
    for call in (datasets.delete, datasets.info, datasets.open):
        with pytest.raises(DatasetMissing, match=r"no dataset 'a' in the cache \(there: b\); put it"):
            call("a")
    check(datasets.open("b"), [(images[i], torch.tensor(1.0)) for i in range(64)])

    report = datasets.put(
        "a", (images, torch.arange(64)), chunk_nbytes=800
    )  # within the grace: nothing is sent
    assert report.uploaded == 0 and min(chunk_keys(client).values()) > 29 * DAY


def test_a_put_beside_a_delete_keeps_its_chunks(
    settings: Settings, datasets: Datasets, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = torch.arange(1000)
    datasets.put("a", rows)
    original = CachePlace.mark
    done: list[str] = []

    def mark(self: CachePlace, chunks: Sequence[Chunk]) -> None:
        if not done:  # `a` is unnamed, nobody else was seen to share its chunks, and now somebody does
            done.append(datasets.put("b", rows).info.digest)
        original(self, chunks)

    monkeypatch.setattr(CachePlace, "mark", mark)
    datasets.delete("a")
    assert done and min(chunk_keys(client).values()) > 29 * DAY
    check(datasets.open("b"), list(rows))


def test_expired_names_leave_the_index(datasets: Datasets, client: redis.Redis) -> None:
    datasets.put("a", torch.arange(3))
    datasets.put("b", torch.arange(3))
    client.delete(keys.dataset("a"))
    assert [info.name for info in datasets.list()] == ["b"]
    assert client.zrange(keys.DATASETS, 0, -1) == [b"b"]


# --- lives ------------------------------------------------------------------------------


def test_a_short_life_does_not_shorten_a_shared_one(datasets: Datasets, client: redis.Redis) -> None:
    images = torch.randint(0, 256, (64, 100), dtype=torch.uint8)
    datasets.put("long", images)
    datasets.put("short", images, ttl=1000)
    assert min(chunk_keys(client).values()) > 29 * DAY
    assert 990 <= client.ttl(keys.dataset("short")) <= 1000
    assert client.ttl(keys.DATASETS) > 29 * DAY
    datasets.put("own", images + 1, ttl=500)
    assert {ttl <= 500 for ttl in chunk_keys(client).values()} == {True, False}
    assert datasets.info("own").ttl_seconds == 500
    datasets.put("own", images + 1, ttl=60 * DAY)  # the same content may be given another life
    assert min(chunk_keys(client).values()) > 29 * DAY


def test_reading_renews_a_life_once_an_hour(
    settings: Settings, datasets: Datasets, client: redis.Redis
) -> None:
    datasets.put("d", torch.arange(1000), chunk_nbytes=1000)
    names = [keys.dataset("d"), keys.DATASETS, *chunk_keys(client)]

    def age() -> None:
        for name in names:
            client.expire(name, 10 * DAY)

    age()
    found = datasets.open("d")
    found[0]
    assert all(client.ttl(name) > 29 * DAY for name in names)
    assert 3590 <= client.ttl(keys.dataset_renewed("d")) <= 3600
    age()
    found[1]  # this process has done so
    Datasets(fresh(settings)).open("d")[1]  # and another sees that it was done
    assert all(client.ttl(name) <= 10 * DAY for name in names)
    client.delete(keys.dataset_renewed("d"))
    Datasets(fresh(settings)).open("d")[1]
    assert all(client.ttl(name) > 29 * DAY for name in names)


def test_a_deleted_dataset_is_not_renewed(datasets: Datasets, client: redis.Redis) -> None:
    datasets.put("d", torch.arange(1000))
    found = datasets.open("d")
    datasets.delete("d")
    assert int(found[5]) == 5
    assert max(chunk_keys(client).values()) <= keys.DATASET_GRACE_SECONDS


# --- places -----------------------------------------------------------------------------


def test_chunks_spread_over_several_nodes(settings: Settings, redis_url: str, client: redis.Redis) -> None:
    nodes = tuple(f"{redis_url}#{name}" for name in ("left", "middle", "right"))
    datasets = Datasets(replace(settings, cache_urls=nodes))
    rows = torch.randint(0, 256, (200, 10), dtype=torch.uint8)
    datasets.put("d", rows, chunk_nbytes=100)
    found = datasets.open("d")
    check(found, list(rows))
    assert datasets.put("d", rows).uploaded == 0
    client.delete(key_of(found, 0, 3))
    broken = Datasets(replace(fresh(settings), cache_urls=nodes)).open("d")
    with pytest.raises(DatasetDamaged, match=r"is on none of the cache nodes .*left, .*middle, .*right"):
        broken[35]
    datasets.delete("d")
    assert max(chunk_keys(client).values()) <= keys.DATASET_GRACE_SECONDS


@pytest.fixture(params=["directory", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "store") if request.param == "directory" else f"memory://{tmp_path.name}"


def files(url: str) -> list[str]:
    import fsspec

    filesystem, base = fsspec.core.url_to_fs(url)
    return [path for path in filesystem.find(base) if "/chunks/" in path]


def test_a_folder_holds_datasets_without_redis(folder: str) -> None:
    datasets = Datasets(fresh(Settings(url="redis://127.0.0.1:1/0")))
    assert datasets.list(url=folder) == []
    made = [varying(i) for i in range(30)]
    report = datasets.put("d", Samples(varying, 30), url=folder, chunk_nbytes=200)
    assert len(files(folder)) == report.uploaded
    assert (report.info.url, report.info.ttl_seconds) == (folder, None)
    check(datasets.open("d", url=folder), made)
    check(stored_dataset("d", url=folder, digest=report.info.digest), made)
    assert datasets.put("d", made, url=folder).uploaded == 0
    with pytest.raises(DatasetExists):
        datasets.put("d", made[1:], url=folder)
    assert [info.name for info in datasets.list(url=folder)] == ["d"]
    assert not [name for name in files(folder) if name.endswith(".tmp")]


def test_a_file_of_a_folder_has_its_name_once_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who reads it meanwhile, or after a crash, finds nothing and not half of it."""
    rename, renamed = os.replace, []

    def noted(source: str, target: str) -> None:
        assert not Path(target).exists()
        rename(source, target)
        renamed.append(Path(target))

    monkeypatch.setattr(os, "replace", noted)
    datasets = Datasets(fresh(Settings(url="redis://127.0.0.1:1/0")))
    datasets.put("d", torch.arange(1000), url=str(tmp_path), chunk_nbytes=1000)
    assert sorted(renamed) == sorted(path for path in tmp_path.rglob("*") if path.is_file())


def test_delete_in_a_folder_leaves_what_others_share(folder: str) -> None:
    datasets = Datasets(fresh(Settings()))
    images = torch.randint(0, 256, (64, 100), dtype=torch.uint8)
    datasets.put("a", (images, torch.arange(64)), url=folder, chunk_nbytes=800)
    datasets.put("b", (images, torch.ones(64)), url=folder, chunk_nbytes=800)
    assert len(files(folder)) == 12
    datasets.delete("a", url=folder)
    assert len(files(folder)) == 10
    check(datasets.open("b", url=folder), [(images[i], torch.tensor(1.0)) for i in range(64)])
    datasets.put("b", images, url=folder, replace=True)
    datasets.delete("b", url=folder)
    assert files(folder) == [] and datasets.list(url=folder) == []
    with pytest.raises(DatasetMissing):
        datasets.delete("b", url=folder)


def test_damage_in_a_folder_is_named_and_repaired(tmp_path: Path) -> None:
    url = str(tmp_path)
    datasets = Datasets(fresh(Settings()))
    rows = torch.randint(0, 256, (50, 10), dtype=torch.uint8)
    datasets.put("d", rows, url=url, chunk_nbytes=100)
    found = datasets.open("d", url=url)
    places = {
        i: tmp_path / "chunks" / a[:2] / a
        for i in (1, 2, 3)
        for a in [found._manifest.columns[0].data.chunk(i).address]
    }
    places[1].write_bytes(bytes(100))
    places[2].write_bytes(b"")
    places[3].unlink()
    for i, what in ((1, "is not what was written"), (2, "is not what was written"), (3, "does not exist")):
        with pytest.raises(DatasetDamaged, match=what) as caught:
            found[10 * i]
        assert str(places[i]) in str(caught.value)
    assert datasets.put("d", rows, url=url).uploaded == 2  # a file that is too short counts as absent
    assert datasets.put("d", rows, url=url, verify=True).uploaded == 1
    check(found, list(rows))
    (tmp_path / "d.dataset.json").write_text("{")
    with pytest.raises(DatasetDamaged, match=r"d\.dataset\.json"):
        datasets.open("d", url=url)


@pytest.mark.parametrize("url", ["relative/folder", "zip://a::file:///b.zip", "nosuch://bucket/x"])
def test_a_folder_must_be_one_that_workers_can_find(url: str) -> None:
    everywhere = Settings(dataset_urls=("/", "zip://", "nosuch://"))
    with pytest.raises(InvalidInput, match="datasets cannot be kept at"):
        Datasets(everywhere).list(url=url)


# --- in a recipe ------------------------------------------------------------------------


def test_a_recipe_names_a_stored_dataset(
    redis_url: str, datasets: Datasets, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets.put("points", models.points(30))
    spec = models.mlp(dataset=partial(stored_dataset, name="points")).to_spec()
    assert spec["dataset"]["target"] == "torchord.coordinator.datasets:stored_dataset"
    monkeypatch.setenv("TORCHORD_URL", "redis://127.0.0.1:1/0")
    monkeypatch.setenv("CELERY_BROKER_URL", redis_url)  # what `celery -b URL` sets
    for target in ("torchord.coordinator.datasets:stored_dataset", "coordinator:stored_dataset"):
        spec["dataset"]["target"] = target
        found = resolve(spec, allowed=("tests.support", "torch")).dataset()  # not in the list, yet admitted
        check(found, [(a, b) for a, b in models.points(30)])
    spec["dataset"]["target"] = "torchord.coordinator.datasets:Datasets"
    with pytest.raises(NotAllowed):
        resolve(spec, allowed=("tests.support", "torch"))


def test_the_master_has_the_datasets_of_its_cache(redis_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    master = Master(redis_url)
    report = master.datasets.put("d", (torch.arange(100), np.ones((100, 2))), progress=True)
    assert "put d" in capsys.readouterr().out
    (info,) = master.datasets.list()
    assert info == report.info == master.datasets.info("d")
    assert info.structure == "(tensor int64 [], array <f8 [2])"
    assert "'d' in the cache: 100 x (tensor int64 []" in repr(master.datasets.open("d"))
    master.datasets.delete("d")
    assert master.datasets.list() == []
