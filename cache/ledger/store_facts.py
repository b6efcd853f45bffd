"""What a server says of itself that a person who looks after it has to know."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

import redis

from torchord.cache.servers.redis_client import translated


@dataclass(frozen=True)
class StoreFacts:
    """A server of the control plane.

    Attributes:
        release: its name and version.
        seconds: that one request and its answer took.
        clock: seconds by which its clock is ahead of ours.
        persists: how it keeps what it holds through a crash: "append-only file", "snapshots" or "".
        lengths: queue -> messages that wait in it.
    """

    release: str
    seconds: float
    clock: float
    persists: str
    lengths: dict[str, int]


def store_facts(client: redis.Redis, url: str, queues: Iterable[str]) -> StoreFacts:
    """Ask a server.

    Args:
        client: a connection from `torchord.cache.servers.redis_client`.
        url: its URL, for messages.
        queues: whose lengths to ask for.

    Raises:
        CacheUnreachable: it does not answer.
        CacheError: its user may not ask.
    """
    with translated(url, "ask the server what it is"):
        began, sent = time.perf_counter(), time.time()
        seconds, microseconds = client.time()
        took = time.perf_counter() - began
        said = client.info("server")
        kept = client.info("persistence")
        lengths = {queue: client.llen(queue) for queue in queues}
    valkey = said.get("valkey_version")
    release = f"Valkey {valkey}" if valkey else f"Redis {said.get('redis_version', '?')}"
    persists = "append-only file" if kept.get("aof_enabled") else ""
    if not persists and kept.get("rdb_saves", 0):
        persists = "snapshots"
    return StoreFacts(release, took, seconds + microseconds / 1e6 - (sent + took / 2), persists, lengths)
