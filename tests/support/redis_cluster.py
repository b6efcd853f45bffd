"""A Redis Cluster of embedded servers, put together with the cluster commands alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis

from tests.support.waiting import wait_until
from torchord.coordinator.local_cluster.embedded_server import EmbeddedServer, free_port

SLOTS = 16384
_OPTIONS = {
    "cluster-enabled": "yes",
    "cluster-node-timeout": 800,
    "cluster-replica-validity-factor": 0,
    "cluster-allow-replica-migration": "no",
    "repl-diskless-sync-delay": 0,
}


@dataclass
class Member:
    """One server of the cluster."""

    server: EmbeddedServer
    client: redis.Redis
    id: str
    bus: int

    @property
    def endpoint(self) -> tuple[str, int]:
        """Host and port."""
        return "127.0.0.1", self.server.port


class RedisCluster:
    """Primaries, which share the slots evenly, and a replica for each of the first `replicas`."""

    def __init__(self, members: list[Member], primaries: int) -> None:
        self.members = members
        self.primaries = members[:primaries]
        self.replicas = members[primaries:]

    @property
    def url(self) -> str:
        """What goes to TORCHORD_CACHE_URLS; one server is enough to find all, two if one may die."""
        return "redis+cluster://" + ",".join(f"127.0.0.1:{m.server.port}" for m in self.members[-2:])

    def owner(self, slot: int) -> Member:
        """The primary that serves a slot, as the first living server sees it."""
        for member in self.members:
            with contextlib.suppress(redis.ConnectionError):
                for first, last, primary, *_ in member.client.execute_command("CLUSTER SLOTS"):
                    if first <= slot <= last:
                        return next(m for m in self.members if m.server.port == primary[1])
        raise AssertionError(f"no server knows who owns slot {slot}")

    def begin_move(self, slot: int, to: Member) -> None:
        """Announce that a slot moves: from here on keys may be on either side."""
        source = self.owner(slot)
        to.client.execute_command("CLUSTER SETSLOT", slot, "IMPORTING", source.id)
        source.client.execute_command("CLUSTER SETSLOT", slot, "MIGRATING", to.id)

    def move_keys(self, slot: int, to: Member) -> int:
        """Move the keys of a slot that is announced to move; returns how many."""
        source = self.owner(slot)
        keys = source.client.execute_command("CLUSTER GETKEYSINSLOT", slot, 1000)
        if keys:
            source.client.execute_command("MIGRATE", *to.endpoint, "", 0, 5000, "KEYS", *keys)
        return len(keys)

    def end_move(self, slot: int, to: Member) -> None:
        """The slot belongs to its new owner."""
        for member in [to, *(m for m in self.primaries if m is not to)]:
            member.client.execute_command("CLUSTER SETSLOT", slot, "NODE", to.id)

    def move(self, slot: int, to: Member) -> None:
        """Move a slot and its keys at once."""
        self.begin_move(slot, to)
        self.move_keys(slot, to)
        self.end_move(slot, to)


@contextlib.contextmanager
def redis_cluster(
    folder: Path, *, primaries: int = 3, replicas: int = 0, **options: Any
) -> Iterator[RedisCluster]:
    """Start servers, let them meet, share the slots, and wait until all of them agree."""
    members: list[Member] = []
    with contextlib.ExitStack() as stack:
        for i in range(primaries + replicas):
            members.append(stack.enter_context(_started(folder / f"nodes-{i}.conf", options)))
        cluster = RedisCluster(members, primaries)
        for i, member in enumerate(cluster.primaries):
            first, last = i * SLOTS // primaries, (i + 1) * SLOTS // primaries - 1
            member.client.execute_command("CLUSTER ADDSLOTSRANGE", first, last)
            member.client.execute_command("CLUSTER SET-CONFIG-EPOCH", i + 1)
        for member in members[1:]:
            member.client.execute_command("CLUSTER MEET", *members[0].endpoint, members[0].bus)
        wait_until(lambda: all(_knows(m, len(members)) for m in members), 20, "the servers to meet")
        for primary, replica in zip(cluster.primaries, cluster.replicas, strict=False):
            replica.client.execute_command("CLUSTER REPLICATE", primary.id)
        wait_until(lambda: all(_ready(m) for m in members), 20, "the cluster to form")
        wait_until(lambda: all(_linked(m) for m in cluster.replicas), 20, "the replicas to follow")
        yield cluster


@contextlib.contextmanager
def joined(cluster: RedisCluster, folder: Path) -> Iterator[Member]:
    """One more server of a cluster, which owns no slot yet."""
    with _started(folder / "nodes-joined.conf", {}) as member:
        first = cluster.members[0]
        member.client.execute_command("CLUSTER MEET", *first.endpoint, first.bus)
        everybody = [*cluster.members, member]
        wait_until(
            lambda: all(_knows(m, len(everybody)) for m in everybody), 20, "the new server to be known"
        )
        wait_until(lambda: _ready(member), 20, "the new server to be ready")
        yield member


@contextlib.contextmanager
def _started(config: Path, options: dict[str, Any]) -> Iterator[Member]:
    """A server that may become a member of a cluster."""
    bus = free_port()
    own = {"cluster-config-file": str(config), "cluster-port": bus}
    with (
        EmbeddedServer(options={**_OPTIONS, **own, **options}, password=False) as server,
        redis.Redis(port=server.port) as client,
    ):
        name = client.execute_command("CLUSTER MYID")
        yield Member(server, client, name.decode() if isinstance(name, bytes) else name, bus)


def _info(member: Member, section: str) -> dict[str, str]:
    reply: Any = member.client.execute_command(section)
    if isinstance(reply, dict):
        return {str(k): str(v) for k, v in reply.items()}
    text = reply.decode() if isinstance(reply, bytes) else str(reply)
    return dict(line.partition(":")[::2] for line in text.splitlines() if ":" in line)


def _knows(member: Member, count: int) -> bool:
    return _info(member, "CLUSTER INFO").get("cluster_known_nodes") == str(count)


def _ready(member: Member) -> bool:
    found = _info(member, "CLUSTER INFO")
    return found.get("cluster_state") == "ok" and found.get("cluster_slots_assigned") == str(SLOTS)


def _linked(member: Member) -> bool:
    return member.client.info("replication").get("master_link_status") == "up"
