"""A run whose Clients and training server are in this process and get their messages one at a time."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tests.support import reference
from tests.support.fleet import finished
from torchord import Run, TrainedModel
from torchord.cache.ledger.heartbeat import Heartbeat
from torchord.cache.ledger.launch import Launch
from torchord.cache.ledger.workers import new_info
from torchord.cache.settings import Settings
from torchord.coordinator.client.client import Client
from torchord.coordinator.client.slot_lease import SlotTask
from torchord.coordinator.messages.task_names import GRADIENTS, UPDATES
from torchord.coordinator.runtime.context import Contexts
from torchord.coordinator.runtime.services import Services
from torchord.coordinator.server.server import TrainingServer


@dataclass
class Post:
    """A `Sender` that keeps the messages, for a test to deliver when it likes, as often as it likes.

    Attributes:
        gradients: waiting (step, shard or partial sum, version, chord).
        callbacks: how many calls to the server wait.
        chords: the shards of each chord that were not delivered yet, as Celery counts them.
        joining: of each chord, how many partial sums are still to be delivered.
        sums: every (step, partial sum) that was sent.
    """

    QUEUE = "test-duplicates"

    gradients: list[tuple[int, int, int | None, int | None]] = field(default_factory=list)
    callbacks: int = 0
    chords: list[set[int]] = field(default_factory=list)
    joining: list[int] = field(default_factory=list)
    sums: set[tuple[int, int]] = field(default_factory=set)

    def advance(self, run: str, *, queue: str = UPDATES) -> None:
        self.callbacks += 1

    def step(
        self,
        run: str,
        step: int,
        shards: Iterable[int],
        *,
        callback_queue: str,
        version: int | None = None,
        joining: int = 0,
    ) -> None:
        self.chords.append(set(shards))
        self.joining.append(joining)
        self.gradients += [(step, shard, version, len(self.chords) - 1) for shard in self.chords[-1]]

    def gradient(self, run: str, step: int, shard: int, *, version: int | None = None) -> None:
        self.gradients.append((step, shard, version, None))

    def partial_sum(self, run: str, step: int, slot: int, *, version: int, join: Any = None) -> None:
        self.sums.add((step, slot))
        chord = None
        if join is not None:
            chord = join[1]["chord"]
            self.chords[chord].add(slot)
            self.joining[chord] -= 1
        self.gradients.insert(0, (step, slot, version, chord))

    def drafted(
        self,
        run: str,
        step: int,
        shards: Iterable[int],
        *,
        callback_queue: str,
        version: int,
        incarnation: str,
        seconds: float,
        joining: int = 0,
    ) -> Launch:
        """What goes out with a commit; `arrived` takes it in."""
        messages = tuple(json.dumps({"of": [step, shard, version, joining]}).encode() for shard in shards)
        return Launch(
            step,
            incarnation,
            "celery-taskset-meta-test.s",
            len(messages) + joining,
            60,
            self.QUEUE,
            seconds,
            messages,
        )

    def arrived(self, client: Any) -> None:
        """Take in the chords that commits published; each comes whole, but perhaps more than one."""
        came = [json.loads(text)["of"] for text in client.lrange(self.QUEUE, 0, -1)][::-1]
        client.delete(self.QUEUE)
        for step, version, joining in dict.fromkeys((t, v, j) for t, _, v, j in came):
            shards = [s for t, s, _, _ in came if t == step]
            self.step("", step, shards, callback_queue="", version=version, joining=joining)

    def counted(self, shard: int, chord: int | None) -> None:
        """A header task of a chord has ended: the last one calls back."""
        if chord is not None and shard in self.chords[chord]:
            self.chords[chord].remove(shard)
            self.callbacks += not self.chords[chord] and self.joining[chord] <= 0


@dataclass
class EvaluatingPost(Post):
    """Keeps the parts of evaluations, too: waiting (version, part, parts)."""

    parts: list[tuple[int, int, int]] = field(default_factory=list)

    def evaluation(self, run: str, version: int, parts: Iterable[int], of: int) -> None:
        self.parts += [(version, part, of) for part in parts]


class Shuffle:
    """Two workers and a training server in this process, which get their messages from `Post`.

    At each point of the protocol where a process could be killed, another one may act in between.

    Args:
        run: a run that was submitted already.
        chance: decides which message is delivered next, how often, and when the server is called besides;
            None: each once, in their order.

    Attributes:
        verdicts: what became of each delivery of a gradient task.
    """

    POST: type[Post] = Post

    def __init__(self, settings: Settings, run: Run, chance: random.Random | None) -> None:
        self.run = run
        self.chance = chance
        self.post: Any = self.POST(callbacks=1)  # what submit sent went to a queue that nobody reads
        self.clients = [
            Client(*self._parts(settings, f"client{i}@here"), fault=partial(self._meanwhile, i))
            for i in range(2)
        ]
        self.server = TrainingServer(*self._parts(settings, "server@here"), fault=partial(self._meanwhile, 0))
        self.depth = 0
        self.old: list[Any] = []
        self.verdicts: Counter[str] = Counter()

    def _parts(self, settings: Settings, node: str) -> tuple[Contexts, Heartbeat, Any]:
        services = Services(settings)
        heartbeat = Heartbeat(services.registry, new_info(node, (GRADIENTS, UPDATES)))
        services.registry.beat(heartbeat.info)
        return Contexts(services), heartbeat, self.post

    def train(self) -> dict[str, Any]:
        """Deliver messages until the run has ended; the bits that it ended with."""
        while self.run.status().state in ("pending", "running"):
            if self.chance is None:
                self._in_order()
            else:
                self._at_random(self.chance)
        return reference.bits(finished(self.run).module)

    def _in_order(self) -> None:
        self.post.arrived(self.run._ledger.client)
        if self.post.callbacks:
            self.post.callbacks -= 1
            self.server.advance(self.run.name)
        else:
            self._deliver(self.post.gradients.pop(0), self.clients[0], "once", backup=False)

    def _at_random(self, chance: random.Random) -> None:
        self.post.arrived(self.run._ledger.client)
        roll = chance.random()
        if roll < 0.15 or (self.post.callbacks and roll < 0.4):  # early, or one that is due
            self.server.advance(self.run.name)
            if self.post.callbacks and chance.random() < 0.7:  # else the same message comes again
                self.post.callbacks -= 1
            return
        waiting = self.post.gradients if self.post.gradients and roll < 0.85 else self.old
        if not waiting:
            return
        message = chance.choice(waiting)
        if waiting is self.post.gradients and chance.random() < 0.7:
            waiting.remove(message)
            self.old.append(message)
        copy = f"{message[0]}-{message[1]}-{chance.randrange(3)}"
        self._deliver(message, chance.choice(self.clients), copy, backup=roll > 0.8)

    def _meanwhile(self, busy: int, point: str) -> None:
        """Between two moves of one process, the other Client may take a copy of a message."""
        if self.chance is None or self.depth or not self.old or self.chance.random() < 0.5:
            return
        message = self.chance.choice(self.old[-4:])
        self.depth += 1
        try:
            self._deliver(message, self.clients[1 - busy], "meanwhile", backup=self.chance.random() < 0.7)
        finally:
            self.depth -= 1

    def _deliver(self, message: Any, client: Client, delivery: str, *, backup: bool) -> None:
        step, shard, version, chord = message
        join = None if chord is None else ("group", {"chord": chord})
        task = SlotTask(self.run.name, step, shard, version, delivery, join, backup)
        summed = (step, shard) in self.post.sums
        receipt = client.sums.partial_sum(task) if summed else client.shards.compute_gradient(task)
        self.verdicts[receipt["status"]] += 1
        self.post.counted(shard, chord)


class Evaluated(Shuffle):
    """A run whose evaluations are computed as soon as they are sent, before anything else."""

    POST = EvaluatingPost

    def end(self) -> TrainedModel:
        """Deliver messages, each once, until the run has ended."""
        self.deliver()
        return finished(self.run)

    def deliver(self) -> None:
        """Deliver messages, each once, as long as the run is not at rest."""
        while self.run.status().state in ("pending", "running"):
            if self.post.parts:
                version, part, of = self.post.parts.pop(0)
                self.clients[part % 2].inference.evaluate(self.run.name, version, part, of)
            else:
                self._in_order()
