"""The protocol as an abstract model, explored exhaustively: every interleaving of every actor.

The model has steps x shards, Clients, training servers and a supervisor. Its state is what the
scripts keep (head, slots, leases, `launched`, token) and where each actor stands. Each script is
one move; between two moves of an actor anything may happen, for any length of time.

Messages are modelled by their worst case. Any Client may begin any shard of any step, and any
server may be asked to advance, at any time: that covers every duplicate, every early, late or
misdirected message, and every callback of the chord. For liveness no message counts but the
supervisor's own: that covers every loss. An actor may die at any point (a new one takes its
place), be paused for any time (it does nothing until it does), or have its lease expire while it
lives (another acquires).

Safety: each step is applied exactly once, from all its slots, in order, by the holder of the token;
what a server read is what is in the slots when it commits; nothing is left behind a committed step.
Liveness: from every reachable state the supervisor's messages lead to "done", with all actors alive
as well as with one Client and one server that survive all others.

Both checks are then run on protocols with one rule broken, and must find each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest

NOBODY = -1
GONE = 9  # a lease that was closed, or whose worker died

COLD, ACQUIRED, WARM, DRAFTED, COMMITTED = "cold", "acquired", "warm", "drafted", "committed"


class Server(NamedTuple):
    """Where a training server stands: what it is at, the version it holds, whether its draft is outdated."""

    at: str = COLD
    version: int = NOBODY
    outdated: bool = False


class State(NamedTuple):
    """One state of the whole system."""

    version: int = 0  # the head
    done: bool = False
    slots: int = 0  # bit step * shards + shard
    leases: tuple[int, ...] = ()  # a Client's number, NOBODY or GONE
    launched: bool = False  # whether that of every step that may be computed is recorded
    restorable: int = 0  # the newest version whose optimizer state is stored
    owner: int = NOBODY  # the server that acquired last: the only one whose token is in force
    servers: tuple[Server, ...] = ()
    clients: tuple[int, ...] = ()  # the slot that a Client computes, or NOBODY; see Sums
    lost: int = 0  # bit as in slots: the slot is written and its bytes are gone
    round: object = None  # see test_rounds_model.py


class Violation(AssertionError):
    """A promise was broken; the message has the moves that led there."""


class Move(NamedTuple):
    """One atomic step of one actor.

    Attributes:
        helps: it needs neither a mishap nor any message but the supervisor's.
        broken: the promise that it breaks, "" if none.
    """

    name: str
    state: State
    helps: bool = False
    broken: str = ""


@dataclass(frozen=True)
class Protocol:
    """The protocol, with switches that break one rule each."""

    steps: int = 2
    shards: int = 2
    clients: int = 2
    servers: int = 2
    staleness: int = 0
    checks_token: bool = True
    checks_version: bool = True
    checks_complete: bool = True
    rollback_checks_token: bool = True
    restore_rolls_back: bool = True
    first_writer_wins: bool = True
    refuses_late_slots: bool = True
    commit_deletes_slots: bool = True
    supervisor_resends: bool = True
    supervisor_takes_over: bool = True
    supervisor_calls_idle: bool = True
    supervisor_trusts_leases: bool = False
    launch_is_recorded: bool = True

    def start(self) -> State:
        """A run that was submitted and initialised; nobody serves it."""
        return State(
            leases=(NOBODY,) * (self.steps * self.shards),
            servers=(Server(),) * self.servers,
            clients=(NOBODY,) * self.clients,
        )

    # --- small things -----------------------------------------------------------------------------

    def mask(self, step: int) -> int:
        """The slots of a step."""
        return ((1 << self.shards) - 1) << (step * self.shards) if step < self.steps else 0

    def early(self, state: State, step: int) -> bool:
        """Whether the version that a step is computed at is not there yet."""
        return max(0, step - self.staleness) > state.version

    def complete(self, state: State, step: int) -> bool:
        """Whether every slot of a step is there."""
        return state.slots & self.mask(step) == self.mask(step)

    def behind(self, state: State) -> int:
        """The slots of committed steps that nobody reads any more."""
        return state.slots & ((1 << state.version * self.shards) - 1)

    def survivors(self, state: State, client: int, server: int) -> State:
        """A state in which every Client but one and every server but one have died for good."""
        return state._replace(
            clients=(state.clients[client],),
            servers=(state.servers[server],),
            owner=0 if state.owner == server else NOBODY,
            leases=tuple(
                holder if holder in (NOBODY, GONE) else 0 if holder == client else GONE
                for holder in state.leases
            ),
        )

    def moves(self, state: State) -> Iterator[Move]:
        """Everything that can happen next."""
        for number in range(self.servers):
            yield from self.server_moves(state, number)
        for number in range(self.clients):
            yield from self.client_moves(state, number)

    # --- training servers -------------------------------------------------------------------------

    def server_moves(self, state: State, number: int) -> Iterator[Move]:
        """Moves of one server."""
        me, mine = state.servers[number], state.owner == number

        def put(server: Server, **changes: object) -> State:
            servers = (*state.servers[:number], server, *state.servers[number + 1 :])
            return state._replace(servers=servers, **changes)  # type: ignore[arg-type]

        if me.at != COLD or mine:
            yield Move(f"server {number} dies", put(Server(), owner=NOBODY if mine else state.owner))
        if me.at in (COLD, WARM) and not state.done:
            yield from self.advance(state, number, put)
        elif me.at == ACQUIRED:
            yield from self.restore(state, number, put)
        elif me.at == DRAFTED:
            yield from self.commit(state, number, put)
        elif me.at == COMMITTED:
            # The chord is published; its messages count for nothing here (see the module's docstring).
            warm = Server(WARM, me.version)
            if not mine:
                yield Move(f"server {number} is fenced", put(Server()), True)
                return
            launched = state.launched or self.launch_is_recorded
            yield Move(f"server {number} launches step {me.version}", put(warm, launched=launched), True)
            if state.restorable < me.version:  # and its optimizer state is stored beside
                yield Move(
                    f"server {number} launches and stores state {me.version}",
                    put(warm, launched=launched, restorable=me.version),
                    True,
                )

    def advance(self, state: State, number: int, put: object) -> Iterator[Move]:
        """A message asks a server for whatever comes next."""
        assert callable(put)
        me, mine = state.servers[number], state.owner == number
        if not (me.at == WARM and mine and me.version == state.version):
            helps = self.supervisor_takes_over and (state.owner == NOBODY or mine)
            yield Move(f"server {number} acquires", put(Server(ACQUIRED), owner=number), helps)
        elif state.version == self.steps:
            yield Move(f"server {number} finishes", put(me, done=True), self.supervisor_calls_idle)
        elif self.complete(state, state.version) or not self.checks_complete:
            yield Move(
                f"server {number} applies step {state.version}",
                put(Server(DRAFTED, me.version)),
                self.supervisor_calls_idle and self.complete(state, state.version),
            )
        elif not state.launched:
            yield Move(
                f"server {number} begins to launch",
                put(Server(COMMITTED, me.version)),
                self.supervisor_calls_idle,
            )

    def restore(self, state: State, number: int, put: object) -> Iterator[Move]:
        """Load the newest version with optimizer state, and roll the head back to it."""
        assert callable(put)
        mine = state.owner == number
        base = state.restorable
        if base == state.version or not self.restore_rolls_back:
            yield Move(f"server {number} restores version {base}", put(Server(WARM, base)), True)
        elif mine or not self.rollback_checks_token:
            broken = "" if mine else "a fenced server took the head back"
            warm = put(Server(WARM, base), version=base, launched=False)
            yield Move(f"server {number} rolls back to version {base}", warm, True, broken)
        else:
            yield Move(f"server {number} is fenced", put(Server()), True)

    def commit(self, state: State, number: int, put: object) -> Iterator[Move]:
        """Compare and swap the head."""
        assert callable(put)
        me, mine, step = state.servers[number], state.owner == number, state.servers[number].version
        whole = self.complete(state, step)
        refused = (
            (self.checks_token and not mine)
            or (self.checks_version and state.version != step)
            or (self.checks_complete and not whole)
        )
        if refused:
            yield Move(f"server {number} is refused", put(Server()), True)
            return
        broken = ""
        if not mine:
            broken = "a fenced server committed"
        elif state.version != step:
            broken = f"step {step} was applied to version {state.version}"
        elif not whole:
            broken = f"step {step} was applied without all its slots"
        elif me.outdated:
            broken = f"step {step} was applied from other bytes than its slots hold"
        leases = tuple(
            NOBODY if unit // self.shards == step else lease for unit, lease in enumerate(state.leases)
        )
        slots = state.slots & ~self.mask(step) if self.commit_deletes_slots else state.slots
        lost = state.lost & ~self.mask(step)
        after = Server(COMMITTED if step + 1 < self.steps else WARM, step + 1)
        yield Move(
            f"server {number} commits version {step + 1}",
            put(after, version=step + 1, slots=slots, lost=lost, leases=leases, launched=False),
            True,
            broken,
        )

    # --- Clients ----------------------------------------------------------------------------------

    def client_moves(self, state: State, number: int) -> Iterator[Move]:
        """Moves of one Client."""
        at = state.clients[number]

        def put(at: int, **changes: object) -> State:
            clients = (*state.clients[:number], at, *state.clients[number + 1 :])
            return state._replace(clients=clients, **changes)  # type: ignore[arg-type]

        def lease(unit: int, holder: int) -> tuple[int, ...]:
            return (*state.leases[:unit], holder, *state.leases[unit + 1 :])

        dead = tuple(GONE if holder == number else holder for holder in state.leases)
        if at != NOBODY or dead != state.leases:
            yield Move(f"client {number} dies", put(NOBODY, leases=dead))
        if at == NOBODY:
            if state.done:
                return
            for unit in range(state.version * self.shards, self.steps * self.shards):
                if not self.early(state, unit // self.shards) and self.possible(state, unit):
                    helps = self.sent_again(state, unit)
                    yield Move(
                        f"client {number} begins slot {unit}", put(unit, leases=lease(unit, number)), helps
                    )
            return
        yield from self.write(state, number, at, put)
        closed = lease(at, GONE) if state.leases[at] == number else state.leases
        yield Move(f"client {number} hands slot {at} back", put(NOBODY, leases=closed))
        yield Move(f"client {number} forgets slot {at}", put(NOBODY))  # and could not even say so

    def possible(self, state: State, unit: int) -> bool:
        """Whether who begins a slot is told to compute it, its step being under way."""
        return not state.slots >> unit & 1

    def sent_again(self, state: State, unit: int) -> bool:
        """Whether the supervisor sends a missing shard of a step under way (again)."""
        if not self.supervisor_resends:
            return False
        if not state.launched:
            return False
        holder = state.leases[unit]
        if holder in (NOBODY, GONE):
            return True
        return not self.supervisor_trusts_leases and state.clients[holder] != unit

    def write(self, state: State, number: int, unit: int, put: object) -> Iterator[Move]:
        """Store the bytes and write the slot."""
        assert callable(put)
        step, there = unit // self.shards, bool(state.slots >> unit & 1)
        late = step < state.version
        if state.done or (late and self.refuses_late_slots) or self.early(state, step):
            yield Move(f"client {number} is late or early with slot {unit}", put(NOBODY), True)
        elif there and self.first_writer_wins:
            yield Move(f"client {number} is a duplicate at slot {unit}", put(NOBODY), True)
        else:
            servers = tuple(
                s._replace(outdated=True) if there and s.at == DRAFTED and s.version == step else s
                for s in state.servers
            )
            broken = f"slot {unit} was written after its step was committed" if late else ""
            leases = (*state.leases[:unit], NOBODY, *state.leases[unit + 1 :])  # of no use any more
            after = put(NOBODY, slots=state.slots | 1 << unit, servers=servers, leases=leases)
            yield Move(f"client {number} writes slot {unit}", after, True, broken)

    # --- symmetry ---------------------------------------------------------------------------------

    def canonical(self, state: State) -> State:
        """The same state up to what means nothing: the names of servers and Clients and the order of
        a step's shards; and a warm model under a token that is no longer in force, which is not used."""
        servers = tuple(
            Server() if server.at == WARM and number != state.owner else server
            for number, server in enumerate(state.servers)
        )
        owner = state.owner
        if self.servers == 2 and (servers[1], owner == 1) < (servers[0], owner == 0):
            servers, owner = servers[::-1], owner if owner == NOBODY else 1 - owner
        slots, leases, clients = state.slots, state.leases, state.clients
        if self.clients == 2 and self._place(leases, clients, 1) < self._place(leases, clients, 0):
            leases = tuple(1 - holder if holder in (0, 1) else holder for holder in leases)
            clients = clients[::-1]
        if self.shards == 2 and type(self) is Protocol:
            for step in range(self.steps):
                one, two = 2 * step, 2 * step + 1
                if self._look(slots, leases, clients, two) < self._look(slots, leases, clients, one):
                    bits = slots >> one & 3
                    slots ^= (bits ^ (bits >> 1 | (bits & 1) << 1)) << one
                    leases = (*leases[:one], leases[two], leases[one], *leases[two + 1 :])
                    clients = tuple(two if c == one else one if c == two else c for c in clients)
        return state._replace(servers=servers, owner=owner, slots=slots, leases=leases, clients=clients)

    @staticmethod
    def _place(leases: tuple[int, ...], clients: tuple[int, ...], number: int) -> tuple[object, ...]:
        """How a Client looks from outside."""
        return clients[number], [holder == number for holder in leases]

    @staticmethod
    def _look(slots: int, leases: tuple[int, ...], clients: tuple[int, ...], unit: int) -> tuple[object, ...]:
        """How a slot looks from outside."""
        return slots >> unit & 1, leases[unit], [client == unit for client in clients]


READ, DELETING = 50, 90  # added to the slot of a sum: its inputs are added up; it is written, they go next


@dataclass(frozen=True)
class Sums(Protocol):
    """The protocol where the last slot of each step is the sum of the others, and bytes may be lost.

    A Client at a sum reads its inputs (one that is lost it opens again), writes the sum, and deletes
    the inputs' bytes; between these, too, anything may happen. The training server reads the sum alone.
    """

    supervisor_resends_sums: bool = True
    lost_inputs_are_opened: bool = True
    lost_sums_are_opened: bool = True

    def inputs(self, unit: int) -> int:
        """The slots that a sum is made from; none for a shard."""
        whole, step = self.mask(unit // self.shards), unit // self.shards
        return whole & ~(1 << unit) if unit == (step + 1) * self.shards - 1 else 0

    def possible(self, state: State, unit: int) -> bool:
        """A sum's message may come at any time; whoever finds an input missing ends at once."""
        inputs = self.inputs(unit)
        return super().possible(state, unit) and state.slots & inputs == inputs

    def moves(self, state: State) -> Iterator[Move]:
        """And bytes are lost."""
        yield from super().moves(state)
        for unit in range(state.version * self.shards, self.steps * self.shards):
            bit = 1 << unit
            if state.slots & bit and not state.lost & bit and not state.done:
                yield Move(f"the bytes of slot {unit} are lost", state._replace(lost=state.lost | bit))

    def advance(self, state: State, number: int, put: object) -> Iterator[Move]:
        """A training server that finds the sum's bytes gone opens the step's slots."""
        assert callable(put)
        me, root = state.servers[number], 1 << ((state.version + 1) * self.shards - 1)
        serves = me.at == WARM and state.owner == number and me.version == state.version
        whole = state.version < self.steps and self.complete(state, state.version)
        if not (serves and whole and state.lost & root):
            yield from super().advance(state, number, put)
        elif self.lost_sums_are_opened:
            gone = self.mask(state.version)
            opened = put(me, slots=state.slots & ~gone, lost=state.lost & ~gone, launched=False)
            yield Move(f"server {number} opens step {state.version}", opened, True)

    def sent_again(self, state: State, unit: int) -> bool:
        """A sum is sent (again) once its inputs are there."""
        holder = state.leases[unit]
        if holder not in (NOBODY, GONE) and state.clients[holder] in (unit, unit + READ):
            return False
        return super().sent_again(state, unit) and (self.supervisor_resends_sums or not self.inputs(unit))

    def client_moves(self, state: State, number: int) -> Iterator[Move]:
        """A Client that has added up, or written a sum."""
        at = state.clients[number]
        if at < READ:
            yield from super().client_moves(state, number)
            return

        def put(at: int, **changes: object) -> State:
            clients = (*state.clients[:number], at, *state.clients[number + 1 :])
            return state._replace(clients=clients, **changes)  # type: ignore[arg-type]

        dead = tuple(GONE if holder == number else holder for holder in state.leases)
        yield Move(f"client {number} dies", put(NOBODY, leases=dead))
        unit = at - (DELETING if at >= DELETING else READ)
        step = unit // self.shards
        if at >= DELETING:
            there = self.inputs(unit) & state.slots
            yield Move(
                f"client {number} deletes what {unit} is made from",
                put(NOBODY, lost=state.lost | there),
                True,
            )
        elif state.done or step < state.version or state.slots >> unit & 1:
            yield Move(f"client {number} is late or a duplicate at sum {unit}", put(NOBODY), True)
        else:
            leases = (*state.leases[:unit], NOBODY, *state.leases[unit + 1 :])
            after = put(unit + DELETING, slots=state.slots | 1 << unit, leases=leases)
            yield Move(f"client {number} writes sum {unit}", after, True)

    def write(self, state: State, number: int, unit: int, put: object) -> Iterator[Move]:
        """A shard is written as ever; a sum is added up first."""
        assert callable(put)
        inputs = self.inputs(unit)
        if not inputs:
            for move in super().write(state, number, unit, put):
                fresh = move.state.slots & ~state.slots
                above = 1 << ((unit // self.shards + 1) * self.shards - 1)
                spare = fresh if state.slots & above else 0  # its sum is made: the bytes are deleted
                yield move._replace(state=move.state._replace(lost=move.state.lost | spare))
            return
        closed = tuple(GONE if n == unit and h == number else h for n, h in enumerate(state.leases))
        gone = inputs & state.slots & state.lost
        if state.done or unit // self.shards < state.version or state.slots >> unit & 1:
            yield Move(f"client {number} is late or a duplicate at sum {unit}", put(NOBODY), True)
        elif gone and self.lost_inputs_are_opened:
            leases = tuple(NOBODY if gone >> n & 1 else h for n, h in enumerate(closed))
            opened = put(NOBODY, slots=state.slots & ~gone, lost=state.lost & ~gone, leases=leases)
            yield Move(f"client {number} opens lost inputs of {unit}", opened, True)
        elif gone or state.slots & inputs != inputs:
            yield Move(f"client {number} finds no input of {unit}", put(NOBODY, leases=closed), True)
        else:
            yield Move(f"client {number} adds up {unit}", put(unit + READ), True)


# --- the explorer ---------------------------------------------------------------------------------


@dataclass
class Exploration:
    """All reachable states of a protocol."""

    protocol: Protocol
    came_from: dict[State, tuple[State | None, str]]
    helped_by: dict[State, list[State]]

    def trace(self, state: State) -> str:
        """The moves that lead to a state."""
        names = []
        here: State | None = state
        while here is not None:
            here, name = self.came_from[here]
            names.append(name)
        return "\n".join(reversed(names))

    def stuck(self) -> list[State]:
        """The states from which helping moves do not lead to "done", shortest trace first."""
        alive = {state for state in self.came_from if state.done}
        frontier = list(alive)
        while frontier:
            for before in self.helped_by.get(frontier.pop(), ()):
                if before not in alive:
                    alive.add(before)
                    frontier.append(before)
        return [state for state in self.came_from if state not in alive]


def explore(
    protocol: Protocol, starts: list[State] | None = None, *, helping_only: bool = False
) -> Exploration:
    """Breadth first through everything that can happen.

    Raises:
        Violation: a move breaks a promise; the message is its trace.
    """
    found = Exploration(protocol, {}, {})
    frontier = [protocol.canonical(state) for state in starts or [protocol.start()]]
    found.came_from.update(dict.fromkeys(frontier, (None, "start")))
    while frontier:
        following = []
        for state in frontier:
            for name, after, helps, broken in protocol.moves(state):
                if helping_only and not helps:
                    continue
                if broken:
                    raise Violation(f"{broken}\n{found.trace(state)}\n{name}")
                after = protocol.canonical(after)
                if helps:
                    found.helped_by.setdefault(after, []).append(state)
                if after not in found.came_from:
                    found.came_from[after] = (state, name)
                    following.append(after)
                    if protocol.behind(after):
                        raise Violation(f"slots are left behind the head\n{found.trace(after)}")
        frontier = following
    return found


def check(protocol: Protocol) -> Exploration:
    """Safety in every reachable state, and liveness from each.

    Raises:
        Violation: with the shortest trace to a state that breaks a promise or is stuck.
    """
    found = explore(protocol)
    stuck = found.stuck()
    if stuck:
        raise Violation(f"stuck, with every actor alive, after\n{found.trace(stuck[0])}\n{stuck[0]}")
    alone = replace(protocol, clients=1, servers=1)
    origin: dict[State, State] = {}
    for state in found.came_from:
        for client in range(protocol.clients):
            for server in range(protocol.servers):
                origin.setdefault(protocol.survivors(state, client, server), state)
    stuck = explore(alone, list(origin), helping_only=True).stuck()
    if stuck:
        first = next(state for state in origin if state in set(stuck))
        raise Violation(f"the survivors are stuck after\n{found.trace(origin[first])}\n{first}")
    return found


# --- what is checked ------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_protocol_keeps_its_promises() -> None:
    """2 steps of 2 shards, 2 Clients, 2 training servers."""
    found = check(Protocol())
    assert len(found.came_from) > 10_000
    finished = [state for state in found.came_from if state.done]
    assert finished
    for state in finished:
        assert state.version == 2
        assert state.slots == 0


@pytest.mark.slow
def test_it_keeps_them_over_more_steps() -> None:
    """4 steps of 1 shard, 1 Client: rollbacks over several versions, replays overtaken in their turn."""
    check(Protocol(steps=4, shards=1, clients=1))


@pytest.mark.slow
def test_it_keeps_them_with_staleness() -> None:
    """4 steps of 1 shard, each computed at the version before the last."""
    check(Protocol(steps=4, shards=1, clients=1, staleness=1))


@pytest.mark.slow
@pytest.mark.parametrize(
    "protocol",
    [Sums(steps=1, shards=3), Sums(steps=2, shards=2, clients=1)],
    ids=["two shards and their sum", "two steps of a shard and its sum"],
)
def test_it_keeps_them_with_partial_sums(protocol: Sums) -> None:
    """Two training servers, and any bytes lost at any time."""
    found = check(protocol)
    assert len(found.came_from) > 10_000
    assert all(state.slots == state.lost == 0 for state in found.came_from if state.done)


MUTANTS = {
    "a sum that is not sent again": (Sums(supervisor_resends_sums=False, steps=1, servers=1), "stuck"),
    "an input that is lost for good": (Sums(lost_inputs_are_opened=False, steps=1, servers=1), "stuck"),
    "a sum that is lost for good": (Sums(lost_sums_are_opened=False, steps=1, servers=1), "stuck"),
    "a commit without the token": (Protocol(checks_token=False), "a fenced server committed"),
    "a commit of any version": (
        Protocol(checks_token=False, checks_version=False, clients=1),
        "a fenced server committed|was applied to version",
    ),
    "an update of an incomplete step": (Protocol(checks_complete=False), "without all its slots"),
    "a slot that the last writer wins": (Protocol(first_writer_wins=False), "other bytes than its slots"),
    "a late slot that is written": (Protocol(refuses_late_slots=False), "after its step was committed"),
    "a commit that leaves its slots": (Protocol(commit_deletes_slots=False), "left behind the head"),
    "a rollback without the token": (Protocol(rollback_checks_token=False), "took the head back"),
    "a restore without a rollback": (Protocol(restore_rolls_back=False, shards=1), "stuck"),
    "no message sent again": (Protocol(supervisor_resends=False, shards=1), "stuck"),
    "nobody takes over": (Protocol(supervisor_takes_over=False, shards=1), "stuck"),
    "a lost callback": (Protocol(supervisor_calls_idle=False, shards=1), "stuck"),
    "an open lease taken for work": (Protocol(supervisor_trusts_leases=True, shards=1), "stuck"),
    "a launch that is not recorded": (Protocol(launch_is_recorded=False, shards=1), "stuck"),
}


@pytest.mark.parametrize("name", sorted(MUTANTS))
def test_a_broken_rule_is_found(name: str) -> None:
    protocol, message = MUTANTS[name]
    with pytest.raises(Violation, match=message) as caught:
        check(protocol)
    assert str(caught.value).splitlines()[1] == "start", "the trace leads there from the start"


def test_a_rule_that_is_not_needed_is_told_from_one_that_is() -> None:
    """The holder of the token alone moves the head: so the version it compares can't be another's."""
    check(Protocol(checks_version=False, shards=1))
