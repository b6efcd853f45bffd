"""What the scripts of a round promise, on a real server and on its in-memory twin.

A round of steps 0 to 2 with two shards each is open; w0 and w1 are alive.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.support.control import SPEC, Plane, comparable, digest, entry, record, slot, worker, write
from torchord.cache import keys
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.ledger.records import GENESIS, SlotRecord
from torchord.cache.ledger.rounds import KEPT_STEPS, Report, RoundState, Seat, Turn
from torchord.cache.testing.memory_ledger import MemoryLedger

LAST, SHARDS, ATTEMPTS = 2, 2, 3


def acquired(ledger: Ledger, server: str = "s0") -> int:
    ledger.release(ledger.head().token)
    token = ledger.acquire(worker=server, node=server, queue=server)[1]
    assert isinstance(token, int)
    return token


def started(plane: Plane, spec: dict[str, Any] = SPEC) -> Ledger:
    """A run at version 0, whose server is s0; it has no round yet."""
    ledger = plane.ledger()
    ledger.create(spec, incarnation="life")
    token = acquired(ledger)
    fields: dict[str, Any] = {"manifest": {}, "record": record(0, state=True)}
    ledger.initialise(token=token, dataset_size=8, evaluation_size=0, total_steps=9, **fields)
    for id in ("s0", "w0", "w1"):
        plane.registry.beat(worker(id))
    return ledger


@pytest.fixture
def ledger(plane: Plane) -> Ledger:
    ledger = started(plane)
    assert ledger.open_round(0, LAST, token=ledger.head().token) == "ok"
    return ledger


def seat(ledger: Ledger, id: str = "w0", **changes: Any) -> Seat:
    state = ledger.round()
    first = 0 if state is None else state.first
    return replace(Seat(id, "memory", ledger.head().token, first, "life", ATTEMPTS), **changes)


def turn(ledger: Ledger, step: int = 0, id: str = "w0", **more: Any) -> Turn:
    return ledger.turn(seat(ledger, id), step, **{"shards": SHARDS if step <= LAST else 0, **more})


def made(step: int, *, parameters: str | None = None, shards: int = SHARDS) -> Report:
    """The report of the version after a step, which everybody makes of the same slots."""
    previous = GENESIS if step == 0 else made(step - 1).entry.chain
    changes = {} if parameters is None else {"parameters": parameters}
    slots = [slot(step, shard) for shard in range(shards)]
    return Report(entry(step + 1, slots, previous, **changes), {"step": step}, shards)


def complete(ledger: Ledger, step: int, id: str = "w0") -> Turn:
    """Write what is missing of a step; the answer to the last slot."""
    answer = turn(ledger, step, id)
    while answer.verdict == "compute":
        answer = turn(ledger, step, id, slot=slot(step, answer.shard, worker=id))
    assert answer.verdict == "complete"
    return answer


def step_taken(ledger: Ledger, step: int, id: str = "w0") -> Turn:
    """Compute and take a step."""
    complete(ledger, step, id)
    return turn(ledger, step + 1, id, report=made(step))


def unchanged(plane: Plane, act: Callable[[], Any]) -> Any:
    """The answer of `act`, which changes no key."""
    before = comparable(plane.state())
    answer = act()
    assert comparable(plane.state()) == before
    return answer


def state_of(ledger: Ledger) -> RoundState:
    state = ledger.round()
    assert state is not None
    return state


def paused(ledger: Ledger) -> None:
    assert ledger.transition("paused", allowed=("running",), event="paused")[0]


# --- open_round, close_round ----------------------------------------------------------------------


def test_a_round_is_opened_at_the_present_step(plane: Plane, ledger: Ledger) -> None:
    head = ledger.head()
    assert (head.round, head.launched) == (LAST, LAST)
    assert state_of(ledger) == RoundState(0, LAST, head.token)
    assert not ledger.called(0)


def test_a_round_is_opened_by_the_server_in_force_at_its_step_while_the_run_runs(plane: Plane) -> None:
    ledger = started(plane)
    token = ledger.head().token
    assert unchanged(plane, lambda: ledger.open_round(0, 3, token=token - 1)) == "fenced"
    assert unchanged(plane, lambda: ledger.open_round(1, 3, token=token)) == "stale"
    paused(ledger)
    assert unchanged(plane, lambda: ledger.open_round(0, 3, token=token)) == "stopped"
    assert ledger.round() is None


def test_the_steps_of_a_round_count_as_reached(ledger: Ledger) -> None:
    """So that a switch of the config comes after them."""

    def switched(step: int) -> str:
        return ledger.switch(SPEC, step=step, incarnation="life", following="life+1", total_steps=9, data={})

    assert switched(LAST + 1) == "late"
    assert switched(LAST + 2) == "ok"


def test_a_closed_round_leaves_nothing_but_the_present_step(plane: Plane, ledger: Ledger) -> None:
    for step in range(2):
        step_taken(ledger, step)
    turn(ledger, 2)
    assert ledger.close_round(token=ledger.head().token, committed=2)
    head = ledger.head()
    assert (head.round, head.launched, head.version) == (None, None, 2)
    assert ledger.round() is None
    assert [step for step in range(4) if ledger.slots_present(step)] == []
    assert turn(ledger, 2) == Turn("fenced")


def test_only_the_server_in_force_closes(plane: Plane, ledger: Ledger) -> None:
    token = ledger.head().token
    assert not unchanged(plane, lambda: ledger.close_round(token=token - 1, committed=0))


# --- computing ------------------------------------------------------------------------------------


def test_shards_are_claimed_one_after_the_other(ledger: Ledger) -> None:
    assert turn(ledger) == Turn("compute", shard=0, attempt=1, memory="memory")
    assert turn(ledger, id="w1") == Turn("compute", shard=1, attempt=1, memory="memory")
    assert {shard: lease.worker for shard, lease in ledger.leases(0).items()} == {0: "w0", 1: "w1"}
    assert set(state_of(ledger).participants) == {"w0", "w1"}


def test_the_same_worker_is_given_the_same_shard_again(plane: Plane, ledger: Ledger) -> None:
    turn(ledger)
    assert unchanged(plane, lambda: turn(ledger)) == Turn("compute", shard=0, attempt=1, memory="memory")
    plane.registry.leave(worker("w0"))
    assert turn(ledger).attempt == 1, "whoever asks lives"


def test_slots_lie_in_memory_that_all_participants_share(ledger: Ledger) -> None:
    assert turn(ledger).memory == "memory"
    there = ledger.turn(seat(ledger, "w1", memory="elsewhere"), 0, shards=SHARDS)
    assert (there.verdict, there.memory) == ("compute", "")
    assert turn(ledger).memory == ""


def test_a_slot_is_written_and_the_next_shard_claimed_in_one_turn(ledger: Ledger) -> None:
    turn(ledger)
    answer = turn(ledger, slot=slot(0, 0))
    assert (answer.verdict, answer.written, answer.shard) == ("compute", "written", 1)
    last = turn(ledger, slot=slot(0, 1))
    assert last == Turn("complete", "written", slots={0: slot(0, 0), 1: slot(0, 1)})
    assert turn(ledger, id="w1") == Turn("complete", slots={0: slot(0, 0), 1: slot(0, 1)})


def test_the_first_writer_of_a_slot_wins(ledger: Ledger) -> None:
    turn(ledger, slot=slot(0, 0))
    assert turn(ledger, slot=slot(0, 0)).written == "written", "its answer was lost, it asks again"
    assert turn(ledger, id="w1", slot=slot(0, 0, "other")).written == "duplicate"
    assert turn(ledger, id="w1", slot=slot(0, 0, "bad", digest=digest("bad"))).written == "divergent"
    assert ledger.slots(0) == {0: slot(0, 0)}
    head = ledger.head()
    assert (head.duplicates, head.divergent) == (2, 1)


def test_a_slot_of_a_committed_step_is_late(ledger: Ledger) -> None:
    step_taken(ledger, 0)
    answer = turn(ledger, id="w1", slot=slot(0, 0, "late"))
    assert (answer.verdict, answer.written) == ("complete", "late"), "its slots are there to catch up with"
    assert ledger.head().late == 1


def test_slots_of_messages_and_of_turns_are_the_same_slots(ledger: Ledger) -> None:
    write(ledger, 0, slot(0, 1))
    turn(ledger)
    assert turn(ledger, slot=slot(0, 0)).verdict == "complete"


def test_what_a_live_worker_is_at_is_waited_for(plane: Plane, ledger: Ledger) -> None:
    turn(ledger)
    turn(ledger, slot=slot(0, 0))
    assert turn(ledger, id="w1") == Turn("wait")
    assert unchanged(plane, lambda: turn(ledger, id="w1")) == Turn("wait")
    assert ledger.leases(0)[1].worker == "w0"


def test_the_shard_of_a_dead_worker_is_free(plane: Plane, ledger: Ledger) -> None:
    turn(ledger)
    plane.registry.leave(worker("w0"))
    answer = turn(ledger, id="w1")
    assert (answer.verdict, answer.shard, answer.attempt) == ("compute", 0, 2)


def test_a_shard_handed_back_is_free_and_counts_no_try(ledger: Ledger) -> None:
    turn(ledger)
    assert ledger.end_lease(0, 0, worker="w0", delivery="round")
    answer = turn(ledger, id="w1")
    assert (answer.verdict, answer.shard, answer.attempt) == ("compute", 0, 1)


def test_a_shard_that_kills_each_holder_is_computed_no_more(plane: Plane, ledger: Ledger) -> None:
    write(ledger, 0, slot(0, 1))
    for attempt in range(1, ATTEMPTS + 1):
        plane.registry.beat(worker(f"w{attempt}"))
        answer = turn(ledger, id=f"w{attempt}")
        assert (answer.verdict, answer.attempt) == ("compute", attempt)
        plane.registry.leave(worker(f"w{attempt}"))
    assert turn(ledger, id="w0") == Turn("wait")


def test_a_late_holders_shard_is_computed_twice_more_at_most(plane: Plane, ledger: Ledger) -> None:
    write(ledger, 0, slot(0, 1))
    turn(ledger)
    assert turn(ledger, id="w1", late_seconds=1e3) == Turn("wait")
    for id, backups in (("w1", 1), ("w2", 2)):
        plane.registry.beat(worker(id))
        answer = turn(ledger, id=id, late_seconds=-1.0)
        assert (answer.verdict, answer.shard, answer.attempt) == ("compute", 0, 1)
        assert ledger.leases(0)[0].backups == ledger.head().backups == backups
        assert turn(ledger, id=id, late_seconds=-1.0) == answer, "its answer was lost, it asks again"
        assert ledger.head().backups == backups
    assert turn(ledger, late_seconds=-1.0) == Turn("wait")


def test_of_two_late_shards_the_one_under_way_for_longest_is_taken(plane: Plane, ledger: Ledger) -> None:
    for id in ("w0", "w1"):
        turn(ledger, id=id)
    ledger.end_lease(0, 0, worker="w0", delivery="round")
    turn(ledger)
    plane.registry.beat(worker("w2"))
    assert turn(ledger, id="w2", late_seconds=-1.0).shard == 1
    assert turn(ledger, id="w2", late_seconds=-1.0).shard == 1
    assert ledger.head().backups == 1, "its answer was lost, it asked again"


def test_a_free_shard_comes_before_a_late_one(ledger: Ledger) -> None:
    turn(ledger)
    answer = turn(ledger, id="w1", late_seconds=-1.0)
    assert (answer.shard, answer.attempt, ledger.head().backups) == (1, 1, 0)


def test_ones_own_shard_is_no_backup_beside_a_late_one(ledger: Ledger) -> None:
    for id in ("w0", "w1"):
        turn(ledger, id=id)
    assert turn(ledger, id="w1", late_seconds=-1.0).shard == 1
    assert ledger.head().backups == 0


# --- reporting ------------------------------------------------------------------------------------


def test_the_first_report_is_the_commit(ledger: Ledger) -> None:
    complete(ledger, 0)
    answer = turn(ledger, 1, report=made(0))
    assert (answer.verdict, answer.reported, answer.shard) == ("compute", "first", 0)
    head = ledger.head()
    assert (head.version, head.chain) == (1, made(0).entry.chain)
    assert ledger.entries() == [made(0).entry]
    assert ledger.read_events()[-1].data == {"step": 0}
    assert ledger.leases(0) == {}
    assert ledger.slots_present(0) == {0, 1}, "for whoever is behind"


def test_the_second_report_of_the_same_bytes_changes_nothing(plane: Plane, ledger: Ledger) -> None:
    step_taken(ledger, 0)
    again = unchanged(plane, lambda: turn(ledger, 1, report=made(0)))
    assert (again.verdict, again.reported) == ("compute", "same"), "its answer was lost, it asks again"
    complete(ledger, 0, "w1")
    answer = turn(ledger, 1, "w1", report=made(0))
    assert (answer.verdict, answer.reported, answer.shard) == ("compute", "same", 1)
    assert len(ledger.entries()) == 1


def test_other_bytes_of_a_version_end_the_round(ledger: Ledger) -> None:
    step_taken(ledger, 0)
    other = made(0, parameters=digest("other"))
    assert turn(ledger, 1, "w1", report=other) == Turn("divergent", other="w0")
    assert ledger.head().divergent == 0, "who was wrong is not known yet"
    assert turn(ledger, 1).verdict == "behind"
    assert ledger.end_round(seat(ledger), 1) == "behind"
    state = state_of(ledger)
    assert (state.disputed, state.rivals) == (
        1,
        {"w0": made(0).entry.parameters, "w1": other.entry.parameters},
    )


def test_the_first_dispute_is_the_one_that_is_judged(plane: Plane, ledger: Ledger) -> None:
    """Whoever diverges next, perhaps in another version, is not taken for a rival of the first."""
    step_taken(ledger, 0)
    step_taken(ledger, 1)
    turn(ledger, 1, "w1", report=made(0, parameters=digest("other")))
    before = state_of(ledger).rivals
    plane.registry.beat(worker("w2"))
    late = turn(ledger, 2, "w2", report=made(1, parameters=digest("another")))
    assert late.verdict == "divergent"
    state = state_of(ledger)
    assert (state.disputed, state.rivals) == (1, before)


def test_what_was_stored_of_other_bytes_is_not_believed(ledger: Ledger) -> None:
    paused(ledger)
    complete_while_paused(ledger, 0)
    turn(ledger, 1, report=made(0))
    assert ledger.end_round(seat(ledger), 1) == "publish"
    assert ledger.end_round(seat(ledger), 1, record=record(1, state=True)) == "over"
    assert turn(ledger, 1, "w1", report=made(0, parameters=digest("other"))).verdict == "divergent"
    assert ledger.version(1) is None and ledger.version(0) is not None
    assert state_of(ledger).published is None


def complete_while_paused(ledger: Ledger, step: int) -> None:
    """Write all slots of a step of a run that is paused, in which nobody begins one."""
    for shard in range(SHARDS):
        assert turn(ledger, step, slot=slot(step, shard)).written == "written"


def test_a_version_is_committed_from_all_slots_only(plane: Plane, ledger: Ledger) -> None:
    turn(ledger, slot=slot(0, 0))
    assert unchanged(plane, lambda: turn(ledger, 1, report=made(0))) == Turn("behind")
    assert ledger.head().version == 0


def test_a_version_is_committed_under_the_token_in_force_only(plane: Plane, ledger: Ledger) -> None:
    complete(ledger, 0)
    before = seat(ledger)
    acquired(ledger, "s1")
    assert unchanged(plane, lambda: ledger.turn(before, 1, shards=SHARDS, report=made(0))) == Turn("fenced")
    assert unchanged(plane, lambda: ledger.turn(before, 0, shards=SHARDS)) == Turn("fenced")
    assert ledger.end_round(before, 0) == "fenced"
    assert turn(ledger, 1, report=made(0)) == Turn("fenced"), "of this token there is no round"


def test_nobody_goes_on_in_a_round_whose_run_was_taken_back(plane: Plane, ledger: Ledger) -> None:
    """Under the same token, too."""
    step_taken(ledger, 0)
    step_taken(ledger, 1)
    ledger.rollback(token=ledger.head().token, version=0, chain=GENESIS)
    assert ledger.head().round is None
    for step, report in ((0, None), (1, made(0)), (2, None), (3, made(2))):
        assert unchanged(plane, lambda: turn(ledger, step, report=report)) == Turn("fenced")  # noqa: B023
    assert unchanged(plane, lambda: ledger.end_round(seat(ledger), 0)) == "fenced"


def test_a_server_that_was_overtaken_by_a_participant_has_its_version_stored(
    plane: Plane, ledger: Ledger
) -> None:
    """Nobody had begun the round, and single messages had brought the slots of its first step."""
    step_taken(ledger, 0)
    put = record(1, made(0).entry.chain, nonce="the server's")

    def commit() -> str:
        committed = ledger.commit(
            step=0, token=ledger.head().token, shards=SHARDS, entry=made(0).entry, record=put, event={}
        )
        return committed.verdict

    assert (commit(), ledger.version(1)) == ("ok", put)
    assert unchanged(plane, commit) == "ok"
    step_taken(ledger, 1)
    assert unchanged(plane, commit) == "stale"


def test_another_revision_of_the_run_inherits_no_slots_of_a_round(plane: Plane) -> None:
    """Those of the steps that were committed last, which a replay could take, go with the rollback."""
    ledger = started(plane, {"recipe": {}, "config": {"skew": "admit"}})
    token = ledger.head().token
    ledger.open_round(0, LAST, token=token)
    for step in range(2):
        step_taken(ledger, step)
    turn(ledger, 2, slot=slot(2, 0))
    assert [step for step in range(4) if ledger.slots_present(step)] == [0, 1, 2]
    ledger.rollback(token=token, version=0, chain=GENESIS)
    assert ledger.incarnation() == "life.1"
    assert not any(ledger.slots_present(step) or ledger.leases(step) for step in range(4))


def test_versions_are_reported_in_order(plane: Plane, ledger: Ledger) -> None:
    complete(ledger, 0)
    assert unchanged(plane, lambda: turn(ledger, 2, report=made(1))) == Turn("fenced")
    assert unchanged(plane, lambda: turn(ledger, 1)) == Turn("fenced"), "it has not reported what it holds"


def test_a_participant_of_another_revision_of_the_run_is_out(plane: Plane, ledger: Ledger) -> None:
    other = seat(ledger, incarnation="life.1")
    assert unchanged(plane, lambda: ledger.turn(other, 0, shards=SHARDS)) == Turn("fenced")
    switched = seat(ledger, incarnation="life+1")
    assert ledger.turn(switched, 0, shards=SHARDS).verdict == "compute"


@pytest.mark.parametrize("status", ["failed", "cancelled", "done"])
def test_a_run_that_has_ended_has_no_turns(plane: Plane, ledger: Ledger, status: str) -> None:
    ledger.transition(status, allowed=("running",), event=status)
    assert unchanged(plane, lambda: turn(ledger)) == Turn("stopped")


def test_a_replay_meets_what_was_committed_before(plane: Plane, ledger: Ledger) -> None:
    for step in range(2):
        step_taken(ledger, step)
    token = acquired(ledger, "s1")
    ledger.rollback(token=token, version=0, chain=GENESIS)
    ledger.open_round(0, LAST, token=token)
    assert turn(ledger).verdict == "complete", "its slots are still there"
    wrong = made(0, parameters=digest("other"))
    assert unchanged(plane, lambda: turn(ledger, 1, report=wrong)) == Turn("diverged")
    assert turn(ledger, 1, report=made(0)).reported == "first"
    ledger.forget_expected(2)
    complete(ledger, 1)
    other = made(1, parameters=digest("other"))
    assert turn(ledger, 2, report=other).reported == "first"


def test_what_a_replay_was_to_meet_is_forgotten_from_a_version_on(plane: Plane, ledger: Ledger) -> None:
    for step in range(2):
        step_taken(ledger, step)
    token = acquired(ledger, "s1")
    ledger.rollback(token=token, version=0, chain=GENESIS)
    ledger.forget_expected(2)
    assert plane.state()[ledger.keys.expected] == {"1": made(0).entry.chain}


def test_whoever_is_behind_catches_up_over_the_steps_that_are_kept(ledger: Ledger) -> None:
    last = KEPT_STEPS + 2
    ledger.open_round(0, last, token=ledger.head().token)
    for step in range(last):
        complete_by_hand(ledger, step)
        assert turn(ledger, step + 1, report=made(step), shards=SHARDS).reported == "first"
    oldest = last - KEPT_STEPS
    assert turn(ledger, oldest, "w1").verdict == "complete"
    assert turn(ledger, oldest - 1, "w1") == Turn("behind")
    assert [step for step in range(last + 1) if ledger.slots_present(step)] == list(range(oldest, last))


def complete_by_hand(ledger: Ledger, step: int) -> None:
    for shard in range(SHARDS):
        turn(ledger, step, slot=slot(step, shard), shards=SHARDS)


def test_a_run_that_is_paused_takes_no_further_step(ledger: Ledger) -> None:
    """A step that is complete is reported, whoever is behind catches up, and that is the round's end."""
    step_taken(ledger, 0)
    complete(ledger, 1)
    paused(ledger)
    assert turn(ledger, 1, "w1").verdict == "end"
    assert turn(ledger, 0, "w1").verdict == "complete"
    assert turn(ledger, 2, report=made(1)) == Turn("end", reported="first")


def test_beyond_its_last_step_a_round_ends(ledger: Ledger) -> None:
    for step in range(LAST):
        step_taken(ledger, step)
    assert step_taken(ledger, LAST) == Turn("end", reported="first")


# --- waiting --------------------------------------------------------------------------------------


def test_whoever_waits_is_woken_when_the_step_is_complete(plane: Plane, ledger: Ledger) -> None:
    for shard in range(SHARDS):
        turn(ledger)
        turn(ledger, slot=None if shard else slot(0, 0))
    assert turn(ledger, id="w1") == Turn("wait")
    timer = threading.Timer(0.05, lambda: turn(ledger, slot=slot(0, 1)))
    timer.start()
    assert turn(ledger, id="w1", wait_seconds=4.0).verdict == "complete"
    timer.join()
    assert ledger.keys.wake("w1") not in plane.state(), "it has taken what woke it"


def test_a_wake_that_comes_first_is_not_lost(ledger: Ledger) -> None:
    turn(ledger)
    turn(ledger, slot=slot(0, 0))
    assert turn(ledger, id="w1") == Turn("wait")
    turn(ledger, slot=slot(0, 1))
    assert turn(ledger, id="w1", wait_seconds=600.0 if isinstance(ledger, MemoryLedger) else 4.0).slots


def test_nobody_is_waited_for_longer_than_is_said(ledger: Ledger) -> None:
    turn(ledger)
    turn(ledger, slot=slot(0, 0))
    assert turn(ledger, id="w1", wait_seconds=0.01) == Turn("wait")


# --- the end --------------------------------------------------------------------------------------


@pytest.fixture
def at_the_end(ledger: Ledger) -> Ledger:
    """Both participants hold the version after the round's last step."""
    for step in range(LAST + 1):
        step_taken(ledger, step)
    assert turn(ledger, LAST + 1, "w1").verdict == "end"
    return ledger


def stored(ledger: Ledger) -> Any:
    return record(LAST + 1, ledger.head().chain, state=True)


def test_one_participant_stores_the_last_version(plane: Plane, at_the_end: Ledger) -> None:
    ledger, end = at_the_end, LAST + 1
    assert ledger.end_round(seat(ledger), end) == "publish"
    assert unchanged(plane, lambda: ledger.end_round(seat(ledger), end)) == "publish"
    assert ledger.end_round(seat(ledger, "w1"), end) == "wait"
    assert state_of(ledger).published is None
    assert ledger.end_round(seat(ledger), end, record=stored(ledger)) == "over"
    assert ledger.end_round(seat(ledger, "w1"), end, wait_seconds=4.0) == "over"
    assert ledger.keys.wake("w1") not in plane.state(), "it was woken"
    assert state_of(ledger).published == end
    assert ledger.version(end) == stored(ledger)
    assert ledger.kept_versions() == ((0, end), frozenset())


def test_another_stores_it_when_the_first_dies(plane: Plane, at_the_end: Ledger) -> None:
    ledger, end = at_the_end, LAST + 1
    ledger.end_round(seat(ledger), end)
    plane.registry.leave(worker("w0"))
    assert ledger.end_round(seat(ledger, "w1"), end) == "publish"


def test_another_stores_it_when_the_first_leaves(plane: Plane, at_the_end: Ledger) -> None:
    """It lives on, but could not store it."""
    ledger, end = at_the_end, LAST + 1
    ledger.end_round(seat(ledger), end)
    assert ledger.end_round(seat(ledger, "w1"), end) == "wait"
    ledger.leave_round("w0")
    assert state_of(ledger).participants == ("w1",)
    assert ledger.end_round(seat(ledger, "w1"), end) == "publish"


def test_whoever_is_behind_stores_nothing(plane: Plane, at_the_end: Ledger) -> None:
    ledger = at_the_end
    assert unchanged(plane, lambda: ledger.end_round(seat(ledger), LAST, record=record(LAST))) == "behind"


def test_a_version_that_is_stored_is_the_last_of_its_round(plane: Plane, ledger: Ledger) -> None:
    """A run that is paused and resumed at once: who was slow takes no step alone."""
    step_taken(ledger, 0)
    complete(ledger, 1)
    paused(ledger)
    ledger.end_round(seat(ledger), 1)
    ledger.end_round(seat(ledger), 1, record=record(1, state=True))
    ledger.transition("running", allowed=("paused",), event="resumed")
    assert turn(ledger, 1, "w1").verdict == "end"
    assert ledger.end_round(seat(ledger, "w1"), 1) == "over"
    assert turn(ledger, 2, "w1", report=made(1)) == Turn("behind")
    assert ledger.head().version == 1


def test_a_worker_that_has_to_end_leaves_the_round_to_others(plane: Plane, ledger: Ledger) -> None:
    step_taken(ledger, 0)
    complete(ledger, 0, "w1")
    turn(ledger, 1, "w1", report=made(0))
    assert turn(ledger, 1, shards=0).verdict == "end"
    assert ledger.end_round(seat(ledger), 1, leaving=True) == "over"
    assert state_of(ledger).participants == ("w1",), "a second one that leaves does not count on it"
    assert ledger.end_round(seat(ledger, "w1"), 1, leaving=True) == "publish"


def test_the_last_worker_ends_the_round(plane: Plane, ledger: Ledger) -> None:
    step_taken(ledger, 0)
    turn(ledger, 0, "w1")
    plane.registry.leave(worker("w1"))
    assert ledger.end_round(seat(ledger), 1, leaving=True) == "publish"
    plane.registry.beat(worker("w2"))
    assert turn(ledger, 1, "w2").verdict == "end", "nobody begins what would be lost"


# --- keys -----------------------------------------------------------------------------------------


def test_the_keys_of_a_round_have_a_ttl(plane: Plane, ledger: Ledger) -> None:
    """Those that its first report makes, too; `redis_url` checks the real ones."""
    step_taken(ledger, 0)
    turn(ledger, 1, "w1", slot=slot(1, 1))
    turn(ledger, 1, "w1")
    turn(ledger, 1, slot=slot(1, 0))
    names = ledger.keys
    assert {names.round, names.ledger, names.slots(0), names.slots(1), names.leases(1)} <= set(plane.state())
    if isinstance(ledger, MemoryLedger):
        assert all(ledger.plane.ttl(name) is not None for name in ledger.plane.names())


@pytest.mark.parametrize("plane", ["redis", "lane"], indirect=True)
def test_slots_that_are_no_records_are_deleted(plane: Plane, ledger: Ledger) -> None:
    """The participant finds that a slot is missing; it is free again."""
    ledger.client.hset(ledger.keys.slots(0), "1", '{"none": 1}')
    answer = turn(ledger, slot=slot(0, 0))
    found: dict[int, SlotRecord] = answer.slots
    assert (answer.verdict, set(found)) == ("complete", {0})
    assert turn(ledger).verdict == "compute"
    assert keys.worker("w0") in plane.state()
