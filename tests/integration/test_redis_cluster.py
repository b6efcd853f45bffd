"""A Redis Cluster as the data plane: real servers, slots that move, a primary that dies."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis
import redis.cluster
import torch
from redis.crc import key_slot

from tests.support import models, reference, resting
from tests.support.inprocess import resolved
from tests.support.processes import responds
from tests.support.redis_cluster import RedisCluster, joined, redis_cluster
from tests.support.waiting import wait_until
from torchord import LocalCluster, Master, TrainingConfig
from torchord.cache.blobs.chunk_store import BlobRef, ChunkStore
from torchord.cache.blobs.tiered_store import TieredStore
from torchord.cache.errors import CacheError, CacheUnreachable, ChunkMissing, InvalidInput
from torchord.cache.servers.address import ClusterAddress
from torchord.cache.servers.cluster import Cluster, owners_of
from torchord.cache.settings import from_environment
from torchord.cache.stores.parameters import ParameterCache
from torchord.cache.testing.memory_ledger import MemoryLedger
from torchord.cache.testing.memory_plane import MemoryPlane
from torchord.coordinator.compute.replica import Replica
from torchord.coordinator.local_cluster.embedded_server import EmbeddedServer, free_port
from torchord.coordinator.runtime.version_writer import VersionWriter

KB = 1 << 10


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisCluster]:
    """Three primaries that no test stops."""
    with redis_cluster(tmp_path_factory.mktemp("cluster")) as made:
        yield made


@pytest.fixture
def store(three: RedisCluster) -> Iterator[ChunkStore]:
    store = ChunkStore([three.url], chunk_nbytes=16 * KB)
    yield store
    store.close()


def blob(nbytes: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def key_in_slot(slot: int, prefix: str) -> str:
    """A blob key whose chunk 0 falls into a slot."""
    return next(f"{prefix}{n}" for n in itertools.count() if key_slot(f"{prefix}{n}:0".encode()) == slot)


# --- the parts -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key", ["123456789", "foo{hash_tag}x", "foo{}{bar}", "foo{{bar}}zap", "{a}:1", "}{", "a{b", "", "é{ü}"]
)
def test_slots_are_those_of_the_servers(three: RedisCluster, key: str) -> None:
    assert key_slot(key.encode()) == three.members[0].client.execute_command("CLUSTER KEYSLOT", key)


@pytest.mark.parametrize(
    ("url", "label", "servers"),
    [
        ("redis+cluster://b:7001,a:7000", "redis+cluster://a:7000,b:7001", [("b", 7001), ("a", 7000)]),
        ("valkey+cluster://u:p@a", "valkey+cluster://a:6379", [("a", 6379)]),
        ("redis+cluster://[::1]:7000#here", "here", [("::1", 7000)]),
    ],
)
def test_urls(url: str, label: str, servers: list[tuple[str, int]]) -> None:
    found = ClusterAddress.parse(url)
    assert found.label == label and [(a.host, a.port) for a in found.servers] == servers


@pytest.mark.parametrize(
    "url", ["redis+cluster://", "redis+cluster://u:secret@a:x", "redis+cluster://u:secret@a:1/3"]
)
def test_an_unusable_url_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(InvalidInput, match="cannot be used") as caught:
        ChunkStore([url])
    assert "secret" not in str(caught.value)


def test_the_environment_may_list_clusters_and_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    value = "redis://x:1, redis+cluster://a:1,b:2, c:3,redis://y:1"
    monkeypatch.setenv("TORCHORD_CACHE_URLS", value)
    assert from_environment().cache_urls == ("redis://x:1", "redis+cluster://a:1,b:2,c:3", "redis://y:1")


def test_a_server_that_does_not_know_its_address_is_reached_where_it_was_asked() -> None:
    found = owners_of([[0, 100, [b"", 7000, b"id"]], [101, 16383, [b"10.0.0.2", 7001, b"id"]]], ("host", 1))
    assert (found[0], found[101]) == (("host", 7000), ("10.0.0.2", 7001))
    with pytest.raises(ConnectionError, match="CLUSTER SLOTS"):
        owners_of([[0, 100]], ("host", 1))


# --- a cluster at peace ----------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", [0, 1, 16 * KB, 3_000_001])
@pytest.mark.parametrize("connections", [1, 3])
def test_a_blob_comes_back_bit_for_bit(three: RedisCluster, nbytes: int, connections: int) -> None:
    store = ChunkStore([three.url], chunk_nbytes=16 * KB, connections=connections)
    ref = store.put("t:size", blob(nbytes), ttl_seconds=60)
    assert torch.equal(store.get(ref), blob(nbytes))
    assert ref == ChunkStore([three.url], chunk_nbytes=16 * KB).put("t:size", blob(nbytes), ttl_seconds=60)
    store.delete([ref])
    store.close()


def test_chunks_lie_on_every_server_live_as_long_as_asked_and_are_deleted_everywhere(
    three: RedisCluster, store: ChunkStore
) -> None:
    ref = store.put("t:spread", blob(3_000_000), ttl_seconds=60)
    held = [list(member.client.scan_iter("t:spread:*")) for member in three.members]
    assert sum(map(len, held)) == len(ref.checksums) and min(map(len, held)) > len(ref.checksums) / 6
    store.touch(ref, 600)
    assert all(
        60 < m.client.ttl(key) <= 600 for m, keys in zip(three.members, held, strict=True) for key in keys
    )
    assert store.extend([ref, BlobRef("t:none", 1, 1, ("0" * 16,))], 60) == [True, False]
    assert all(three.members[0].client.ttl(key) > 60 for key in held[0])
    store.delete([ref])
    store.delete([ref])
    assert not any(list(member.client.scan_iter("t:spread:*")) for member in three.members)
    with pytest.raises(ChunkMissing, match=r"t:spread:0.*redis\+cluster://"):
        store.get(ref)


def test_what_rests_of_a_run_is_stored_once_and_goes_with_its_last_version(
    three: RedisCluster, store: ChunkStore
) -> None:
    replica = Replica.build(resolved(resting.recipe()), TrainingConfig(epochs=1, batch_size=8))
    ledger: Any = MemoryLedger(MemoryPlane(), "t-rest")
    ledger.create({}, incarnation="life")
    _, token = ledger.acquire(worker="s0", node="celery@s0", queue="")
    parameters = ParameterCache(TieredStore(store, None))
    writer = VersionWriter(parameters, ledger, replica)
    trained = [p for p in replica.parameters.values() if p.requires_grad]

    def stored() -> list[int]:
        found = [list(member.client.scan_iter("torchord:blob:t-rest:*")) for member in three.members]
        return [sum(map(len, found)), sum(b":rest:" in key for keys in found for key in keys)]

    counts = []
    for version in range(6):
        with torch.no_grad():
            for parameter in trained:
                parameter.add_(1)
        assert ledger.put_version(writer.store(version, chain="c"), token=token)
        parameters.drop(ledger, [version - 2], token=token)
        counts.append(stored())
        found = parameters.fetch_bytes(ledger, version, manifest=replica.manifest)[1]
        assert torch.equal(found.flat(), replica.pack())
    chunks = -(-sum(p.nbytes for n, p in replica.frozen.items()) // (16 * KB))
    assert chunks <= counts[0][1] == counts[-1][1] and counts[1] == counts[-1]
    parameters.drop(ledger, [4, 5], token=token)
    assert stored() == [0, 0]


def test_redis_py_finds_the_chunks_where_they_are(three: RedisCluster, store: ChunkStore) -> None:
    store.put("t:there", blob(500_000), ttl_seconds=60)
    with redis.cluster.RedisCluster(host="127.0.0.1", port=three.members[0].server.port) as client:
        assert client.get("t:there:7") == bytes(blob(500_000)[7 * 16 * KB : 8 * 16 * KB].tolist())


def test_small_blobs_go_together(store: ChunkStore) -> None:
    store.put_many([(f"t:many:{n}", memoryview(bytes([n]) * 100)) for n in range(200)], ttl_seconds=60)
    refs = [store.put(f"t:small:{n}", blob(100, seed=n), ttl_seconds=60) for n in range(50)]
    assert all(torch.equal(got, blob(100, seed=n)) for n, got in enumerate(store.get_many(refs)))


def test_a_cluster_may_be_one_node_of_several(three: RedisCluster) -> None:
    with EmbeddedServer() as single:
        store = ChunkStore([three.url, single.url], chunk_nbytes=16 * KB, replicas=1)
        ref = store.put("t:both", blob(500_000), ttl_seconds=60)
        with redis.Redis.from_url(single.url) as client:
            assert client.dbsize() == len(ref.checksums)
        assert torch.equal(ChunkStore([three.url], chunk_nbytes=16 * KB).get(ref), blob(500_000))
        store.close()


# --- slots that move -------------------------------------------------------------------------


def test_a_slot_that_moves_is_followed_and_a_slot_half_way_is_asked_on_both_sides(
    three: RedisCluster,
) -> None:
    slot = 1234
    store = ChunkStore([three.url], chunk_nbytes=16 * KB)
    old = store.put(key_in_slot(slot, "t:old"), blob(100_000), ttl_seconds=60)
    source = three.owner(slot)
    target = next(member for member in three.primaries if member is not source)
    three.begin_move(slot, target)
    fresh = store.put(key_in_slot(slot, "t:new"), blob(100_000, seed=1), ttl_seconds=60)  # ASK
    assert target.client.execute_command("CLUSTER COUNTKEYSINSLOT", slot) == 1
    assert three.move_keys(slot, target) == 1  # now the old one is on the other side, too
    for ref, seed in ((old, 0), (fresh, 1)):
        assert torch.equal(store.get(ref), blob(100_000, seed=seed))
        store.touch(ref, 600)
        assert store.extend([ref], 600) == [True]
    assert torch.equal(
        store.get(store.put(old.key, blob(100_000, seed=2), ttl_seconds=60)), blob(100_000, seed=2)
    )
    three.end_move(slot, target)  # MOVED from here on
    assert three.owner(slot) is target
    for _ in range(2):
        again = store.put(old.key, blob(100_000, seed=3), ttl_seconds=60)
        assert torch.equal(store.get(again), blob(100_000, seed=3))
        assert torch.equal(store.get(fresh), blob(100_000, seed=1))
    asked = source.client.info("commandstats")
    store.get(again)  # the table was read again: the old owner is not asked any more
    now = source.client.info("commandstats")
    assert now["cmdstat_get"].get("rejected_calls") == asked["cmdstat_get"].get("rejected_calls")
    store.delete([old, fresh])
    assert target.client.execute_command("CLUSTER COUNTKEYSINSLOT", slot) == 0
    store.close()


def test_a_slot_that_moves_to_a_server_without_slots_is_found_there(tmp_path: Path) -> None:
    """No table of owners names that server yet."""
    slot = 1234
    with redis_cluster(tmp_path, primaries=2) as two, joined(two, tmp_path) as fresh:
        store = ChunkStore([two.url], chunk_nbytes=16 * KB)
        two.begin_move(slot, fresh)
        ref = store.put(key_in_slot(slot, "t:fresh"), blob(100_000), ttl_seconds=60)
        assert fresh.client.dbsize() == 1
        assert torch.equal(store.get(ref), blob(100_000))
        store.touch(ref, 600)
        store.delete([ref])
        assert fresh.client.dbsize() == 0
        store.close()


def test_many_slots_move_while_blobs_are_written_and_read(three: RedisCluster) -> None:
    store = ChunkStore([three.url], chunk_nbytes=4 * KB)
    ref = store.put("t:moving", blob(400_000), ttl_seconds=60)
    for key in itertools.islice(ref.chunk_keys(), 0, 60, 3):
        slot = key_slot(key.encode())
        source = three.owner(slot)
        three.move(slot, three.primaries[(three.primaries.index(source) + 1) % 3])
        assert torch.equal(store.get(ref), blob(400_000))
        again = store.put("t:moving", blob(400_000), ttl_seconds=60)
        assert again == ref
    store.delete([ref])
    assert not any(list(member.client.scan_iter("t:moving:*")) for member in three.members)
    store.close()


def test_a_slot_that_two_servers_refer_to_each_other_is_an_error(
    three: RedisCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ChunkStore([three.url])
    key = key_in_slot(77, "t:fro")
    wrong = [member.endpoint for member in three.primaries if member is not three.owner(77)]
    monkeypatch.setattr(Cluster, "_refresh", lambda self, avoid=(): [wrong[0]] * 16384)
    monkeypatch.setattr(
        Cluster, "_follow", lambda self, tasks, referred: bool(referred.update({0: (wrong[0], False)}) or 1)
    )
    with pytest.raises(CacheUnreachable, match=r"refer t:fro.* \(slot 77\) to each other"):
        store.put(key, blob(10), ttl_seconds=60)
    store.close()


def test_a_plain_server_is_no_cluster_and_a_cluster_no_plain_server(
    three: RedisCluster, redis_url: str
) -> None:
    place = redis_url.removeprefix("redis://").partition("/")[0]
    with pytest.raises(CacheError, match=r"is no server of a Redis Cluster.*redis://HOST:PORT"):
        ChunkStore([f"redis+cluster://{place}"]).put("t:x", blob(10), ttl_seconds=60)
    away = key_in_slot(5461, "t:x")  # the first slot of the second primary
    with pytest.raises(CacheError, match=r"MOVED 5461.*redis\+cluster://HOST:PORT"):
        ChunkStore([three.members[0].server.url]).put(away, blob(10), ttl_seconds=60)
    with pytest.raises(CacheUnreachable, match=r"no server of redis\+cluster://127\.0\.0\.1.* answers"):
        ChunkStore([f"redis+cluster://127.0.0.1:{free_port()}"]).put("t:x", blob(10), ttl_seconds=60)


def test_a_cluster_cannot_be_the_broker() -> None:
    with pytest.raises(
        CacheUnreachable, match=r"Celery cannot use as a broker.*TORCHORD_CACHE_URLS"
    ) as caught:
        Master("redis+cluster://me:secret@127.0.0.1:7000")
    assert "secret" not in str(caught.value)


# --- a primary that dies ---------------------------------------------------------------------


def test_a_replica_takes_over_and_nothing_is_lost(tmp_path: Path) -> None:
    with redis_cluster(tmp_path, primaries=3, replicas=3) as six:
        store = ChunkStore([six.url], chunk_nbytes=16 * KB, patience_seconds=30.0)
        ref = store.put("t:over", blob(2_000_000), ttl_seconds=60)
        for primary in six.primaries:
            assert primary.client.execute_command("WAIT", 1, 5000) >= 1
        lost = six.primaries[1]
        lost.server.kill()
        assert torch.equal(store.get(ref), blob(2_000_000))
        assert store.put("t:over", blob(2_000_000), ttl_seconds=60) == ref
        assert six.owner(8000) is six.replicas[1]
        lost.server.start()  # comes back as a replica, empty and read-only
        wait_until(
            lambda: lost.client.info("replication")["role"] == "slave", 20, "the old primary to follow"
        )
        assert torch.equal(store.get(ref), blob(2_000_000))
        store.touch(ref, 60)
        store.delete([ref])
        store.close()


def test_without_a_replica_the_error_names_the_server_that_is_gone(tmp_path: Path) -> None:
    with redis_cluster(tmp_path) as three:
        store = ChunkStore([three.url], chunk_nbytes=16 * KB)
        ref = store.put("t:gone", blob(500_000), ttl_seconds=60)
        three.primaries[0].server.kill()
        port = three.primaries[0].server.port
        with pytest.raises(CacheUnreachable, match=rf"cannot read t:gone:\d+ on .*127\.0\.0\.1:{port}"):
            store.get(ref)
        store.close()


# --- training --------------------------------------------------------------------------------


def test_a_run_on_a_cluster_has_the_bits_of_a_plain_loop_though_slots_move_and_a_primary_dies(
    cluster: Callable[..., LocalCluster], tmp_path: Path
) -> None:
    recipe = models.mlp(size=64, model=partial(models.Mlp, hidden=20_000))
    config = TrainingConfig(epochs=3, batch_size=8, shards=2, checkpoint_every=50, seed=3)
    with redis_cluster(tmp_path, primaries=3, replicas=3) as six:
        made = cluster(2, env={"TORCHORD_CACHE_URLS": six.url, "TORCHORD_HOST_CACHE": "off"})
        master = Master(made.url, checkpoint_dir=made.checkpoint_dir, cache_urls=[six.url])
        run = master.submit(recipe, config, name="on-a-cluster")
        wait_until(lambda: run.status().version >= 4, 30, "the fourth step")
        for slot in range(100, 110):
            six.move(slot, six.primaries[2])
        six.primaries[1].server.kill()
        run.wait(timeout=120)
        assert run.verify().ok
        found = reference.bits(run.state_dict())
        assert [key for m in six.members if responds(m.server) for key in m.client.scan_iter("torchord:*")]
    assert found == reference.accumulate(recipe, config).bits
