"""The registry of living workers: a heartbeat key per process, renewed by a thread of its own.

A worker whose key is gone is taken for dead: its shards are sent again. A worker that was only
paused finds out by the verdicts of the scripts; nothing that it then sends is applied twice.
"""

from __future__ import annotations

import ast
import contextlib
import json
import logging
import os
import platform
import socket
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import cast

import redis
from redis.exceptions import NoPermissionError

from torchord.cache import keys
from torchord.cache.errors import CacheError, CacheUnreachable, InvalidInput, RecordDamaged
from torchord.cache.ledger import process
from torchord.cache.ledger.distrusted import Distrusted, read_distrusted
from torchord.cache.reading import (
    COUNT,
    FINITE,
    FOREIGN,
    NAMED_FIGURES,
    NAMED_TEXTS,
    TEXT,
    TEXTS,
    Fields,
    Kind,
)
from torchord.cache.scripts import source
from torchord.cache.servers.address import masked
from torchord.cache.servers.redis_client import translated

log = logging.getLogger(__name__)

_LOOK_AGAIN_SECONDS = 0.2
_FORGOTTEN_MS = 60_000  # after its last beat
DEAF_SECONDS = 15.0  # of an idle worker whose consumer's loop has not turned
_MOST_ARGUMENTS = 1 << 16  # signs of a task's arguments, as text


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """What a worker process says of itself.

    Attributes:
        id: unique for the life of the process.
        node: Celery node name, as in `celery@host`; several processes of a prefork pool share it.
        queues: the queues that its node consumes.
        pid: process id on its host.
        task: what it is doing now, "" when idle; of a process that runs several tasks at once, all
            of them, joined by "; ".
        since: Unix time (s) at which that last changed.
        environment: what could change bits (torch version, device, CPU capability).
        refuses: run -> why this process may not work on it.
        discarded: of the supervisor: queue -> what is wrong where its messages are thrown away.
        pace: run -> seconds that it took for a shard of it, the lesser of the last two.
        place: where its pid means something, and
        started: since when it has that pid, so that a process beside it sees at once when it has ended
            (see `torchord.cache.ledger.process`); "" and 0 if unknown.
        placement: where it stores chunks (see `ChunkStore.placement`); "" if it stores none.
        silent: seconds in which it has seen that the event loop that takes its messages does not turn; 0.0
            if that is not known.
        where: task -> the line of code that it is at, of tasks that it has been at for some seconds.
        hindered: run -> what failed when it made the run's next move, which it will try again.
        signs: the roles that it has keys of; () without keys.
        cache: what the tiers of the model cache have done in this process: TIER.COUNTER -> so far.
    """

    id: str
    node: str
    host: str
    pid: int
    queues: tuple[str, ...]
    task: str = ""
    since: float = 0.0
    environment: str = ""
    refuses: dict[str, str] = field(default_factory=dict)
    discarded: dict[str, str] = field(default_factory=dict)
    pace: dict[str, float] = field(default_factory=dict)
    place: str = ""
    started: int = 0
    placement: str = ""
    silent: float = 0.0
    where: dict[str, str] = field(default_factory=dict)
    hindered: dict[str, str] = field(default_factory=dict)
    signs: tuple[str, ...] = ()
    cache: dict[str, float] = field(default_factory=dict)

    @property
    def deaf(self) -> bool:
        """Whether it is alive, idle, and takes no messages. While it computes, its loop may rest."""
        return not self.task and self.silent > DEAF_SECONDS

    @property
    def ended(self) -> bool:
        """Whether the process is known to have ended, whatever its lease says; asked on its machine."""
        return process.ended(self.place, self.pid, self.started)

    @property
    def tasks(self) -> tuple[str, ...]:
        """What it is doing now, one by one."""
        return tuple(self.task.split("; ")) if self.task else ()


def new_info(
    node: str,
    queues: Iterable[str],
    environment: str = "",
    *,
    placement: str = "",
    signs: Iterable[str] = (),
) -> WorkerInfo:
    """Describe this process under a fresh id."""
    host = socket.gethostname() or platform.node()
    unique, pid = uuid.uuid4().hex[:8], os.getpid()
    return WorkerInfo(
        f"{node}/{pid}-{unique}",
        node,
        host,
        pid,
        tuple(queues),
        environment=environment,
        place=process.place(),
        started=process.started(pid),
        placement=placement,
        signs=tuple(signs),
    )


def read(text: str) -> WorkerInfo:
    """What a heartbeat says; what a newer release says beyond that is passed over.

    Raises:
        RecordDamaged: it is none; the message names the field.
    """
    fields = _HEARTBEAT.read(text)
    fields["queues"], fields["signs"] = tuple(fields["queues"]), tuple(fields.get("signs", ()))
    return WorkerInfo(**{name: fields[name] for name in WorkerInfo.__slots__ if name in fields})


_MOST_PROCESS = 1 << 31
_PROCESS = Kind(COUNT.types, lambda value: 0 <= value < _MOST_PROCESS, "the id of a process")
_HEARTBEAT = Fields(
    "a heartbeat",
    {"id": TEXT, "node": TEXT, "host": TEXT, "pid": _PROCESS, "queues": TEXTS},
    {
        **dict.fromkeys(("task", "environment", "place", "placement"), TEXT),
        **dict.fromkeys(("since", "silent"), FINITE),
        **dict.fromkeys(("refuses", "discarded", "where", "hindered"), NAMED_TEXTS),
        **dict.fromkeys(("pace", "cache"), NAMED_FIGURES),
        "started": COUNT,
        "signs": TEXTS,
    },
    open=True,
)


@dataclass(frozen=True, slots=True)
class StoreMemory:
    """How full a server is.

    Attributes:
        used: bytes that it holds.
        limit: bytes that it may hold; 0 for as many as there are.
        policy: what it does once it is full: "noeviction", or which keys it throws away.
    """

    used: int
    limit: int
    policy: str

    @property
    def full(self) -> bool:
        """Whether it takes nothing more."""
        return 0 < self.limit <= self.used

    @property
    def evicts(self) -> bool:
        """Whether it throws keys away once it is full."""
        return self.limit > 0 and self.policy != "noeviction"


class Registry:
    """Reads and writes heartbeats.

    Args:
        client: connection to the control plane.
        url: its URL, for messages.
    """

    def __init__(self, client: redis.Redis, url: str) -> None:
        self.client = client
        self.url = url

    def beat(self, info: WorkerInfo) -> dict[str, Distrusted]:
        """Renew one worker's lease; those that are long gone are forgotten. Whom nobody trusts, by node."""
        with translated(self.url, f"renew the lease of worker {info.id}"):
            pipe = self.client.pipeline(transaction=False)
            pipe.set(keys.worker(info.id), json.dumps(asdict(info)), px=keys.WORKER_LEASE_MS)
            now = int(time.time() * 1000)
            pipe.zadd(keys.WORKERS, {info.id: now})
            pipe.zremrangebyscore(keys.WORKERS, "-inf", now - _FORGOTTEN_MS)
            pipe.expire(keys.WORKERS, keys.WORKER_INDEX_TTL_SECONDS)
            if info.placement:
                pipe.set(keys.PLACEMENT, info.placement, nx=True, px=keys.WORKER_LEASE_MS)
                pipe.pexpire(keys.PLACEMENT, keys.WORKER_LEASE_MS)
            pipe.hgetall(keys.DISTRUSTED)
            return read_distrusted(pipe.execute()[-1])

    # --- who is trusted ---------------------------------------------------------------------

    def distrusted(self) -> dict[str, Distrusted]:
        """Who gets no shard of a run that checks, by node."""
        with translated(self.url, "ask who is distrusted"):
            return read_distrusted(cast(dict[str, str], self.client.hgetall(keys.DISTRUSTED)))

    def distrust(self, found: Distrusted) -> None:
        """Quarantine a node."""
        with translated(self.url, f"quarantine {found.node}"):
            pipe = self.client.pipeline(transaction=True)
            pipe.hset(keys.DISTRUSTED, found.node, found.to_json())
            pipe.expire(keys.DISTRUSTED, keys.DISTRUST_TTL_SECONDS)
            pipe.execute()

    def readmit(self, node: str) -> bool:
        """Trust a node again; returns whether it was quarantined."""
        with translated(self.url, f"readmit {node}"):
            return bool(self.client.hdel(keys.DISTRUSTED, node))

    # --- who lives --------------------------------------------------------------------------

    def leave(self, info: WorkerInfo) -> None:
        """End one worker's lease at once."""
        with translated(self.url, f"end the lease of worker {info.id}"):
            pipe = self.client.pipeline(transaction=False)
            pipe.delete(keys.worker(info.id))
            pipe.zrem(keys.WORKERS, info.id)
            pipe.execute()

    def alive(self) -> dict[str, WorkerInfo]:
        """Every worker whose lease is in force, by id."""
        with translated(self.url, "list the workers"):
            ids = cast(list[str], self.client.zrange(keys.WORKERS, 0, -1))
            if not ids:
                return {}
            texts = cast(list[str | None], self.client.mget([keys.worker(id) for id in ids]))
        return {
            info.id: info
            for id, text in zip(ids, texts, strict=True)
            if text is not None and (info := self._read(id, text)) is not None
        }

    def _read(self, id: str, text: str) -> WorkerInfo | None:
        """A heartbeat; one that is none is logged, and its worker is none."""
        try:
            return read(text)
        except RecordDamaged as error:
            log.error("worker %.100r in the registry is passed over: %s", id, error)
            with contextlib.suppress(NoPermissionError):  # who may only read leaves it to others
                self.client.zrem(keys.WORKERS, id)  # a worker that lives comes back with its next beat
            return None

    def worker(self, id: str) -> WorkerInfo | None:
        """What a worker says of itself; None if its lease is not in force."""
        with translated(self.url, f"ask for worker {id}"):
            text = cast(str | None, self.client.get(keys.worker(id)))
        return None if text is None else self._read(id, text)

    def consumers(self, queue: str) -> list[WorkerInfo]:
        """The living workers that consume `queue`."""
        return [info for info in self.alive().values() if queue in info.queues]

    # --- where chunks lie -------------------------------------------------------------------

    def placement(self) -> str:
        """Where the workers that run store chunks, in words; "" while none runs."""
        with translated(self.url, "ask where chunks lie"):
            return cast(str, self.client.get(keys.PLACEMENT) or "")

    def claim_placement(self, placement: str) -> str:
        """Say where this worker will store chunks; returns what the first of those that run said.

        It holds for one lease, and goes on to hold with the beats.
        """
        with translated(self.url, "say where chunks lie"):
            script = self.client.register_script(source("elect"))
            return cast(str, script(keys=[keys.PLACEMENT], args=[placement, keys.WORKER_LEASE_MS, ""]))

    def require_placement(self, placement: str, *, claim: bool = False) -> None:
        """Make sure that this process stores chunks where the workers that run do.

        Else it would keep other copies than they count on, and look for theirs at the wrong node first.

        Args:
            placement: from `ChunkStore.placement`.
            claim: this process is about to be a worker. Then workers that were killed have the time of
                two leases to be found dead, and what this one says holds for those that come later.

        Raises:
            InvalidInput: they store them elsewhere; the message says how both were told.
        """
        deadline = time.monotonic() + (2 * keys.WORKER_LEASE_MS / 1000 if claim else 0.0)
        there = self.claim_placement(placement) if claim else self.placement()
        while there not in ("", placement):
            if time.monotonic() >= deadline:
                raise InvalidInput(
                    f"this process was told to keep {placement}; the workers that run keep {there}. Give "
                    "every process the same TORCHORD_CACHE_URLS, TORCHORD_CACHE_REPLICAS and "
                    "TORCHORD_CACHE_WEIGHTS; to change them, stop all workers first"
                )
            time.sleep(_LOOK_AGAIN_SECONDS)
            there = self.claim_placement(placement)

    # --- what the supervisor asks ---------------------------------------------------------

    def elect(self, worker: str, *, dead: str = "") -> str:
        """Take or renew the supervisor's lease.

        Args:
            dead: id of a holder that is known to have died; the lease is taken from it at once.

        Returns:
            The holder's id: `worker` while the lease is its own.
        """
        with translated(self.url, "elect a supervisor"):
            script = self.client.register_script(source("elect"))
            return cast(str, script(keys=[keys.SUPERVISOR], args=[worker, keys.SUPERVISOR_LEASE_MS, dead]))

    def step_down(self, worker: str) -> None:
        """Give the supervisor's lease up, if `worker` holds it."""
        with translated(self.url, "give the supervisor's lease up"):
            if self.client.get(keys.SUPERVISOR) == worker:
                self.client.delete(keys.SUPERVISOR)

    def active_runs(self) -> list[str]:
        """Names of the runs that are not at rest."""
        with translated(self.url, "list the active runs"):
            return sorted(cast(set[str], self.client.smembers(keys.ACTIVE)))

    def telling_runs(self) -> list[str]:
        """Names of the runs that may have something to tell."""
        with translated(self.url, "list what is to be told"):
            return sorted(filter(keys.is_name, cast(set[str], self.client.smembers(keys.TELLING))))

    def forget_run(self, run: str) -> None:
        """Take a run off the list of active ones, unless it has become active again."""
        with translated(self.url, "forget a run"):
            script = self.client.register_script(source("forget_run"))
            script(keys=[keys.RunKeys(run).head, keys.ACTIVE], args=[run])

    def expire_queue(self, queue: str) -> None:
        """Give a dead worker's private queue a last TTL; every message in it is sent again anyway."""
        with translated(self.url, f"expire queue {queue!r}"):
            self.client.expire(queue, keys.WORK_TTL_SECONDS)

    def queued(self, queue: str) -> list[dict[str, object]]:
        """Arguments of the tasks that wait in a Celery queue.

        Reads the oldest and newest thousand messages; each carries its arguments as text.
        """
        with translated(self.url, f"read queue {queue!r}"):
            texts = cast(list[str], self.client.lrange(queue, -1000, -1))
            if len(texts) == 1000:
                texts += cast(list[str], self.client.lrange(queue, 0, 999))
        found = []
        for text in texts:
            try:
                written = json.loads(text)["headers"]["kwargsrepr"]
                arguments = ast.literal_eval(written) if len(written) <= _MOST_ARGUMENTS else None
            except (SyntaxError, MemoryError, *FOREIGN):
                continue
            if isinstance(arguments, dict):
                found.append(arguments)
        return found

    def lengths(self, queues: Sequence[str]) -> dict[str, int]:
        """How many messages wait in each queue."""
        with translated(self.url, "ask how long the queues are"):
            pipe = self.client.pipeline(transaction=False)
            for queue in queues:
                pipe.llen(queue)
            return dict(zip(queues, pipe.execute(), strict=True))

    def supervisor(self) -> str:
        """Id of the supervisor, "" while there is none."""
        with translated(self.url, "ask for the supervisor"):
            return cast(str, self.client.get(keys.SUPERVISOR) or "")

    def memory(self) -> StoreMemory | None:
        """How full the control plane's server is; None where it does not say (its ACL may forbid it)."""
        try:
            with translated(self.url, "ask the server for its memory"):
                said = cast(dict[str, object], self.client.info("memory"))
        except CacheUnreachable:
            raise
        except CacheError:
            return None
        if "maxmemory_policy" not in said:
            return None
        used, limit = (int(cast(int, said.get(name, 0))) for name in ("used_memory", "maxmemory"))
        return StoreMemory(used, limit, str(said["maxmemory_policy"]))

    def require_room_kept(self) -> None:
        """Refuse a control plane that throws keys away once it is full: a run would lose its ledger.

        Raises:
            InvalidInput: it does, as far as it says.
        """
        memory = self.memory()
        if memory is not None and memory.evicts:
            raise InvalidInput(
                f"the Redis at {masked(self.url)} throws keys away once it holds {memory.limit:,} bytes "
                f"(maxmemory-policy {memory.policy}): a run would lose its ledger. Set maxmemory-policy "
                "noeviction there, as in `CONFIG SET maxmemory-policy noeviction`"
            )

    def server_id(self) -> str:
        """Which life of the server this is: another text after each of its starts."""
        with translated(self.url, "ask the server who it is"):
            return str(cast(dict[str, object], self.client.info("server")).get("run_id", ""))
