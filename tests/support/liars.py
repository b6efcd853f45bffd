"""Clients that lie: they compute what they are to, and send something else."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.support import reference
from tests.support.shuffle import Shuffle
from torchord import Run
from torchord.cache.ledger.heartbeat import Heartbeat
from torchord.cache.ledger.workers import new_info
from torchord.cache.settings import Settings
from torchord.coordinator.client.client import Client
from torchord.coordinator.client.slot_lease import SlotTask
from torchord.coordinator.compute.shard import ShardWork
from torchord.coordinator.messages.task_names import GRADIENTS
from torchord.coordinator.runtime.context import Contexts
from torchord.coordinator.runtime.services import Services
from torchord.coordinator.server.server import TrainingServer

Lie = Callable[[ShardWork], ShardWork]


def doubled(done: ShardWork) -> ShardWork:
    """A gradient of twice the length, under figures that fit it."""
    payload = {name: each * 2 if each.is_floating_point() else each for name, each in done.payload.items()}
    return replace(done, payload=payload, grad_norm=done.grad_norm * 2)


def scaled(done: ShardWork, by: float) -> ShardWork:
    """A gradient of so many times the length, under an honest one's figures."""
    return replace(done, payload={name: each * by for name, each in done.payload.items()})


class LyingFleet(Shuffle):
    """Three Clients and a training server in this process, which get their messages in turn.

    Attributes:
        liar: the second Client.
        told: how often it has lied.
    """

    def __init__(self, run: Run, folder: Path) -> None:
        settings = Settings(url=run._services.settings.url, checkpoint_dir=str(folder), overlap=frozenset())
        self.settings = settings
        super().__init__(settings, run, None)
        self.clients.append(Client(*self._parts(settings, "client2@here"), fault=lambda point: None))
        self.liar, self.told, self.turn = self.clients[1], 0, 0

    def _parts(self, settings: Settings, node: str) -> tuple[Contexts, Heartbeat, Any]:
        services = Services(settings)
        heartbeat = Heartbeat(services.registry, new_info(node, (GRADIENTS,)))
        services.registry.beat(heartbeat.info)
        return Contexts(services), heartbeat, self.post

    def lies(
        self, lie: Lie, *, once_in: int, checked: bool = True, only: tuple[int, int] | None = None
    ) -> None:
        """Have the second Client lie from now on.

        Args:
            once_in: about one slot in so many, the same ones each time.
            checked: about such alone as are computed twice.
            only: about this step's shard alone, whoever computes it.
        """
        for client in [self.liar] if only is None else self.clients:
            self._lies(client, lie, once_in, checked, only)

    def _lies(
        self, client: Client, lie: Lie, once_in: int, checked: bool, only: tuple[int, int] | None
    ) -> None:
        shards = client.shards
        honest = shards._work

        def work(context: Any, task: SlotTask, begun: Any, unless_stored: Any) -> Any:
            done, outgoing = honest(context, task, begun, unless_stored)
            assert outgoing is None
            tree = context.plan().fan_in(task.step)
            hit = zlib.crc32(f"{task.step} {tree.shard_of(task.slot)}".encode()) % once_in == 0
            hit = hit and only in (None, (task.step, task.slot))
            if hit and (not checked or tree.shard_of(task.slot) in tree.checked):
                self.told += 1
                done = lie(done)
            return done, None

        shards._work = work  # type: ignore[method-assign]

    def _in_order(self) -> None:
        self.post.arrived(self.run._ledger.client)
        for process in (*self.clients, self.server):
            heartbeat = process.heartbeat  # type: ignore[attr-defined]
            heartbeat.distrusted = heartbeat.registry.beat(heartbeat._said())
        if self.post.callbacks:
            self.post.callbacks -= 1
            self.server.advance(self.run.name)
            return
        self.turn += 1
        client = self.clients[self.turn % 3]
        self._deliver(self.post.gradients.pop(0), client, f"turn-{self.turn}", backup=False)

    def bits(self) -> reference.Bits:
        """Deliver messages until the run is done; the bits that it ended with, whatever the audit says."""
        while self.run.status().state in ("pending", "running"):
            self._in_order()
        assert self.run.status().state == "done", self.run.status().error
        return reference.bits(self.run.model())

    def another_server(self) -> None:
        """The training server is dead; another takes the run over."""
        self.server.heartbeat.stop()
        self.server = TrainingServer(*self._parts(self.settings, "server2@here"))
        self.post.callbacks += 1
