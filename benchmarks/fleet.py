"""Many Clients in one process, which speak the real protocol: what the rest of the system sees of a fleet.

Each simulated Client has a connection of its own on which it waits in BRPOP as kombu does, its own
worker id and heartbeat, and fetches each version for itself, as on a host of its own. A message that it
gets is recorded as unacknowledged, executed by the Clients' own code (`torchord.coordinator.client`: lease,
gradient, bytes, slot, partial sums), counted into its chord by Celery's result backend, and acknowledged.
Only the execution is shared: the process has one Python, so the Clients take turns there, and one set of
connections for all but the waiting.
"""

from __future__ import annotations

import base64
import json
import selectors
import socket
import threading
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any
from urllib.parse import urlsplit

import hiredis
from celery.app.task import Context

from torchord.cache import keys
from torchord.cache.errors import CacheError
from torchord.cache.ledger.heartbeat import Heartbeat
from torchord.cache.ledger.workers import new_info
from torchord.cache.settings import Settings
from torchord.coordinator.client.client import Client
from torchord.coordinator.client.slot_lease import SlotTask
from torchord.coordinator.messages.sender import Sender
from torchord.coordinator.messages.task_names import COMPUTE_GRADIENT, GRADIENTS, PARTIAL_SUM
from torchord.coordinator.runtime.context import Contexts
from torchord.coordinator.runtime.environment import environment
from torchord.coordinator.runtime.services import Services

_PRIORITIES = "\x06\x16"  # kombu's: a queue has one list for each of the priorities 0, 3, 6 and 9
_QUEUES = [GRADIENTS, *(f"{GRADIENTS}{_PRIORITIES}{priority}" for priority in (3, 6, 9))]
_POLL_SECONDS = 1


@dataclass
class Consumer:
    """One simulated Client: its waiting connection, its identity, the version that it holds."""

    link: socket.socket
    client: Client
    held: dict[str, int] = field(default_factory=dict)
    reader: Any = field(default_factory=lambda: hiredis.Reader(encoding="utf-8"))

    def wait(self) -> None:
        """Ask for the next message."""
        self.link.sendall(hiredis.pack_command(("BRPOP", *_QUEUES, _POLL_SECONDS)))


class Fleet:
    """Simulated Clients on one Redis.

    Args:
        url: a plain redis:// URL, of broker and cache.
        size: how many Clients.
    """

    def __init__(self, url: str, size: int) -> None:
        from torchord.tasks.celery_app import app

        self.app: Any = app
        self.services = Services(Settings(url=url, host_cache=False, allowed_modules=("*",)))
        self.contexts = Contexts(self.services)
        self.redis = self.services.ledger("any").client
        self.sender = Sender(app)
        self.selector = selectors.DefaultSelector()
        self.consumers = [self._consumer(url, number) for number in range(size)]
        self.tasks = 0
        self._stop = threading.Event()
        self._beats = threading.Thread(target=self._beat, daemon=True)

    def _consumer(self, url: str, number: int) -> Consumer:
        parts = urlsplit(url)
        link = socket.create_connection((parts.hostname, parts.port or 6379))
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        info = new_info(f"simulated{number}@bench", (GRADIENTS,), environment())
        one = Consumer(link, Client(self.contexts, Heartbeat(self.services.registry, info), self.sender))
        self.selector.register(link, selectors.EVENT_READ, one)
        return one

    def _beat(self) -> None:
        """Every Client's heartbeat, as often as a worker sends its own."""
        while not self._stop.is_set():
            began = time.monotonic()
            for consumer in self.consumers:
                self.services.registry.beat(consumer.client.heartbeat.info)
            self._stop.wait(max(0.0, keys.WORKER_LEASE_MS / 5000 - (time.monotonic() - began)))

    def serve(self, control: Connection) -> None:
        """Work until something comes over `control`."""
        self._beats.start()
        for consumer in self.consumers:
            consumer.wait()
        while not control.poll():
            for key, _ in self.selector.select(timeout=0.2):
                consumer = key.data
                consumer.reader.feed(consumer.link.recv(1 << 16))
                while (reply := consumer.reader.gets()) is not False:
                    if reply is not None:
                        self._execute(consumer, json.loads(reply[1]))
                    consumer.wait()
        self._stop.set()
        self._beats.join()
        for consumer in self.consumers:
            self.services.registry.leave(consumer.client.heartbeat.info)
            consumer.link.close()

    def _execute(self, consumer: Consumer, message: dict[str, Any]) -> None:
        tag = message["properties"]["delivery_tag"]
        pipe = self.redis.pipeline()
        pipe.zadd("unacked_index", {tag: time.time()})
        pipe.hset("unacked", tag, json.dumps([message, "", GRADIENTS]))
        pipe.execute()
        headers = message["headers"]
        _, kwargs, embed = json.loads(base64.b64decode(message["body"]))
        body, group = embed.get("chord"), headers.get("group")
        receipt = self._work(consumer, headers["task"], kwargs, headers["id"], body, group)
        if body is not None:
            request = Context({**headers, "chord": body})
            self.app.backend.on_chord_part_return(request, "SUCCESS", receipt)
        pipe = self.redis.pipeline()
        pipe.zrem("unacked_index", tag)
        pipe.hdel("unacked", tag)
        pipe.execute()
        self.tasks += 1

    def _work(
        self, consumer: Consumer, task: str, kwargs: dict[str, Any], delivery: str, body: Any, group: Any
    ) -> dict[str, Any]:
        join = None if body is None else (group, body)
        run, version = kwargs["run"], kwargs["version"]
        if task == PARTIAL_SUM:
            asked = SlotTask(run, kwargs["step"], kwargs["slot"], version, delivery, join, kwargs["backup"])
            return consumer.client.sums.partial_sum(asked)
        assert task == COMPUTE_GRADIENT, f"a fleet that only trains got {task}"
        if consumer.held.get(run) != version:  # the shared replica would fetch it once for all
            try:
                self.services.parameters.fetch(self.services.ledger(run), version)
                consumer.held = {run: version}
            except CacheError:
                pass  # a late message: the ledger says so
        backup = kwargs.get("backup", False)
        asked = SlotTask(run, kwargs["step"], kwargs["shard"], version, delivery, join, backup)
        return consumer.client.shards.compute_gradient(asked)


def serve(url: str, control: Connection) -> None:
    """Process entry: a fleet of each size that comes over `control`, until None comes."""
    import torch

    torch.set_num_threads(1)
    while (size := control.recv()) is not None:
        fleet = Fleet(url, size)
        control.send("ready")
        fleet.serve(control)
        control.recv()
        control.send(fleet.tasks)
