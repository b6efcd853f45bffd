"""What fails is said and tried again; what does not pass pauses the run, once."""

from __future__ import annotations

import pytest

from tests.support.control import SPEC
from torchord.cache.errors import CacheError, CacheUnreachable, ChunkMissing, TorchordError
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.testing.memory_ledger import MemoryLedger
from torchord.cache.testing.memory_plane import MemoryPlane
from torchord.coordinator.runtime.hindrances import MOST_PAUSE_SECONDS, SECONDS, TRIES, Hindrances


class Lab:
    """Hindrances of one process, a clock, and what is said."""

    def __init__(self) -> None:
        self.now = 0.0
        self.said: dict[str, str] = {}
        self.plane = MemoryPlane()
        self.ledger = self.run("run-1")
        self.found = Hindrances(self, clock=lambda: self.now)

    def run(self, name: str) -> Ledger:
        ledger: Ledger = MemoryLedger(self.plane, name)
        ledger.create(SPEC, incarnation="life")
        return ledger

    def hindered(self, run: str, reason: str | None) -> None:
        self.said.pop(run, None)
        if reason is not None:
            self.said[run] = reason

    def fails(self, error: TorchordError, *, times: int, each: float, place: tuple[int, ...] = (3, 0)) -> str:
        """The state of the run after so many failures."""
        for _ in range(times):
            self.found.met(self.ledger, "slot", place, error)
            self.now += each
        return self.ledger.head().status


@pytest.fixture
def lab() -> Lab:
    return Lab()


DENIED = CacheError("cannot write x: redis://there answered 'NOPERM'")


def test_what_fails_is_said_with_the_number_of_the_try(lab: Lab) -> None:
    lab.fails(DENIED, times=3, each=1.0)
    assert lab.said == {"run-1": f"try 3 of {TRIES}: {DENIED}"}
    lab.found.passed("run-1", "slot")
    assert lab.said == {} and not lab.found.waits("run-1", "slot")


@pytest.mark.parametrize("error", [DENIED, ChunkMissing("chunk 3 of x is gone")])
def test_what_does_not_pass_pauses_the_run_with_the_reason(lab: Lab, error: CacheError) -> None:
    assert lab.fails(error, times=2 * TRIES, each=SECONDS / TRIES / 4) == "pending", "not before its time"
    assert lab.fails(error, times=2 * TRIES, each=SECONDS / TRIES) == "paused"
    reason = (lab.ledger.head().error or {})["message"]
    assert str(error) in reason and "run.resume() goes on" in reason


def test_a_run_that_is_resumed_has_all_its_tries_again(lab: Lab) -> None:
    lab.fails(DENIED, times=TRIES + 1, each=SECONDS / TRIES)
    lab.ledger.transition("pending", allowed=("paused",), event="resumed", error=None)
    assert lab.fails(DENIED, times=TRIES - 1, each=SECONDS) == "pending"


@pytest.mark.parametrize(
    "error",
    [
        CacheUnreachable("no Redis answers"),
        CacheError("answered 'OOM' (it is full: raise its maxmemory, or let finished runs expire)"),
    ],
    ids=["away", "full"],
)
def test_a_server_that_is_away_or_full_is_waited_for(lab: Lab, error: CacheError) -> None:
    assert lab.fails(error, times=10 * TRIES, each=SECONDS) == "pending"
    assert lab.said["run-1"] == f"try {10 * TRIES}: {error}"


def test_a_run_that_gets_further_is_not_paused(lab: Lab) -> None:
    for step in range(10 * TRIES):
        assert lab.fails(DENIED, times=2, each=SECONDS, place=(step, 0)) == "pending"


def test_at_the_same_place_a_success_in_between_does_not_count(lab: Lab) -> None:
    """Bytes that are lost as often as they are written."""
    for _ in range(TRIES):
        lab.fails(DENIED, times=1, each=SECONDS / 2)
        lab.found.passed("run-1", "slot", moved=False)
        assert lab.said == {}
    assert lab.ledger.head().status == "paused"


def test_two_things_of_one_run_are_told_apart(lab: Lab) -> None:
    lab.fails(DENIED, times=1, each=1.0)
    lab.found.met(lab.ledger, "checkpoint", (), CacheError("no space"))
    assert lab.said["run-1"] == f"try 1 of {TRIES}: {DENIED}; try 1 of {TRIES}: no space"
    lab.found.passed("run-1", "slot")
    assert lab.said["run-1"] == f"try 1 of {TRIES}: no space" and lab.found.waits("run-1", "checkpoint")


def test_pauses_grow_up_to_a_minute(lab: Lab) -> None:
    def pause() -> int:
        lab.found.met(lab.ledger, "checkpoint", (), DENIED, seconds=1e9)
        seconds = 0
        while not lab.found.due("run-1", "checkpoint"):
            lab.now += 1
            seconds += 1
        return seconds

    assert lab.found.due("run-1", "checkpoint")
    assert [pause() for _ in range(9)] == [1, 2, 4, 8, 16, 32, *3 * [int(MOST_PAUSE_SECONDS)]]


def test_runs_of_long_ago_are_forgotten(lab: Lab) -> None:
    for number in range(200):
        lab.found.met(lab.run(f"other-{number}"), "slot", (0, 0), DENIED)
    assert len(lab.found._found) <= 64 and len(lab.said) <= 64
