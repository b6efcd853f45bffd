"""Control planes for tests: records with made-up contents, and a view of every key that compares."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import redis

from torchord.cache import keys
from torchord.cache.blobs.chunk_store import BlobRef
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.ledger.records import (
    GENESIS,
    LedgerEntry,
    SlotReceipt,
    SlotRecord,
    StateRecord,
    VersionRecord,
)
from torchord.cache.ledger.workers import Registry, WorkerInfo
from torchord.cache.testing.memory_plane import MemoryPlane
from torchord.coordinator.messages.task_names import QUEUES

SPEC = {
    "recipe": {"model": {"target": "m:Model"}},
    "config": {"epochs": 1, "skew": "refuse"},
    "on": {"evaluated": ["shop.tasks.look", "https://shop.example/look"], "paused": ["shop.tasks.look"]},
}


def digest(*parts: object) -> str:
    """32 hexadecimal digits that stand for the bytes made from `parts`."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def blob(key: str, *parts: object) -> BlobRef:
    return BlobRef(key, 8, 1 << 20, (digest(*parts)[:16],))


def slot(step: int, shard: int, nonce: str = "n", **changes: Any) -> SlotRecord:
    """The gradient of (step, shard) by one attempt: the same bytes whoever computed it."""
    fields: dict[str, Any] = {
        "shard": shard,
        "digest": digest("gradient", step, shard),
        "nonce": nonce,
        "blob": blob(f"gradient:{step}:{shard}:{nonce}", "gradient", step, shard),
        "manifest": {"tensors": [], "nbytes": 8},
        "buffers": (),
        "examples": 4,
        "loss": 0.5,
        "grad_norm": 1.0,
        "worker": "w0",
        "attempt": 1,
        "seconds": 0.01,
    }
    return SlotRecord(**{**fields, **changes})


def entry(version: int, slots: list[SlotRecord], previous: str = GENESIS, **changes: Any) -> LedgerEntry:
    """The ledger entry that commits `version` from these slots."""
    fields: dict[str, Any] = {
        "version": version,
        "slots": tuple(
            SlotReceipt(s.shard, s.digest, s.examples, s.loss, s.worker, s.attempt, s.seconds, s.blob.nbytes)
            for s in slots
        ),
        "parameters": digest("parameters", version),
        "loss": 0.5,
        "grad_norm": 1.0,
        "examples": sum(s.examples for s in slots),
        "seconds": 0.1,
        "committed_at": 1000.0,
        "token": 1,
        "server": "s0",
        "skipped": False,
        "lr": (0.1,),
        "previous": previous,
    }
    return LedgerEntry(**{**fields, **changes}).sealed()


def history(steps: int, shards: int, examples: int = 4) -> list[LedgerEntry]:
    """The entries of an undisturbed run."""
    found: list[LedgerEntry] = []
    for step in range(steps):
        slots = [slot(step, shard, examples=examples) for shard in range(shards)]
        found.append(entry(step + 1, slots, found[-1].chain if found else GENESIS))
    return found


def record(version: int, chain: str = GENESIS, *, state: bool = False, nonce: str = "p") -> VersionRecord:
    """Where the parameters of a version are."""
    stored = blob(f"parameters:{version}:{nonce}", "parameters", version)
    beside = StateRecord({}, {}, blob(f"state:{version}:{nonce}", "state", version)) if state else None
    return VersionRecord(version, digest("parameters", version), stored, chain, beside)


def worker(id: str, *, node: str | None = None, queues: tuple[str, ...] = QUEUES, **more: Any) -> WorkerInfo:
    """A worker process by its id."""
    return WorkerInfo(id, node or f"celery@{id}", "host", 1, queues, **more)


@dataclass
class Plane:
    """A control plane of one kind: how to talk to it and how to look at all its keys."""

    ledger_of: Callable[[str], Ledger]
    registry: Registry
    state: Callable[[], dict[str, Any]]

    def ledger(self, run: str = "run-1") -> Ledger:
        return self.ledger_of(run)


# --- every key, as plain values --------------------------------------------------------------


def redis_state(client: redis.Redis, only: Iterable[str] | None = None) -> dict[str, Any]:
    """Every key with its value, or those of `only` that are there."""
    names = sorted(client.scan_iter(match=f"{keys.PREFIX}:*", count=1000) if only is None else set(only))
    with client.pipeline(transaction=True) as pipe:
        for name in names:
            pipe.type(name)
        kinds = pipe.execute()
        for name, kind in zip(names, kinds, strict=True):
            if kind == "hash":
                pipe.hgetall(name)
            elif kind == "set":
                pipe.smembers(name)
            elif kind == "zset":
                pipe.zrange(name, 0, -1, withscores=True)
            elif kind == "stream":
                pipe.xrange(name)
            elif kind == "list":
                pipe.lrange(name, 0, -1)
            elif kind == "none":
                pipe.exists(name)
            else:
                pipe.get(name)
        values = pipe.execute()
    found = {}
    for name, kind, value in zip(names, kinds, values, strict=True):
        if kind == "none":
            continue
        if kind == "stream":
            value = [(fields["type"], json.loads(fields["data"])) for _, fields in value]
        found[name] = dict(value) if kind == "zset" else value
    return found


def begin(ledger: Ledger, step: int, shard: int, **asked: Any) -> tuple[str, int, str]:
    """Verdict, attempt and incarnation of `Ledger.begin`."""
    begun = ledger.begin(step, shard, lacking=False, **asked)
    return begun.verdict, begun.attempt, begun.incarnation


def write(ledger: Ledger, step: int, slot: SlotRecord, **more: Any) -> tuple[str, int]:
    """Verdict of `Ledger.finish_slot`, and how many slots are there."""
    finished = ledger.finish_slot(step, slot, **more)
    return finished.verdict, finished.present


def memory_state(plane: MemoryPlane) -> dict[str, Any]:
    """The same of the in-memory twin."""
    found = {name: plane.get(name) for name in plane.names()}
    for name, value in found.items():
        if name.endswith("}:events"):
            found[name] = [(event.type, event.data) for event in value]
    return found


CLOCKED = ("started_at", "submitted_at", "committed_at", "changed", "token")
COUNTERS = ("late", "duplicates", "divergent")


def comparable(state: dict[str, Any], *, counters: bool = True) -> dict[str, Any]:
    """A state without what a clock or a die decides: times, tokens, nonces of requests, heartbeats."""
    found: dict[str, Any] = {}
    for name, value in state.items():
        kind = name.rpartition("}:")[2].partition(":")[0]
        if name.startswith((f"{keys.PREFIX}:worker", keys.SUPERVISOR)):
            continue
        if kind == "head":
            left_out = CLOCKED if counters else CLOCKED + COUNTERS
            value = {field: text for field, text in value.items() if field not in left_out}
        elif kind == "round":
            value = {field: text for field, text in value.items() if field != "token"}
        elif kind == "leases":
            value = {shard: {**json.loads(text), "since": 0} for shard, text in value.items()}
        elif kind == "outbox":
            value = sorted(json.dumps({**json.loads(text), "at": 0}) for text in value.values())
        elif kind == "telling":
            value = sorted(json.dumps({**json.loads(text), "due": 0, "nonce": ""}) for text in value.values())
        elif kind == "pins" or name == keys.RUNS:
            value = set(value)
        elif kind == "events":
            value = sorted({json.dumps(event, sort_keys=True) for event in value})
        elif kind in ("spec", "manifest"):
            value = json.loads(value)
        found[name] = value
    return found
