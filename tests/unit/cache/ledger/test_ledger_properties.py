"""Random interleavings of Clients, training servers and people, on the real scripts and on the twin.

The machine below plays every actor of the protocol. Each of its rules sends one operation, with
whatever that actor believed when it last looked: messages are lost, doubled and delayed for ever,
servers are paused and overtaken at any point, heartbeats end while their worker goes on. After
each rule it compares the real keys with the twin's, and both with what the protocol promises.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.support import control
from tests.support.control import comparable, digest, entry, memory_state, record, redis_state, slot, worker
from torchord.cache import keys
from torchord.cache.ledger.answers import Group
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.ledger.records import GENESIS, LedgerEntry, VersionRecord
from torchord.cache.ledger.rounds import KEPT_STEPS, Report, Seat, Turn
from torchord.cache.ledger.workers import Registry
from torchord.cache.scripts import source
from torchord.cache.servers import fast_client
from torchord.cache.servers.fast_client import Command
from torchord.cache.servers.redis_client import connect
from torchord.cache.testing.memory_ledger import MemoryLedger
from torchord.cache.testing.memory_plane import MemoryPlane
from torchord.cache.testing.memory_registry import MemoryRegistry

CLIENTS = ("w0", "w1", "w2")
SERVERS = ("s0", "s1")
SPEC = {"recipe": {}, "config": {"skew": "refuse"}}

_names = itertools.count()


@pytest.fixture(autouse=True)
def heartbeats_end_when_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """No lease ends by the clock: on a slow machine a walk takes longer than one lasts."""
    monkeypatch.setattr(keys, "WORKER_LEASE_MS", 3_600_000)
    monkeypatch.setattr(keys, "WAKE_TTL_SECONDS", 3600)


Dice = st.DataObject | random.Random


def pick(dice: Dice, options: Sequence[Any]) -> Any:
    """One of `options`, chosen by hypothesis or by a generator."""
    return dice.choice(options) if isinstance(dice, random.Random) else dice.draw(st.sampled_from(options))


@dataclass
class Work:
    """What a Client is at: it began this shard and has not written it."""

    step: int
    shard: int
    delivery: str
    nonce: str


@dataclass
class Draft:
    """An update that a server has computed and not committed."""

    step: int
    entry: LedgerEntry
    record: VersionRecord


@dataclass
class Server:
    """What one server process believes: its turn (which acquire gave its token), its model, its draft."""

    turn: int | None = None
    version: int = -1
    chain: str = GENESIS
    draft: Draft | None = None
    old: list[VersionRecord] = field(default_factory=list)


@dataclass
class Player:
    """A participant of a round: the acquire that gave its token, its model, what it was told last."""

    turn: int
    version: int
    chain: str
    first: int
    told: Turn = field(default_factory=lambda: Turn("wait"))
    publishes: bool = False


class Stammering(Ledger):
    """Sends all commands twice: the answers and keys must be those of once."""

    def _call(self, *commands: Command) -> list[Any]:
        super()._call(*commands)
        return super()._call(*commands)


class Protocol(RuleBasedStateMachine):
    """Every actor, the real control plane, and the twin."""

    url = ""
    client: redis.Redis
    kind: type[Ledger] = Ledger
    counters = True

    def __init__(self) -> None:
        super().__init__()
        run = f"run-{next(_names)}"
        self.real = self.kind(self.client, self.url, run)
        self.real_registry = Registry(self.client, self.url)
        self.plane = MemoryPlane()
        self.twin = MemoryLedger(self.plane, run)
        self.twin_registry = MemoryRegistry(self.plane)
        self.tokens: list[tuple[int, int]] = [(0, 0)]
        self.servers = {id: Server() for id in SERVERS}
        self.work: dict[str, Work] = {}
        self.players: dict[str, Player] = {}
        self.messages: list[tuple[int, int, str]] = []
        self.beating: set[str] = set()
        self.status = "pending"
        self.shards, self.steps, self.staleness = 1, 1, 0
        self.deliveries = itertools.count()
        self.last: tuple[int, str] = (0, GENESIS)
        self.chains: dict[int, str] = {0: GENESIS}
        self.may_move: str | None = None
        self.happened: Counter[str] = Counter()

    # --- asking both ------------------------------------------------------------------------

    def both(self, act: Callable[[Ledger, int], Any]) -> Any:
        """The answer of the real ledger and the twin, which must be one. `act` gets 0 or 1: its place
        in each pair of tokens."""
        real, twin = act(self.real, 0), act(self.twin, 1)
        assert real == twin
        return real

    def token(self, server: Server, place: int) -> int:
        return self.tokens[server.turn or 0][place]

    def in_force(self, server: Server) -> bool:
        """Whether no acquire came after this server's."""
        return server.turn is not None and server.turn == len(self.tokens) - 1

    def view(self, *, counters: bool = True) -> dict[str, Any]:
        return comparable(memory_state(self.plane), counters=counters)

    def unchanged(self, act: Callable[[], Any]) -> Any:
        """`act` may change counters only."""
        before = self.view(counters=False)
        answer = act()
        assert self.view(counters=False) == before
        return answer

    def version_for(self, step: int) -> int:
        """The version that a step's gradients are computed at."""
        return max(0, step - self.staleness)

    def believed(self, step: int) -> str:
        """How the head lies to a step."""
        if step < self.version:
            return "late"
        return "early" if self.version_for(step) > self.version else "now"

    @property
    def version(self) -> int:
        return self.twin.head().version

    def in_round(self, server: Server) -> bool:
        """Whether this server has opened a round and waits for its end."""
        return self.twin.head().round is not None and self.in_force(server)

    # --- the start ----------------------------------------------------------------------------

    @initialize(shards=st.integers(1, 3), steps=st.sampled_from([2, 9]), staleness=st.integers(0, 1))
    def submit(self, shards: int, steps: int, staleness: int) -> None:
        self.shards, self.steps, self.staleness = shards, steps, staleness
        for ledger in (self.real, self.twin):
            assert ledger.create(SPEC, incarnation="life") is None or self.kind is Stammering
        for id in (*CLIENTS, *SERVERS):
            self.beat(id)
        self.acquire("s0")
        self.initialise("s0")
        self.launch("s0")

    def beat(self, id: str) -> None:
        for registry in (self.real_registry, self.twin_registry):
            registry.beat(worker(id))
        self.beating.add(id)

    # --- heartbeats: they say little about whether a process acts --------------------------------

    @rule(id=st.sampled_from(CLIENTS + SERVERS))
    def heartbeat_ends_or_returns(self, id: str) -> None:
        if id not in self.beating:
            self.beat(id)
            return
        for registry in (self.real_registry, self.twin_registry):
            registry.leave(worker(id))
        self.beating.discard(id)

    # --- Clients ------------------------------------------------------------------------------------

    @rule(away=st.integers(-2, 1), shard=st.integers(0, 2))
    def a_message_comes_from_anywhere(self, away: int, shard: int) -> None:
        step = self.version + away
        if shard < self.shards and 0 <= step < self.steps:
            self.messages.append((step, shard, f"d{next(self.deliveries)}"))

    @precondition(lambda self: self.messages)
    @rule(data=st.data(), id=st.sampled_from(CLIENTS), kept=st.booleans(), backup=st.booleans())
    def a_client_begins(self, data: Dice, id: str, kept: bool, backup: bool) -> None:
        if self.work.get(id):
            return
        newest = range(max(0, len(self.messages) - 6), len(self.messages))
        index = pick(data, newest)
        step, shard, delivery = self.messages[index] if kept else self.messages.pop(index)

        def begin() -> Any:
            return self.both(
                lambda ledger, _: control.begin(
                    ledger,
                    step,
                    shard,
                    worker=id,
                    delivery=delivery,
                    backup=backup,
                    environment="torch",
                    version=self.version_for(step),
                )
            )

        written = str(shard) in self.plane.hash(self.twin.keys.slots(step))
        lease = self.twin.leases(step).get(shard)
        held = lease is not None and lease.open and lease.worker in self.beating and not backup
        ours = lease is not None and lease.open and (lease.worker, lease.delivery) == (id, delivery)
        if self.status != "running":
            assert self.unchanged(begin)[0] == "stopped"
        elif self.believed(step) != "now":
            assert self.unchanged(begin)[0] == self.believed(step)
        elif written:
            assert self.unchanged(begin)[0] == "duplicate"
        elif held and not ours:
            assert self.unchanged(begin)[0] == "held"
        else:
            assert begin()[0] == "compute"
            self.work[id] = Work(step, shard, delivery, f"n{next(self.deliveries)}")

    @precondition(lambda self: self.work)
    @rule(data=st.data(), pure=st.sampled_from([True] * 9 + [False]))
    def a_client_writes(self, data: Dice, pure: bool) -> None:
        id = pick(data, sorted(self.work))
        work = self.work.pop(id)
        present = self.twin.slots_present(work.step)
        pure = pure or work.shard not in present  # the first bytes are right: see the unit tests for others
        changes = {} if pure else {"digest": digest("other")}
        made = slot(work.step, work.shard, work.nonce, worker=id, **changes)
        into = Group(99, 0, self.shards - 1) if work.step % 2 else None  # a partial sum of all shards
        written = "group" if into is not None and len(present) + 1 == self.shards else "written"

        self.happened[
            f"write {work.step - self.version:+d} {'second' if work.shard in present else 'first'}"
        ] += 1

        def write() -> Any:
            return self.both(
                lambda ledger, _: control.write(
                    ledger,
                    work.step,
                    made,
                    incarnation="life",
                    version=self.version_for(work.step),
                    into=into,
                )
            )

        if self.status in ("done", "cancelled"):
            assert self.unchanged(write)[0] == "stopped"
        elif self.believed(work.step) != "now":
            assert self.unchanged(write)[0] == self.believed(work.step)
        elif work.shard in present:
            assert self.unchanged(write)[0] == ("duplicate" if pure else "divergent")
        else:
            assert write() == (written, len(present) + 1)
            assert self.unchanged(write) == (written, len(present) + 1), "its answer was lost, it asks again"

    @precondition(lambda self: self.work)
    @rule(data=st.data(), seconds=st.sampled_from([0.0, 1e3]))
    def a_client_offers_a_backup(self, data: Dice, seconds: float) -> None:
        """What it is told changes who is asked to compute, never what is applied."""
        step = self.work[pick(data, sorted(self.work))].step
        found = self.both(lambda ledger, _: ledger.late_shard(step, shards=self.shards, seconds=seconds))
        assert found is None or found not in self.twin.slots_present(step)

    @precondition(lambda self: self.work)
    @rule(data=st.data(), told=st.booleans(), counts=st.booleans())
    def a_client_gives_up(self, data: Dice, told: bool, counts: bool) -> None:
        """It dies, or hands its shard back, or the supervisor takes it."""
        id = pick(data, sorted(self.work))
        work = self.work.pop(id)
        if told:
            self.both(
                lambda ledger, _: ledger.end_lease(
                    work.step, work.shard, worker=id, delivery=work.delivery, counts=counts
                )
            )

    @precondition(lambda self: self.work)
    @rule(data=st.data())
    def a_client_fails(self, data: Dice) -> None:
        """The recipe raises: the run fails unless it went on without this shard."""
        id = pick(data, sorted(self.work))
        work = self.work.pop(id)
        needed = work.step >= self.version and work.shard not in self.twin.slots_present(work.step)

        def fail() -> Any:
            return self.both(
                lambda ledger, _: ledger.transition(
                    "failed",
                    allowed=("running",),
                    event="failed",
                    error={"message": "raised"},
                    incarnation="life",
                    shard=(work.step, work.shard),
                )
            )

        if needed and self.status == "running":
            assert fail() == (True, "running")
            self.status = "failed"
        else:
            assert self.unchanged(fail) == (False, self.status)

    # --- training servers -----------------------------------------------------------------------------

    @rule(id=st.sampled_from(SERVERS), node=st.sampled_from(["own", "own", "shared"]), data=st.data())
    def a_server_takes_over(self, id: str, node: str, data: Dice) -> None:
        """The owner may be dead, or only paused; the taker goes on, unless it is paused at once."""
        owner = self.twin.head().owner
        if owner in self.beating and pick(data, range(4)):
            self.heartbeat_ends_or_returns(owner)
        self.acquire(id, node)
        if pick(data, range(4)):
            self.initialise(id)
            self.restore(id, None)
            self.launch(id)

    def acquire(self, id: str, node: str = "own") -> None:
        name = f"celery@{id}" if node == "own" else "celery@pool"
        head = self.twin.head()
        answers = [
            ledger.acquire(worker=id, node=name, queue=f"updates.{name}") for ledger in (self.real, self.twin)
        ]
        if head.owner not in ("", id) and head.owner in self.beating and head.node != name:
            assert answers == [("owned", head.queue)] * 2
            return
        (real, first), (twin, second) = answers
        assert real == twin == "acquired"
        assert isinstance(first, int)
        assert isinstance(second, int)
        assert first > self.tokens[-1][0]
        assert second > self.tokens[-1][1]
        self.tokens.append((first, second))
        self.servers[id] = Server(turn=len(self.tokens) - 1, old=self.servers[id].old)

    @precondition(lambda self: self.status == "pending")
    @rule(id=st.sampled_from(SERVERS))
    def initialise(self, id: str) -> None:
        server = self.servers[id]
        if self.version or server.turn is None or self.status == "running":
            return
        verdict = self.both(
            lambda ledger, place: ledger.initialise(
                token=self.token(server, place),
                manifest={"nbytes": 8},
                record=record(0, state=True),
                dataset_size=24,
                evaluation_size=8,
                total_steps=self.steps,
            )
        )
        if not self.in_force(server):
            assert verdict == "fenced"
        elif self.status != "pending":
            assert verdict == "stopped"
        else:
            assert verdict == "ok"
            self.status = "running"
            server.version, server.chain = 0, GENESIS

    @precondition(lambda self: any(s.turn and s.version < 0 for s in self.servers.values()))
    @rule(id=st.sampled_from(SERVERS), data=st.data())
    def restore(self, id: str, data: Dice | None) -> None:
        """Load a version whose optimizer state is stored, and take the head back to it."""
        server = self.servers[id]
        stored = [v for v, r in self.twin.versions().items() if r.state is not None and v <= self.version]
        if server.turn is None or server.version >= 0 or not stored or self.status == "pending":
            return
        target = max(stored) if data is None else pick(data, sorted(stored))
        opened = self.twin.head().round
        chain = self.chains[target]
        if target != self.version:
            self.may_move = "back" if self.in_force(server) else None

            def rollback() -> Any:
                answers = [
                    ledger.rollback(token=self.token(server, place), version=target, chain=chain)
                    for place, ledger in enumerate((self.real, self.twin))
                ]
                assert answers[0][0] == answers[1][0]
                assert sorted(answers[0][1]) == sorted(answers[1][1])
                return answers[0]

            done, above = rollback() if self.in_force(server) else self.unchanged(rollback)
            assert done == self.in_force(server)
            self.happened[f"rollback {done}"] += 1
            if not done:
                self.servers[id] = Server(old=server.old)
                return
            assert all(version > target for version in above)
            self.both(
                lambda ledger, place: ledger.drop_versions(sorted(above), token=self.token(server, place))
            )
        if opened is not None and self.in_force(server):
            self.close_round(server, target)
        server.version, server.chain = target, chain

    @precondition(lambda self: any(0 <= s.version < self.steps for s in self.servers.values()))
    @rule(id=st.sampled_from(SERVERS))
    def launch(self, id: str) -> None:
        server = self.servers[id]
        if server.version < 0 or server.version >= self.steps or self.in_round(server):
            return
        for step in range(server.version, min(server.version + self.staleness + 1, self.steps)):
            if self.version_for(step) > server.version:
                continue
            for shard in set(range(self.shards)) - self.twin.slots_present(step):
                self.messages.append((step, shard, f"d{next(self.deliveries)}"))

            def mark(step: int = step) -> Any:
                return self.both(
                    lambda ledger, place: ledger.mark_launched(step, token=self.token(server, place))
                )

            if self.in_force(server):
                assert mark() == "ok"
            else:
                assert self.unchanged(mark) == "fenced"

    @precondition(lambda self: any(s.version >= 0 for s in self.servers.values()))
    @rule(id=st.sampled_from(SERVERS))
    def called_back(self, id: str) -> None:
        server = self.servers[id]
        if server.version >= 0:
            self.both(
                lambda ledger, place: ledger.mark_called(server.version, token=self.token(server, place))
            )
            self.both(lambda ledger, _: ledger.called(server.version))

    @precondition(lambda self: len(self.twin.slots_present(self.version)) == self.shards)
    @rule(id=st.sampled_from(SERVERS))
    def apply(self, id: str) -> None:
        """Compute the update of the step that this server believes to be next, if its slots are there."""
        server = self.servers[id]
        step = server.version
        if self.in_round(server) and (self.twin.round().participants or self.version != step):
            return
        slots = self.both(lambda ledger, _: ledger.slots(step)) if 0 <= step < self.steps else {}
        if len(slots) != self.shards or server.draft is not None:
            return
        made = entry(
            step + 1,
            [slots[shard] for shard in range(self.shards)],
            server.chain,
            server=id,
            token=server.turn or 0,
        )
        server.draft = Draft(step, made, record(step + 1, made.chain, nonce=f"p{next(self.deliveries)}"))

    @precondition(lambda self: any(s.draft for s in self.servers.values()))
    @rule(id=st.sampled_from(SERVERS), thrown_away=st.booleans())
    def commit(self, id: str, thrown_away: bool) -> None:
        server = self.servers[id]
        draft = server.draft
        if draft is None:
            return

        def commit() -> Any:
            answers = [
                ledger.commit(
                    step=draft.step,
                    token=self.token(server, place),
                    shards=self.shards,
                    entry=draft.entry,
                    record=draft.record,
                    event={"step": draft.step},
                )
                for place, ledger in enumerate((self.real, self.twin))
            ]
            assert answers[0].verdict == answers[1].verdict
            assert set(answers[0].stored) == set(answers[1].stored)
            assert answers[0].pinned == answers[1].pinned
            return answers[0]

        ready = (
            self.in_force(server)
            and self.version == draft.step
            and self.status == "running"
            and len(self.twin.slots_present(draft.step)) == self.shards
        )
        again = (
            self.in_force(server)
            and self.version == draft.step + 1
            and self.chains[self.version] == draft.record.chain
        )
        if again and self.in_round(server):  # participants were faster
            assert commit().verdict == "ok"
            self.happened["commit of what a participant took"] += 1
            self.close_round(server, draft.step + 1)
            server.version, server.chain, server.draft = draft.step + 1, draft.record.chain, None
            return
        if not ready:
            verdict = self.unchanged(commit).verdict
            self.happened[f"commit {verdict}"] += 1
            assert verdict == "ok" if again else verdict in ("fenced", "stale", "stopped", "incomplete")
            assert self.in_force(server) or verdict == "fenced"
            if not again:
                self.servers[id] = Server(old=server.old)
            return
        self.may_move = "on"
        committed = commit()
        assert committed.verdict == "ok"
        self.happened[f"version {draft.step + 1}"] += 1
        assert {draft.step, draft.step + 1} & set(committed.stored)
        server.version, server.chain = draft.step + 1, draft.record.chain
        server.old.append(draft.record)
        if self.in_round(server):  # nobody has begun it
            self.close_round(server, server.version)
        if thrown_away:
            server.draft = None
        # else the answer was lost and it sends the same commit again later

    @precondition(lambda self: any(server.old for server in self.servers.values()))
    @rule(id=st.sampled_from(SERVERS))
    def publish_state(self, id: str) -> None:
        """Store optimizer state beside the version last committed, perhaps long after being overtaken."""
        server = self.servers[id]
        if not server.old:
            return
        made = server.old[-1]
        with_state = record(made.version, made.chain, state=True, nonce=made.blob.key.rpartition(":")[2])

        def put() -> Any:
            return self.both(
                lambda ledger, place: ledger.put_version(with_state, token=self.token(server, place))
            )

        if self.in_force(server) and made.version == server.version:
            assert put() is True
        elif not self.in_force(server):
            self.happened["state fenced"] += 1
            assert self.unchanged(put) is False

    @rule(id=st.sampled_from(SERVERS))
    def retain(self, id: str) -> None:
        server = self.servers[id]
        stored = sorted(self.twin.versions())
        if self.in_round(server):
            return
        kept = {server.version, server.version - 1, *[v for v in stored if self.twin.version(v).state][-1:]}
        doomed = [v for v in stored if v not in kept]

        def drop() -> Any:
            return self.both(
                lambda ledger, place: ledger.drop_versions(doomed, token=self.token(server, place))
            )

        if self.in_force(server):
            assert drop() is True
        else:
            assert self.unchanged(drop) is False

    @precondition(lambda self: self.twin.slots_present(self.version))
    @rule(id=st.sampled_from(SERVERS), shard=st.integers(0, 2))
    def slot_bytes_are_lost(self, id: str, shard: int) -> None:
        server, step = self.servers[id], self.servers[id].version
        there = self.twin.slots(step).get(shard) if step >= 0 else None
        if there is None or server.draft is not None or self.in_round(server):
            return

        def drop() -> Any:
            return [
                ledger.drop_slot(step, shard, nonce=there.nonce, token=self.token(server, place))
                for place, ledger in enumerate((self.real, self.twin))
            ]

        if self.in_force(server):
            assert drop()[1] == "ok"
        else:
            assert self.unchanged(drop) == ["fenced"] * 2

    @precondition(lambda self: self.version < self.steps)
    @rule(
        turns_ago=st.integers(0, 3),
        what=st.sampled_from(["commit", "rollback", "drop_versions", "put_version"]),
    )
    def a_server_is_wrong(self, turns_ago: int, what: str) -> None:
        """It was overtaken and does not know, or counts a slot that is not there: nothing may change."""
        turn, step = max(0, len(self.tokens) - 1 - turns_ago), self.version
        overtaken = turn < len(self.tokens) - 1
        if not overtaken and (what != "commit" or len(self.twin.slots_present(step)) == self.shards):
            return
        made = entry(step + 1, [slot(step, shard) for shard in range(self.shards)], self.chains[step])

        def act(ledger: Ledger, place: int) -> Any:
            token = self.tokens[turn][place]
            if what == "commit":
                stored = record(step + 1, made.chain, nonce="wrong")
                return ledger.commit(
                    step=step, token=token, shards=self.shards, entry=made, record=stored, event={}
                )
            if what == "rollback":
                return ledger.rollback(token=token, version=0, chain=GENESIS)
            if what == "put_version":
                return ledger.put_version(record(step, nonce="wrong"), token=token)
            return ledger.drop_versions([step], token=token)

        answer = self.unchanged(lambda: self.both(act))
        if what != "commit":
            assert answer in (False, (False, ()))
        elif overtaken:
            assert answer.verdict == "fenced"
        else:
            assert answer.verdict == ("incomplete" if self.status == "running" else "stopped")

    @precondition(lambda self: any(s.turn for s in self.servers.values()))
    @rule(id=st.sampled_from(SERVERS))
    def leave(self, id: str) -> None:
        server = self.servers[id]
        assert self.both(lambda ledger, place: ledger.release(self.token(server, place))) == self.in_force(
            server
        )
        self.servers[id] = Server(old=server.old)

    @precondition(lambda self: any(s.turn for s in self.servers.values()))
    @rule(id=st.sampled_from(SERVERS))
    def crash(self, id: str) -> None:
        self.servers[id] = Server()

    @precondition(lambda self: any(s.version == self.steps for s in self.servers.values()))
    @rule(id=st.sampled_from(SERVERS))
    def finish(self, id: str) -> None:
        server = self.servers[id]
        if server.version != self.steps:
            return
        done, _ = self.both(
            lambda ledger, place: ledger.transition(
                "done", allowed=("running",), event="done", token=self.token(server, place)
            )
        )
        assert done == (self.in_force(server) and self.status == "running")
        if done:
            self.status = "done"
            self.happened["done"] += 1

    @precondition(lambda self: self.version < self.steps)
    @rule(
        id=st.sampled_from(SERVERS),
        client=st.sampled_from(CLIENTS),
        until=st.sampled_from(["written", "applied", "committed", "stored", "stored"]),
    )
    def a_step_goes_well(self, id: str, client: str, until: str) -> None:
        """What usually happens between the mishaps, at once, up to the next one."""
        id = self.a_server_in_force(id)
        server = self.servers[id]
        if self.status != "running" or not 0 <= server.version < self.steps:
            return
        self.launch(id)
        server.draft = None
        for shard in set(range(self.shards)) - self.twin.slots_present(server.version):
            made = slot(server.version, shard, f"n{next(self.deliveries)}", worker=client)
            self.both(lambda ledger, _, made=made: control.write(ledger, server.version, made))
        if until != "written":
            self.apply(id)
        if until in ("committed", "stored"):
            self.commit(id, thrown_away=True)
        if until == "stored":
            self.both(
                lambda ledger, place: ledger.put_version(
                    record(server.version, server.chain, state=True), token=self.token(server, place)
                )
            )

    def a_server_in_force(self, id: str) -> str:
        """The server that holds the run, or `id` after it has taken the run over; the run is running."""
        if self.status in ("paused", "failed"):
            self.a_person_acts("running")
        id = next((id for id, server in self.servers.items() if self.in_force(server)), id)
        if not self.in_force(self.servers[id]):
            owner = self.twin.head().owner
            if owner in self.beating:
                self.heartbeat_ends_or_returns(owner)
            self.acquire(id)
        self.initialise(id)
        if self.in_round(self.servers[id]):
            self.a_server_looks_at_its_round(id, lost=True)
        self.restore(id, None)
        self.promises()
        return id

    def all_goes_well(self) -> None:
        if self.version < self.steps:
            self.a_step_goes_well("s0", "w0", "stored")
        else:
            self.finish(self.a_server_in_force("s0"))

    # --- rounds ---------------------------------------------------------------------------------------

    def close_round(self, server: Server, committed: int) -> None:
        assert self.both(
            lambda ledger, place: ledger.close_round(token=self.token(server, place), committed=committed)
        )

    @precondition(
        lambda self: not self.staleness and any(0 <= s.version < self.steps for s in self.servers.values())
    )
    @rule(id=st.sampled_from(SERVERS), steps=st.integers(2, 6))
    def a_server_opens_a_round(self, id: str, steps: int) -> None:
        server = self.servers[id]
        first, last = server.version, min(server.version + steps, self.steps) - 1
        if not 0 <= first < self.steps or server.draft is not None or self.in_round(server):
            return
        if self.twin.versions().get(first, record(0)).state is None:  # first it stores its optimizer's state
            put = record(first, server.chain, state=True)
            self.both(lambda ledger, place: ledger.put_version(put, token=self.token(server, place)))

        def opened() -> Any:
            return self.both(
                lambda ledger, place: ledger.open_round(first, last, token=self.token(server, place))
            )

        if not self.in_force(server):
            assert self.unchanged(opened) == "fenced"
        elif self.status != "running":
            assert self.unchanged(opened) == "stopped"
        else:
            assert opened() == "ok"

    @precondition(lambda self: self.twin.head().round is not None)
    @rule(id=st.sampled_from(CLIENTS), behind=st.integers(0, 2))
    def a_participant_sits_down(self, id: str, behind: int) -> None:
        """With the present version; or with one that it held, and slept."""
        state = self.twin.round()
        if id not in self.players and state is not None:
            version = max(state.first, self.version - behind) if self.version >= state.first else self.version
            self.players[id] = Player(len(self.tokens) - 1, version, self.chains[version], state.first)

    def seat(self, id: str, place: int) -> Seat:
        player = self.players[id]
        return Seat(id, "memory", self.tokens[player.turn][place], player.first, "life", 2)

    def fenced(self, player: Player) -> bool:
        head, state = self.twin.head(), self.twin.round()
        token = self.tokens[player.turn][1]
        if head.round is None or state is None or state.first != player.first:
            return True
        return not head.token == state.token == token

    @precondition(lambda self: self.players)
    @rule(
        data=st.data(),
        pure=st.sampled_from([True] * 9 + [False]),
        late=st.sampled_from([None, None, None, -1.0]),
        waits=st.booleans(),
    )
    def a_participant_takes_its_turn(self, data: Dice, pure: bool, late: float | None, waits: bool) -> None:
        """It does what it was told, and says so."""
        id = pick(data, sorted(self.players))
        player, last = self.players[id], self.twin.head().round
        more: dict[str, Any] = {"late_seconds": late}
        first = False
        if player.told.verdict == "compute":
            there = player.told.shard in self.twin.slots_present(player.version)
            changes = {} if pure or not there else {"digest": digest("other")}
            nonce = f"n{next(self.deliveries)}"
            more["slot"] = slot(player.version, player.told.shard, nonce, worker=id, **changes)
        elif player.told.verdict == "complete":
            slots = [player.told.slots[shard] for shard in range(self.shards)]
            player.version += 1
            wrong = not pure and self.version >= player.version
            made = entry(player.version, slots, player.chain, server=id)
            if wrong:
                made = entry(player.version, slots, player.chain, server=id, parameters=digest("wrong"))
            player.chain = made.chain
            more["report"] = Report(made, {"step": player.version - 1}, self.shards)
            first = self.reports_first(player)
            self.may_move = "on" if first else None
        elif player.told.verdict == "end":
            self.a_participant_ends(id)
            return
        elif waits and self.kind is Ledger:
            more["wait_seconds"] = 0.001
        shards = self.shards if last is not None and player.version <= last else 0

        def turn() -> Turn:
            answers = [
                ledger.turn(self.seat(id, place), player.version, shards=shards, **more)
                for place, ledger in enumerate((self.real, self.twin))
            ]
            if self.kind is Stammering and answers[1].reported == "first":
                assert answers[0].reported == "same"
                answers[0] = replace(answers[0], reported="first")
            assert answers[0] == answers[1]
            return answers[1]

        fenced = self.fenced(player)
        self.happened[f"turn {player.told.verdict}"] += 1
        player.told = self.unchanged(turn) if fenced else turn()
        assert (player.told.verdict == "fenced") == fenced
        assert (player.told.reported == "first") == first
        self.happened[f"told {player.told.verdict}"] += 1
        if player.told.verdict in ("fenced", "stopped", "behind", "divergent", "diverged"):
            del self.players[id]

    def reports_first(self, player: Player) -> bool:
        """Whether the version that a participant has made is to be the head."""
        before, state = player.version - 1, self.twin.round()
        return (
            not self.fenced(player)
            and self.status in ("running", "paused")
            and self.version == before
            and len(self.twin.slots_present(before)) == self.shards
            and state is not None
            and state.published != before
        )

    def a_participant_ends(self, id: str) -> None:
        player = self.players[id]
        put = record(player.version, player.chain, state=True) if player.publishes else None

        def end() -> str:
            return self.both(
                lambda ledger, place: ledger.end_round(self.seat(id, place), player.version, record=put)
            )

        answer = self.unchanged(end) if self.fenced(player) else end()
        self.happened[f"end {answer}"] += 1
        if answer == "publish":
            player.publishes = True
        elif answer != "wait":
            del self.players[id]

    @precondition(lambda self: self.players)
    @rule(data=st.data(), how=st.sampled_from(["dies", "leaves", "leaves the round"]))
    def a_participant_goes(self, data: Dice, how: str) -> None:
        id = pick(data, sorted(self.players))
        player = self.players[id]
        if how == "leaves":
            self.both(
                lambda ledger, place: ledger.end_round(self.seat(id, place), player.version, leaving=True)
            )
        if how == "leaves the round":
            self.both(lambda ledger, place: ledger.leave_round(id))
        del self.players[id]

    @precondition(lambda self: self.twin.head().round is not None)
    @rule(id=st.sampled_from(SERVERS), lost=st.booleans())
    def a_server_looks_at_its_round(self, id: str, lost: bool) -> None:
        """It goes on from what was stored; or, if that is lost, takes the run over anew."""
        server, state = self.servers[id], self.twin.round()
        if not self.in_round(server):
            return
        served = state is not None and state.token == self.tokens[-1][1]
        if served and state.published == self.version and state.disputed is None:
            self.happened["round adopted"] += 1
            server.version, server.chain, server.draft = self.version, self.chains[self.version], None
            self.close_round(server, self.version)
        elif lost:
            self.happened["round lost"] += 1
            if state is not None and state.disputed is not None:
                self.happened["round disputed"] += 1
                self.both(lambda ledger, _: ledger.forget_expected(state.disputed))
            self.acquire(id)
            self.restore(id, None)

    @precondition(lambda self: not self.staleness and self.version < self.steps)
    @rule(id=st.sampled_from(SERVERS), turns=st.integers(1, 40), data=st.data())
    def a_round_goes_well(self, id: str, turns: int, data: Dice) -> None:
        """What usually happens in one, at once, up to some mishap."""
        id = self.a_server_in_force(id)
        self.servers[id].draft = None
        if self.status != "running" or not 0 <= self.servers[id].version < self.steps:
            return
        self.players.clear()
        self.a_server_opens_a_round(id, 5)
        for client in CLIENTS[:2]:
            self.a_participant_sits_down(client, 0)
        for _ in range(turns):
            if self.players:
                self.a_participant_takes_its_turn(data, True, None, False)
                self.promises()

    # --- people, evaluations ------------------------------------------------------------------------------

    @rule(status=st.sampled_from(["paused", "running"]))
    def a_person_acts(self, status: str) -> None:
        allowed = ("pending", "running") if status == "paused" else ("paused", "failed")
        if status == "running" and self.twin.head().total_steps is None:
            status = "pending"
        done, before = self.both(
            lambda ledger, _: ledger.transition(status, allowed=allowed, event=status, error=None)
        )
        assert (done, before) == (self.status in allowed, self.status)
        if done:
            self.status = status

    @rule(version=st.integers(0, 3), parts=st.integers(1, 2))
    def an_evaluation_begins(self, version: int, parts: int) -> None:
        answers = [
            ledger.launch_evaluation(version, parts, pin_seconds=60) for ledger in (self.real, self.twin)
        ]
        assert answers[0] == answers[1] or self.kind is Stammering

    @precondition(lambda self: self.twin.pending_evaluations())
    @rule(data=st.data(), part=st.integers(0, 1))
    def a_part_is_evaluated(self, data: Dice, part: int) -> None:
        version, parts = pick(data, sorted(self.twin.pending_evaluations().items()))
        verdict, values = self.both(
            lambda ledger, _: ledger.write_part(version, min(part, parts - 1), {"part": part}, parts=parts)
        )
        if verdict == "complete" and pick(data, (True, False)):
            for ledger in (self.real, self.twin):
                ledger.record_evaluation(version, {"loss": float(len(values))})

    @precondition(lambda self: self.twin.pending_evaluations())
    @rule(data=st.data(), under_way=st.booleans())
    def an_evaluation_is_given_up(self, data: Dice, under_way: bool) -> None:
        pending = self.twin.pending_evaluations()
        version = pick(data, sorted(pending)) if under_way else max(pending) + 1
        answers = [ledger.abandon_evaluation(version, "lost") for ledger in (self.real, self.twin)]
        assert answers == [under_way, under_way] or self.kind is Stammering

    @rule(status=st.just("again"))
    def the_same_name_is_submitted_again(self, status: str) -> None:
        answer = self.unchanged(lambda: self.both(lambda ledger, _: ledger.create(SPEC, incarnation=status)))
        assert answer == SPEC

    # --- what must hold after each of them ------------------------------------------------------------

    @invariant()
    def promises(self) -> None:
        if self.plane.get(self.twin.keys.head) is not None:
            self.the_head_moves_by_one_or_back()
            self.the_twin_equals_the_real_one()
            self.each_shard_is_applied_exactly_once()
            self.the_steps_behind_the_head_hold_no_work()

    def the_twin_equals_the_real_one(self) -> None:
        names = [name for name in memory_state(self.plane) if "{" in name]
        state = redis_state(self.client, [*names, keys.ACTIVE])
        active = {run for run in state.pop(keys.ACTIVE, set()) if run == self.real.run}
        assert bool(active) == (self.real.run in self.twin_registry.active_runs())
        assert bool(active) == (self.status in ("pending", "running"))
        twin = {name: value for name, value in memory_state(self.plane).items() if name in names}
        assert comparable(twin, counters=self.counters) == comparable(state, counters=self.counters)
        assert int(state[self.real.keys.head]["token"]) == self.tokens[-1][0]

    def the_head_moves_by_one_or_back(self) -> None:
        head = self.twin.head()
        before, self.last = self.last, (head.version, head.chain)
        allowed, self.may_move = self.may_move, None
        assert head.status == self.status
        if self.last == before:
            return
        if head.version == before[0] + 1:
            assert allowed == "on"
            assert self.chains.setdefault(head.version, head.chain) == head.chain, (
                "a replay gave another result"
            )
        else:
            assert head.version < before[0]
            assert allowed == "back"
            assert head.chain == self.chains[head.version]

    def each_shard_is_applied_exactly_once(self) -> None:
        entries = self.twin.entries()
        assert [e.version for e in entries] == list(range(1, self.version + 1))
        chain = GENESIS
        for made in entries:
            assert [s.shard for s in made.slots] == list(range(self.shards))
            assert [s.digest for s in made.slots] == [
                slot(made.version - 1, shard).digest for shard in range(self.shards)
            ]
            assert made.previous == chain
            assert made.computed_chain() == made.chain == self.chains[made.version]
            assert made.computed_seal() == made.seal
            chain = made.chain
        assert entries == [] or self.twin.head().chain == chain

    def the_steps_behind_the_head_hold_no_work(self) -> None:
        kept = KEPT_STEPS if self.twin.head().round is not None else 0
        for step in range(self.version):
            assert step >= self.version - kept or not self.twin.slots_present(step)
            assert not self.twin.leases(step)

    def every_key_has_a_ttl(self) -> None:
        names = list(self.client.scan_iter(match=f"{self.real.keys.root}:*", count=1000))
        assert set(names) <= set(self.plane.names()), "keys that the twin does not have"
        forever = [name for name in names if self.client.ttl(name) == -1]
        assert not forever, f"keys without a TTL: {forever}"

    def teardown(self) -> None:
        try:
            self.every_key_has_a_ttl()
        finally:
            self.client.delete(*self.client.scan_iter(match=f"{self.real.keys.root}:*", count=1000))
            self.client.srem(keys.ACTIVE, self.real.run)


class Stuttering(Protocol):
    """The same, with each script sent twice to the real server: only counters may tell."""

    kind = Stammering
    counters = False


MACHINES = pytest.mark.parametrize("machine", [Protocol, Stuttering], ids=["once", "sent-twice"])


@pytest.mark.slow
@MACHINES
def test_any_interleaving_keeps_the_promises(redis_url: str, machine: type[Protocol]) -> None:
    """Short ones, which hypothesis chooses and, when one fails, makes shorter."""
    with connect(redis_url) as machine.client:
        machine.url = redis_url
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=40,
                stateful_step_count=40,
                deadline=None,
                derandomize=True,
                suppress_health_check=list(HealthCheck),
            ),
        )


def moves(walk: Protocol, dice: random.Random) -> list[Callable[[], None]]:
    """Every rule of the machine that can be played now, with arguments by the dice."""
    server = dice.choice(SERVERS)
    client = dice.choice([id for id in CLIENTS if id not in walk.work] or CLIENTS)
    found: list[Callable[[], None]] = [
        lambda: walk.heartbeat_ends_or_returns(dice.choice(CLIENTS + SERVERS)),
        lambda: walk.a_message_comes_from_anywhere(dice.choice([-2, -1, 0, 0, 0, 1]), dice.randrange(3)),
        lambda: walk.a_server_takes_over(server, dice.choice(["own", "own", "shared"]), dice),
        lambda: walk.initialise(server),
        lambda: walk.restore(server, dice),
        lambda: walk.launch(server),
        lambda: walk.called_back(server),
        lambda: walk.apply(server),
        lambda: walk.commit(server, dice.random() < 0.5),
        lambda: walk.publish_state(server),
        lambda: walk.retain(server),
        lambda: walk.slot_bytes_are_lost(server, dice.randrange(3)),
        lambda: walk.leave(server),
        lambda: walk.crash(server),
        lambda: walk.a_person_acts(dice.choice(["paused", "running", "running"])),
        lambda: walk.an_evaluation_begins(dice.randrange(walk.steps + 1), dice.randint(1, 2)),
        lambda: walk.the_same_name_is_submitted_again("again"),
    ]
    if walk.messages:
        found += [lambda: walk.a_client_begins(dice, client, dice.random() < 0.5, dice.random() < 0.4)] * 8
    if walk.work:
        found += [lambda: walk.a_client_writes(dice, dice.random() < 0.9)] * 5
        found += [lambda: walk.a_client_gives_up(dice, dice.random() < 0.5, dice.random() < 0.5)]
        found += [lambda: walk.a_client_fails(dice)]
    if walk.version < walk.steps:
        until = dice.choice(["written", "applied", "applied", "committed", "stored"])
        found += [lambda: walk.a_step_goes_well(server, client, until)] * 2
        wrong = dice.choice(["commit", "rollback", "drop_versions", "put_version"])
        found += [lambda: walk.a_server_is_wrong(dice.randrange(4), wrong)]
    if not walk.staleness:
        found += [lambda: walk.a_server_opens_a_round(server, dice.randint(2, 6))]
        if walk.version < walk.steps:
            found += [lambda: walk.a_round_goes_well(server, dice.randint(1, 40), dice)]
    if walk.twin.head().round is not None:
        found += [lambda: walk.a_participant_sits_down(dice.choice(CLIENTS), dice.choice([0, 0, 1, 2]))] * 2
        found += [lambda: walk.a_server_looks_at_its_round(server, dice.random() < 0.2)]
    if walk.players:
        late = dice.choice([None, None, -1.0])
        found += [
            lambda: walk.a_participant_takes_its_turn(dice, dice.random() < 0.9, late, dice.random() < 0.3)
        ] * 12
        how = dice.choice(["dies", "leaves", "leaves the round"])
        found += [lambda: walk.a_participant_goes(dice, how)]
    if walk.twin.pending_evaluations():
        found += [lambda: walk.a_part_is_evaluated(dice, dice.randrange(2))]
    return found


def walk(machine: type[Protocol], seed: int, steps: int = 350) -> Counter[str]:
    """One long interleaving; then the mishaps cease, and the run must come to its end."""
    dice = random.Random(seed)
    played = machine()
    played.submit(shards=dice.randint(1, 3), steps=12, staleness=seed % 2)
    try:
        for _ in range(steps):
            dice.choice(moves(played, dice))()
            played.promises()
        played.every_key_has_a_ttl()
        for _ in range(60):
            played.all_goes_well()
            played.promises()
        assert played.status == "done"
    finally:
        played.teardown()
    return played.happened


@pytest.mark.slow
@MACHINES
def test_long_walks_end_well(redis_url: str, machine: type[Protocol]) -> None:
    happened: Counter[str] = Counter()
    with connect(redis_url) as machine.client:
        machine.url = redis_url
        for seed in range(4):
            happened += walk(machine, seed)
    assert any(what.startswith("write -") for what in happened), f"the walks are too tame: {happened}"
    needed = {"commit fenced", "rollback True", "state fenced", "write +0 second"}
    needed |= {"told fenced", "end publish", "end over", "round adopted", "round lost"}
    assert needed <= set(happened), f"the walks are too tame: {happened}"


MUTANTS = {
    "commit without the token": ("commit", "~= tonumber(ARGV[2]) then", "== nil then"),
    "commit of an incomplete step": ("commit", "~= tonumber(ARGV[3]) then", "== -1 then"),
    "commit keeps the slots": ("commit", "redis.call('DEL', KEYS[2], KEYS[3])", ""),
    "rollback without the token": ("rollback", "~= tonumber(ARGV[1]) then", "== nil then"),
    "state without the token": ("put_version", "~= tonumber(ARGV[1]) then", "== nil then"),
    "a slot is overwritten": ("write_slot", "'HSETNX'", "'HSET'"),
    "a late slot is written": ("write_slot", "step < version", "false"),
    "a late shard begins": ("begin_shard", "step < version", "false"),
    "a held shard begins": (
        "begin_shard",
        "lease['open'] and redis.call('EXISTS'",
        "false and redis.call('EXISTS'",
    ),
    "a slot is overwritten in a round": ("take_turn", "'HSETNX', KEYS[3]", "'HSET', KEYS[3]"),
    "a live participant's shard is free": (
        "take_turn",
        "redis.call('EXISTS', ARGV[4] .. lease['worker']) == 0",
        "true",
    ),
    "leases outlive a report": ("take_turn", "redis.call('DEL', KEYS[9], KEYS[10])", ""),
    "slots live for ever": ("write_slot", "redis.call('EXPIRE', KEYS[2], ARGV[6])", ""),
}


@pytest.mark.parametrize("mutant", sorted(MUTANTS))
def test_a_script_with_a_fault_is_found(redis_url: str, monkeypatch: pytest.MonkeyPatch, mutant: str) -> None:
    script, old, new = MUTANTS[mutant]
    changed = source(script).replace(old, new)
    assert changed != source(script)
    monkeypatch.setattr(fast_client, "source", lambda name: changed if name == script else source(name))
    monkeypatch.setattr(fast_client, "_digest", fast_client._digest.__wrapped__)  # without its memory
    with connect(redis_url) as Protocol.client:
        Protocol.url = redis_url
        with pytest.raises(AssertionError):
            for seed in range(20):
                walk(Protocol, seed)
