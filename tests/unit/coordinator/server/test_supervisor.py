"""The supervisor on the in-memory control plane, with a clock that the test turns.

Each test puts a run into a state that some mishap leaves behind, lets rounds pass, and looks at the
messages: the right one is sent, in time, and no more of it than needed. Where all is well, nothing is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from tests.support.control import begin, entry, record, slot, worker
from tests.support.waiting import wait_until
from torchord.cache import keys
from torchord.cache.errors import CacheUnreachable, CheckpointError, RunNotFound
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.ledger.records import GENESIS
from torchord.cache.ledger.slots import BACKUP_FACTOR, BACKUP_LOST_SECONDS
from torchord.cache.ledger.workers import WorkerInfo
from torchord.cache.testing.memory_ledger import MemoryLedger
from torchord.cache.testing.memory_plane import MemoryPlane
from torchord.cache.testing.memory_registry import MemoryRegistry
from torchord.coordinator.messages.task_names import GRADIENTS, UPDATES
from torchord.coordinator.runtime import activity
from torchord.coordinator.server.supervisor.discards import LOSSES, WINDOW_SECONDS
from torchord.coordinator.server.supervisor.memory import IDLE_SECONDS, REPEAT_SECONDS, UNSEEN_SECONDS
from torchord.coordinator.server.supervisor.shard_watch import ASTRAY_SECONDS
from torchord.coordinator.server.supervisor.supervisor import (
    POLL_SECONDS,
    QUIET_AGAIN_SECONDS,
    QUIET_SECONDS,
    SETTLE_SECONDS,
    Supervisor,
)
from torchord.coordinator.spec.config import TrainingConfig

RUN = "run-1"
# 3 steps of 4 shards on 24 examples
CONFIG = TrainingConfig(batch_size=8, shards=4, max_attempts=3, audit_fraction=0)


@dataclass
class Sent:
    """Records what is sent, and puts it into the queue where a worker would find it."""

    plane: MemoryPlane
    messages: list[tuple[Any, ...]] = field(default_factory=list)

    def advance(self, run: str, *, queue: str = UPDATES) -> None:
        self.messages.append(("advance", queue))
        self.plane.push(queue, {"run": run})

    def gradient(self, run: str, step: int, shard: int, *, version: int, backup: bool = False) -> None:
        self.messages.append(("backup" if backup else "gradient", step, shard))
        self.plane.push(GRADIENTS, {"run": run, "step": step, "shard": shard, "version": version})

    def partial_sum(self, run: str, step: int, slot: int, *, version: int, backup: bool = False) -> None:
        self.messages.append(("backup sum" if backup else "sum", step, slot))
        self.plane.push(GRADIENTS, {"run": run, "step": step, "slot": slot, "version": version})

    def evaluation(self, run: str, version: int, parts: Any, of: int) -> None:
        self.messages.append(("evaluation", version, tuple(parts)))
        for part in parts:
            self.plane.push(GRADIENTS, {"run": run, "version": version, "part": part, "parts": of})


class Laboratory:
    """A running run of 3 steps with 4 shards, its server s0, its Clients w0 to w2, and the supervisor."""

    def __init__(self, config: TrainingConfig = CONFIG) -> None:
        self.now = 1000.0
        self.plane = MemoryPlane(clock=lambda: self.now)
        self.registry = MemoryRegistry(self.plane)
        self.sent = Sent(self.plane)
        self.wrong: dict[str, str] = {}
        self.supervisor = Supervisor(
            self,  # type: ignore[arg-type]
            "s0",
            self.sent,  # type: ignore[arg-type]
            clock=lambda: self.now,
            report=lambda wrong: setattr(self, "wrong", wrong),
        )
        self.living = {
            "s0": worker("s0", queues=(UPDATES, f"{UPDATES}.celery@s0")),
            **{id: worker(id, queues=(GRADIENTS,), environment="torch") for id in ("w0", "w1", "w2")},
        }
        self.run = self.submit(RUN, config)

    def ledger(self, run: str) -> Ledger:
        return MemoryLedger(self.plane, run)

    def submit(self, run: str, config: TrainingConfig = CONFIG, *, launched: int | None = 0) -> Ledger:
        self.beat()
        ledger = self.ledger(run)
        ledger.create({"recipe": {}, "config": config.to_json()}, incarnation="life")
        _, token = ledger.acquire(worker="s0", node="celery@s0", queue=f"{UPDATES}.celery@s0")
        assert isinstance(token, int)
        ledger.initialise(
            token=token, manifest={}, record=record(0), dataset_size=24, evaluation_size=8, total_steps=3
        )
        if launched is not None:
            ledger.mark_launched(launched, token=token)
        return ledger

    @property
    def token(self) -> int:
        return self.run.head().token

    def beat(self) -> None:
        for info in self.living.values():
            self.registry.beat(info)

    def doing(self, id: str, *tasks: str) -> None:
        self.living[id] = replace(self.living[id], task="; ".join(tasks))

    def begin(self, shard: int, id: str = "w0", step: int = 0) -> None:
        """A Client takes a shard and says so."""
        assert self.run.begin(step, shard, worker=id, delivery=f"d{shard}").verdict == "compute"
        self.doing(id, activity.gradient(RUN, step, shard))

    def write(self, *shards: int, step: int = 0, seconds: float = 1e3) -> None:
        for shard in shards:
            self.run.finish_slot(step, slot(step, shard, f"n{shard}", seconds=seconds), version=0)

    def queued(self) -> None:
        """The messages of the chord wait in the queue: nobody has taken them yet."""
        for shard in range(4):
            self.plane.push(GRADIENTS, {"run": RUN, "step": 0, "shard": shard})

    def consume(self, queue: str) -> None:
        """Somebody takes every message of a queue, and loses it."""
        self.plane.delete(queue)

    def round(self) -> None:
        self.now += POLL_SECONDS
        self.beat()
        self.supervisor.look(self.registry)
        self.supervisor._round_ended = self.now

    def rounds(self, seconds: float) -> list[tuple[Any, ...]]:
        """Let time pass; returns what was sent in it."""
        before = len(self.sent.messages)
        for _ in range(round(seconds / POLL_SECONDS)):
            self.round()
        return self.sent.messages[before:]


@pytest.fixture
def lab() -> Laboratory:
    """A laboratory whose supervisor has got over its own start."""
    lab = Laboratory()
    lab.queued()
    assert lab.rounds(4) == []
    lab.consume(GRADIENTS)
    return lab


OWN = f"{UPDATES}.celery@s0"

# --- nothing is sent when all is well --------------------------------------------------------------


def test_nothing_is_sent_while_the_shards_wait_their_turn(lab: Laboratory) -> None:
    lab.queued()
    assert lab.rounds(90) == []


def test_nothing_is_sent_while_the_shards_are_computed(lab: Laboratory) -> None:
    lab.begin(0, "w0")
    lab.begin(1, "w1")
    lab.begin(2, "w2")
    lab.write(3)
    lab.doing("w2", activity.gradient(RUN, 0, 2))
    assert lab.rounds(90) == []


def test_nothing_is_sent_while_the_update_is_computed(lab: Laboratory) -> None:
    lab.write(0, 1, 2, 3)
    lab.doing("s0", activity.update(RUN, 0))
    assert lab.rounds(90) == []


def test_nothing_is_sent_while_an_evaluation_is_computed(lab: Laboratory) -> None:
    lab.queued()
    lab.run.launch_evaluation(0, 2, pin_seconds=1e6)
    lab.doing("w0", activity.evaluation(RUN, 0, 1))
    assert lab.rounds(90) == []


@pytest.mark.parametrize("status", ["paused", "failed", "cancelled", "done"])
def test_nothing_is_sent_for_a_run_at_rest(lab: Laboratory, status: str) -> None:
    lab.run.transition(status, allowed=("running",), event=status)
    lab.living.pop("s0")
    lab.living["s1"] = worker("s1")
    lab.supervisor.worker = "s1"
    assert lab.rounds(60) == []
    assert lab.registry.active_runs() == []


def test_no_run_no_message(lab: Laboratory) -> None:
    lab.run.transition("done", allowed=("running",), event="done")
    lab.plane.delete(lab.run.keys.head)
    assert lab.rounds(10) == []


# --- shards ------------------------------------------------------------------------------------------


def test_the_shard_of_a_dead_worker_is_sent_again(lab: Laboratory) -> None:
    lab.write(1, 2, 3)
    lab.begin(0)
    assert lab.rounds(10) == []
    lab.living.pop("w0")
    assert lab.rounds(keys.WORKER_LEASE_MS / 1000 + POLL_SECONDS) == [("gradient", 0, 0)]
    assert lab.rounds(60) == [], "it waits in the queue"


def test_a_message_that_is_lost_again_is_sent_again(lab: Laboratory) -> None:
    lab.write(1, 2, 3)
    lab.begin(0)
    lab.living.pop("w0")
    lab.rounds(3)
    lab.consume(GRADIENTS)
    assert lab.rounds(3) == [("gradient", 0, 0)]


def test_a_shard_that_was_handed_back_is_sent_at_once(lab: Laboratory) -> None:
    lab.write(1, 2, 3)
    lab.begin(0)
    lab.doing("w0")
    lab.run.end_lease(0, 0, worker="w0", delivery="d0")
    assert lab.rounds(POLL_SECONDS) == [("gradient", 0, 0)]


def test_a_lost_message_is_sent_again_when_it_is_surely_lost(lab: Laboratory) -> None:
    lab.write(1, 3)
    assert lab.rounds(UNSEEN_SECONDS) == []
    assert lab.rounds(POLL_SECONDS) == [("gradient", 0, 0), ("gradient", 0, 2)]
    assert lab.rounds(60) == []


def test_each_shard_waits_in_the_queue_once_however_long_nobody_takes_it(lab: Laboratory) -> None:
    """All Clients are away overnight: nothing accumulates."""
    lab.write(3)
    lab.begin(0, "w0")
    lab.begin(1, "w1")
    for id in ("w0", "w1", "w2"):
        lab.living.pop(id)
    lab.rounds(600)
    assert len(lab.registry.queued(GRADIENTS)) == 3


def test_a_worker_that_is_not_at_its_shard_loses_it(lab: Laboratory) -> None:
    """It could not hand it back, or Redis lost its slot: an open lease of a living worker is no proof."""
    lab.write(1, 2, 3)
    lab.begin(0)
    lab.doing("w0")
    assert lab.rounds(ASTRAY_SECONDS) == []
    assert lab.rounds(1.5) == [("gradient", 0, 0)]
    assert begin(lab.run, 0, 0, worker="w1", delivery="d") == ("compute", 1, "life"), "no try was lost"


def test_with_staleness_every_step_under_way_is_watched() -> None:
    lab = Laboratory(replace(CONFIG, staleness=1))
    lab.run.mark_launched(1, token=lab.token)
    lab.rounds(3)
    lab.write(0, 1, 2)
    lab.write(0, 1, 3, step=1)
    lab.consume(GRADIENTS)
    lab.sent.messages.clear()
    assert sorted(lab.rounds(4)) == [("gradient", 0, 3), ("gradient", 1, 2)]


# --- slow shards ---------------------------------------------------------------------------------------


def test_a_slow_shard_gets_one_backup_on_an_idle_worker(lab: Laboratory) -> None:
    lab.write(1, 2, 3, seconds=0.1)
    lab.begin(0)
    assert lab.rounds(1) == [("backup", 0, 0)]
    assert lab.rounds(BACKUP_LOST_SECONDS - 1) == []
    lab.consume(GRADIENTS)
    assert lab.rounds(2) == [("backup", 0, 0)], "nobody has begun the first one: it was lost"
    lab.consume(GRADIENTS)
    assert lab.rounds(120) == [], "two are enough, however long it takes"


def test_no_backup_while_every_worker_is_busy(lab: Laboratory) -> None:
    lab.write(1, 2, 3, seconds=0.1)
    lab.begin(0)
    lab.doing("w1", "run-2: gradient of shard 0, step 0")
    lab.doing("w2", "run-2: gradient of shard 1, step 0")
    assert lab.rounds(60) == []


def test_no_backup_of_a_shard_that_takes_as_long_as_usual(lab: Laboratory) -> None:
    lab.write(1, 2, 3, seconds=20.0)
    lab.begin(0)
    assert lab.rounds(20 + BACKUP_FACTOR * 20) == []
    assert lab.rounds(1) == [("backup", 0, 0)]


def test_no_backup_where_nobody_knows_what_is_usual(lab: Laboratory) -> None:
    for shard, id in enumerate(("w0", "w1")):
        lab.begin(shard, id)
    lab.queued()
    assert lab.rounds(90) == []


def test_an_overdue_shard_goes_elsewhere_and_fails_the_run_in_the_end() -> None:
    lab = Laboratory(replace(CONFIG, shard_timeout_seconds=5.0))
    lab.queued()
    lab.rounds(4)
    lab.consume(GRADIENTS)
    lab.write(1, 2, 3, seconds=100.0)
    for attempt, id in enumerate(("w0", "w1", "w2"), start=1):
        assert lab.run.head().status == "running"
        lab.begin(0, id)
        assert lab.run.leases(0)[0].attempt == attempt
        assert lab.rounds(5) == []
        expected = [("gradient", 0, 0)] if attempt < 3 else []
        assert lab.rounds(1) == expected
        lab.consume(GRADIENTS)
    head = lab.run.head()
    assert head.status == "failed"
    assert head.error is not None
    assert (head.error["kind"], head.error["shard"]) == ("Poison", 0)
    assert "shard_timeout_seconds=5" in head.error["message"]


# --- poison ----------------------------------------------------------------------------------------------


def test_a_shard_that_takes_every_worker_down_fails_the_run_and_names_its_samples(lab: Laboratory) -> None:
    lab.write(1, 2, 3)
    for id in ("w0", "w1", "w2"):
        assert lab.run.head().status == "running"
        lab.begin(0, id)
        lab.living.pop(id)
        lab.rounds(3)
        lab.consume(GRADIENTS)
    assert lab.run.head().status == "running", "the last one may only be slow to answer"
    assert lab.rounds(4) == []
    head = lab.run.head()
    assert head.status == "failed"
    assert head.error is not None
    assert (head.error["kind"], head.error["step"], head.error["shard"]) == ("Poison", 0, 0)
    assert len(head.error["samples"]) == 2
    assert str(head.error["samples"][0]) in head.error["message"]
    assert lab.run.slots_present(0) == {1, 2, 3}, "the others' work is kept"


def test_after_resume_the_tries_count_anew(lab: Laboratory) -> None:
    test_a_shard_that_takes_every_worker_down_fails_the_run_and_names_its_samples(lab)
    lab.run.transition("running", allowed=("failed",), event="resumed", error=None)
    lab.run.mark_launched(0, token=lab.token)
    assert lab.rounds(60) == [("gradient", 0, 0)]
    assert lab.run.head().status == "running"


def test_a_worker_that_was_only_stopped_is_no_poison(lab: Laboratory) -> None:
    lab.write(1, 2, 3)
    stopped: dict[str, WorkerInfo] = {}
    for id in ("w0", "w1", "w2"):
        lab.begin(0, id)
        stopped[id] = lab.living.pop(id)
        lab.rounds(2.5)
        lab.consume(GRADIENTS)
    lab.living["w2"] = stopped["w2"]  # it goes on
    lab.rounds(60)
    assert lab.run.head().status == "running"


def test_a_worker_that_died_beside_the_supervisor_is_not_waited_for(
    lab: Laboratory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lease has long to run, but its process is gone; one that runs elsewhere has its lease only."""
    lab.write(2, 3)
    lab.begin(0, "w0")
    lab.begin(1, "w1")
    lab.registry.beat(replace(lab.living.pop("w0"), pid=1, started=2, place="here"))
    lab.registry.beat(replace(lab.living.pop("w1"), pid=1, started=2, place="elsewhere"))
    monkeypatch.setattr("torchord.cache.ledger.process.ended", lambda place, pid, started: place == "here")
    assert lab.rounds(POLL_SECONDS) == [("gradient", 0, 0)]
    assert lab.registry.worker("w0") is None and lab.registry.worker("w1") is not None


# --- training servers ------------------------------------------------------------------------------------


def successor(lab: Laboratory) -> None:
    """The server dies; another, which supervises, lives."""
    lab.living.pop("s0")
    lab.living["s1"] = worker("s1", queues=(UPDATES,))
    lab.supervisor.worker = "s1"


def test_a_dead_server_is_replaced_as_soon_as_its_lease_ends(lab: Laboratory) -> None:
    lab.queued()
    lab.plane.push(OWN, {"run": RUN, "step": 0})
    lab.living["s1"] = worker("s1", queues=(UPDATES,))
    lab.rounds(1)
    successor(lab)
    assert lab.rounds(keys.WORKER_LEASE_MS / 1000 + POLL_SECONDS) == [("advance", UPDATES)]
    assert lab.plane.ttl(OWN) is not None, "what was sent to the dead one does not stay for ever"
    assert lab.rounds(60) == [], "the call waits in the queue"
    lab.consume(UPDATES)
    assert lab.rounds(3) == [("advance", UPDATES)]


def test_a_server_that_died_beside_the_supervisor_is_replaced_at_once(
    lab: Laboratory, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.queued()
    lab.living["s1"] = worker("s1", queues=(UPDATES,))
    lab.rounds(1)
    lab.registry.beat(replace(lab.living["s0"], pid=1, started=2, place="here"))
    successor(lab)
    monkeypatch.setattr("torchord.cache.ledger.process.ended", lambda place, pid, started: place == "here")
    assert lab.rounds(POLL_SECONDS) == [("advance", UPDATES)]


def test_a_supervisor_that_died_beside_another_is_followed_at_once(
    lab: Laboratory, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.registry.elect("s0")
    lab.registry.beat(replace(lab.living["s0"], pid=1, started=2, place="here"))
    lab.supervisor.worker = "s1"
    assert not lab.supervisor._elected(lab.registry)
    monkeypatch.setattr("torchord.cache.ledger.process.ended", lambda place, pid, started: place == "here")
    assert lab.supervisor._elected(lab.registry)
    assert lab.registry.elect("s2") == "s1"


def test_a_run_that_nobody_has_served_yet_is_called_for() -> None:
    lab = Laboratory()
    lab.queued()
    other = lab.ledger("run-2")
    other.create({"recipe": {}, "config": CONFIG.to_json()}, incarnation="life")
    assert lab.rounds(IDLE_SECONDS) == [], "its message may be on its way"
    assert lab.rounds(2) == [("advance", UPDATES)]


def test_a_lost_chord_is_called_for_at_the_server_that_holds_the_run(lab: Laboratory) -> None:
    lab.write(0, 1, 2, 3)
    assert lab.rounds(IDLE_SECONDS) == []
    assert lab.rounds(POLL_SECONDS) == [("advance", OWN)]
    assert lab.rounds(60) == [], "the call waits in its queue"


def test_a_lost_chord_is_noticed_while_the_server_is_busy_with_another_run(lab: Laboratory) -> None:
    lab.write(0, 1, 2, 3)
    lab.doing("s0", activity.update("run-2", 7))
    assert lab.rounds(2) == [("advance", OWN)]


def test_a_launch_that_was_interrupted_is_finished(lab: Laboratory) -> None:
    lab.run.transition("paused", allowed=("running",), event="paused")
    lab.run.transition("running", allowed=("paused",), event="resumed")
    assert lab.run.head().launched is None
    assert lab.rounds(2) == [("advance", OWN)]


def test_a_server_that_acquired_and_did_not_initialise_is_called(lab: Laboratory) -> None:
    lab.queued()
    other = lab.ledger("run-2")
    other.create({"recipe": {}, "config": CONFIG.to_json()}, incarnation="life")
    other.acquire(worker="s0", node="celery@s0", queue=OWN)
    assert lab.rounds(2) == [("advance", OWN)]


def test_the_end_of_a_run_is_called_for(lab: Laboratory) -> None:
    chain = GENESIS
    for step in range(3):
        lab.write(0, 1, 2, 3, step=step)
        made = entry(step + 1, [slot(step, shard) for shard in range(4)], chain)
        chain = made.chain
        committed = lab.run.commit(
            step=step, token=lab.token, shards=4, entry=made, record=record(step + 1, chain), event={}
        )
        assert committed.verdict == "ok"
    lab.run.launch_evaluation(3, 1, pin_seconds=60)
    lab.doing("w0", activity.evaluation(RUN, 3, 0))
    assert lab.rounds(10) == []
    lab.run.write_part(3, 0, {}, parts=1)
    lab.run.record_evaluation(3, {})
    assert lab.rounds(2) == [("advance", OWN)]


# --- evaluations ------------------------------------------------------------------------------------------


def test_lost_parts_of_an_evaluation_are_sent_again(lab: Laboratory) -> None:
    lab.begin(0)
    lab.write(1, 2, 3)
    lab.run.launch_evaluation(0, 3, pin_seconds=1e6)
    lab.run.write_part(0, 1, {}, parts=3)
    assert lab.rounds(IDLE_SECONDS) == []
    assert lab.rounds(POLL_SECONDS) == [("evaluation", 0, (0, 2))]
    assert lab.rounds(60) == [], "they wait in the queue"


def test_an_evaluation_whose_last_writer_died_is_recorded(lab: Laboratory) -> None:
    lab.begin(0)
    lab.write(1, 2, 3)
    lab.run.launch_evaluation(0, 2, pin_seconds=1e6)
    for part in range(2):
        lab.run.write_part(0, part, {}, parts=2)
    assert lab.rounds(2) == [("evaluation", 0, (0,))]


def test_an_evaluation_that_takes_every_worker_down_fails_the_run(lab: Laboratory) -> None:
    lab.begin(0)
    lab.write(1, 2, 3)
    lab.run.launch_evaluation(0, 1, pin_seconds=1e6)
    for _ in range(40):
        lab.rounds(1)
        lab.consume(GRADIENTS)
    head = lab.run.head()
    assert head.status == "failed"
    assert head.error is not None
    assert head.error["kind"] == "Poison"
    assert lab.sent.messages.count(("evaluation", 0, (0,))) == 3


# --- Redis and the supervisor themselves -------------------------------------------------------------------


def test_after_an_outage_nobody_is_taken_for_dead_at_once(lab: Laboratory) -> None:
    """Every lease has run out, because nobody could renew it."""
    lab.write(1, 2, 3)
    lab.begin(0)
    lab.now += 30.0
    lab.supervisor.look(lab.registry)
    lab.registry.beat(lab.living["s0"])
    lab.supervisor.look(lab.registry)
    assert lab.sent.messages == []
    assert lab.rounds(60) == []


def test_after_an_outage_the_others_have_time_to_say_that_they_live(lab: Laboratory) -> None:
    """The supervisor's own lease is the first that is renewed; whoever is silent for longer is dead."""
    lab.write(1, 2, 3)
    lab.begin(0)
    others = {id: lab.living.pop(id) for id in ("w0", "w1", "w2")}
    lab.now += 30.0
    assert lab.rounds(SETTLE_SECONDS - POLL_SECONDS) == []
    lab.living |= {"w1": others["w1"], "w2": others["w2"]}
    assert lab.rounds(2 * POLL_SECONDS) == [("gradient", 0, 0)], "w0 has not come back"


def test_whoever_has_lost_its_own_lease_takes_nobody_for_dead(lab: Laboratory) -> None:
    """No round took long, but what it missed others may have missed: they have as much time as it took."""
    lab.write(1, 2, 3)
    lab.begin(0)
    living, lab.living = lab.living, {}
    assert lab.rounds(10) == []
    assert lab.registry.alive() == {}
    lab.living = {"s0": living["s0"]}
    assert lab.rounds(SETTLE_SECONDS - POLL_SECONDS) == []
    lab.living = living
    assert lab.rounds(60) == []


class Rounds(threading.Event):
    """What the supervisor's thread waits for between two rounds: a clock that the wait turns.

    Args:
        before: called before each round with its number.
        rounds: how many there are.
    """

    def __init__(self, lab: Laboratory, before: Callable[[int], None], rounds: int) -> None:
        super().__init__()
        self.lab, self.before, self.rounds, self.number = lab, before, rounds, 0

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.lab.now += timeout
        self.number += 1
        self.before(self.number)
        return self.number > self.rounds


def test_after_an_error_nobody_is_taken_for_dead_at_once_and_then_whoever_is(
    lab: Laboratory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Redis answers this process again, and the others' leases ran out meanwhile; one of them has died."""
    lab.write(1, 2, 3)
    lab.begin(0)
    dead = lab.living.pop("w0")
    lab.registry.leave(dead)
    elect, sent = lab.registry.elect, []

    def away_at_first(id: str, *, dead: str = "") -> str:
        if supervisor_thread.number == 1:
            raise CacheUnreachable("away")
        return elect(id, dead=dead)

    def before(number: int) -> None:
        lab.beat()
        sent.append(list(lab.sent.messages))

    monkeypatch.setattr(lab.registry, "elect", away_at_first)
    supervisor_thread = Rounds(lab, before, round(SETTLE_SECONDS / POLL_SECONDS) + 1)
    lab.supervisor._stop = supervisor_thread
    lab.supervisor._run()
    assert [record.message for record in caplog.records if "away" in record.message] == ["supervisor: away"]
    assert sent[-2] == [] and sent[-1] == [("gradient", 0, 0)]


def test_an_error_that_nobody_foresaw_does_not_end_the_supervisor(
    lab: Laboratory, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.write(1, 2, 3)
    elect = lab.registry.elect

    def wrong_at_first(id: str, *, dead: str = "") -> str:
        if supervisor_thread.number == 1:
            raise RuntimeError("a mistake")
        return elect(id, dead=dead)

    monkeypatch.setattr(lab.registry, "elect", wrong_at_first)
    supervisor_thread = Rounds(lab, lambda number: lab.beat(), round(UNSEEN_SECONDS / POLL_SECONDS) + 40)
    lab.supervisor._stop = supervisor_thread
    lab.supervisor._run()
    assert lab.sent.messages == [("gradient", 0, 0)]


def test_a_run_that_redis_lost_is_created_again(lab: Laboratory, monkeypatch: pytest.MonkeyPatch) -> None:
    recreated: list[str] = []
    monkeypatch.setattr(
        "torchord.coordinator.server.supervisor.supervisor.recreate",
        lambda services, run: recreated.append(run) or 0,
    )
    lab.queued()
    lab.rounds(1)
    lab.plane.delete(*lab.plane.names())
    lab.plane.id = "another life of the server"
    lab.now += 5.0
    assert lab.rounds(5) == [("advance", UPDATES)]
    assert recreated == [RUN]


def test_a_run_that_cannot_be_created_again_is_let_go(
    lab: Laboratory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def recreate(services: object, run: str) -> int:
        raise CheckpointError("no checkpoint here")

    monkeypatch.setattr("torchord.coordinator.server.supervisor.supervisor.recreate", recreate)
    lab.queued()
    lab.rounds(1)
    lab.plane.delete(*lab.plane.names())
    lab.plane.id = "another life of the server"
    lab.now += 5.0
    assert lab.rounds(10) == []


def test_a_run_that_a_person_deleted_is_not_created_again(
    lab: Laboratory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "torchord.coordinator.server.supervisor.supervisor.recreate", lambda services, run: pytest.fail(run)
    )
    lab.queued()
    lab.rounds(1)
    lab.plane.delete(*[name for name in lab.plane.names() if RUN in name])
    assert lab.rounds(5) == []
    with pytest.raises(RunNotFound):
        lab.run.head()
    assert lab.registry.active_runs() == []


def test_one_supervisor_acts_and_another_takes_its_place() -> None:
    plane = MemoryPlane()
    registry = MemoryRegistry(plane)

    class Services:
        def __init__(self) -> None:
            self.registry = registry

        def ledger(self, run: str) -> Ledger:
            return MemoryLedger(plane, run)

    supervisors = [Supervisor(Services(), id, Sent(plane)) for id in ("a", "b")]  # type: ignore[arg-type]
    for supervisor in supervisors:
        supervisor.start()
    first = wait_until(lambda: plane.get(keys.SUPERVISOR), message="an election")
    chosen = {"a": supervisors[0], "b": supervisors[1]}
    chosen.pop(first).stop()
    (other,) = chosen
    wait_until(lambda: plane.get(keys.SUPERVISOR) == other, message="the other one to be elected")
    chosen[other].stop()
    assert plane.get(keys.SUPERVISOR) is None


def test_what_is_wrong_with_telling_others_stops_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = Laboratory()
    monkeypatch.setattr(lab.registry, "telling_runs", lambda: 1 / 0)
    lab.supervisor.services.registry = lab.registry  # type: ignore[misc]
    looked: list[int] = []
    monkeypatch.setattr(lab.supervisor, "look", lambda registry: looked.append(1))
    lab.supervisor.start()
    wait_until(lambda: len(looked) > 1, message="another look at the runs")
    assert lab.supervisor._settled_at == float("-inf"), "and nobody waits for a store that is there"
    lab.supervisor.stop()


# --- partial sums: four shards with a fan-in of 2 are summed in the slots 4 and 5 --------------------


@pytest.fixture
def tree() -> Laboratory:
    lab = Laboratory(replace(CONFIG, fan_in=2))
    lab.queued()
    assert lab.rounds(4) == []
    lab.consume(GRADIENTS)
    return lab


def test_a_sum_is_sent_again_once_its_inputs_are_there(tree: Laboratory) -> None:
    tree.begin(2, "w0")
    tree.begin(3, "w1")
    tree.write(0, 1)
    assert tree.rounds(10) == [("sum", 0, 4)], "who wrote the last input died before it sent the sum"
    assert tree.rounds(60) == [], "it waits in the queue"
    tree.consume(GRADIENTS)
    tree.write(4)
    assert tree.rounds(10) == [], "the inputs of the other sum are under way"


def test_a_sum_of_a_dead_worker_is_sent_again(tree: Laboratory) -> None:
    tree.write(0, 1, 2, 3, 5)
    tree.run.begin(0, 4, worker="w0", delivery="d")
    tree.doing("w0", activity.partial_sum(RUN, 0, 4))
    assert tree.rounds(10) == []
    tree.living.pop("w0")
    assert tree.rounds(keys.WORKER_LEASE_MS / 1000 + POLL_SECONDS) == [("sum", 0, 4)]


def checked() -> Laboratory:
    """A laboratory whose steps have checks: in the first one the slots 4 to 7."""
    lab = Laboratory(replace(CONFIG, audit_fraction=0.01))
    lab.queued()
    lab.rounds(4)
    lab.consume(GRADIENTS)
    return lab


def test_a_check_that_is_lost_is_sent_again_like_a_shard() -> None:
    lab = checked()
    lab.write(0, 1, 2, 3, 4, 6, 7)
    assert lab.rounds(10) == [("gradient", 0, 5)], "its message was lost"
    lab.consume(GRADIENTS)
    lab.run.begin(0, 5, worker="w0", delivery="d")
    lab.doing("w0", activity.gradient(RUN, 0, 5))
    assert lab.rounds(10) == []
    lab.living.pop("w0")
    assert lab.rounds(keys.WORKER_LEASE_MS / 1000 + POLL_SECONDS) == [("gradient", 0, 5)]


def test_a_slow_check_gets_a_backup() -> None:
    lab = checked()
    lab.write(0, 1, 2, 3, 4, 6, 7, seconds=0.1)
    lab.run.begin(0, 5, worker="w0", delivery="d")
    lab.doing("w0", activity.gradient(RUN, 0, 5))
    assert lab.rounds(10) == [("backup", 0, 5)]


def test_a_slow_sum_gets_a_backup(tree: Laboratory) -> None:
    tree.write(0, 1, 2, 3, seconds=0.1)
    tree.write(5, seconds=0.2)
    tree.run.begin(0, 4, worker="w0", delivery="d")
    tree.doing("w0", activity.partial_sum(RUN, 0, 4))
    assert tree.rounds(10) == [("backup sum", 0, 4)]


def test_a_step_with_a_tree_is_complete_when_its_sums_are_there(tree: Laboratory) -> None:
    tree.write(0, 1, 2, 3, 5)
    tree.run.begin(0, 4, worker="w0", delivery="d")
    tree.doing("w0", activity.partial_sum(RUN, 0, 4))
    assert tree.rounds(10) == [], "the training server is not called for an incomplete step"
    tree.write(4)
    tree.doing("w0")
    assert tree.rounds(3) == [("advance", OWN)]


def test_a_sum_that_takes_its_workers_down_stops_the_run(tree: Laboratory) -> None:
    tree.write(0, 1, 2, 3, 5)
    for turn in range(CONFIG.max_attempts):
        id = f"w{turn}"
        tree.run.begin(0, 4, worker=id, delivery=f"d{turn}")
        tree.doing(id, activity.partial_sum(RUN, 0, 4))
        tree.rounds(1)
        tree.living.pop(id)
        tree.rounds(4)
        tree.consume(GRADIENTS)
    tree.rounds(10)
    head = tree.run.head()
    assert head.status == "failed" and head.error is not None
    assert "partial sum 4 of step 0 took its worker down 3 times in a row" in head.error["message"]


# --- messages that somebody throws away ---------------------------------------------------------


def discarded(lab: Laboratory) -> list[str]:
    """Queues that the run's events name."""
    return [event.data["queue"] for event in lab.run.read_events() if event.type == "discarded"]


def test_messages_that_are_thrown_away_again_and_again_are_reported(lab: Laboratory) -> None:
    """Once a minute in the run's events, and for as long as it goes on in the supervisor's heartbeat."""
    for losses in range(1, LOSSES + 3):
        assert bool(lab.wrong) is bool(discarded(lab)) is (losses > LOSSES)
        lab.consume(GRADIENTS)
        assert len(lab.rounds(REPEAT_SECONDS + POLL_SECONDS)) == 4
    assert discarded(lab) == [GRADIENTS]
    assert list(lab.wrong) == [GRADIENTS] and "thrown away by somebody" in lab.wrong[GRADIENTS]
    lab.rounds(WINDOW_SECONDS + POLL_SECONDS)
    assert lab.wrong == {} and len(discarded(lab)) == 1


def test_what_a_dead_worker_took_with_it_is_not_reported(lab: Laboratory) -> None:
    """Nor what Redis lost: that happens once, to however many messages."""
    lab.consume(GRADIENTS)
    assert len(lab.rounds(WINDOW_SECONDS)) == 4
    lab.consume(GRADIENTS)
    lab.rounds(WINDOW_SECONDS)
    assert lab.wrong == {} and discarded(lab) == []


def test_lost_messages_that_no_worker_would_have_begun_are_not_reported(lab: Laboratory) -> None:
    """Those of a busy fleet may be held by its workers; those of a run that a worker refuses, by that one."""
    for id in ("w0", "w1", "w2"):
        lab.doing(id, "something else")
    for _ in range(2 * LOSSES):
        lab.consume(GRADIENTS)
        lab.rounds(REPEAT_SECONDS + POLL_SECONDS)
    assert lab.wrong == {}
    for id in ("w0", "w1", "w2"):
        lab.doing(id)
    lab.living["w1"] = replace(lab.living["w1"], refuses={RUN: "another torch"})
    for _ in range(2 * LOSSES):
        lab.consume(GRADIENTS)
        lab.rounds(REPEAT_SECONDS + POLL_SECONDS)
    assert lab.wrong == {} and discarded(lab) == []


def test_calls_of_a_training_server_that_are_thrown_away_are_reported(lab: Laboratory) -> None:
    lab.living.pop("s0")
    lab.living["s1"] = worker("s1", queues=(UPDATES,))
    lab.supervisor.worker = "s1"
    for _ in range(LOSSES + 2):
        lab.rounds(REPEAT_SECONDS + POLL_SECONDS)
        lab.consume(UPDATES)
    assert UPDATES in discarded(lab)


# --- runs that stand still -----------------------------------------------------------------------


def refusing(lab: Laboratory, *ids: str) -> None:
    for id in ids:
        lab.living[id] = replace(lab.living[id], refuses={RUN: f"{id} has other code"})


def test_the_log_says_what_a_run_waits_for(lab: Laboratory, caplog: pytest.LogCaptureFixture) -> None:
    lab.begin(0, "w0")
    lab.queued()
    lab.rounds(QUIET_SECONDS - 6)
    assert "waits for" not in caplog.text
    lab.rounds(6)
    said = [record.getMessage() for record in caplog.records if "waits for" in record.getMessage()]
    assert len(said) == 2 and "slot 0 at w0" in said[0] and "3 slots of step 0 that nobody" in said[1]
    lab.rounds(QUIET_SECONDS)
    assert len([r for r in caplog.records if "waits for" in r.getMessage()]) == 2, "not in every round"


def test_a_run_that_everybody_refuses_is_paused_with_the_reasons(lab: Laboratory) -> None:
    lab.queued()
    refusing(lab, "w0", "w1")
    lab.rounds(QUIET_SECONDS + QUIET_AGAIN_SECONDS + 5)
    assert lab.run.head().status == "running", "w2 does not"
    refusing(lab, "w2")
    lab.rounds(QUIET_AGAIN_SECONDS - 5)
    assert lab.run.head().status == "running", "they may be about to be replaced"
    lab.rounds(QUIET_AGAIN_SECONDS + 10)
    head = lab.run.head()
    assert head.status == "paused" and head.error is not None
    assert "w0 has other code" in head.error["message"] and "admit_skew" in head.error["message"]


def test_nobody_is_called_while_the_run_waits_for_an_evaluation_that_decides(lab: Laboratory) -> None:
    lab.queued()
    decides = replace(CONFIG, keep="best", evaluate_every=1, evaluate_at_start=True)
    other = lab.submit("other", decides, launched=None)
    other.launch_evaluation(0, 1, pin_seconds=1e6)
    lab.plane.push(GRADIENTS, {"run": "other", "version": 0, "part": 0, "parts": 1})
    assert lab.rounds(30) == []
    other.record_evaluation(0, {"loss": 1.0})
    assert lab.rounds(30) == [("advance", OWN)]
