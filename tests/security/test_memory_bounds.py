"""A record that claims much takes no memory before its bytes are there, however few signs it has."""

from __future__ import annotations

import json
import os
import resource
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from torchord import TrainingConfig
from torchord.cache.blobs.blob import MOST_CHUNK_NBYTES, BlobRef
from torchord.cache.blobs.bounds import UNASKED_NBYTES, machine_nbytes
from torchord.cache.blobs.chunk_store import CHUNK_NBYTES, ChunkStore
from torchord.cache.blobs.host_tier import HostTier
from torchord.cache.blobs.tiered_store import TieredStore
from torchord.cache.errors import (
    CacheError,
    ChunkLost,
    ConfigError,
    InvalidInput,
    ManifestMismatch,
    RecordDamaged,
)
from torchord.cache.reading import MOST_DEPTH, parsed
from torchord.cache.tensors.codec import Manifest

MIB = 1 << 20


@pytest.fixture
def tier() -> Iterator[HostTier]:
    path = Path(tempfile.mkdtemp(prefix="torchord-bounds-", dir="/tmp"))
    yield HostTier(path)
    shutil.rmtree(path)


@pytest.fixture
def store(redis_url: str, tier: HostTier) -> TieredStore:
    return TieredStore(ChunkStore([redis_url]), tier)


def forged(nbytes: int, chunk_nbytes: int = CHUNK_NBYTES, **more: object) -> dict[str, object]:
    count = -(-nbytes // chunk_nbytes)
    sums = "0123456789abcdef" * count
    return {"key": "t:no", "nbytes": nbytes, "chunk_nbytes": chunk_nbytes, "checksums": sums, **more}


def taken_nbytes(tier: HostTier) -> int:
    """What the tier's directory holds, and the most memory that this process ever had."""
    assert tier.directory is not None
    held = sum(os.stat(path).st_blocks * 512 for path in tier.directory.iterdir())
    return held + resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize("more", [{}, {"local": True}])
@pytest.mark.parametrize("chunk_nbytes", [CHUNK_NBYTES, MOST_CHUNK_NBYTES])
def test_a_reference_to_nothing_takes_no_memory(
    store: TieredStore,
    tier: HostTier,
    more: dict[str, object],
    chunk_nbytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torchord.cache.blobs import host_tier

    reserved: list[int] = []
    monkeypatch.setattr(host_tier, "reserve", lambda part, nbytes: reserved.append(nbytes))
    claimed = min(1 << 32, machine_nbytes())
    ref = BlobRef.from_json(forged(claimed, chunk_nbytes, **more))
    before = taken_nbytes(tier)
    with pytest.raises(ChunkLost):
        store.get(ref)
    if not more:
        with pytest.raises(ChunkLost):
            store.require_stored(ref)
    assert taken_nbytes(tier) - before < 64 * MIB and reserved == []


def test_more_than_the_machine_has_is_refused_with_both_figures(store: TieredStore) -> None:
    most = machine_nbytes()
    ref = BlobRef.from_json(forged(most + 1, MOST_CHUNK_NBYTES))
    with pytest.raises(ChunkLost, match=f"claims {most + 1:,} bytes, more than the {most:,}"):
        store.get(ref)


def test_what_is_there_is_read_as_ever(store: TieredStore) -> None:
    data = torch.arange((UNASKED_NBYTES + 3 * MIB) // 8)
    ref = store.chunks.put("t:there", data, ttl_seconds=60)
    assert torch.equal(store.get(BlobRef.from_json(ref.to_json())).view(torch.int64), data)


def test_a_large_blob_of_other_chunks_than_todays_is_read(redis_url: str) -> None:
    data = torch.arange((UNASKED_NBYTES + 3 * MIB) // 8)
    ref = ChunkStore([redis_url], chunk_nbytes=1 << 18).put("t:before", data, ttl_seconds=60)
    assert torch.equal(TieredStore(ChunkStore([redis_url]), None).get(ref).view(torch.int64), data)


@pytest.mark.parametrize(
    "changes",
    [
        {"chunk_nbytes": 512 << 20},
        {"nbytes": 1 << 62},
        {"nbytes": -1},
        {"chunk_nbytes": 0},
        {"data": "AAAA"},
        {"key": 5},
        {"checksums": "0"},
        {"nbytes": True},
    ],
)
def test_a_reference_at_odds_with_itself_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(InvalidInput):
        BlobRef.from_json({**forged(CHUNK_NBYTES), **changes})


def test_a_reference_that_carries_other_bytes_is_refused(store: TieredStore) -> None:
    ref = store.put("t:small", torch.arange(100), ttl_seconds=60, inline=True)
    assert ref.data
    with pytest.raises(InvalidInput, match="are not 800 bytes"):
        BlobRef.from_json({**ref.to_json(), "data": ref.data + "AAAA"})
    with pytest.raises(CacheError):
        store.get(replace(ref, data="é" * len(ref.data)))


def test_sixty_thousand_dimensions_cost_no_time() -> None:
    row = ["w", [1] * 60_000, "float32", 0, 4]
    with pytest.raises(ManifestMismatch, match="60000 dimensions"):
        Manifest.from_json({"nbytes": 64, "tensors": [row] * 100})
    with pytest.raises(ManifestMismatch):
        Manifest.from_json({"nbytes": 64, "tensors": [["w", [2**62] * 64, "float32", 0, 4]]})


@pytest.mark.parametrize("opening", ["[", '{"a":', '[{"]":', '["]",', '{"\\"]":['])
def test_nesting_has_one_bound(opening: str) -> None:
    """Brackets inside of texts hide no level, and make none."""
    per = opening.count("[") + opening.count("{")
    ending = "".join({"[": "]", "{": "}"}[sign] for sign in reversed(opening) if sign in "[{")

    def text(levels: int) -> str:
        return opening * levels + "1" + ending * levels

    parsed(text(MOST_DEPTH // per), "it")
    parsed(json.dumps(["[{" * 1000, "]}" * 1000, '"[\\' * 1000]), "it")
    for levels in (MOST_DEPTH // per + 1, 3 * MOST_DEPTH, 100_000):
        with pytest.raises(RecordDamaged, match="nests deeper than 64 levels"):
            parsed(text(levels), "it")


BROKEN = ['"\\ud83d"', '{"key": "\\udc00x"}', "1" * 5000, "[" * 65, "]" * 200, '"' * 300]


@pytest.mark.parametrize("text", BROKEN, ids=map(str, range(len(BROKEN))))
def test_what_no_server_can_take_is_no_json(text: str) -> None:
    with pytest.raises(RecordDamaged):
        parsed(text, "it")
    assert parsed('"\\ud83d\\ude00"', "it") == "\U0001f600"


@pytest.mark.parametrize(
    "field", ["threads", "shards", "local_steps", "staleness", "epochs", "batch_size", "fan_in", "seed"]
)
@pytest.mark.parametrize("value", [1 << 63, 10**400, 10**5000], ids=["63 bits", "400 digits", "5000 digits"])
def test_a_number_in_a_config_that_no_machine_has_is_refused(field: str, value: int) -> None:
    with pytest.raises(ConfigError, match=field):
        TrainingConfig(**{"batch_size": 8, field: value})


@pytest.mark.parametrize("field", ["clip_norm", "loss_scale", "audit_fraction", "shard_timeout_seconds"])
@pytest.mark.parametrize("value", [10**400, -(10**5000)], ids=["400", "-5000"])
def test_nor_one_that_is_no_float(field: str, value: int) -> None:
    with pytest.raises(ConfigError, match=field):
        TrainingConfig(batch_size=8, **{field: value})


def test_a_hundred_thousand_threads_are_refused() -> None:
    with pytest.raises(ConfigError, match="threads must be an integer, from 1 to 1024, not 100000"):
        TrainingConfig(batch_size=8, threads=100_000)
