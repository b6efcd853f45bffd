"""A whole fleet in one process: the product's own training server and Clients, on twins of ledger and store.

Messages wait in a list and are delivered in a seeded random order, some of them twice. A kill leaves the
process at a point of the protocol: its thread stands still there until the run is over, and another process
takes its place. What the supervisor does when nothing happens any more is done here.
No queue, no server and no clock: a run of a small model takes milliseconds.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import torch

from tests.support.one_at_a_time import OneAtATime
from torchord.cache import keys
from torchord.cache.blobs.host_tier import HostTier
from torchord.cache.blobs.tiered_store import TieredStore
from torchord.cache.keyring import NO_KEYS
from torchord.cache.ledger.rounds import Seat, Turn
from torchord.cache.ledger.workers import WorkerInfo
from torchord.cache.settings import Settings
from torchord.cache.stores.evaluations import EvaluationStore
from torchord.cache.stores.gradients import GradientStore
from torchord.cache.stores.parameters import ParameterCache
from torchord.cache.tensors.codec import Manifest, views
from torchord.cache.testing.memory_chunks import MemoryChunkStore
from torchord.cache.testing.memory_ledger import MemoryLedger
from torchord.cache.testing.memory_plane import MemoryPlane
from torchord.coordinator.client.client import Client
from torchord.coordinator.client.round_task import SeatTask
from torchord.coordinator.client.slot_lease import SlotTask
from torchord.coordinator.master.audit import audit
from torchord.coordinator.master.switching import plan_of
from torchord.coordinator.messages import task_names
from torchord.coordinator.messages.sender import Sender
from torchord.coordinator.runtime.context import Contexts
from torchord.coordinator.runtime.environment import environment
from torchord.coordinator.runtime.faults import POINTS, Hook, nothing
from torchord.coordinator.runtime.services import Services
from torchord.coordinator.server.server import TrainingServer
from torchord.coordinator.server.step_slots import send_missing
from torchord.coordinator.spec.config import TrainingConfig
from torchord.coordinator.spec.recipe import Recipe

RUN = "run"
SEAT = "seat"  # what Celery has as a gradient of several steps
RESTING = ("done", "failed", "cancelled", "paused")
_AROUND = ("acquire", "initialise", "finish")
DECIDING = (
    "client.before_part",
    "client.after_part",
    "client.after_evaluation",
    "server.before_stop",
    "server.after_stop",
)
_NEVER = ("server.before_rollback", "server.after_rollback", *DECIDING)
ONCE = tuple(f"server.{when}_{what}" for what in _AROUND for when in ("before", "after"))
EACH_STEP = tuple(p for p in POINTS if p.startswith(("server.", "client.")) and p not in (*ONCE, *_NEVER))
"""Points at which a process may be killed: in a run, or in a step. (Evaluations are none of this.)"""
_PATIENCE_SECONDS = 60.0
_IDLE_ROUNDS = 20


class Stalled(AssertionError):
    """Nothing happens any more, and the run is not at rest."""


class Post(Sender):
    """What is sent, in place of a broker: (task, arguments), to be delivered by `Fleet`."""

    def __init__(self) -> None:
        self.waiting: list[tuple[str, dict[str, Any]]] = []

    def send(self, task: str, kwargs: dict[str, Any], *, queue: str, hidden: str = "") -> None:
        self.waiting.append((task, kwargs))

    def partial_sum(
        self, run: str, step: int, slot: int, *, version: int, join: Any = None, backup: bool = False
    ) -> None:
        kwargs = {"run": run, "step": step, "slot": slot, "version": version, "backup": backup}
        self.waiting.append((task_names.PARTIAL_SUM, kwargs))

    def step(
        self, run: str, step: int, shards: Sequence[int], *, version: int | None = None, **options: Any
    ) -> None:
        if (steps := options.get("steps", 1)) > 1:
            seats = [{"run": run, "step": step, "steps": steps, "seat": seat} for seat in shards]
            self.waiting += [(SEAT, seat) for seat in seats]
            return
        for shard in shards:
            self.gradient(run, step, shard, version=version)

    def drafted(self, *args: Any, **kwargs: Any) -> None:
        """A chord of its own goes out after the commit."""


class Ledger(MemoryLedger):
    """Whoever is in a round lets the others go on before each turn."""

    def __init__(self, plane: MemoryPlane, before_turn: Callable[[str], None]) -> None:
        super().__init__(plane, RUN)
        self._before_turn = before_turn

    def turn(self, seat: Seat, *args: Any, **options: Any) -> Turn:
        self._before_turn(seat.worker)
        return super().turn(seat, *args, **{**options, "wait_seconds": None})

    def end_round(self, seat: Seat, *args: Any, **options: Any) -> str:
        self._before_turn(seat.worker)
        return super().end_round(seat, *args, **{**options, "wait_seconds": None})


class Heartbeat:
    """What a process says of itself, to nobody."""

    def __init__(self, name: str) -> None:
        self.info = WorkerInfo(
            name,
            "node@here",
            "here",
            1,
            (task_names.UPDATES, task_names.GRADIENTS),
            environment=environment(),
        )
        self.refused: dict[str, str] = {}
        self.distrusted: dict[str, str] = {}

    def refuse(self, run: str, reason: str | None) -> bool:
        if reason is not None:
            raise AssertionError(f"{self.info.id} refuses {run}: {reason}")
        return False

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


@dataclass
class Outcome:
    """What a run came to.

    Attributes:
        state: "done" or "failed".
        error: why it failed.
        tensors: the last version, by name.
        losses: of each step.
        kills: where processes were killed.
    """

    state: str
    error: str = ""
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    losses: tuple[float, ...] = ()
    kills: tuple[str, ...] = ()

    @property
    def bits(self) -> dict[str, bytes]:
        """The last version, byte by byte."""
        flat = {name: t.contiguous().reshape(-1).view(torch.uint8) for name, t in self.tensors.items()}
        return {name: bytes(t.numpy().tobytes()) for name, t in flat.items()}


class Fleet:
    """One training server and some Clients for one run.

    Args:
        folder: for checkpoints.
        clients: how many.
        seed: of the order of deliveries, and of what is delivered twice.
        kill: (point, pass): the process that comes to the point for the so many-th time is killed.
        leave: at which of all turns in rounds a Client is told to end; another one takes its place.
        host: the tier that all of them share.
    """

    def __init__(
        self,
        folder: str,
        clients: int,
        *,
        seed: int = 0,
        kill: tuple[str, int] | None = None,
        leave: Sequence[int] = (),
        host: HostTier | None = None,
    ) -> None:
        chunks = TieredStore(cast(Any, MemoryChunkStore()), host)
        self.plane = MemoryPlane()
        self.random = random.Random(seed)
        self.turns = OneAtATime(self.random)
        ledger = Ledger(self.plane, self._before_turn)
        settings = Settings(checkpoint_dir=folder, allowed_modules=("*",), overlap=frozenset())
        self.services = cast(
            Services,
            SimpleNamespace(
                settings=settings,
                chunks=chunks,
                parameters=ParameterCache(chunks),
                gradients=GradientStore(chunks),
                evaluations=EvaluationStore(chunks),
                ledger=lambda run: ledger,
                registry=SimpleNamespace(alive=self._alive, worker=lambda name: self._alive().get(name)),
                keyring=NO_KEYS,
                file_keyring=NO_KEYS,
            ),
        )
        self.ledger = ledger
        self.post = Post()
        self.kill = kill
        self.leave = set(leave)
        self.kills: list[str] = []
        self._parked = threading.Event()
        self._over = threading.Event()
        self._made = 0
        self._turns_taken = 0
        self.seats: list[dict[str, Any]] = []  # receipts
        self._raised: Exception | None = None
        self.clients: list[Client] = []
        self.server = self._server()
        self.clients = [self._client() for _ in range(clients)]

    def run(self, recipe: Recipe, config: TrainingConfig) -> Outcome:
        """Submit, and deliver messages until the run is at rest."""
        described = recipe.to_spec()
        spec = {"recipe": described, "config": config.to_json(), "fingerprint": ""}
        assert self.ledger.create(spec, incarnation="first") is None
        self.post.advance(RUN)
        with patch("torchord.coordinator.runtime.context.fingerprint", return_value=""):  # all have one code
            self._until_rest()
        found = self._outcome()
        self._over.set()
        return found

    def _until_rest(self) -> None:
        rounds, version = 0, 0
        while (head := self.ledger.head()).status not in RESTING:
            if head.version > version:
                rounds, version = 0, head.version
            if self.post.waiting:
                self._deliver(*self._next())
                continue
            rounds += 1
            if rounds > _IDLE_ROUNDS:
                raise Stalled(f"{head.status} at version {version} of {head.total_steps}") from self._raised
            self._supervise()

    def _alive(self) -> dict[str, WorkerInfo]:
        return {client.heartbeat.info.id: client.heartbeat.info for client in self.clients}

    # --- messages -------------------------------------------------------------------------

    def _next(self) -> tuple[str, dict[str, Any]]:
        place = self.random.randrange(len(self.post.waiting))
        message = self.post.waiting[place]
        if self.random.random() > 0.1:  # else it is delivered once more
            self.post.waiting.pop(place)
        return message

    def _deliver(self, task: str, kwargs: dict[str, Any]) -> None:
        if task == task_names.ADVANCE:
            self._live(lambda: self.server.advance(RUN), self._replace_server)
            return
        if task == SEAT:
            self._take_seats([kwargs])
            return
        number = self.random.randrange(len(self.clients))
        client = self.clients[number]
        self._live(lambda: self._compute(client, task, kwargs), lambda: self._replace_client(number))

    def _compute(self, client: Client, task: str, kwargs: dict[str, Any]) -> None:
        if task == task_names.EVALUATE:
            client.inference.evaluate(**kwargs)
            return
        slot = kwargs["slot"] if task == task_names.PARTIAL_SUM else kwargs["shard"]
        delivery = f"d{self.random.random()}"
        work = SlotTask(RUN, kwargs["step"], slot, kwargs["version"], delivery, backup=kwargs["backup"])
        if task == task_names.PARTIAL_SUM:
            client.sums.partial_sum(work)
        else:
            client.shards.compute_gradient(work)

    def _take_seats(self, seats: list[dict[str, Any]]) -> None:
        """A round: all of its seats that wait, each by a Client of its own, some of which come late."""
        step = seats[0]["step"]
        seats += [kwargs for task, kwargs in self.post.waiting if task == SEAT and kwargs["step"] == step]
        self.post.waiting = [
            (task, kwargs) for task, kwargs in self.post.waiting if task != SEAT or kwargs["step"] != step
        ]
        clients = self.random.sample(self.clients, min(len(seats), len(self.clients)))
        self.turns.run([partial(self._sit, *each) for each in zip(clients, seats, strict=False)])
        self.post.advance(RUN)  # as their chord does

    def _sit(self, client: Client, seat: dict[str, Any]) -> None:
        for _ in range(self.random.choice((0, 0, 5, 20))):
            self.turns.pause()
        self._quietly(lambda: self.seats.append(client.rounds.take_seat(SeatTask(**seat))))
        if client.lease.leaving:
            self._dies(client.heartbeat.info.id)

    def _before_turn(self, worker: str) -> None:
        self.turns.pause()
        self._turns_taken += 1
        if self._turns_taken in self.leave:
            next(c for c in self.clients if c.heartbeat.info.id == worker).lease.hand_back()

    def _dies(self, worker: str) -> None:
        """A Client that was in a round has ended, and another one takes its place."""
        number = next(n for n, client in enumerate(self.clients) if client.heartbeat.info.id == worker)
        self._replace_client(number)

    def _supervise(self) -> None:
        """Send again what is missing: nobody is alive who is at it."""
        head = self.ledger.head()
        plan = plan_of(self.ledger, head, self.ledger.spec())
        if plan is not None and head.launched is not None and head.version < plan.total_steps:
            for step in range(head.version, head.launched + 1):
                send_missing(
                    self.post, RUN, step, plan.fan_in(step), self.ledger.slots_present(step),
                    version=plan.version_for(step), callback_queue=task_names.UPDATES,
                )  # fmt: skip
        for version, parts in self.ledger.pending_evaluations().items():
            missing = set(range(parts)) - self.ledger.parts_present(version)
            self.post.evaluation(RUN, version, sorted(missing or {0}), parts)
        self.post.advance(RUN)

    # --- lives and deaths -------------------------------------------------------------------

    def _live(self, act: Callable[[], Any], replace_it: Callable[[], None]) -> None:
        """Let a process do something; if it is killed meanwhile, another takes its place."""
        if self.kill is None:
            self._quietly(act)
            return
        done = threading.Event()

        def living() -> None:
            try:
                self._quietly(act)
            except SystemExit:
                pass
            finally:
                done.set()
                self._parked.set()

        thread = threading.Thread(target=living, daemon=True)
        thread.start()
        assert self._parked.wait(_PATIENCE_SECONDS), "a task hangs"
        if not done.is_set():
            self.kill = None
            replace_it()
        self._parked.clear()

    def _quietly(self, act: Callable[[], Any]) -> None:
        """Do something whose failure the run's head tells."""
        try:
            act()
        except Exception as error:  # noqa: BLE001  a worker's task logs it
            self._raised = error

    def _fault(self, worker: str) -> Hook:
        count = 0

        def reached(point: str) -> None:
            nonlocal count
            if self.kill is None or point != self.kill[0]:
                return
            count += 1
            if count == self.kill[1]:
                self.kills.append(point)
                if self.turns.inside:
                    self.kill = None
                    self._dies(worker)
                    self.turns.gone()
                self._parked.set()
                self._over.wait()
                raise SystemExit  # whatever that does now, nobody will see it

        return nothing if self.kill is None else reached

    def _named(self, kind: str) -> Heartbeat:
        self._made += 1
        self.plane.put(keys.worker(f"{kind}{self._made}"), "alive")
        return Heartbeat(f"{kind}{self._made}")

    def _server(self) -> TrainingServer:
        beat = cast(Any, self._named("server"))
        return TrainingServer(Contexts(self.services), beat, self.post, fault=self._fault(beat.info.id))

    def _client(self) -> Client:
        beat = cast(Any, self._named("client"))
        return Client(Contexts(self.services), beat, self.post, fault=self._fault(beat.info.id))

    def _replace_server(self) -> None:
        self.server = self._server()

    def _replace_client(self, number: int) -> None:
        self.plane.delete(keys.worker(self.clients[number].heartbeat.info.id))
        self.clients[number] = self._client()

    # --- the end ----------------------------------------------------------------------------

    def _outcome(self) -> Outcome:
        head = self.ledger.head()
        if head.status != "done":
            return Outcome(head.status, (head.error or {}).get("message", ""), kills=tuple(self.kills))
        entries = self.ledger.entries()
        found = audit(
            head, entries, plan_of(self.ledger, head, self.ledger.spec()), self.ledger.version(head.version)
        )
        assert found.ok, found.problems
        _, flat, _ = self.services.parameters.fetch(self.ledger, head.version)
        tensors = views(flat, Manifest.from_json(self.ledger.manifest()))
        losses = tuple(entry.loss for entry in entries)
        return Outcome("done", "", tensors, losses, tuple(self.kills))
