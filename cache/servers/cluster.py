"""A Redis Cluster as one node of the chunk store: each chunk goes straight to the server that owns its slot.

The servers of a cluster share 16,384 hash slots among them. A key belongs to the slot that its CRC16
names (of the part between braces, where there is one), and a slot to one primary, until an operator
moves it or a failover gives it to a replica. Here the table of owners is read when it is first needed,
and again whenever a server refers a key elsewhere (MOVED) or does not answer; a slot that is just being
moved is served by both sides (ASK). Chunks move as they do between plain nodes: pipelined, from and into
the tensor's own memory, one connection and thread for each server.

redis-py computes slots, and that is all that is taken of its cluster client: it copies values, and does not
follow ASK to a server that owns no slot yet (redis-py 8.1).

torchord's chunk keys have no braces: the chunks of one blob are meant to lie on all servers, and each
operation is of one key. See the Redis Cluster Specification.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial

from redis.crc import REDIS_CLUSTER_HASH_SLOTS as SLOTS
from redis.crc import key_slot

from torchord.cache.errors import CacheError, CacheUnreachable
from torchord.cache.servers.address import Address, ClusterAddress, bracketed, is_cluster
from torchord.cache.servers.connection import Connection, Reply, ServerRefused, command
from torchord.cache.servers.fork import reset_after_fork
from torchord.cache.servers.node import Node, Problem, Referrals
from torchord.cache.tensors.pieces import Parts

_TURNS = 8  # how often a key may be referred on before something must be wrong
_SETTLE_SECONDS = 0.02  # before the third of them, then twice as long: servers agree by gossip, 1.3 s in all
_MOST_THREADS = 64
_REFERRAL = re.compile(r"(MOVED|ASK) [0-9]{1,5} (\S{0,255}):([0-9]{1,5})")

Endpoint = tuple[str, int]


@dataclass(slots=True)
class _Task:
    """The keys of one operation that go to one server."""

    endpoint: Endpoint
    indices: list[int] = field(default_factory=list)
    referrals: Referrals = field(default_factory=Referrals)
    lost: CacheUnreachable | None = None


class Cluster:
    """All servers of one Redis Cluster, with the interface of `torchord.cache.servers.node.Node`.

    Threads may share it. What a primary had acknowledged and not yet handed to its replica is lost in a
    failover, as Redis Cluster replicates behind the answer; a reader then finds the chunk missing.

    Args:
        address: from `ClusterAddress.parse`.
        connect_timeout_seconds: longest wait for a connection.
        timeout_seconds: longest wait without a byte moving.
    """

    def __init__(
        self, address: ClusterAddress, *, connect_timeout_seconds: float, timeout_seconds: float
    ) -> None:
        self.address = address
        self._connect_timeout_seconds = connect_timeout_seconds
        self._timeout_seconds = timeout_seconds
        self._servers: dict[Endpoint, Node] = {}
        self._owners: list[Endpoint | None] | None = None
        self._lock = threading.Lock()
        self._threads: ThreadPoolExecutor | None = None
        reset_after_fork(self)

    @property
    def label(self) -> str:
        """The cluster's URL without credentials."""
        return self.address.label

    def store(
        self,
        items: Sequence[tuple[bytes, memoryview]],
        ttl_seconds: int,
        sent: Callable[[int, int], None] | None = None,
    ) -> None:
        """As `Node.store`; `sent` is called for one item at a time."""

        def write(server: Node, task: _Task) -> None:
            def tell(first: int, stop: int) -> None:
                if sent is not None:
                    for i in task.indices[first:stop]:
                        sent(i, i + 1)

            server.store([items[i] for i in task.indices], ttl_seconds, tell, task.referrals)

        self._spread([key for key, _ in items], write)

    def load(self, keys: Sequence[bytes], parts: Parts, sums: Sequence[str]) -> dict[int, Problem]:
        """As `Node.load`."""
        problems: dict[int, Problem] = {}

        def read(server: Node, task: _Task) -> None:
            wrong = server.load(
                [keys[i] for i in task.indices],
                [parts[i] for i in task.indices],
                [sums[i] for i in task.indices],
                task.referrals,
            )
            for position, i in enumerate(task.indices):
                if position in wrong:
                    problems[i] = wrong[position]
                else:
                    problems.pop(i, None)

        self._spread(keys, read)
        return problems

    def delete(self, keys: Sequence[bytes]) -> None:
        """As `Node.delete`."""
        self._spread(
            keys, lambda server, task: server.delete([keys[i] for i in task.indices], task.referrals)
        )

    def expire(self, keys: Sequence[bytes], ttl_seconds: int, *, extend: bool = False) -> list[bool]:
        """As `Node.expire`."""
        found = [False] * len(keys)

        def touch(server: Node, task: _Task) -> None:
            wanted = [keys[i] for i in task.indices]
            hits = server.expire(wanted, ttl_seconds, extend=extend, referrals=task.referrals)
            for i, hit in zip(task.indices, hits, strict=True):
                found[i] |= hit

        self._spread(keys, touch)
        return found

    def close(self) -> None:
        """Close idle connections and threads; the cluster may be used again."""
        with self._lock:
            threads, self._threads = self._threads, None
            servers = list(self._servers.values())
        if threads is not None:
            threads.shutdown()
        for server in servers:
            server.close()

    def reset(self) -> None:
        """Start afresh in a forked child, which has none of the parent's threads."""
        self._lock = threading.Lock()
        self._threads = None

    # --- who owns what -------------------------------------------------------------------------

    def _spread(self, keys: Sequence[bytes], work: Callable[[Node, _Task], None]) -> None:
        """Do the work of each key at the server that owns its slot, wherever that has moved to.

        Raises:
            CacheUnreachable: a server does not answer and nobody has taken its slots over yet, no server
                tells who owns what, or keys are referred to and fro.
            CacheError: a server refuses.
        """
        slots = [key_slot(key) for key in keys]
        owners = self._owners or self._refresh()
        referred: dict[int, tuple[Endpoint, bool]] = {}  # index -> whom to ask, and whether with ASKING
        rest: Sequence[int] = range(len(keys))
        for turn in range(_TURNS):
            if turn > 1:  # the first two are usual: the owner in the table, and whom that one refers to
                time.sleep(_SETTLE_SECONDS * 2 ** (turn - 2))
            tasks = self._tasks(rest, slots, owners, referred)
            self._side_by_side([partial(self._try, task, work) for task in tasks])
            lost = [task for task in tasks if task.lost is not None]
            moved = self._follow(tasks, referred)
            rest = [i for task in lost for i in task.indices] + list(referred)
            if not rest:
                return
            if lost or moved:
                owners = self._refresh(avoid=[task.endpoint for task in lost])
            for task in lost:
                if any(owners[slots[i]] in (task.endpoint, None) for i in task.indices):
                    assert task.lost is not None
                    raise task.lost  # whoever calls may try again: a replica may take over
        raise CacheUnreachable(
            f"the servers of {self.label} refer {keys[rest[0]].decode(errors='replace')} (slot "
            f"{slots[rest[0]]}) to each other; does a move of slots hang? See CLUSTER NODES"
        )

    def _tasks(
        self,
        rest: Iterable[int],
        slots: Sequence[int],
        owners: Sequence[Endpoint | None],
        referred: dict[int, tuple[Endpoint, bool]],
    ) -> list[_Task]:
        """One task for each server and way of asking; `referred` is used up."""
        tasks: dict[tuple[Endpoint, bool], _Task] = {}
        for i in rest:
            owner = owners[slots[i]]
            if i in referred:
                where, asking = referred.pop(i)
            elif owner is not None:
                where, asking = owner, False
            else:
                self._owners = None
                raise CacheUnreachable(f"no server of {self.label} owns slot {slots[i]}; see CLUSTER INFO")
            task = tasks.get((where, asking))
            if task is None:
                task = tasks[where, asking] = _Task(where, referrals=Referrals(asking))
            task.indices.append(i)
        return list(tasks.values())

    def _follow(self, tasks: Iterable[_Task], referred: dict[int, tuple[Endpoint, bool]]) -> bool:
        """Note whom to ask for what was referred elsewhere; tells whether a slot has moved for good."""
        moved = False
        for task in tasks:
            for position, text in task.referrals.found.items():
                found = _REFERRAL.fullmatch(text)
                if found is None:
                    raise CacheUnreachable(
                        f"{self._address(task.endpoint).label} refers a key to no place: {text!r:.80}"
                    )
                code, host, port = found.groups()
                referred[task.indices[position]] = (host or task.endpoint[0], int(port)), code == "ASK"
                moved |= code == "MOVED"
        return moved

    def _try(self, task: _Task, work: Callable[[Node, _Task], None]) -> None:
        """Do one task; that its server does not answer is noted, not raised."""
        try:
            work(self._server(task.endpoint), task)
        except CacheUnreachable as error:
            task.lost = error
            task.referrals.found.clear()

    def _server(self, endpoint: Endpoint) -> Node:
        with self._lock:
            if endpoint not in self._servers:
                self._servers[endpoint] = Node(
                    self._address(endpoint),
                    connect_timeout_seconds=self._connect_timeout_seconds,
                    timeout_seconds=self._timeout_seconds,
                )
            return self._servers[endpoint]

    def _address(self, endpoint: Endpoint) -> Address:
        host, port = endpoint
        first = self.address.servers[0]
        scheme = "redis" if first.tls is None else "rediss"
        return replace(first, label=f"{scheme}://{bracketed(host)}:{port}/0", host=host, port=port)

    def _refresh(self, avoid: Sequence[Endpoint] = ()) -> list[Endpoint | None]:
        """Ask any server who owns which slot.

        Raises:
            CacheUnreachable: none of those that are known answers.
            CacheError: one answers that it is not part of a cluster, or refuses the credentials.
        """
        with self._lock:
            known = list(self._servers)
        candidates = dict.fromkeys([*known, *((one.host, one.port) for one in self.address.servers)])
        last: Exception | None = None
        for endpoint in sorted(candidates, key=lambda one: one in avoid):
            try:
                owners = self._ask_owners(endpoint)
            except OSError as error:
                last = error
                continue
            except ServerRefused as refusal:
                if str(refusal).partition(" ")[0] in ("LOADING", "CLUSTERDOWN"):
                    last = refusal
                    continue
                raise CacheError(
                    f"{self._address(endpoint).label} is no server of a Redis Cluster that lets us in: it "
                    f"answered '{refusal}'; a plain server is named redis://HOST:PORT"
                ) from refusal
            with self._lock:
                self._owners = owners
                for gone in set(self._servers) - set(owners):
                    self._servers.pop(gone).close()
            return owners
        asked = ", ".join(f"{host}:{port}" for host, port in candidates)
        raise CacheUnreachable(f"no server of {self.label} answers (asked {asked}): {last}") from last

    def _ask_owners(self, endpoint: Endpoint) -> list[Endpoint | None]:
        address = self._address(endpoint)
        connection = Connection(address, self._connect_timeout_seconds, self._connect_timeout_seconds)
        with contextlib.closing(connection):
            connection.send([command("CLUSTER", "SLOTS")])
            return owners_of(connection.reply(), endpoint)

    def _side_by_side(self, calls: Sequence[Callable[[], None]]) -> None:
        """Run calls in threads, the last one in this thread; raises the first error of any, at the end."""
        others = [self._pool().submit(call) for call in calls[:-1]]
        failed: CacheError | None = None
        for outcome in [*calls[-1:], *(other.result for other in others)]:
            try:
                outcome()
            except CacheError as error:
                failed = failed or error
        if failed is not None:
            raise failed

    def _pool(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(_MOST_THREADS, thread_name_prefix="torchord-cluster")
            return self._threads


def owners_of(reply: Reply, asked: Endpoint) -> list[Endpoint | None]:
    """The primary of each slot, from the reply to CLUSTER SLOTS.

    A server that does not know its own address is reached at the one that it was asked at.

    Raises:
        ConnectionError: the reply is not what a server of a cluster sends.
    """
    owners: list[Endpoint | None] = [None] * SLOTS
    for row in reply if isinstance(reply, list) else [reply]:
        match row:
            case [int() as first, int() as last, [host, int() as port, *_], *_] if 0 <= first <= last < SLOTS:
                name = host.decode(errors="replace") if isinstance(host, bytes) else ""
                owner = (name if name not in ("", "?") else asked[0], port)
                owners[first : last + 1] = [owner] * (last + 1 - first)
            case _:
                raise ConnectionError(f"unexpected reply to CLUSTER SLOTS: {row!r:.80}")
    return owners


def node_of(url: str, *, connect_timeout_seconds: float, timeout_seconds: float) -> Node | Cluster:
    """What a URL of TORCHORD_CACHE_URLS names: a server, or a cluster of them.

    Raises:
        InvalidInput: the URL cannot be used.
    """
    if is_cluster(url):
        return Cluster(
            ClusterAddress.parse(url),
            connect_timeout_seconds=connect_timeout_seconds,
            timeout_seconds=timeout_seconds,
        )
    return Node(
        Address.parse(url), connect_timeout_seconds=connect_timeout_seconds, timeout_seconds=timeout_seconds
    )
