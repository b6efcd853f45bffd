"""What the supervisor does about an open round: nothing while it goes on, one call once nobody is in it."""

from __future__ import annotations

import pytest

from tests.support.control import slot
from tests.unit.coordinator.server.test_supervisor import OWN, RUN, Laboratory
from torchord.cache.ledger.rounds import Seat
from torchord.cache.testing.memory_rounds import MemoryRounds
from torchord.coordinator.messages.task_names import GRADIENTS
from torchord.coordinator.runtime import activity


@pytest.fixture
def lab() -> Laboratory:
    """A round of two steps is open, and its seats are gone from the queue."""
    lab = Laboratory()
    lab.queued()
    assert lab.rounds(4) == []
    lab.consume(GRADIENTS)
    assert lab.run.open_round(0, 1, token=lab.token) == "ok"
    return lab


def join(lab: Laboratory, id: str) -> int:
    """A worker takes a turn, and says so; the shard that it gets."""
    assert isinstance(lab.run, MemoryRounds)
    turn = lab.run.turn(Seat(id, "", lab.token, 0, "life", 3), 0, shards=4)
    lab.doing(id, activity.gradient(RUN, 0, turn.shard))
    return turn.shard


def test_nothing_is_sent_while_a_participant_lives(lab: Laboratory) -> None:
    join(lab, "w0")
    assert lab.rounds(90) == []


def test_a_participant_that_dies_beside_another_is_not_waited_for(lab: Laboratory) -> None:
    join(lab, "w0")
    join(lab, "w1")
    del lab.living["w1"]
    assert lab.rounds(90) == []


def test_the_first_step_of_a_round_that_nobody_comes_to_goes_out_singly(lab: Laboratory) -> None:
    assert lab.rounds(10)[:4] == [("gradient", 0, shard) for shard in range(4)]


def test_the_server_is_called_when_all_participants_died_in_the_middle(lab: Laboratory) -> None:
    join(lab, "w0")
    lab.plane.hset(lab.run.keys.head, {"version": 1})
    del lab.living["w0"]
    assert lab.rounds(10)[:1] == [("advance", OWN)]


def test_the_server_is_called_when_they_died_before_they_took_the_first_step(lab: Laboratory) -> None:
    join(lab, "w0")
    lab.write(0, 1, 2, 3)
    del lab.living["w0"]
    assert lab.rounds(10)[:1] == [("advance", OWN)]


def test_a_worker_that_left_and_could_not_say_so_is_no_participant(lab: Laboratory) -> None:
    shard = join(lab, "w0")
    lab.run.finish_slot(0, slot(0, shard, "n"), version=0)
    lab.doing("w0")
    assert lab.rounds(20), "its shards go out singly"
    state = lab.run.round()
    assert state is not None and state.participants == ()


def test_a_lost_part_of_an_evaluation_is_sent_again_while_a_round_goes_on(lab: Laboratory) -> None:
    join(lab, "w0")
    lab.run.launch_evaluation(0, 2, pin_seconds=1e6)
    assert lab.rounds(10)[:1] == [("evaluation", 0, (0, 1))]
