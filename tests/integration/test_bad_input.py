"""Bytes that are wrong and servers that refuse: each a clear error, and nothing wrong is ever applied."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis
import torch

from tests.support import models
from tests.support.waiting import wait_until
from torchord import LocalCluster, Master, TrainingConfig
from torchord.cache.blobs.blob import BlobRef
from torchord.cache.blobs.chunk_store import ChunkStore
from torchord.cache.blobs.host_tier import HostTier
from torchord.cache.blobs.tiered_store import TieredStore
from torchord.cache.errors import (
    CacheError,
    CacheUnreachable,
    ChunkCorrupt,
    ChunkMissing,
    InvalidInput,
    ManifestMismatch,
    TorchordError,
    VersionMissing,
)
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.ledger.records import SlotRecord
from torchord.cache.stores.gradients import GradientStore
from torchord.cache.stores.parameters import ParameterCache
from torchord.cache.tensors.codec import Manifest, layout, pack, require_same
from torchord.cache.testing.memory_ledger import MemoryLedger
from torchord.cache.testing.memory_plane import MemoryPlane
from torchord.coordinator.local_cluster.embedded_server import EmbeddedServer
from torchord.coordinator.messages.waits import WaitKind

KB = 1 << 10
CHUNK = 16 * KB


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """Three tensors over four chunks; chunk 1 holds the end of the first and the start of the second."""
    g = torch.Generator().manual_seed(seed)
    return {
        "embed.weight": torch.randn(5 * KB, generator=g),
        "head.weight": torch.randn(5, KB, generator=g),
        "head.bias": torch.randn(KB, generator=g),
    }


class Chunk:
    """One stored chunk, and ways to spoil it."""

    def __init__(self, client: redis.Redis, key: str) -> None:
        self.client, self.key = client, key
        self.other = f"{key.rpartition(':')[0]}:2"
        self.value: bytes = client.get(key)

    def put(self, value: bytes) -> None:
        self.client.set(self.key, value, ex=60)

    def corrupt(self) -> None:
        self.put(self.value[:100] + bytes([self.value[100] ^ 1]) + self.value[101:])

    def truncated(self) -> None:
        self.put(self.value[:-1])

    def empty(self) -> None:
        self.put(b"")

    def oversized(self) -> None:
        self.put(self.value + b"x")

    def far_oversized(self) -> None:
        self.put(self.value * 300)

    def swapped(self) -> None:
        other = self.client.get(self.other)
        self.client.set(self.other, self.value, ex=60)
        self.put(other)

    def missing(self) -> None:
        self.client.delete(self.key)

    def of_another_type(self) -> None:
        self.client.delete(self.key)
        self.client.rpush(self.key, "x")
        self.client.expire(self.key, 60)


BAD: dict[str, type[CacheError]] = {
    "corrupt": ChunkCorrupt,
    "truncated": ChunkCorrupt,
    "empty": ChunkCorrupt,
    "oversized": ChunkCorrupt,
    "far_oversized": ChunkCorrupt,
    "swapped": ChunkCorrupt,
    "missing": ChunkMissing,
    "of_another_type": CacheError,
}


@pytest.fixture
def store(redis_url: str) -> Iterator[ChunkStore]:
    store = ChunkStore([redis_url], chunk_nbytes=CHUNK)
    yield store
    store.close()


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
def ledger() -> Ledger:
    """The control plane of a run, in memory."""
    return MemoryLedger(MemoryPlane(), "digits")


# --- bytes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("way", BAD)
def test_a_bad_chunk_of_a_version_is_named_with_run_version_tensor_and_node(
    store: ChunkStore, client: redis.Redis, ledger: Ledger, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters = ParameterCache(TieredStore(store, None))
    tensors = weights()
    manifest = layout(tensors)
    record = parameters.publish(ledger, 7, pack(tensors, manifest), chain="")
    monkeypatch.setattr(type(ledger), "version", lambda self, version: record)
    monkeypatch.setattr(type(ledger), "manifest", lambda self: manifest.to_json())
    getattr(Chunk(client, f"{record.blob.key}:1"), way)()
    expected = VersionMissing if BAD[way] is ChunkMissing else BAD[way]
    with pytest.raises(expected) as caught:
        parameters.fetch(ledger, 7)
    said = str(caught.value)
    assert "digits" in said and ":7:" in said and "127.0.0.1" in said, said
    assert f"{record.blob.key}:1" in said or way == "of_another_type", said
    if way != "of_another_type":
        assert "version 7 of run 'digits'" in said
        assert "'embed.weight', 'head.weight'" in said and "bias" not in said


@pytest.mark.parametrize("way", [way for way in BAD if way != "of_another_type"])
def test_a_bad_chunk_of_a_gradient_is_named_and_nothing_of_it_is_handed_out(
    store: ChunkStore, client: redis.Redis, ledger: Ledger, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(ledger), "server_memory", lambda self: "")
    gradients = GradientStore(TieredStore(store, None))
    slot = slot_of(gradients, ledger)
    getattr(Chunk(client, f"{slot.blob.key}:1"), way)()
    with pytest.raises(BAD[way], match=r"gradient of shard 2 by worker w1.*'embed\.weight', 'head\.weight'"):
        gradients.get(slot)


def slot_of(gradients: GradientStore, ledger: Ledger) -> SlotRecord:
    stored = gradients.put(ledger, 4, 2, weights())
    return SlotRecord(
        shard=2, digest=stored.digest, nonce=stored.nonce, blob=stored.blob, manifest=stored.manifest,
        buffers=(), examples=1, loss=0.0, grad_norm=0.0, worker="w1", attempt=1, seconds=0.0,
    )  # fmt: skip


@pytest.mark.parametrize("way", [way for way in BAD if way != "of_another_type"])
def test_a_bad_chunk_is_served_by_a_replica(redis_url: str, client: redis.Redis, way: str) -> None:
    with EmbeddedServer() as second:
        store = ChunkStore([redis_url, second.url], chunk_nbytes=CHUNK, replicas=1)
        sent = pack(weights(), layout(weights()))
        ref = store.put("t:replica", sent, ttl_seconds=60)
        for key in ref.chunk_keys():
            if not key.endswith(":2"):
                getattr(Chunk(client, key), way)()
        assert torch.equal(store.get(ref), sent)
        store.close()


@pytest.mark.parametrize("way", [way for way in BAD if way != "of_another_type"])
def test_a_bad_chunk_is_served_by_the_host(
    store: ChunkStore, client: redis.Redis, way: str, tmp_path: Path
) -> None:
    tiered = TieredStore(store, HostTier(tmp_path / "tier"))
    sent = torch.arange(300_000, dtype=torch.int32)
    ref = tiered.put("t:host", sent, ttl_seconds=60)
    getattr(Chunk(client, "t:host:1"), way)()
    found, source = tiered.get_from(ref)
    assert source == "host" and torch.equal(found.view(torch.int32), sent)


def test_a_chunk_that_was_bad_only_on_its_way_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = b"$4\r\ngood\r\n", b"$4\r\nb@d!\r\n"
    import xxhash

    ref = BlobRef("t:once", 4, 4, (xxhash.xxh3_64_hexdigest(b"good"),))
    with scripted(bad, good) as url:
        assert bytes(ChunkStore([url]).get(ref).tolist()) == b"good"
    with scripted(bad, bad, good) as url, pytest.raises(ChunkCorrupt, match="t:once:0"):
        ChunkStore([url]).get(ref)


# --- manifests -------------------------------------------------------------------------------


def changed(change: Callable[[dict[str, torch.Tensor]], Any]) -> Manifest:
    tensors = weights()
    change(tensors)
    return layout(tensors)


def renamed(tensors: dict[str, torch.Tensor]) -> None:
    items = [("other" if name == "head.weight" else name, t) for name, t in tensors.items()]
    tensors.clear()
    tensors.update(items)


MISFITS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "name": (renamed, r"'other' .*: not in the model here"),
    "shape": (
        lambda t: t.update({"head.weight": t["head.weight"].T.contiguous()}),
        r"\(5, 1024\).*\(1024, 5\)",
    ),
    "dtype": (lambda t: t.update({"head.bias": t["head.bias"].view(torch.int32)}), "float32 .* int32"),
    "more": (lambda t: t.update({"x": torch.zeros(3)}), r"'x' .*: not in the model here"),
    "fewer": (lambda t: t.pop("head.bias"), r"'head\.bias': only in the model here"),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_a_model_that_is_laid_out_otherwise_is_refused_naming_the_tensor(kind: str) -> None:
    change, words = MISFITS[kind]
    require_same(layout(weights()), layout(weights()))
    with pytest.raises(ManifestMismatch, match=words):
        require_same(layout(weights()), changed(change))


def test_the_order_in_which_a_model_registered_its_tensors_is_free() -> None:
    require_same(layout(weights()), changed(lambda t: t.update({"embed.weight": t.pop("embed.weight")})))


BROKEN: dict[str, dict[str, Any]] = {
    "no list": {"nbytes": 64},
    "overlap": {"nbytes": 128, "tensors": [["a", [16], "float32", 0, 64], ["b", [16], "float32", 0, 64]]},
    "beyond": {"nbytes": 64, "tensors": [["a", [32], "float32", 0, 128]]},
    "another length": {"nbytes": 64, "tensors": [["a", [16], "float32", 0, 64]]},
    "unknown dtype": {"nbytes": 64, "tensors": [["a", [16], "float13", 0, 64]]},
    "negative": {"nbytes": 64, "tensors": [["a", [-16], "float32", 0, -64]]},
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_damaged_manifest_of_a_slot_hands_nothing_out(
    store: ChunkStore, ledger: Ledger, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(ledger), "server_memory", lambda self: "")
    gradients = GradientStore(TieredStore(store, None))
    slot = slot_of(gradients, ledger)
    with pytest.raises(ManifestMismatch):
        gradients.get(replace(slot, manifest=BROKEN[kind]))


# --- servers that answer otherwise than they should ------------------------------------------


@contextlib.contextmanager
def scripted(*replies: bytes | None) -> Iterator[str]:
    """A server that answers each request with the next reply; None: not at all. Yields its URL."""
    answers = iter(replies)
    done = threading.Event()

    def serve(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while not done.is_set():
                connection = listener.accept()[0]
                threading.Thread(target=talk, args=(connection,), daemon=True).start()

    def talk(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while connection.recv(1 << 20):
                reply = next(answers, None)
                if reply is None:
                    done.wait(20)
                    return
                connection.sendall(reply)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        yield f"redis://127.0.0.1:{listener.getsockname()[1]}"
        done.set()
        listener.shutdown(socket.SHUT_RDWR)


REFUSALS: dict[str, tuple[bytes | None, type[CacheError], str]] = {
    "READONLY": (
        b"-READONLY You can't write against a read only replica.\r\n",
        CacheError,
        "name the primary",
    ),
    "OOM": (
        b"-OOM command not allowed when used memory > 'maxmemory'.\r\n",
        CacheError,
        "raise its maxmemory",
    ),
    "MOVED": (b"-MOVED 3999 10.0.0.9:6379\r\n", CacheError, r"redis\+cluster://"),
    "ASK": (b"-ASK 3999 10.0.0.9:6379\r\n", CacheError, r"redis\+cluster://"),
    "CLUSTERDOWN": (b"-CLUSTERDOWN The cluster is down\r\n", CacheUnreachable, "CLUSTERDOWN"),
    "LOADING": (b"-LOADING Redis is loading the dataset\r\n", CacheUnreachable, "try again"),
    "NOAUTH": (b"-NOAUTH Authentication required.\r\n", CacheError, "wants a password"),
    "NOPERM": (b"-NOPERM this user has no permissions\r\n", CacheError, "lacks a right"),
    "slow": (None, CacheUnreachable, "does not reply"),
    "garbage": (b"HTTP/1.1 400 Bad Request\r\n", CacheUnreachable, "is that a Redis-compatible server"),
    "nonsense length": (b"$many\r\n", CacheUnreachable, "is that a Redis-compatible server"),
    "length without end": (b"$99999999999999999999\r\n", CacheUnreachable, "server|no more data|reply"),
    "nothing": (b"", CacheUnreachable, "reply|closed"),
}


@pytest.mark.parametrize("verb", ["read", "write"])
@pytest.mark.parametrize("kind", REFUSALS)
def test_a_refusal_names_key_and_node_and_the_way_out(kind: str, verb: str) -> None:
    reply, error, words = REFUSALS[kind]
    with scripted(reply) as url:
        store = ChunkStore([url], timeout_seconds=0.3)
        ref = BlobRef("torchord:blob:digits:parameters:7:n", 4, 4, ("0" * 16,))
        with pytest.raises(error, match=words) as caught:
            if verb == "read":
                store.get(ref)
            else:
                store.put(ref.key, memoryview(b"good"), ttl_seconds=60)
        said = str(caught.value)
        assert said.startswith(f"cannot {verb} torchord:blob:digits:parameters:7:n:0 on cache node {url}")
        store.close()


@pytest.mark.parametrize("kind", [kind for kind in REFUSALS if kind != "nothing"])
def test_a_read_is_served_by_another_node_whatever_one_answers(kind: str, redis_url: str) -> None:
    whole = ChunkStore([redis_url])
    ref = whole.put("t:elsewhere", memoryview(b"good"), ttl_seconds=60)
    with scripted(*[REFUSALS[kind][0]] * 4) as url:
        store = ChunkStore([f"{url}#a", redis_url], timeout_seconds=0.3, weights=[100, 0.001])
        assert bytes(store.get(ref).tolist()) == b"good"
        store.close()
    whole.close()


# --- full servers ----------------------------------------------------------------------------


def fill(client: redis.Redis) -> None:
    """Allow the server no more than it holds."""
    client.config_set("maxmemory-policy", "noeviction")
    client.config_set("maxmemory", 1)


def test_a_full_control_plane_is_said_and_can_still_be_read() -> None:
    with EmbeddedServer() as server, redis.Redis.from_url(server.url) as client:
        master = Master(server.url)
        config = TrainingConfig(epochs=1, batch_size=8, shards=2)
        run = master.submit(models.mlp(size=16), config, name="before")
        fill(client)
        with pytest.raises(CacheError, match=r"'after'.*127\.0\.0\.1.*raise its maxmemory") as caught:
            master.submit(models.mlp(size=16), config, name="after")
        assert isinstance(caught.value, TorchordError)
        assert run.status().state == "pending"
        (wait,) = run.status().waits
        assert wait.kind is WaitKind.ROOM and "raise its maxmemory" in wait.ends
        assert "before" in master.runs()
        client.config_set("maxmemory", 0)
        assert master.submit(models.mlp(size=16), config, name="after").status().state == "pending"


def test_a_control_plane_that_throws_keys_away_is_refused() -> None:
    with EmbeddedServer() as server, redis.Redis.from_url(server.url) as client:
        master = Master(server.url)
        client.config_set("maxmemory-policy", "allkeys-lru")
        config = TrainingConfig(epochs=1, batch_size=8, shards=2)
        assert master.submit(models.mlp(size=16), config, name="unlimited").status().state == "pending"
        client.config_set("maxmemory", 1 << 30)
        with pytest.raises(InvalidInput, match=r"policy allkeys-lru.*Set maxmemory-policy noeviction"):
            master.submit(models.mlp(size=16), config, name="evicted")
        assert master.runs() == ["unlimited"]


@pytest.mark.parametrize("plane", ["data", "control"])
def test_a_run_outlives_a_full_server_with_the_same_bits(
    cluster: Callable[..., LocalCluster], plane: str
) -> None:
    recipe = models.mlp(size=64, model=partial(models.Mlp, hidden=2_000))
    config = TrainingConfig(epochs=4, batch_size=8, shards=2, checkpoint_every=50)
    found = []
    with EmbeddedServer() as tensors:
        made = cluster(2, env={"TORCHORD_CACHE_URLS": tensors.url, "TORCHORD_HOST_CACHE": "off"})
        master = Master(made.url, checkpoint_dir=made.checkpoint_dir, cache_urls=[tensors.url])
        for full in (False, True):
            run = master.submit(recipe, config, name=f"full-{full}")
            if full:
                assert not said(made, "maxmemory")
                wait_until(lambda run=run: run.status().version >= 4, 30, "the fourth step")
                with redis.Redis.from_url(tensors.url if plane == "data" else made.url) as client:
                    fill(client)
                    wait_until(lambda: said(made, "maxmemory"), 30, "the workers to say so")
                    assert run.status().state == "running"
                    client.config_set("maxmemory", 0)
            run.wait(timeout=120)
            assert run.verify().ok
            found.append(b"".join(t.numpy().tobytes() for t in run.state_dict().values()))
    assert found[0] == found[1]


def said(made: LocalCluster, word: str) -> bool:
    """Whether a worker has logged a word."""
    return any(word in worker.log.read_text(errors="replace") for worker in made.processes.values())


# --- a worker whose model is another ----------------------------------------------------------


def test_a_worker_with_another_model_refuses_and_says_which_tensor(redis_url: str) -> None:
    from tests.support.inprocess import resolved
    from torchord.coordinator.compute.replica import Replica
    from torchord.coordinator.runtime.context import RunContext

    class Services:
        def ledger(self, run: str) -> Any:
            return self

        def manifest(self) -> dict[str, Any]:
            return json.loads(json.dumps(layout(weights()).to_json()))

    recipe = resolved(models.mlp(size=16))
    replica = Replica.build(recipe, TrainingConfig(epochs=1, batch_size=8, shards=2), "cpu")
    context = RunContext(Services(), "digits", "life")  # type: ignore[arg-type]
    with pytest.raises(ManifestMismatch, match=r"run 'digits': 'embed\.weight' .*: not in the model here"):
        context.lay_out(replica)
