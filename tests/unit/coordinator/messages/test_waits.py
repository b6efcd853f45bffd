"""Each entry of the list of waits, reached as a run reaches it, on the in-memory control plane."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.control import SPEC, begin, record, slot, worker, write
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.ledger.rounds import Seat, Turn
from torchord.cache.ledger.workers import DEAF_SECONDS, StoreMemory, WorkerInfo
from torchord.cache.testing.memory_ledger import MemoryLedger
from torchord.cache.testing.memory_plane import MemoryPlane
from torchord.cache.testing.memory_registry import MemoryRegistry
from torchord.coordinator.master.fleet import Fleet
from torchord.coordinator.master.waiting import QUIET_SECONDS, SHOWN_SECONDS, Quiet
from torchord.coordinator.messages.task_names import GRADIENTS, UPDATES, worker_command
from torchord.coordinator.messages.waits import Wait, WaitKind, Waits, duration
from torchord.coordinator.runtime import activity
from torchord.coordinator.runtime.environment import unlike
from torchord.coordinator.spec.config import TrainingConfig
from torchord.coordinator.spec.plan import Plan

ROOT = Path(__file__).resolve().parents[4]
RUN = "run-1"
PLAN = Plan(24, TrainingConfig(batch_size=8, shards=4, audit_fraction=0.0))  # 3 steps of 4 shards


class Laboratory:
    """A run with a training server and two Clients."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.version = 0
        self.memory: StoreMemory | None = None
        self.away = False
        self.plane = MemoryPlane(clock=lambda: self.now)
        self.registry = MemoryRegistry(self.plane)
        self.ledger: Ledger = MemoryLedger(self.plane, RUN)
        self.living: dict[str, WorkerInfo] = {
            "s0": worker("s0", queues=(UPDATES,)),
            "w0": worker("w0", queues=(GRADIENTS,)),
            "w1": worker("w1", queues=(GRADIENTS,)),
        }
        for info in self.living.values():
            self.registry.beat(info)
        self.ledger.create(SPEC, incarnation="life")

    def begun(self) -> Laboratory:
        """Its first version is made, and its first step is under way."""
        _, token = self.ledger.acquire(worker="s0", node="celery@s0", queue="own")
        assert isinstance(token, int)
        self.ledger.initialise(
            token=token, manifest={}, record=record(0), dataset_size=24, evaluation_size=8, total_steps=3
        )
        self.ledger.mark_launched(0, token=token)
        return self

    def round(self) -> None:
        """Its steps are taken in a round."""
        assert self.ledger.open_round(0, 1, token=self.ledger.head().token) == "ok"

    def turn(self, id: str, **more: Any) -> Turn:
        """A Client asks what is next in the first step of that round, and says what it is at."""
        turn = self.ledger.turn(Seat(id, "", self.ledger.head().token, 0, "life", 3), 0, shards=4, **more)
        at = turn.verdict == "compute"
        self.say(id, task=activity.gradient(RUN, 0, turn.shard) if at else activity.in_round(RUN, 0))
        return turn

    def say(self, id: str, **changes: Any) -> None:
        self.living[id] = replace(self.living[id], **changes)

    @property
    def waits(self) -> Waits:
        return Waits(self.ledger, lambda head: PLAN, memory=lambda: self.memory, clock=lambda: self.now)

    def look(self) -> dict[WaitKind, Wait]:
        return {wait.kind: wait for wait in self.waits.look(self.ledger.head(), self.living)}

    def the(self, kind: WaitKind) -> Wait:
        found = self.look()
        assert list(found) == [kind]
        return found[kind]


@pytest.fixture
def lab() -> Laboratory:
    return Laboratory()


def test_a_participant_of_a_round_is_awaited(lab: Laboratory) -> None:
    """Nobody has come; one restores what it needs; one is at a shard, and others wait; the step is taken."""
    lab.begun().round()
    assert "that nobody has begun" in lab.the(WaitKind.QUEUE).what
    lab.say("w0", task=activity.in_round(RUN, 0), since=1000.0)
    assert lab.the(WaitKind.ROUND).what.endswith("of steps 0 to 1: step 0 is begun by w0")
    for shard in range(3):
        assert lab.turn("w0", slot=slot(0, shard - 1, "n") if shard else None).shard == shard
    assert lab.turn("w1").shard == 3
    assert lab.turn("w1", slot=slot(0, 3, "n")).verdict == "wait"
    lab.now += 25
    found = lab.the(WaitKind.ROUND)
    assert found.what.endswith("1 of the 1 missing slots of step 0 (slot 2 at w0, try 1); waited for by w1")
    assert found.since == 1000.0 and "run.cancel()" in found.ends
    lab.say("w0", where={activity.gradient(RUN, 0, 2): "models.py:7 in forward"})
    assert "slot 2 at w0, try 1, at models.py:7 in forward" in lab.the(WaitKind.ROUND).what
    assert lab.turn("w0", slot=slot(0, 2, "n")).verdict == "complete"
    lab.say("w0", since=1025.0)
    assert (
        lab.the(WaitKind.ROUND).what.endswith("step 0 is taken by w0; w1")
        or "w0" in lab.the(WaitKind.ROUND).what
    )
    del lab.living["w0"], lab.living["w1"]
    lab.living["w2"] = worker("w2", queues=(GRADIENTS,))
    assert "which is called" in lab.the(WaitKind.CALL).what


def test_nobody_serves_a_queue(lab: Laboratory) -> None:
    del lab.living["s0"]
    found = lab.the(WaitKind.SERVER)
    assert "none lives" in found.what and "celery -A torchord worker -Q updates -c 1" in found.ends
    del lab.living["w0"], lab.living["w1"]
    assert set(lab.look()) == {WaitKind.SERVER, WaitKind.CLIENT}


def test_all_that_serve_a_queue_refuse(lab: Laboratory) -> None:
    for id in ("w0", "w1"):
        lab.say(id, refuses={RUN: f"{id} has another torch"})
    found = lab.the(WaitKind.REFUSED)
    assert "w0 has another torch" in found.what and "admit_skew=True" in found.ends
    assert "admit_code" not in found.ends, "code is not the cause"
    lab.say("w1", refuses={RUN: "other sources; run.resume(admit_code=True) where the new code is right"})
    assert "or run.resume(admit_code=True) where the new code is right" in lab.the(WaitKind.REFUSED).ends
    lab.say("w1", refuses={"another": "run"})
    assert WaitKind.REFUSED not in lab.look()


def test_all_refuse_for_want_of_portable_kernels(lab: Laboratory) -> None:
    for id in ("w0", "w1"):
        lab.say(id, refuses={RUN: unlike(RUN, "portable", "torch 2, cpu AVX512, x86_64")})
    found = lab.the(WaitKind.REFUSED)
    assert "hardware='portable'" in found.what
    assert found.ends == f"start one: TORCHORD_HARDWARE=portable {worker_command(GRADIENTS)}"


def test_a_worker_is_deaf(lab: Laboratory) -> None:
    lab.begun().say("w0", silent=DEAF_SECONDS + 5)
    found = lab.look()[WaitKind.DEAF]
    assert "w0" in found.what and found.since == lab.now - DEAF_SECONDS - 5 and "restart" in found.ends
    lab.say("w0", task="busy for so long", silent=DEAF_SECONDS + 5)  # a solo pool's loop rests meanwhile
    assert WaitKind.DEAF not in lab.look()


def test_messages_are_thrown_away(lab: Laboratory) -> None:
    lab.begun().say("s0", discarded={GRADIENTS: "somebody takes them"})
    assert "somebody takes them" in lab.look()[WaitKind.DISCARDED].what


def test_redis_is_full(lab: Laboratory) -> None:
    """Then no worker can say that it lives, and none of them is the reason."""
    head, full = lab.begun().ledger.head(), StoreMemory(1_000_001, 1_000_000, "noeviction")
    (found,) = Waits(lab.ledger, lambda head: PLAN, memory=lambda: full).look(head, {})
    assert found.kind is WaitKind.ROOM and "1,000,001 of 1,000,000 bytes" in found.what
    roomy = replace(full, limit=0)
    assert len(Waits(lab.ledger, lambda head: PLAN, memory=lambda: roomy).look(head, {})) == 2


def test_a_person_has_paused_it(lab: Laboratory) -> None:
    lab.begun().ledger.transition("paused", allowed=("running",), event="paused")
    assert "resume()" in lab.the(WaitKind.PERSON).ends and lab.the(WaitKind.PERSON).what.endswith("paused")


def test_it_was_paused_for_a_reason(lab: Laboratory) -> None:
    why = {"kind": "CacheError", "message": "this failed 10 times"}
    lab.begun().ledger.transition("paused", allowed=("running",), event="paused", error=why)
    assert lab.the(WaitKind.PERSON).what == "a person: it is paused (this failed 10 times)"


def test_nobody_has_taken_it_up(lab: Laboratory) -> None:
    assert "takes it up" in lab.the(WaitKind.CALL).what
    lab.say("s0", task=activity.update("another", 7))
    assert "do something else (s0: another: update of step 7)" in lab.the(WaitKind.CALL).what


def test_its_server_makes_the_first_version_or_updates(lab: Laboratory) -> None:
    lab.say("s0", task=activity.update(RUN, 0), since=990.0)
    found = lab.the(WaitKind.START)
    assert "s0" in found.what and found.since == 990.0
    lab.begun()
    assert "update of step 0" in lab.the(WaitKind.UPDATE).what


def test_shards_wait_in_the_queue_or_are_computed(lab: Laboratory) -> None:
    lab.begun().say("w0", task=activity.gradient("another", 3, 1))
    found = lab.the(WaitKind.QUEUE)
    assert "4 slots of step 0 that nobody has begun; the Clients are at w0: another" in found.what
    lab.now += 30
    begin(lab.ledger, 0, 1, worker="w1", delivery="d1")
    write(lab.ledger, 0, slot(0, 0))
    shards = lab.look()[WaitKind.SHARDS]
    assert "1 of the 3 missing slots of step 0 (slot 1 at w1, try 1)" in shards.what
    assert shards.since == pytest.approx(1030.0)
    assert "2 slots of step 0 that nobody has begun" in lab.look()[WaitKind.QUEUE].what


LIMITED = Plan(
    24, TrainingConfig(batch_size=8, shards=4, audit_fraction=0.0, shard_timeout_seconds=600, max_attempts=2)
)


def test_of_what_takes_long_it_is_said_where_it_is_and_who_can_end_it(lab: Laboratory) -> None:
    place = "model.py:12 in forward"
    lab.begun()
    begin(lab.ledger, 0, 1, worker="w1", delivery="d1")
    task = activity.gradient(RUN, 0, 1)
    lab.say("w1", task=task, where={task: place, "another: task": "elsewhere.py:1 in f"})
    shards = lab.look()[WaitKind.SHARDS]
    assert f"(slot 1 at w1, try 1, at {place})" in shards.what
    assert "run.cancel() does, since the run has no shard_timeout_seconds" in shards.ends
    limited = Waits(lab.ledger, lambda head: LIMITED, clock=lambda: lab.now)
    shards, *_ = limited.look(lab.ledger.head(), lab.living)
    assert "shard_timeout_seconds=600 ends them: each gets 2 tries" in shards.ends
    update = activity.update(RUN, 0)
    lab.say("s0", task=f"another: task; {update}", where={update: place})
    found = lab.look()[WaitKind.UPDATE]
    assert f"update of step 0, at {place}" in found.what and "run.cancel()" in found.ends


def test_a_shard_of_a_dead_worker_is_not_computed(lab: Laboratory) -> None:
    lab.begun()
    begin(lab.ledger, 0, 1, worker="w1", delivery="d1")
    del lab.living["w1"]
    assert "4 slots" in lab.the(WaitKind.QUEUE).what


def test_all_slots_are_there_and_nobody_has_added_them(lab: Laboratory) -> None:
    lab.begun()
    for shard in range(4):
        write(lab.ledger, 0, slot(0, shard))
    assert "s0, which is called" in lab.the(WaitKind.CALL).what


def test_evaluations_are_computed(lab: Laboratory) -> None:
    lab.begun()
    lab.ledger.launch_evaluation(0, 2, pin_seconds=60)
    lab.ledger.write_part(0, 1, {"examples": 1}, parts=2)
    lab.say("w1", task=activity.evaluation(RUN, 0, 0))
    head = replace(lab.ledger.head(), version=3)
    (found,) = lab.waits.look(head, lab.living)
    assert found.kind is WaitKind.EVALUATION
    assert "version 0, of which 1 of 2 parts are there (w1)" in found.what


@pytest.mark.parametrize("state", ["done", "failed", "cancelled"])
def test_a_run_at_rest_waits_for_nothing(lab: Laboratory, state: str) -> None:
    head = replace(lab.begun().ledger.head(), status=state)
    assert lab.waits.look(head, {}) == ()


def test_what_people_read() -> None:
    wait = Wait(WaitKind.CLIENT, "a worker", "start one", since=100.0)
    assert wait.said(190.0) == "waits for a worker, since 1 min; start one"
    assert wait.said(50.0).startswith("waits for a worker, since 0 s"), "clocks may differ"
    assert [duration(s) for s in (0.4, 59.4, 61, 7300)] == ["0 s", "59 s", "1 min", "2 h 1 min"]


# --- said once nothing happens -------------------------------------------------------------


class Shown:
    """Keeps what is shown."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.lines: list[str] = []

    def quiet(self, said: str) -> None:
        self.notes.append(said)

    def say(self, said: str) -> None:
        self.lines.append(said)


class Watched:
    """A `Quiet` of the laboratory's run, with a clock that the test turns."""

    def __init__(self, lab: Laboratory, patch: pytest.MonkeyPatch) -> None:
        self.lab, self.shown, self.passed = lab, Shown(), 0.0
        patch.setattr("torchord.coordinator.master.waiting.time.monotonic", lambda: self.passed)
        fleet = Fleet(self, RUN)  # type: ignore[arg-type]
        self.quiet = Quiet(lab.waits, fleet, self.shown)

    @property
    def registry(self) -> Any:
        return self

    def alive(self) -> dict[str, WorkerInfo]:
        return self.lab.living

    def look(self, seconds: float, *, moved: bool = False, away: bool = False) -> None:
        self.passed += seconds
        self.quiet.look(None if away else self.lab.ledger.head(), moved=moved)


@pytest.fixture
def watched(lab: Laboratory, monkeypatch: pytest.MonkeyPatch) -> Watched:
    del lab.living["w0"], lab.living["w1"]
    return Watched(lab, monkeypatch)


def test_nothing_is_said_while_steps_come(watched: Watched) -> None:
    for _ in range(60):
        watched.look(1, moved=True)
    assert not any(watched.shown.notes) and watched.shown.lines == []


def test_a_short_note_comes_first_and_the_sentence_once(watched: Watched) -> None:
    watched.look(SHOWN_SECONDS - 1)
    assert watched.shown.notes == []
    watched.look(2)
    assert watched.shown.notes == ["waits for a worker on the queue of gradients"]
    assert watched.shown.lines == []
    for _ in range(10):
        watched.look(QUIET_SECONDS / 2)
    assert len(watched.shown.lines) == 1 and "start one: celery" in watched.shown.lines[0]
    watched.look(1, moved=True)
    assert watched.shown.notes[-1] == ""


def test_another_reason_is_said_as_well(watched: Watched) -> None:
    watched.look(QUIET_SECONDS)
    del watched.lab.living["s0"]
    watched.look(QUIET_SECONDS)
    assert len(watched.shown.lines) == 3  # then both queues


def test_a_redis_that_is_away_is_said(watched: Watched) -> None:
    watched.look(QUIET_SECONDS, away=True)
    assert watched.shown.lines[0].startswith("waits for Redis, which does not answer")


def test_an_evaluation_that_decides_is_awaited_before_the_next_step(lab: Laboratory) -> None:
    lab.begun().ledger.launch_evaluation(0, 2, pin_seconds=9)
    assert "that nobody has begun" in lab.the(WaitKind.QUEUE).what, "beside the steps, as a rule"
    plan = Plan(24, replace(PLAN.config, keep="best", evaluate_every=1, evaluate_at_start=True))
    waits = Waits(lab.ledger, lambda head: plan, clock=lambda: lab.now)
    (found,) = waits.look(lab.ledger.head(), lab.living)
    assert found.kind is WaitKind.EVALUATION
    assert found.what.startswith("the evaluation of version 0, of which 0 of 2 parts are there")
