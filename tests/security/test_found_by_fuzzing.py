"""What the fuzzers have found: each let a foreign error out of a parser, or took memory as it was told."""

from __future__ import annotations

import gzip
import json
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

from examples.fashion_mnist import read_idx
from tests.security.test_garbage import message
from tests.support.fuzzing import answering
from torchord import Recipe, TrainingConfig
from torchord.cache import keys
from torchord.cache.datasets.allowed_urls import require_allowed
from torchord.cache.errors import (
    CacheError,
    CheckpointError,
    ConfigError,
    InvalidInput,
    RecipeError,
    RecordDamaged,
)
from torchord.cache.files.checkpoint import CheckpointStore
from torchord.cache.ledger.runs import Runs
from torchord.cache.ledger.workers import Registry, new_info, read
from torchord.cache.servers.address import ClusterAddress
from torchord.cache.servers.cluster import SLOTS, Cluster, owners_of
from torchord.cache.servers.fast_client import Lane
from torchord.cache.servers.redis_client import connect
from torchord.cache.settings import from_environment
from torchord.coordinator.messages.inspection import fault_of


@pytest.mark.parametrize(
    "spec", [None, 5, [], "x", {"model": {"target": 5}}, {5: 5}, {"metrics": 5, "step": 5}]
)
def test_a_spec_that_is_none(spec: Any) -> None:
    with pytest.raises(RecipeError):
        Recipe.from_spec(spec)


@pytest.mark.parametrize("word", ["NaN", "Infinity"])
def test_a_marker_of_a_checkpoint_with_a_number_that_is_none(word: str, tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path), "r")
    store.save(2, {"w": torch.zeros(2)}, {})
    store.save(3, {"w": torch.ones(2)}, {})
    marker = tmp_path / "r/version-000000003.json"
    marker.write_text(marker.read_text().replace('"version": 3', f'"version": {word}'))
    assert store.latest_version() == 2
    found = store.latest()
    assert found is not None and found.version == 2 and "checksum differs" in found.skipped[0]


@pytest.mark.parametrize("config", [None, 5, [], "x", [["epochs", 1]]])
def test_a_config_that_is_none(config: Any) -> None:
    with pytest.raises(ConfigError, match="a config is an object of fields"):
        TrainingConfig.from_json(config)


@pytest.mark.parametrize("name", ["CACHE_REPLICAS", "SERVER_MEMORY_BYTES"])
def test_a_setting_of_five_thousand_digits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"TORCHORD_{name}", "9" * 5000)
    with pytest.raises(InvalidInput, match=f"TORCHORD_{name} must be a whole number.* of at most 18 digits"):
        from_environment()


def test_a_heartbeat_that_is_none() -> None:
    with pytest.raises(RecordDamaged, match="a heartbeat"):
        read("5")


@pytest.mark.parametrize("encoding", [True, 5, ["utf-8"], {}])
def test_a_message_whose_encoding_is_no_text(encoding: Any) -> None:
    assert fault_of(message() | {"content-encoding": encoding}) == "its encoding is no text"


IDX = b"\0\0\x08\x02" + struct.pack(">II", 2, 3)
BROKEN: dict[str, bytes] = {
    "no gzip": b"\0\0",
    "half a gzip": gzip.compress(IDX + bytes(6))[:20],
    "damaged": gzip.compress(IDX + bytes(6))[:-6] + b"......",
    "no extents": IDX[:4],
    "too short": gzip.compress(IDX + bytes(5)),
    "too long": gzip.compress(IDX + bytes(7)),
    "more than is said, packed": gzip.compress(IDX + bytes(64 << 20)),
    "more than a machine has": gzip.compress(IDX[:3] + b"\x08" + b"\xff" * 32 + bytes(9)),
    "nothing, of shapes without end": gzip.compress(IDX[:3] + b"\x03" + b"\xff" * 8 + bytes(4)),
    "too many dimensions": gzip.compress(IDX[:3] + b"\xff" + struct.pack(">I", 1) * 255 + b"x"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_an_idx_file_that_is_none(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "file.gz"
    path.write_bytes(BROKEN[kind])
    with pytest.raises(InvalidInput, match=r"file\.gz (is not an IDX file|says shape)"):
        read_idx(path)


@pytest.mark.parametrize(
    "text", ["MOVED", "MOVED 1", "ASK 1 host", "MOVED x h:1", "ASK 1 h:port", "MOVED 1 h:1 more"]
)
def test_a_referral_to_no_place(text: str) -> None:
    slots = b"*1\r\n*3\r\n:0\r\n:16383\r\n*2\r\n$1\r\nh\r\n:7000\r\n"
    place = ClusterAddress.parse("redis+cluster://localhost:6379")
    cluster = Cluster(place, connect_timeout_seconds=1, timeout_seconds=1)
    with (
        answering(slots, f"-{text}\r\n".encode()),
        pytest.raises(CacheError, match="refers a key to no place"),
    ):
        cluster.delete([b"a"])


@pytest.mark.parametrize(("first", "last"), [(0, 1 << 40), (-1, 5), (5, 4), (SLOTS, SLOTS), (0, SLOTS)])
def test_slots_that_there_are_not(first: int, last: int) -> None:
    with pytest.raises(ConnectionError, match="unexpected reply to CLUSTER SLOTS"):
        owners_of([[first, last, [b"host", 7000]]], ("host", 7000))


def test_a_reply_that_is_no_text() -> None:
    with answering(b"+\xffOK\r\n$3\r\na\x80b\r\n"):
        assert Lane("redis://localhost:6379/0").call(("GET", "a"), ("GET", "b")) == ["\\xffOK", "a\\x80b"]


def test_bytes_of_a_record_that_are_no_text(redis_url: str) -> None:
    """By the long way: a worker's id, its heartbeat and the name of a run."""
    with connect(redis_url) as client:
        registry = Registry(client, redis_url)
        registry.beat(new_info("fine@here", ("torchord.gradients",)))
        client.zadd(keys.WORKERS, {b"\xff": time.time() * 1000, "odd": time.time() * 1000})
        client.set(keys.worker("odd"), b'{"id": "\xff"}', ex=60)
        client.zadd(keys.RUNS, {b"\xfe": 1})
        client.expire(keys.RUNS, 60)
        assert [info.node for info in registry.alive().values()] == ["fine@here"]
        assert registry.worker("odd") is None and Runs(client, redis_url).known() == []


@pytest.mark.parametrize("url", ["\0", "~\0", "file://\0", "/a\0b"])
def test_a_place_that_no_file_can_have(url: str) -> None:
    with pytest.raises(InvalidInput, match="cannot be kept at"):
        require_allowed(url, None)


def test_a_marker_of_a_checkpoint_that_lists_another_file(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path), "r")
    store.save(3, {"w": torch.ones(2)}, {})
    path = tmp_path / "r/version-000000003.json"
    marker = json.loads(path.read_text())
    del marker["checksum"]
    marker["files"]["more"] = None
    text = json.dumps(marker, sort_keys=True)
    path.write_text(json.dumps({**marker, "checksum": xxhash.xxh3_128_hexdigest(text.encode())}))
    assert store.latest_version() is None
    with pytest.raises(CheckpointError, match="it lists the files 'tensors, state, more'"):
        store.load(3)
