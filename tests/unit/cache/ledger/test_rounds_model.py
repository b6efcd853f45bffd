"""The model of the protocol with rounds, explored exhaustively: see test_protocol_model.py.

Here the training servers open rounds and commit nothing; the Clients claim shards, take the steps, report
them and store the last version. Between two moves of a Client another may do the same, die, or leave, and
another server may take the run over, so that the round's token is no longer in force.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import pytest

from tests.unit.cache.ledger.test_protocol_model import (
    ACQUIRED,
    COLD,
    GONE,
    NOBODY,
    WARM,
    Move,
    Protocol,
    Server,
    State,
    Violation,
    check,
)

OUT, READY, COMPUTING, STEPPED, STORING = "out", "ready", "computing", "stepped", "storing"
KEPT = (
    1  # steps that keep their slots: fewer than the scripts keep, so that Clients are left behind here, too
)


class Seat(NamedTuple):
    """Where a Client stands: the version it holds (or has made), its slot, whether its token is in force."""

    at: str = OUT
    version: int = NOBODY
    slot: int = NOBODY
    valid: bool = False


class Round(NamedTuple):
    """An open round.

    Attributes:
        valid: whether the token under which it was opened is in force.
        publisher: the Client that was told to store its last version, NOBODY or GONE.
        published: the version that is stored.
        ending: whether a Client that had to leave, alone, ends it.
    """

    valid: bool = True
    publisher: int = NOBODY
    published: int = NOBODY
    ending: bool = False


Put = Callable[..., State]


@dataclass(frozen=True)
class Rounds(Protocol):
    """The protocol where all steps are taken in rounds, with switches that break one rule each."""

    report_checks_token: bool = True
    storing_checks_token: bool = True
    publisher_is_followed: bool = True
    lost_round_is_found: bool = True
    stored_round_is_adopted: bool = True

    def start(self) -> State:
        """A run that was submitted and initialised; nobody serves it."""
        return super().start()._replace(clients=(Seat(),) * self.clients)  # type: ignore[arg-type]

    @staticmethod
    def seats(state: State) -> tuple[Seat, ...]:
        return cast(tuple[Seat, ...], state.clients)

    @staticmethod
    def opened(state: State) -> Round | None:
        return cast(Round | None, state.round)

    def older(self, slots: int, version: int) -> int:
        """The slots without those of the steps before one."""
        return slots & ~((1 << max(0, version) * self.shards) - 1)

    def behind(self, state: State) -> int:
        """A round keeps the slots of some committed steps until it is closed."""
        kept = 0 if state.round is None else KEPT
        return state.slots & ~self.older(state.slots, state.version - kept)

    # --- training servers -------------------------------------------------------------------------

    def advance(self, state: State, number: int, put: object) -> Iterator[Move]:
        """A message asks a server for whatever comes next."""
        assert callable(put)
        me, mine, held = state.servers[number], state.owner == number, self.opened(state)
        warm = me.at == WARM and mine
        if warm and held is not None and held.valid and held.published == state.version:
            closed = put(
                Server(WARM, state.version), round=None, slots=self.older(state.slots, state.version)
            )
            yield Move(
                f"server {number} adopts version {state.version}", closed, self.stored_round_is_adopted
            )
            return
        lives = any(seat.valid and seat.at != OUT for seat in self.seats(state))
        if warm and held is not None and held.valid and (lives or state.version == me.version):
            return  # under way, or nobody has begun
        if not warm or me.version != state.version or held is not None:
            seats = tuple(seat._replace(valid=False) for seat in self.seats(state))
            old = None if held is None else held._replace(valid=False)
            helps = held is None or (not lives and self.lost_round_is_found)
            taken = put(Server(ACQUIRED), owner=number, clients=seats, round=old)
            yield Move(f"server {number} acquires", taken, helps and (state.owner == NOBODY or mine))
        elif state.version == self.steps:
            yield Move(f"server {number} finishes", put(me, done=True), True)
        else:
            yield Move(f"server {number} opens a round", put(me, round=Round()), True)

    def restore(self, state: State, number: int, put: object) -> Iterator[Move]:
        """Load the newest version that is stored, go back to it, and close what is open."""
        for move in super().restore(state, number, put):
            if move.state.servers[number].at == WARM:
                slots = self.older(move.state.slots, move.state.version)
                yield move._replace(state=move.state._replace(round=None, slots=slots))
            else:
                yield move

    # --- Clients ----------------------------------------------------------------------------------

    def client_moves(self, state: State, number: int) -> Iterator[Move]:
        """Moves of one Client."""
        seat, held = self.seats(state)[number], self.opened(state)

        def put(seat: Seat, **changes: Any) -> State:
            clients: Any = (*state.clients[:number], seat, *state.clients[number + 1 :])
            return state._replace(clients=clients, **changes)

        if seat.at == OUT:
            if held is not None and held.valid and state.restorable == state.version and not state.done:
                ready = put(Seat(READY, state.version, valid=True))
                yield Move(f"client {number} sits down with version {state.version}", ready, True)
            return
        dead: dict[str, Any] = {
            "leases": tuple(GONE if holder == number else holder for holder in state.leases)
        }
        if held is not None and held.publisher == number:
            dead["round"] = held._replace(publisher=GONE)
        yield Move(f"client {number} dies", put(Seat(), **dead))
        fenced = not seat.valid or held is None or not held.valid
        if seat.at == READY and not fenced:
            yield from self.turn(state, number, put)
        elif seat.at == COMPUTING and not fenced:
            there = seat.version < state.version
            slots = state.slots if there else state.slots | 1 << seat.slot
            written = put(Seat(READY, seat.version, valid=True), slots=slots)
            yield Move(f"client {number} writes slot {seat.slot}", written, True)
        elif seat.at == STEPPED and not (fenced and self.report_checks_token):
            yield from self.report(state, number, put)
        elif seat.at == STORING and not (fenced and self.storing_checks_token):
            yield from self.store(state, number, put)
        else:
            yield Move(f"client {number} is fenced", put(Seat(), **dead), True)

    def turn(self, state: State, number: int, put: Put) -> Iterator[Move]:
        """A Client asks what is next."""
        seat, held = self.seats(state)[number], self.opened(state)
        assert held is not None
        step, present = seat.version, seat.version == state.version
        out = Move(f"client {number} leaves the round", put(Seat()), True)
        if present and held.published == step:
            yield out
            return
        if present and (step == self.steps or held.ending):
            if held.publisher in (NOBODY, number) or (held.publisher == GONE and self.publisher_is_followed):
                mine = held._replace(publisher=number)
                told = put(Seat(STORING, step, valid=True), round=mine)
                yield Move(f"client {number} is to store version {step}", told, True)
            return
        if present:  # it has to end
            others = [other for n, other in enumerate(self.seats(state)) if n != number]
            if any(other.valid and other.at != OUT for other in others):
                yield out._replace(helps=False)
            else:
                yield Move(f"client {number} ends the round", put(seat, round=held._replace(ending=True)))
        if self.complete(state, step) or not self.checks_complete:
            made = put(Seat(STEPPED, step + 1, valid=True))
            yield Move(f"client {number} takes step {step}", made, self.complete(state, step))
        elif not present:
            yield out
        else:
            yield from self.claim(state, number, put)

    def claim(self, state: State, number: int, put: Put) -> Iterator[Move]:
        """A shard is free, or its holder is late."""
        seat = self.seats(state)[number]
        for unit in range(seat.version * self.shards, (seat.version + 1) * self.shards):
            if not state.slots >> unit & 1:
                free = state.leases[unit] in (NOBODY, GONE, number)
                leases = (*state.leases[:unit], number, *state.leases[unit + 1 :])
                claimed = put(Seat(COMPUTING, seat.version, unit, valid=True), leases=leases)
                yield Move(f"client {number} claims slot {unit}", claimed, free)

    def report(self, state: State, number: int, put: Put) -> Iterator[Move]:
        """A Client has made a version: it is the head's next one, or the head is there already."""
        seat = self.seats(state)[number]
        step = seat.version - 1
        ready = Seat(READY, seat.version, valid=seat.valid)
        held = self.opened(state)
        if state.version > step:
            yield Move(f"client {number} reports version {step + 1} again", put(ready), True)
            return
        whole = self.complete(state, step)
        stored = held is not None and held.published == step
        if state.version < step or stored or (self.checks_complete and not whole):
            yield Move(f"client {number} is behind", put(Seat()), True)
            return
        broken = "" if whole else f"step {step} was applied without all its slots"
        if not seat.valid:
            broken = "a participant committed under a token that is overtaken"
        leases = tuple(
            NOBODY if unit // self.shards == step else lease for unit, lease in enumerate(state.leases)
        )
        slots = self.older(state.slots, step + 1 - KEPT)
        after = put(ready, version=step + 1, leases=leases, slots=slots)
        yield Move(f"client {number} commits version {step + 1}", after, True, broken)

    def store(self, state: State, number: int, put: Put) -> Iterator[Move]:
        """A Client has stored the round's last version."""
        seat, held = self.seats(state)[number], self.opened(state)
        if held is None or (seat.version != state.version and self.storing_checks_token):
            yield Move(f"client {number} is behind", put(Seat()), True)
            return
        broken = "" if seat.valid else "a version was stored under a token that is overtaken"
        published = held._replace(publisher=number, published=seat.version)
        after = put(Seat(), round=published, restorable=seat.version)
        yield Move(f"client {number} has stored version {seat.version}", after, True, broken)

    # --- symmetry ---------------------------------------------------------------------------------

    def canonical(self, state: State) -> State:
        """The same state up to the names of servers and Clients."""
        held, seats, leases = self.opened(state), self.seats(state), state.leases
        servers = tuple(
            Server() if server.at == WARM and number != state.owner else server
            for number, server in enumerate(state.servers)
        )
        owner = state.owner
        if self.servers == 2 and (servers[1], owner == 1) < (servers[0], owner == 0):
            servers, owner = servers[::-1], owner if owner == NOBODY else 1 - owner

        def place(number: int) -> tuple[object, ...]:
            return seats[number], [lease == number for lease in leases], held and held.publisher == number

        if self.clients == 2 and place(1) < place(0):
            seats = seats[::-1]
            leases = tuple(1 - holder if holder in (0, 1) else holder for holder in leases)
            if held is not None and held.publisher in (0, 1):
                held = held._replace(publisher=1 - held.publisher)
        if held is not None and not held.valid:
            held = Round(valid=False)  # nobody reads it any more
        return state._replace(
            servers=servers, owner=owner, clients=cast(Any, seats), leases=leases, round=held
        )

    def survivors(self, state: State, client: int, server: int) -> State:
        """Of the others one may have been told to store the round's last version."""
        held = self.opened(state)
        if held is not None and held.publisher != NOBODY:
            held = held._replace(publisher=0 if held.publisher == client else GONE)
        return super().survivors(state, client, server)._replace(round=held)


@pytest.mark.slow
@pytest.mark.parametrize(
    "protocol", [Rounds(steps=2, shards=1), Rounds(steps=1, shards=2)], ids=["two steps", "two shards"]
)
def test_rounds_keep_the_promises(protocol: Rounds) -> None:
    found = check(protocol)
    assert len(found.came_from) > 10_000
    finished = [state for state in found.came_from if state.done]
    assert finished
    assert all(state.version == protocol.steps for state in finished)


MUTANTS = {
    "a report without the token": (Rounds(report_checks_token=False, shards=1), "committed under a token"),
    "a version stored without the token": (Rounds(storing_checks_token=False, shards=1), "stored under"),
    "a step without all its slots": (Rounds(checks_complete=False, servers=1), "without all its slots"),
    "a publisher whose death is not seen": (
        Rounds(publisher_is_followed=False, shards=1, servers=1),
        "stuck",
    ),
    "a round that is lost for good": (Rounds(lost_round_is_found=False, shards=1, servers=1), "stuck"),
    "a round's end that nobody looks at": (
        Rounds(stored_round_is_adopted=False, shards=1, servers=1),
        "stuck",
    ),
}


@pytest.mark.parametrize("name", sorted(MUTANTS))
def test_a_broken_rule_of_rounds_is_found(name: str) -> None:
    protocol, message = MUTANTS[name]
    with pytest.raises(Violation, match=message) as caught:
        check(protocol)
    assert str(caught.value).splitlines()[1] == "start", "the trace leads there from the start"


def test_a_server_that_dies_leaves_the_round_to_its_participants() -> None:
    """It is under way, though nobody serves the run; who serves it next may adopt it or take over."""
    protocol = Rounds(steps=1, shards=1, clients=1, servers=1)
    under_way = protocol.start()._replace(
        round=Round(), clients=cast(Any, (Seat(READY, 0, valid=True),)), servers=(Server(COLD),)
    )
    assert any(move.name == "client 0 claims slot 0" for move in protocol.moves(under_way))
