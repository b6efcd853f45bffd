"""The twin of the registry of workers."""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import cast

import redis

from torchord.cache import keys
from torchord.cache.ledger.distrusted import Distrusted, read_distrusted
from torchord.cache.ledger.workers import Registry, StoreMemory, WorkerInfo, read
from torchord.cache.testing.memory_plane import URL, MemoryPlane, NoClient


class MemoryRegistry(Registry):
    """`Registry` without a server.

    Args:
        plane: the keys, shared with the `MemoryLedger` of each run.
    """

    def __init__(self, plane: MemoryPlane) -> None:
        super().__init__(cast(redis.Redis, NoClient()), URL)
        self.plane = plane

    def beat(self, info: WorkerInfo) -> dict[str, Distrusted]:
        """See `Registry.beat`."""
        plane = self.plane
        with plane.changed:
            plane.put(keys.worker(info.id), json.dumps(asdict(info)), keys.WORKER_LEASE_MS / 1000)
            beats = {**(plane.get(keys.WORKERS) or {}), info.id: int(plane.clock() * 1000)}
            plane.put(keys.WORKERS, beats, keys.WORKER_INDEX_TTL_SECONDS)
            if info.placement:
                self._hold_placement(info.placement)
            return self.distrusted()

    def distrusted(self) -> dict[str, Distrusted]:
        """See `Registry.distrusted`."""
        return read_distrusted(self.plane.hash(keys.DISTRUSTED))

    def distrust(self, found: Distrusted) -> None:
        """See `Registry.distrust`."""
        with self.plane.changed:
            there = {**self.plane.hash(keys.DISTRUSTED), found.node: found.to_json()}
            self.plane.put(keys.DISTRUSTED, there, keys.DISTRUST_TTL_SECONDS)

    def readmit(self, node: str) -> bool:
        """See `Registry.readmit`."""
        with self.plane.changed:
            there = node in self.plane.hash(keys.DISTRUSTED)
            self.plane.hdel(keys.DISTRUSTED, node)
            return there

    def memory(self) -> StoreMemory | None:
        """See `Registry.memory`; memory is what this process has."""
        return None

    def placement(self) -> str:
        """See `Registry.placement`."""
        return str(self.plane.get(keys.PLACEMENT) or "")

    def claim_placement(self, placement: str) -> str:
        """See `Registry.claim_placement`."""
        with self.plane.changed:
            there = self.placement() or placement
            if there == placement:
                self._hold_placement(there)
            return there

    def _hold_placement(self, placement: str) -> None:
        there = self.placement() or placement
        self.plane.put(keys.PLACEMENT, there, keys.WORKER_LEASE_MS / 1000)

    def leave(self, info: WorkerInfo) -> None:
        """See `Registry.leave`."""
        with self.plane.changed:
            self.plane.delete(keys.worker(info.id))
            self.plane.hdel(keys.WORKERS, info.id)

    def alive(self) -> dict[str, WorkerInfo]:
        """See `Registry.alive`."""
        found = {}
        for id in self.plane.hash(keys.WORKERS):
            text = self.plane.get(keys.worker(id))
            if text is not None:
                found[id] = read(text)
        return found

    def worker(self, id: str) -> WorkerInfo | None:
        """See `Registry.worker`."""
        return self.alive().get(id)

    def elect(self, worker: str, *, dead: str = "") -> str:
        """See `Registry.elect`."""
        with self.plane.changed:
            holder = self.plane.get(keys.SUPERVISOR)
            if holder not in (None, worker) and not (dead and holder == dead):
                return str(holder)
            self.plane.put(keys.SUPERVISOR, worker, keys.SUPERVISOR_LEASE_MS / 1000)
            return worker

    def step_down(self, worker: str) -> None:
        """See `Registry.step_down`."""
        with self.plane.changed:
            if self.plane.get(keys.SUPERVISOR) == worker:
                self.plane.delete(keys.SUPERVISOR)

    def active_runs(self) -> list[str]:
        """See `Registry.active_runs`."""
        return sorted(self.plane.get(keys.ACTIVE) or ())

    def telling_runs(self) -> list[str]:
        """See `Registry.telling_runs`."""
        return sorted(self.plane.get(keys.TELLING) or ())

    def forget_run(self, run: str) -> None:
        """See `Registry.forget_run`."""
        with self.plane.changed:
            if self.plane.hash(keys.RunKeys(run).head).get("status") not in ("pending", "running"):
                self.plane.put(keys.ACTIVE, set(self.active_runs()) - {run})

    def expire_queue(self, queue: str) -> None:
        """See `Registry.expire_queue`."""
        self.plane.expire(queue, keys.WORK_TTL_SECONDS)

    def queued(self, queue: str) -> list[dict[str, object]]:
        """See `Registry.queued`."""
        waiting = [json.loads(text)["headers"]["kwargsrepr"] for text in self.plane.get(queue) or []]
        return [ast.literal_eval(text) for text in waiting]

    def lengths(self, queues: Sequence[str]) -> dict[str, int]:
        """See `Registry.lengths`."""
        return {queue: len(self.plane.get(queue) or ()) for queue in queues}

    def supervisor(self) -> str:
        """See `Registry.supervisor`."""
        return str(self.plane.get(keys.SUPERVISOR) or "")

    def server_id(self) -> str:
        """See `Registry.server_id`."""
        return self.plane.id
