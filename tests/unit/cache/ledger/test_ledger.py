"""Each operation of the control plane against a real server, and against its in-memory twin.

The first half states the contracts of the scripts' headers. The second half goes through every
operation by a table: each one sent twice, each one against a server that answers with errors or
not at all, each one's keys with a TTL.
"""

from __future__ import annotations

import inspect
import json
import math
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.support import control
from tests.support.control import (
    SPEC,
    Plane,
    comparable,
    digest,
    entry,
    record,
    redis_state,
    slot,
    worker,
    write,
)
from torchord.cache import keys
from torchord.cache.blobs.notice import Notice
from torchord.cache.errors import CacheError, CacheUnreachable, InvalidInput, RecordDamaged, RunNotFound
from torchord.cache.ledger.answers import Finished, Group
from torchord.cache.ledger.heartbeat import Heartbeat
from torchord.cache.ledger.launch import Launch
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.ledger.outbox import Telling
from torchord.cache.ledger.records import GENESIS, Head, LedgerEntry, SlotRecord
from torchord.cache.ledger.rounds import Report, Seat, Turn
from torchord.cache.ledger.workers import Registry, WorkerInfo
from torchord.cache.servers.fast_client import Command
from torchord.cache.servers.redis_client import connect
from torchord.cache.testing.memory_ledger import MemoryLedger
from torchord.cache.testing.memory_plane import MemoryPlane
from torchord.cache.testing.memory_registry import MemoryRegistry
from torchord.coordinator.messages.task_names import GRADIENTS

SCRIPTS = Path(keys.__file__).parent / "scripts"
Queued = Callable[[], list[str]]
NAN, INF = float("nan"), float("inf")


@pytest.fixture
def created(plane: Plane) -> Ledger:
    ledger = plane.ledger()
    assert ledger.create(SPEC, incarnation="life") is None
    return ledger


@pytest.fixture
def running(plane: Plane, created: Ledger) -> Ledger:
    """A run of 3 steps at version 0, with `alive` workers w0, w1, s0, s1 and a launched first step."""
    start(created)
    for id in ("w0", "w1", "s0", "s1"):
        plane.registry.beat(worker(id))
    return created


def start(ledger: Ledger, **changes: Any) -> int:
    """Acquire, initialise and launch; returns the token."""
    token = acquire(ledger)
    fields = {"manifest": {"nbytes": 8}, "record": record(0), "dataset_size": 24, "evaluation_size": 8}
    assert ledger.initialise(token=token, total_steps=3, **{**fields, **changes}) == "ok"
    assert ledger.mark_launched(ledger.head().version, token=token) == "ok"
    return token


def acquire(ledger: Ledger, id: str = "s0", node: str | None = None) -> int:
    verdict, token = ledger.acquire(worker=id, node=node or f"celery@{id}", queue=f"updates.{id}")
    assert verdict == "acquired"
    assert isinstance(token, int)
    return token


def begin(
    ledger: Ledger, step: int = 0, shard: int = 0, worker: str = "w0", **more: Any
) -> tuple[str, int, str]:
    return control.begin(ledger, step, shard, worker=worker, **{"delivery": f"{worker}:{shard}", **more})


def fill(ledger: Ledger, step: int, shards: int = 2) -> None:
    for shard in range(shards):
        write(ledger, step, slot(step, shard))


def commit(ledger: Ledger, step: int, token: int, shards: int = 2, **changes: Any) -> Any:
    """Commit a step whose slots are `slot(step, shard)`, on top of the present chain."""
    made = entry(step + 1, [slot(step, s) for s in range(shards)], ledger.head().chain, token=token)
    fields: dict[str, Any] = {"entry": made, "record": record(step + 1, made.chain), "event": {"step": step}}
    return ledger.commit(step=step, token=token, shards=shards, **{**fields, **changes})


def advance(ledger: Ledger, token: int, steps: int) -> None:
    """Commit the next `steps` steps of two shards each."""
    for step in range(ledger.head().version, ledger.head().version + steps):
        fill(ledger, step)
        assert commit(ledger, step, token).verdict == "ok"


def only_counters_change(plane: Plane, act: Callable[[], Any], *, also: tuple[str, ...] = ()) -> Any:
    """The answer of `act`, which may change the head's counters and nothing else."""
    before = comparable(plane.state(), counters=False)
    answer = act()
    assert comparable(plane.state(), counters=False) == before
    return answer


# --- create ---------------------------------------------------------------------------------------


def test_create_makes_a_pending_run_at_version_0(plane: Plane) -> None:
    ledger = plane.ledger()
    assert ledger.create(SPEC, incarnation="life") is None
    head = ledger.head()
    assert (head.status, head.version, head.chain, head.token) == ("pending", 0, GENESIS, 0)
    assert (head.incarnation, head.owner, head.launched, head.total_steps) == ("life", "", None, None)
    assert ledger.spec() == SPEC
    assert plane.registry.active_runs() == ["run-1"]


def test_create_again_returns_the_spec_that_is_there_and_changes_nothing(
    plane: Plane, running: Ledger
) -> None:
    other = {"recipe": {"model": "another"}, "config": {}}
    answer = only_counters_change(plane, lambda: running.create(other, incarnation="other"))
    assert answer == SPEC
    assert running.head().incarnation == "life"


def test_create_from_a_checkpoint_starts_at_its_version(plane: Plane) -> None:
    ledger = plane.ledger()
    ledger.create(SPEC, incarnation="life", version=7, chain=digest("seven"))
    assert (ledger.head().version, ledger.head().chain) == (7, digest("seven"))


def test_a_new_life_of_a_name_inherits_nothing(plane: Plane, running: Ledger) -> None:
    advance(running, running.head().token, 1)
    running.rollback(token=running.head().token, version=0, chain=GENESIS)
    begin(running)
    write(running, 0, slot(0, 0))
    running.launch_evaluation(0, 2, pin_seconds=60)
    running.claim("first", "w0's")
    if isinstance(running, MemoryLedger):
        running.plane.delete(running.keys.spec)
    else:
        running.client.delete(running.keys.spec)  # evicted, say

    assert running.create(SPEC, incarnation="second") is None
    kept = {name.rpartition("}:")[2] for name in plane.state() if "{run-1}" in name}
    assert kept == {"spec", "head"}


@pytest.mark.parametrize("name", ["", "a b", "../x", "{x}", "-x", "x" * 101, "a:b"])
def test_a_run_needs_a_name_that_fits_a_key(plane: Plane, name: str) -> None:
    with pytest.raises(InvalidInput):
        plane.ledger(name)


def test_reading_an_unknown_run_names_it(plane: Plane) -> None:
    for read in (plane.ledger("nobody").head, plane.ledger("nobody").spec):
        with pytest.raises(RunNotFound, match="nobody"):
            read()
    with pytest.raises(CacheError, match="no parameters yet"):
        plane.ledger("nobody").manifest()


# --- acquire, release -----------------------------------------------------------------------------


def test_acquire_takes_a_run_that_nobody_serves(plane: Plane, created: Ledger) -> None:
    token = acquire(created)
    head = created.head()
    assert (head.owner, head.node, head.queue, head.token) == ("s0", "celery@s0", "updates.s0", token)


def test_each_acquire_gives_a_larger_token(plane: Plane, created: Ledger) -> None:
    tokens = [acquire(created, id) for id in ("s0", "s1", "s1", "s0") * 5]
    assert tokens == sorted(set(tokens))


def test_tokens_of_a_second_life_are_larger_than_those_of_the_first(plane: Plane, created: Ledger) -> None:
    first = acquire(created)
    if isinstance(created, MemoryLedger):
        created.plane.delete(created.keys.head)
    else:
        created.client.delete(created.keys.head)
    created.create(SPEC, incarnation="second")
    assert acquire(created) > first


def test_acquire_leaves_a_run_to_its_living_owner(plane: Plane, running: Ledger) -> None:
    answer = only_counters_change(
        plane, lambda: running.acquire(worker="s1", node="celery@s1", queue="updates.s1")
    )
    assert answer == ("owned", "updates.s0")


def test_acquire_takes_a_run_whose_owner_is_dead(plane: Plane, running: Ledger) -> None:
    before = running.head().token
    plane.registry.leave(worker("s0"))
    assert acquire(running, "s1") > before
    assert running.head().owner == "s1"


def test_two_processes_of_one_node_take_turns_and_share(plane: Plane, created: Ledger) -> None:
    for id in ("child-1", "child-2"):
        plane.registry.beat(worker(id, node="celery@pool"))
    acquire(created, "child-1", "celery@pool")
    assert not created.head().shared
    acquire(created, "child-2", "celery@pool")
    assert created.head().shared
    plane.registry.leave(worker("child-2"))
    acquire(created, "elsewhere")
    assert not created.head().shared


def test_acquire_of_an_unknown_run_makes_no_key(plane: Plane) -> None:
    assert plane.ledger().acquire(worker="s0", node="n", queue="q") == ("missing", 0)
    assert plane.state() == {}


def test_release_lets_a_standby_in_while_the_owner_lives(plane: Plane, running: Ledger) -> None:
    assert running.release(running.head().token)
    assert running.head().owner == ""
    acquire(running, "s1")


def test_release_by_a_fenced_server_changes_nothing(plane: Plane, running: Ledger) -> None:
    old = running.head().token
    plane.registry.leave(worker("s0"))
    acquire(running, "s1")
    assert not only_counters_change(plane, lambda: running.release(old))
    assert running.head().owner == "s1"


def test_a_server_of_another_environment_is_refused(plane: Plane) -> None:
    ledger = plane.ledger()
    ledger.create({"recipe": {}, "config": {"skew": "refuse"}}, incarnation="life")
    place = {"node": "n", "queue": "q"}
    assert ledger.acquire(worker="s0", environment="torch 2.13", **place)[0] == "acquired"
    answer = only_counters_change(
        plane, lambda: ledger.acquire(worker="s1", environment="torch 2.4", **place)
    )
    assert answer == ("skewed", "torch 2.13")
    assert ledger.acquire(worker="s1", environment="torch 2.13", **place)[0] == "acquired"


# --- initialise -----------------------------------------------------------------------------------


def test_initialise_starts_the_run(plane: Plane, created: Ledger) -> None:
    token = acquire(created)
    verdict = created.initialise(
        token=token, manifest={"n": 1}, record=record(0), dataset_size=24, evaluation_size=8, total_steps=3
    )
    head = created.head()
    assert verdict == "ok"
    assert (head.status, head.version, head.total_steps) == ("running", 0, 3)
    assert (head.dataset_size, head.evaluation_size) == (24, 8)
    assert created.manifest() == {"n": 1}
    assert created.version(0) == record(0)
    assert [(e.type, e.data) for e in created.read_events()] == [
        ("started", {"version": 0, "total_steps": 3})
    ]


def test_initialise_needs_the_token_and_a_run_that_waits(plane: Plane, created: Ledger) -> None:
    token = acquire(created)
    fields: dict[str, Any] = {"manifest": {}, "record": record(0), "dataset_size": 1, "evaluation_size": 0}
    assert created.initialise(token=token - 1, total_steps=1, **fields) == "fenced"
    created.transition("cancelled", allowed=("pending",), event="cancelled")
    assert created.initialise(token=token, total_steps=1, **fields) == "stopped"
    assert created.versions() == {}


# --- begin, end_lease -------------------------------------------------------------------------


def test_begin_gives_a_lease(plane: Plane, running: Ledger) -> None:
    assert begin(running) == ("compute", 1, "life")
    (lease,) = running.leases(0).values()
    assert (lease.shard, lease.worker, lease.attempt, lease.delivery, lease.open) == (
        0,
        "w0",
        1,
        "w0:0",
        True,
    )
    assert lease.since > 0


def test_the_same_delivery_gets_the_same_lease(plane: Plane, running: Ledger) -> None:
    begin(running)
    assert only_counters_change(plane, lambda: begin(running)) == ("compute", 1, "life")


@pytest.mark.parametrize(("id", "delivery"), [("w1", "d"), ("w0", "d"), ("w1", "w0:0")])
def test_a_shard_at_a_live_worker_is_held(plane: Plane, running: Ledger, id: str, delivery: str) -> None:
    begin(running)
    answer = only_counters_change(plane, lambda: begin(running, worker=id, delivery=delivery))
    assert answer == ("held", 1, "life")
    assert running.head().duplicates == 1


def test_a_backup_computes_beside_a_live_worker_and_is_no_further_try(plane: Plane, running: Ledger) -> None:
    begin(running)
    assert begin(running, worker="w1", backup=True) == ("compute", 1, "life")
    assert running.leases(0)[0].worker == "w1"


def test_the_shard_of_a_dead_worker_is_a_further_try(plane: Plane, running: Ledger) -> None:
    begin(running)
    plane.registry.leave(worker("w0"))
    assert begin(running, worker="w1") == ("compute", 2, "life")


def test_a_shard_handed_back_goes_elsewhere_and_counts_no_try(plane: Plane, running: Ledger) -> None:
    begin(running)
    assert running.end_lease(0, 0, worker="w0", delivery="w0:0")
    assert not running.leases(0)[0].open
    assert begin(running, worker="w1") == ("compute", 1, "life")


def test_a_try_taken_from_an_overdue_worker_counts(plane: Plane, running: Ledger) -> None:
    begin(running)
    assert running.end_lease(0, 0, worker="w0", delivery="w0:0", counts=True)
    assert begin(running, worker="w1") == ("compute", 2, "life")


def test_a_shard_handed_back_is_open_again_for_the_same_delivery(plane: Plane, running: Ledger) -> None:
    begin(running)
    running.end_lease(0, 0, worker="w0", delivery="w0:0")
    assert begin(running) == ("compute", 1, "life")
    assert running.leases(0)[0].open


@pytest.mark.parametrize(("id", "delivery"), [("w1", "w0:0"), ("w0", "another")])
def test_only_the_holder_hands_back(plane: Plane, running: Ledger, id: str, delivery: str) -> None:
    begin(running)
    assert not only_counters_change(plane, lambda: running.end_lease(0, 0, worker=id, delivery=delivery))
    assert not only_counters_change(plane, lambda: running.end_lease(0, 1, worker=id, delivery=delivery))


def test_begin_before_and_after_the_step(plane: Plane, running: Ledger) -> None:
    advance(running, running.head().token, 1)
    assert only_counters_change(plane, lambda: begin(running, step=0)) == ("late", 0, "life")
    assert only_counters_change(plane, lambda: begin(running, step=2)) == ("early", 0, "life")
    assert running.head().late == 1


def test_begin_of_a_written_shard_is_a_duplicate(plane: Plane, running: Ledger) -> None:
    write(running, 0, slot(0, 0))
    assert only_counters_change(plane, lambda: begin(running)) == ("duplicate", 0, "life")
    assert running.head().duplicates == 1


@pytest.mark.parametrize("status", ["paused", "failed", "cancelled", "done"])
def test_begin_in_a_run_that_does_not_run(plane: Plane, running: Ledger, status: str) -> None:
    running.transition(status, allowed=("running",), event=status)
    assert only_counters_change(plane, lambda: begin(running)) == ("stopped", 0, "life")


def test_begin_in_an_unknown_run_makes_no_key(plane: Plane) -> None:
    assert begin(plane.ledger()) == ("stopped", 0, "")
    assert plane.state() == {}


def test_the_first_worker_sets_the_environment_and_others_are_refused(plane: Plane) -> None:
    ledger = plane.ledger()
    ledger.create({"recipe": {}, "config": {"skew": "refuse"}}, incarnation="life")
    start(ledger)
    assert begin(ledger, environment="torch 2.13")[0] == "compute"
    assert ledger.head().environment == "torch 2.13"
    answer = only_counters_change(plane, lambda: begin(ledger, shard=1, worker="w1", environment="torch 2.4"))
    assert answer == ("skewed", 0, "life")
    assert begin(ledger, shard=1, worker="w1", environment="torch 2.13")[0] == "compute"
    assert begin(ledger, shard=1, worker="w2")[0] == "compute"


def test_a_run_may_admit_other_environments(plane: Plane) -> None:
    ledger = plane.ledger()
    ledger.create({"recipe": {}, "config": {"skew": "admit"}}, incarnation="life")
    start(ledger)
    begin(ledger, environment="torch 2.13")
    assert begin(ledger, shard=1, worker="w1", environment="torch 2.4")[0] == "compute"


def test_a_portable_run_is_for_workers_with_portable_kernels(plane: Plane) -> None:
    """From its first moment: who comes first does not decide what the run is computed on."""
    ledger = plane.ledger()
    config = {"skew": "refuse", "hardware": "portable"}
    ledger.create({"recipe": {}, "config": config}, incarnation="life")
    assert (ledger.head().environment, ledger.head().server_environment) == ("portable", "portable")
    native, shared = "torch 2.13, cpu AVX512, x86_64", "torch 2.13, portable x86-64"
    server = {"worker": "s0", "node": "celery@s0", "queue": "updates.s0"}
    assert ledger.acquire(**server, environment=native) == ("skewed", "portable")
    assert ledger.acquire(**server, environment=shared)[0] == "acquired"
    start(ledger)
    assert begin(ledger, worker="w0", environment=native)[0] == "skewed"
    assert begin(ledger, worker="w1", environment=shared)[0] == "compute"
    assert (ledger.head().environment, ledger.head().server_environment) == (shared, shared)
    assert begin(ledger, shard=1, worker="w2", environment="torch 2.12, portable x86-64")[0] == "skewed"


# --- late_shard -----------------------------------------------------------------------------------


def test_a_shard_is_late_when_its_holder_was_slow_before_or_is_now(plane: Plane, running: Ledger) -> None:
    """Only once all have begun; never more than two times; again at once only if the backup was begun."""
    plane.registry.beat(replace(worker("w0"), pace={"run-1": 10.0, "run-2": 0.1}))
    begin(running, worker="w0", shard=0)
    assert running.late_shard(0, shards=4, seconds=1.0) is None
    begin(running, worker="w1", shard=1)
    assert running.late_shard(0, shards=2, seconds=7.0) is None, "who asks is slow, too"
    assert running.late_shard(0, shards=2, seconds=1.0) == 0
    assert running.head().backups == 1
    assert running.late_shard(0, shards=2, seconds=1.0) is None, "that backup is on its way"
    assert begin(running, worker="w1", shard=0, backup=True)[:2] == ("compute", 1)
    assert (running.leases(0)[0].backups, running.leases(0)[0].worker) == (1, "w1")
    plane.registry.beat(replace(worker("w1"), pace={"run-1": 20.0}))
    assert running.late_shard(0, shards=2, seconds=1.0) in (0, 1)
    assert running.late_shard(0, shards=2, seconds=1.0) in (0, 1)
    assert begin(running, worker="s1", shard=0, backup=True)[0] == "compute"
    plane.registry.beat(replace(worker("s1"), pace={"run-1": 20.0}))
    write(running, 0, slot(0, 1))
    assert running.late_shard(0, shards=2, seconds=1.0) is None, "two backups are enough"
    assert running.head().backups == 3


def test_even_workers_are_not_late(plane: Plane, running: Ledger) -> None:
    for id in ("w0", "w1"):
        plane.registry.beat(replace(worker(id), pace={"run-1": 1.0}))
    begin(running, worker="w0", shard=0)
    begin(running, worker="w1", shard=1)
    write(running, 0, slot(0, 1))
    assert running.late_shard(0, shards=2, seconds=0.7) is None
    plane.registry.leave(worker("w0"))
    assert running.late_shard(0, shards=2, seconds=0.01) is None, "a dead one's is sent again anyway"


def test_a_shard_that_takes_longer_than_ever_is_late() -> None:
    now = 1000.0
    twin = MemoryPlane(clock=lambda: now)
    registry, ledger = MemoryRegistry(twin), MemoryLedger(twin, "run-1")
    registry.beat(worker("w0"))
    ledger.create(SPEC, incarnation="life")
    start(ledger)
    begin(ledger, worker="w0", shard=0)
    now += 1.2
    registry.beat(worker("w0"))
    assert ledger.late_shard(0, shards=1, seconds=0.5) is None, "as long as a backup would take"
    now += 0.2
    registry.beat(worker("w0"))
    assert ledger.late_shard(0, shards=1, seconds=0.5) == 0


def test_who_writes_a_slot_is_told_what_is_late(plane: Plane, running: Ledger) -> None:
    plane.registry.beat(replace(worker("w0"), pace={"run-1": 10.0}))
    for shard in range(3):
        begin(running, worker=f"w{min(shard, 1)}", shard=shard)
    assert running.finish_slot(0, slot(0, 1), idle=(4, 1.0)).late is None, "one is not begun"
    assert running.finish_slot(0, slot(0, 1, "twin"), idle=(3, 1.0)).late is None, "another was faster"
    assert running.finish_slot(0, slot(0, 1), idle=(3, 1.0)).late == 0
    assert running.finish_slot(0, slot(0, 2), idle=(3, 1.0)) == Finished("written", 2, called=False)
    assert running.head().backups == 1


def test_many_idle_workers_do_not_all_look_through_the_leases(plane: Plane, running: Ledger) -> None:
    """Nine to fifteen missing shards: only the supervisor's question is answered."""
    plane.registry.beat(replace(worker("w0"), pace={"run-1": 10.0}))
    for shard in range(18):
        begin(running, worker="w0", shard=shard)
    told = [running.finish_slot(0, slot(0, shard), idle=(18, 1.0)).late is not None for shard in range(12)]
    missing = [17 - shard for shard in range(12)]
    assert [left for left, late in zip(missing, told, strict=True) if late] == [16, 8, 7, 6]


def test_the_supervisor_is_always_told(plane: Plane, running: Ledger) -> None:
    plane.registry.beat(replace(worker("w0"), pace={"run-1": 10.0}))
    for shard in range(12):
        begin(running, worker="w0", shard=shard)
    assert len({running.late_shard(0, shards=12, seconds=1.0) for _ in range(12)}) == 12


# --- finish_slot ----------------------------------------------------------------------------------


def test_the_first_writer_wins(plane: Plane, running: Ledger) -> None:
    assert write(running, 0, slot(0, 1, "first")) == ("written", 1)
    answer = only_counters_change(plane, lambda: write(running, 0, slot(0, 1, "second")))
    assert answer == ("duplicate", 1)
    assert running.slots(0)[1].nonce == "first"
    assert running.head().duplicates == 1
    assert write(running, 0, slot(0, 0)) == ("written", 2)
    assert running.slots_present(0) == {0, 1}


def test_the_same_attempt_may_write_again(plane: Plane, running: Ledger) -> None:
    write(running, 0, slot(0, 1))
    assert only_counters_change(plane, lambda: write(running, 0, slot(0, 1))) == ("written", 1)
    assert running.head().duplicates == 0


def test_other_bytes_for_the_same_shard_are_told_and_counted(plane: Plane, running: Ledger) -> None:
    write(running, 0, slot(0, 1))
    impure = slot(0, 1, "second", digest=digest("other"))
    assert only_counters_change(plane, lambda: write(running, 0, impure)) == ("divergent", 1)
    assert running.head().divergent == 1


def test_write_before_and_after_the_step(plane: Plane, running: Ledger) -> None:
    advance(running, running.head().token, 1)
    assert only_counters_change(plane, lambda: write(running, 0, slot(0, 0, "late"))) == ("late", 0)
    assert only_counters_change(plane, lambda: write(running, 2, slot(2, 0))) == ("early", 0)
    assert running.head().late == 1


@pytest.mark.parametrize(
    ("status", "verdict"),
    [("paused", "written"), ("failed", "written"), ("cancelled", "stopped"), ("done", "stopped")],
)
def test_work_that_ends_after_a_pause_is_kept(
    plane: Plane, running: Ledger, status: str, verdict: str
) -> None:
    running.transition(status, allowed=("running",), event=status)
    assert write(running, 0, slot(0, 0))[0] == verdict


def test_a_slot_of_an_earlier_life_of_the_name_is_refused(plane: Plane, running: Ledger) -> None:
    answer = only_counters_change(plane, lambda: write(running, 0, slot(0, 0), incarnation="before"))
    assert answer == ("stopped", 0)
    assert write(running, 0, slot(0, 0), incarnation="life") == ("written", 1)


def test_write_in_an_unknown_run_makes_no_key(plane: Plane) -> None:
    assert write(plane.ledger(), 0, slot(0, 0)) == ("stopped", 0)
    assert plane.state() == {}


@pytest.mark.parametrize("value", [NAN, INF, -INF, 1e308, 5e-324, -0.0])
def test_numbers_that_json_has_no_word_for_survive_the_scripts(
    plane: Plane, running: Ledger, value: float
) -> None:
    """NaN and infinity pass through the scripts' own JSON reader on the second write and at a rollback."""

    def same(one: float, other: float) -> bool:
        return one == other or (math.isnan(one) and math.isnan(other))

    odd = slot(0, 0, loss=value, grad_norm=value, seconds=value)
    assert write(running, 0, odd) == ("written", 1)
    assert write(running, 0, odd) == ("written", 1)
    assert write(running, 0, replace(odd, nonce="second")) == ("duplicate", 1)
    assert same(running.slots(0)[0].loss, value)
    assert same(running.slots(0)[0].grad_norm, value)

    token = running.head().token
    made = entry(1, [odd], loss=value, grad_norm=value, lr=(value,))
    assert running.commit(
        step=0, token=token, shards=1, entry=made, record=record(1, made.chain), event={"loss": value}
    ).verdict == "ok"  # fmt: skip
    (found,) = running.entries()
    assert same(found.loss, value)
    assert same(found.lr[0], value)
    assert found.computed_seal() == found.seal
    assert same(running.read_events()[-1].data["loss"], value)
    assert running.rollback(token=token, version=0, chain=GENESIS)[0]
    write(running, 0, odd)
    assert running.commit(
        step=0, token=token, shards=1, entry=made, record=record(1, made.chain), event={}
    ).verdict == "ok"  # fmt: skip


def test_text_of_any_kind_survives_the_scripts(plane: Plane, running: Ledger) -> None:
    id = 'wörker "1" \\ \n {0} \u2028 🙂'
    plane.registry.beat(worker(id))
    assert begin(running, worker=id)[0] == "compute"
    assert running.leases(0)[0].worker == id
    assert begin(running, worker="w1") == ("held", 1, "life")
    running.end_lease(0, 0, worker=id, delivery=f"{id}:0")
    assert running.leases(0)[0].worker == id


# --- partial sums ---------------------------------------------------------------------------------

SUM = Group(3, 0, 1)  # slot 3 adds up the slots 0 and 1


def test_who_writes_the_last_input_of_a_sum_is_told_so(running: Ledger) -> None:
    assert write(running, 0, slot(0, 1), into=SUM) == ("written", 1)
    assert write(running, 0, slot(0, 2), into=Group(4, 2, 2)) == ("group", 2)
    assert write(running, 0, slot(0, 0), into=SUM) == ("group", 3)
    assert write(running, 0, slot(0, 0), into=SUM) == ("group", 3), "asked again by the same attempt"
    assert write(running, 0, slot(0, 0, "second"), into=SUM) == ("duplicate", 3)


def test_an_input_that_comes_after_its_sum_is_not_needed(plane: Plane, running: Ledger) -> None:
    write(running, 0, slot(0, 3))
    assert write(running, 0, slot(0, 0), into=SUM) == ("spare", 2)
    assert only_counters_change(plane, lambda: write(running, 0, slot(0, 0), into=SUM)) == ("spare", 2)


def test_some_slots_and_how_many_there_are(running: Ledger) -> None:
    for shard in (0, 2, 5):
        write(running, 0, slot(0, shard))
    found, present = running.some_slots(0, [2, 3])
    assert (list(found), found[2], present) == ([2], slot(0, 2), 3)
    assert running.some_slots(1, [0]) == ({}, 0)


def test_a_sum_whose_bytes_are_lost_is_opened_with_what_it_was_made_from(running: Ledger) -> None:
    token = running.head().token
    for shard in (0, 1, 2, 3):
        begin(running, shard=shard)
        write(running, 0, slot(0, shard, f"n{shard}"))
    assert running.drop_slot(0, 3, nonce="n3", token=token, below=[0, 1]) == "ok"
    assert (running.slots_present(0), set(running.leases(0))) == ({2}, {2})
    assert running.head().launched is None, "so the training server launches what is missing"


def test_a_client_opens_an_input_whose_bytes_are_lost(plane: Plane, running: Ledger) -> None:
    for shard in (0, 1, 2):
        begin(running, shard=shard)
        write(running, 0, slot(0, shard, f"n{shard}"))
    drop = partial(running.drop_slot, 0, token=None, into=3)
    assert only_counters_change(plane, lambda: drop(1, nonce="of another attempt")) == "stale"
    assert drop(1, nonce="n1", below=[0]) == "ok"
    assert (running.slots_present(0), set(running.leases(0))) == ({2}, {2})
    assert running.head().launched == 0, "the step stays launched: the Client sends what it opened"
    write(running, 0, slot(0, 3))
    assert only_counters_change(plane, lambda: drop(2, nonce="n2")) == "stale", "the sum is made"
    assert plane.ledger("gone").drop_slot(0, 0, nonce="n", token=None, into=3) == "stale"


def test_a_client_opens_no_slot_of_a_step_that_is_committed(plane: Plane, running: Ledger) -> None:
    token = running.head().token
    write(running, 0, slot(0, 0))
    commit(running, 0, token, shards=1, entry=FIRST, record=record(1, FIRST.chain))
    assert only_counters_change(plane, lambda: running.drop_slot(0, 0, nonce="n", token=None)) == "stale"


# --- one round trip ------------------------------------------------------------------------------


@pytest.mark.parametrize("lacking", [True, False])
def test_begin_brings_the_version_to_compute_at(running: Ledger, lacking: bool) -> None:
    begun = running.begin(0, 0, worker="w0", delivery="w0:0", lacking=lacking)
    assert (begun.verdict, begun.attempt, begun.incarnation) == ("compute", 1, "life")
    assert begun.record == (record(0) if lacking else None)


def test_begin_brings_no_version_to_who_may_not_compute(running: Ledger) -> None:
    write(running, 0, slot(0, 0))
    begun = running.begin(0, 0, worker="w0", delivery="w0:0")
    assert (begun.verdict, begun.record) == ("duplicate", None)


def test_who_finishes_a_slot_learns_whether_the_chord_has_called(running: Ledger) -> None:
    assert running.finish_slot(0, slot(0, 0)) == Finished("written", 1, called=False)
    assert running.mark_called(0, token=running.head().token) == "ok"
    assert running.finish_slot(0, slot(0, 1)) == Finished("written", 2, called=True)


def test_head_and_slots_are_read_together(running: Ledger) -> None:
    fill(running, 0, shards=1)
    assert running.head_and_slots(0) == (running.head(), {0: slot(0, 0)})


# --- commit ---------------------------------------------------------------------------------------


def test_commit_moves_the_head_by_one(plane: Plane, running: Ledger) -> None:
    token = running.head().token
    begin(running)
    fill(running, 0)
    committed = commit(running, 0, token)
    head = running.head()
    assert (committed.verdict, sorted(committed.stored), committed.pinned) == ("ok", [0, 1], frozenset())
    (made,) = running.entries()
    assert (head.version, head.chain) == (1, made.chain)
    assert running.version(1) == record(1, made.chain)
    assert running.slots_present(0) == set()
    assert running.leases(0) == {}
    assert (running.read_events()[-1].type, running.read_events()[-1].data) == ("step", {"step": 0})


def test_a_commit_sent_twice_is_known_by_its_chain(plane: Plane, running: Ledger) -> None:
    token = running.head().token
    fill(running, 0)
    made = entry(1, [slot(0, 0), slot(0, 1)])
    arguments: dict[str, Any] = {
        "step": 0, "token": token, "shards": 2, "entry": made, "record": record(1, made.chain), "event": {},
    }  # fmt: skip
    first = running.commit(**arguments)
    assert only_counters_change(plane, lambda: running.commit(**arguments)) == first


@pytest.mark.parametrize("status", ["paused", "failed", "cancelled"])
def test_a_commit_whose_answer_was_lost_is_known_though_the_run_has_stopped_since(
    plane: Plane, running: Ledger, status: str
) -> None:
    """Else the server would delete the bytes of a version that the head names."""
    token = running.head().token
    fill(running, 0)
    made = entry(1, [slot(0, 0), slot(0, 1)])
    arguments: dict[str, Any] = {
        "step": 0, "token": token, "shards": 2, "entry": made, "record": record(1, made.chain), "event": {},
    }  # fmt: skip
    first = running.commit(**arguments)
    running.transition(status, allowed=("running",), event=status)
    assert only_counters_change(plane, lambda: running.commit(**arguments)) == first


def launch(step: int = 1, incarnation: str = "life") -> Launch:
    return Launch(
        step, incarnation, "celery-taskset-meta-g.s", 2, 60, "gradients", 0.5, (b'{"m": 0}', b'{"m": 1}')
    )


@pytest.fixture
def queued(plane: Plane) -> Iterator[Queued]:
    """What waits in a broker's queue, newest first; it is emptied at the end (such a queue has no TTL)."""
    ledger = plane.ledger()
    if isinstance(ledger, MemoryLedger):
        yield lambda: ledger.plane.get("gradients") or []
    else:
        yield lambda: ledger.client.lrange("gradients", 0, -1)
        ledger.client.delete("gradients")


def size_of_chord(ledger: Ledger) -> Any:
    """What Celery reads as the size of the chord of `launch`, with the seconds that it lives."""
    key = launch().size_key
    if isinstance(ledger, MemoryLedger):
        return ledger.plane.get(key), ledger.plane.ttl(key)
    return ledger.client.get(key), ledger.client.ttl(key)


def committing(ledger: Ledger, step: int, token: int) -> dict[str, Any]:
    made = entry(step + 1, [slot(step, 0), slot(step, 1)], ledger.head().chain, token=token)
    fields = {"entry": made, "record": record(step + 1, made.chain), "event": {}}
    return {"step": step, "token": token, "shards": 2, **fields}


class TestLaunchWithCommit:
    """The chord of the next step is published in the transaction of the commit."""

    def test_it_is_published_and_recorded(self, queued: Queued, running: Ledger) -> None:
        token = acquire(running)
        fill(running, 0)
        committed = commit(running, 0, token, launch=launch())
        assert (committed.verdict, committed.launched, committed.incarnation) == ("ok", True, "life")
        head = running.head()
        assert (head.version, head.launched, head.reached) == (1, 1, 1)
        assert queued() == [
            f'{{"rank": "0 {time}", "m": {m}}}' for m, time in ((1, "0.500000"), (0, "0.000000"))
        ]
        size, seconds = size_of_chord(running)
        assert size == "2" and 0 < seconds <= 60

    def test_its_chord_has_not_called_back(self, queued: Queued, running: Ledger) -> None:
        token = acquire(running)
        running.mark_called(1, token=token)
        fill(running, 0)
        commit(running, 0, token, launch=launch())
        assert not running.called(1)

    def test_sent_twice_it_is_published_once(self, queued: Queued, running: Ledger) -> None:
        token = acquire(running)
        fill(running, 0)
        arguments = committing(running, 0, token)
        running.commit(**arguments, launch=launch())
        again = running.commit(**arguments, launch=launch())
        assert (again.verdict, again.launched) == ("ok", True)
        assert queued() == [
            f'{{"rank": "0 {time}", "m": {m}}}' for m, time in ((1, "0.500000"), (0, "0.000000"))
        ]

    def test_nothing_is_published_under_another_config(self, queued: Queued, running: Ledger) -> None:
        token = acquire(running)
        fill(running, 0)
        committed = commit(running, 0, token, launch=launch(incarnation="life+1"))
        assert (committed.verdict, committed.launched, committed.incarnation) == ("ok", False, "life")
        assert running.head().launched == 0
        assert queued() == []

    def test_nothing_is_published_without_the_commit(self, queued: Queued, running: Ledger) -> None:
        token = acquire(running)
        fill(running, 0, shards=1)
        assert commit(running, 0, token, launch=launch()).verdict == "incomplete"
        assert queued() == []


def test_a_commit_drops_the_versions_that_nobody_needs(running: Ledger) -> None:
    token = acquire(running)
    fill(running, 0)
    committed = commit(running, 0, token, drop=[0, 7])
    assert committed.dropped == (record(0),)
    assert committed.stored == (1,)
    assert sorted(running.versions()) == [1]


def test_a_commit_keeps_a_pinned_version(running: Ledger) -> None:
    token = acquire(running)
    running.pin(0, seconds=60)
    fill(running, 0)
    committed = commit(running, 0, token, drop=[0])
    assert (committed.dropped, sorted(committed.stored), committed.pinned) == ((), [0, 1], frozenset({0}))


def test_a_pin_holds_until_its_time_is_over(running: Ledger) -> None:
    assert not running.pinned(0)
    running.pin(0, seconds=60)
    assert running.pinned(0) and not running.pinned(1)
    running.pin(0, seconds=-1)
    assert not running.pinned(0)


def test_a_commit_without_the_token_is_fenced(plane: Plane, running: Ledger) -> None:
    old = running.head().token
    fill(running, 0)
    plane.registry.leave(worker("s0"))
    acquire(running, "s1")
    assert only_counters_change(plane, lambda: commit(running, 0, old)).verdict == "fenced"


def test_a_commit_that_was_taken_is_fenced_for_the_server_before(plane: Plane, running: Ledger) -> None:
    old = running.head().token
    fill(running, 0)
    plane.registry.leave(worker("s0"))
    commit(running, 0, acquire(running, "s1"))
    assert only_counters_change(plane, lambda: commit(running, 0, old)).verdict == "fenced"


@pytest.mark.parametrize("step", [0, 2])
def test_a_commit_from_another_version_is_stale(plane: Plane, running: Ledger, step: int) -> None:
    token = running.head().token
    advance(running, token, 1)
    fill(running, 1)
    assert only_counters_change(plane, lambda: commit(running, step, token)).verdict == "stale"


@pytest.mark.parametrize("present", [0, 1, 3])
def test_a_commit_needs_every_slot_and_no_other(plane: Plane, running: Ledger, present: int) -> None:
    fill(running, 0, present)
    token = running.head().token
    assert only_counters_change(plane, lambda: commit(running, 0, token)).verdict == "incomplete"


@pytest.mark.parametrize("status", ["paused", "failed", "cancelled"])
def test_a_commit_needs_a_run_that_runs(plane: Plane, running: Ledger, status: str) -> None:
    fill(running, 0)
    running.transition(status, allowed=("running",), event=status)
    token = running.head().token
    assert only_counters_change(plane, lambda: commit(running, 0, token)).verdict == "stopped"


def test_commit_says_which_versions_are_stored_and_pinned(plane: Plane, running: Ledger) -> None:
    token = running.head().token
    running.pin(0, seconds=60)
    running.pin(7, seconds=-60)
    advance(running, token, 1)
    fill(running, 1)
    committed = commit(running, 1, token)
    assert (sorted(committed.stored), committed.pinned) == ([0, 1, 2], {0})
    assert set(plane.state()[running.keys.pins]) == {"0"}, "pins that are over are deleted"


# --- rollback -------------------------------------------------------------------------------------


def test_rollback_takes_the_head_back_and_keeps_what_the_replay_must_meet(
    plane: Plane, running: Ledger
) -> None:
    token = running.head().token
    advance(running, token, 3)
    chains = [e.chain for e in running.entries()]
    running.mark_launched(3, token=token)
    done, above = running.rollback(token=token, version=1, chain=chains[0])
    head = running.head()
    assert (done, sorted(above)) == (True, [2, 3])
    assert (head.version, head.chain, head.launched, head.replayed) == (1, chains[0], None, 2)
    assert [e.version for e in running.entries()] == [1]
    advance(running, token, 2)
    assert [e.chain for e in running.entries()] == chains


def test_a_rollback_over_entries_that_are_on_disk_only(running: Ledger) -> None:
    """Of those the replay is not told what it has to meet; the others it must."""
    token = running.head().token
    advance(running, token, 3)
    chains = [e.chain for e in running.entries()]
    running.trim_entries([1, 2])
    assert running.rollback(token=token, version=0, chain=GENESIS)[0]
    advance(running, token, 3)
    assert [e.chain for e in running.entries()] == chains


def test_what_a_replay_has_met_it_need_not_meet_again(running: Ledger) -> None:
    """Its entry says so from then on; where that lies on disk only, nothing does."""
    token = running.head().token
    advance(running, token, 1)
    running.rollback(token=token, version=0, chain=GENESIS)
    advance(running, token, 1)
    running.trim_entries([1])
    running.rollback(token=token, version=0, chain=GENESIS)
    fill(running, 0)
    other = entry(1, [slot(0, 0), slot(0, 1, digest=digest("other"))])
    assert commit(running, 0, token, entry=other, record=record(1, other.chain)).verdict == "ok"


def test_a_replay_that_gives_other_bytes_is_told(plane: Plane, running: Ledger) -> None:
    token = running.head().token
    advance(running, token, 1)
    running.rollback(token=token, version=0, chain=GENESIS)
    fill(running, 0)
    other = entry(1, [slot(0, 0), slot(0, 1, digest=digest("other"))])
    answer = only_counters_change(
        plane, lambda: commit(running, 0, token, entry=other, record=record(1, other.chain))
    )
    assert answer.verdict == "diverged"
    assert commit(running, 0, token).verdict == "ok"


def test_rollback_needs_the_token(plane: Plane, running: Ledger) -> None:
    token = running.head().token
    advance(running, token, 1)
    plane.registry.leave(worker("s0"))
    acquire(running, "s1")
    answer = only_counters_change(plane, lambda: running.rollback(token=token, version=0, chain=GENESIS))
    assert answer == (False, ())


def test_slots_of_the_interrupted_step_survive_a_rollback(plane: Plane, running: Ledger) -> None:
    token = running.head().token
    advance(running, token, 1)
    write(running, 1, slot(1, 0))
    running.rollback(token=token, version=0, chain=GENESIS)
    assert write(running, 1, slot(1, 1)) == ("early", 0)
    advance(running, token, 1)
    assert running.slots_present(1) == {0}


def corrected(plane: Plane, steps: int) -> tuple[Ledger, int, list[str]]:
    """A run whose code was corrected after some steps, its token, and its chains by version."""
    ledger = plane.ledger()
    ledger.create({"recipe": {}, "config": {"skew": "refuse"}}, incarnation="life")
    token = start(ledger)
    advance(ledger, token, steps)
    ledger.transition("failed", allowed=("running",), event="failed")
    assert ledger.respec(SPEC, incarnation="life.1", skew="refuse")
    ledger.transition("running", allowed=("failed",), event="resumed")
    return ledger, token, [GENESIS, *(e.chain for e in ledger.entries())]


def test_a_replay_of_steps_before_a_correction_may_give_other_bytes(plane: Plane) -> None:
    ledger, token, chains = corrected(plane, 2)
    ledger.mark_launched(2, token=token)
    begin(ledger, step=2)
    write(ledger, 2, slot(2, 0), incarnation="life.1")

    ledger.rollback(token=token, version=1, chain=chains[1])
    assert ledger.incarnation() == "life.2", "what workers hold of version 2 is another's"
    assert ledger.slots_present(2) == set(), "it was computed at the version 2 that is no more"
    assert ledger.leases(2) == {}
    fill(ledger, 1)
    other = entry(2, [slot(1, 0), slot(1, 1, digest=digest("corrected"))], chains[1])
    assert commit(ledger, 1, token, entry=other, record=record(2, other.chain)).verdict == "ok"
    assert write(ledger, 2, slot(2, 0), incarnation="life.1") == ("stopped", 0)
    assert write(ledger, 2, slot(2, 0), incarnation="life.2") == ("written", 1)


def test_a_replay_of_steps_after_a_correction_must_meet_them(plane: Plane) -> None:
    ledger, token, _ = corrected(plane, 1)
    advance(ledger, token, 2)
    chains = [GENESIS, *(e.chain for e in ledger.entries())]
    ledger.rollback(token=token, version=1, chain=chains[1])
    assert ledger.incarnation() == "life.1"
    fill(ledger, 1)
    other = entry(2, [slot(1, 0), slot(1, 1, digest=digest("other"))], chains[1])
    assert commit(ledger, 1, token, entry=other, record=record(2, other.chain)).verdict == "diverged"


def test_a_second_replay_must_meet_the_first_one_with_the_corrected_code(plane: Plane) -> None:
    ledger, token, chains = corrected(plane, 2)
    ledger.rollback(token=token, version=1, chain=chains[1])
    fill(ledger, 1)
    other = entry(2, [slot(1, 0), slot(1, 1, digest=digest("corrected"))], chains[1])
    commit(ledger, 1, token, entry=other, record=record(2, other.chain))
    ledger.rollback(token=token, version=1, chain=chains[1])
    assert ledger.incarnation() == "life.2"
    fill(ledger, 1)
    assert commit(ledger, 1, token).verdict == "diverged"
    assert commit(ledger, 1, token, entry=other, record=record(2, other.chain)).verdict == "ok"


def test_a_rollback_sent_twice_begins_one_revision_of_the_run(plane: Plane) -> None:
    """Else the slots of the replay would be refused: they are of the revision that the first one began."""
    ledger = plane.ledger()
    ledger.create({"recipe": {}, "config": {"skew": "admit"}}, incarnation="life")
    token = start(ledger)
    advance(ledger, token, 2)
    ledger.rollback(token=token, version=0, chain=GENESIS)
    fill(ledger, 0)
    only_counters_change(plane, lambda: ledger.rollback(token=token, version=0, chain=GENESIS))
    assert ledger.incarnation() == "life.1" and ledger.slots_present(0) == {0, 1}


def test_where_any_environment_is_admitted_a_replay_may_give_other_bytes(plane: Plane) -> None:
    ledger = plane.ledger()
    ledger.create({"recipe": {}, "config": {"skew": "admit"}}, incarnation="life+1")
    token = start(ledger)
    advance(ledger, token, 1)
    ledger.rollback(token=token, version=0, chain=GENESIS)
    assert ledger.incarnation() == "life.1+1"
    fill(ledger, 0)
    other = entry(1, [slot(0, 0), slot(0, 1, digest=digest("another machine"))])
    assert commit(ledger, 0, token, entry=other, record=record(1, other.chain)).verdict == "ok"


# --- marks, slots that lost their bytes -----------------------------------------------------------


def test_marks_hold_for_the_present_step_and_its_server(plane: Plane, running: Ledger) -> None:
    token = running.head().token
    assert running.mark_called(0, token=token) == "ok"
    assert running.called(0)
    assert not running.called(1)
    assert running.mark_launched(0, token=token) == "ok"
    assert not running.called(0)
    for mark in (running.mark_launched, running.mark_called):
        assert only_counters_change(plane, lambda mark=mark: mark(0, token=token - 1)) == "fenced"
    write(running, 0, slot(0, 0))
    commit(running, 0, token, shards=1, entry=FIRST, record=record(1, FIRST.chain))
    for mark in (running.mark_launched, running.mark_called):
        assert only_counters_change(plane, lambda mark=mark: mark(0, token=token)) == "stale"
    assert running.mark_launched(2, token=token) == "ok", (
        "with staleness, steps beyond the head are under way"
    )
    for mark in (plane.ledger("nobody").mark_launched, plane.ledger("nobody").mark_called):
        assert only_counters_change(plane, lambda mark=mark: mark(0, token=1)) == "fenced"


def test_a_slot_whose_bytes_are_lost_is_opened_again(plane: Plane, running: Ledger) -> None:
    token = running.head().token
    begin(running)
    write(running, 0, slot(0, 0, "lost"))
    assert (
        only_counters_change(plane, lambda: running.drop_slot(0, 0, nonce="lost", token=token - 1))
        == "fenced"
    )
    assert only_counters_change(plane, lambda: running.drop_slot(0, 0, nonce="newer", token=token)) == "stale"
    assert only_counters_change(plane, lambda: running.drop_slot(1, 0, nonce="lost", token=token)) == "stale"
    assert running.drop_slot(0, 0, nonce="lost", token=token) == "ok"
    assert running.head().launched is None
    assert begin(running, worker="w1") == ("compute", 1, "life")
    assert write(running, 0, slot(0, 0, "again")) == ("written", 1)


# --- claims ---------------------------------------------------------------------------------------


def test_whoever_says_something_first_is_heard(plane: Plane, running: Ledger) -> None:
    assert running.claims() == {}
    assert running.claim("first", "w0's") == {"first": "w0's"}
    assert running.claim("first", "w1's") == {"first": "w0's"}
    assert (
        running.claim("unlike w1", "another") == running.claims() == {"first": "w0's", "unlike w1": "another"}
    )


def test_of_a_run_that_is_gone_nothing_is_kept(plane: Plane) -> None:
    ledger = plane.ledger("run-2")
    assert ledger.claim("first", "w0's") == {"first": "w0's"}
    assert ledger.claims() == {}


# --- transition -----------------------------------------------------------------------------------


def test_transition_from_an_allowed_state(plane: Plane, running: Ledger) -> None:
    reason = {"kind": "Poison", "message": "no"}
    done = running.transition(
        "failed", allowed=("pending", "running"), event="failed", data={"a": 1}, error=reason
    )
    assert done == (True, "running")
    head = running.head()
    assert (head.status, head.error) == ("failed", reason)
    assert plane.registry.active_runs() == []
    assert (running.read_events()[-1].type, running.read_events()[-1].data) == ("failed", {"a": 1})
    assert running.transition("running", allowed=("failed",), event="resumed", error=None) == (True, "failed")
    head = running.head()
    assert (head.status, head.error, head.launched) == ("running", None, None)
    assert "error" not in plane.state()[running.keys.head]
    assert plane.registry.active_runs() == ["run-1"]


def test_transition_from_another_state_is_refused(plane: Plane, running: Ledger) -> None:
    answer = only_counters_change(
        plane, lambda: running.transition("running", allowed=("paused", "failed"), event="resumed")
    )
    assert answer == (False, "running")
    assert plane.ledger("nobody").transition("paused", allowed=("running",), event="x") == (False, "missing")


def test_a_state_is_no_prefix_of_another(plane: Plane, running: Ledger) -> None:
    assert running.transition("x", allowed=("run", "unning", "runningx"), event="x") == (False, "running")


def test_transition_by_a_fenced_server_is_refused(plane: Plane, running: Ledger) -> None:
    token = running.head().token
    answer = only_counters_change(
        plane, lambda: running.transition("done", allowed=("running",), event="done", token=token - 1)
    )
    assert answer == (False, "running")
    assert running.transition("done", allowed=("running",), event="done", token=token) == (True, "running")


def test_a_straggler_cannot_fail_a_run_that_went_on_without_it(plane: Plane, running: Ledger) -> None:
    def fail(step: int, shard: int, incarnation: str = "life") -> tuple[bool, str]:
        return running.transition(
            "failed", allowed=("running",), event="failed", shard=(step, shard), incarnation=incarnation
        )

    write(running, 0, slot(0, 0))
    assert only_counters_change(plane, lambda: fail(0, 0)) == (False, "running")
    assert only_counters_change(plane, lambda: fail(0, 1, "before")) == (False, "running")
    token = running.head().token
    commit(running, 0, token, shards=1, entry=FIRST, record=record(1, FIRST.chain))
    assert only_counters_change(plane, lambda: fail(0, 1)) == (False, "running")
    assert fail(1, 1) == (True, "running")


def test_staleness_opens_the_steps_whose_version_is_there(plane: Plane, running: Ledger) -> None:
    def begin_at(step: int, version: int) -> str:
        return begin(running, step, delivery=f"d{step}", version=version)[0]

    assert begin_at(2, 0) == "compute"
    assert write(running, 2, slot(2, 0), version=0) == ("written", 1)
    assert only_counters_change(plane, lambda: begin_at(3, 1)) == "early"
    assert only_counters_change(plane, lambda: write(running, 3, slot(3, 0), version=1)) == ("early", 0)
    assert running.slots_present(2) == {0}


def test_a_switch_holds_from_a_step_that_nobody_is_about_to_launch(plane: Plane, running: Ledger) -> None:
    switched = {**SPEC, "switches": {"9": {"shards": 8}}}

    def switch(step: int, incarnation: str = "life", following: str = "life+1") -> str:
        return running.switch(
            switched,
            step=step,
            incarnation=incarnation,
            following=following,
            total_steps=7,
            data={"step": step},
        )

    running.mark_launched(3, token=running.head().token)
    assert only_counters_change(plane, lambda: switch(4)) == "late"
    assert only_counters_change(plane, lambda: switch(9, "life+4", "life+5")) == "changed"
    assert switch(5) == "ok"
    assert switch(5) == "ok", "sent twice"
    assert running.spec() == switched
    assert (
        (running.head().incarnation, running.head().total_steps)
        == (running.incarnation(), 7)
        == ("life+1", 7)
    )
    begin(running)
    assert write(running, 0, slot(0, 0), incarnation="life")[0] == "written", "slots before it stay good"
    running.transition("cancelled", allowed=("running",), event="cancelled")
    assert switch(20, "life+1", "life+2") == "cancelled"


def test_resuming_forgets_the_tries_before(plane: Plane, running: Ledger) -> None:
    begin(running)
    plane.registry.leave(worker("w0"))
    begin(running, worker="w1")
    running.transition("failed", allowed=("running",), event="failed")
    running.transition("running", allowed=("failed",), event="resumed")
    lease = running.leases(0)[0]
    assert (lease.worker, lease.attempt, lease.open) == ("w1", 0, True)


def test_a_corrected_spec_is_taken_while_the_run_stands_still(plane: Plane, running: Ledger) -> None:
    corrected = {**SPEC, "config": {"epochs": 2}}
    assert not only_counters_change(
        plane, lambda: running.respec(corrected, incarnation="life.1", skew="admit")
    )
    running.transition("paused", allowed=("running",), event="paused")
    assert running.respec(corrected, incarnation="life.1", skew="refuse")
    assert running.spec() == corrected
    assert (running.head().incarnation, running.head().skew) == ("life.1", "refuse")


def switch(ledger: Ledger, step: int, incarnation: str = "life", following: str = "life+1") -> str:
    switched = {**SPEC, "switches": {str(step): {"shards": 4}}}
    return ledger.switch(
        switched, step=step, incarnation=incarnation, following=following, total_steps=9, data={"step": step}
    )


def test_a_switch_holds_from_a_step_that_nobody_has_launched(plane: Plane, running: Ledger) -> None:
    assert switch(running, 2) == "ok"
    assert running.spec()["switches"] == {"2": {"shards": 4}}
    assert (running.head().incarnation, running.head().total_steps) == ("life+1", 9)
    assert running.incarnation() == "life+1"
    assert running.read_events()[-1].type == "switched"
    assert only_counters_change(plane, lambda: switch(running, 2)) == "ok", "sent twice"
    assert only_counters_change(plane, lambda: switch(running, 5, following="life+2")) == "changed"
    assert write(running, 0, slot(0, 0), incarnation="life") == ("written", 1)


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_switch_of_a_step_under_way_is_late(plane: Plane, running: Ledger, step: int) -> None:
    token = running.head().token
    advance(running, token, 1)
    running.mark_launched(2, token=token)
    assert only_counters_change(plane, lambda: switch(running, step)) == "late"
    assert switch(running, 4) == "ok"


def test_a_rollback_or_a_pause_opens_no_launched_step_to_a_switch(plane: Plane, running: Ledger) -> None:
    """The replay must meet what was committed, and slots of one step must have one config."""
    token = running.head().token
    advance(running, token, 3)
    running.mark_launched(3, token=token)
    running.rollback(token=token, version=0, chain=GENESIS)
    running.transition("paused", allowed=("running",), event="paused")
    running.transition("running", allowed=("paused",), event="resumed")
    assert (running.head().launched, running.head().reached) == (None, 3)
    assert switch(running, 4) == "late"
    assert switch(running, 5) == "ok"


@pytest.mark.parametrize("status", ["failed", "done", "cancelled"])
def test_a_run_at_rest_is_not_switched(plane: Plane, running: Ledger, status: str) -> None:
    running.transition(status, allowed=("running",), event=status)
    assert only_counters_change(plane, lambda: switch(running, 7)) == status
    assert plane.ledger("nobody").switch(
        SPEC, step=0, incarnation="", following="+1", total_steps=None, data={}
    ) == "missing"  # fmt: skip


def test_with_staleness_a_step_may_begin_before_its_turn(plane: Plane, running: Ledger) -> None:
    assert begin(running, step=1)[0] == "early"
    assert begin(running, step=1, version=0)[0] == "compute"
    assert write(running, 1, slot(1, 0)) == ("early", 0)
    assert write(running, 1, slot(1, 0), version=0) == ("written", 1)
    advance(running, running.head().token, 1)
    assert running.slots_present(1) == {0}


# --- versions -------------------------------------------------------------------------------------


def test_versions_are_written_and_dropped_by_the_server_in_force(plane: Plane, running: Ledger) -> None:
    token = running.head().token
    assert running.put_version(record(0, state=True), token=token)
    assert running.version(0) == record(0, state=True)
    plane.registry.leave(worker("s0"))
    successor = acquire(running, "s1")
    assert not only_counters_change(plane, lambda: running.put_version(record(5), token=token))
    assert not only_counters_change(plane, lambda: running.drop_versions([0], token=token))
    assert running.drop_versions([], token=successor)
    assert running.drop_versions([0, 17], token=successor)
    assert (running.version(0), running.versions()) == (None, {})


# --- the ledger's entries -------------------------------------------------------------------------


def test_entries_are_read_in_order_and_in_part(plane: Plane, running: Ledger) -> None:
    token = running.head().token
    start(running, record=record(0))
    token = running.head().token
    advance(running, token, 12)
    assert [e.version for e in running.entries()] == list(range(1, 13))
    assert [e.version for e in running.entries(10)] == [10, 11, 12]
    assert [e.version for e in running.entries(3, 5)] == [3, 4, 5]
    assert running.entries(5, 3) == []
    running.trim_entries(range(1, 4))
    running.trim_entries([])
    assert running.ledger_size() == 9
    assert [e.version for e in running.entries(1, 4)] == [4]


def test_an_entry_survives_its_trip(plane: Plane, running: Ledger) -> None:
    made = entry(1, [slot(0, 0, loss=1e-17), slot(0, 1)], lr=(0.1, 1e-300), notes={"a": [1, None]})
    fill(running, 0)
    commit(running, 0, running.head().token, entry=made, record=record(1, made.chain))
    assert running.entries() == [made]
    assert LedgerEntry.from_json(made.to_json()).computed_seal() == made.seal


# --- evaluations ----------------------------------------------------------------------------------


def test_an_evaluation_from_launch_to_record(plane: Plane, running: Ledger) -> None:
    assert running.launch_evaluation(0, 2, pin_seconds=60)
    assert running.pending_evaluations() == {0: 2}
    advance(running, running.head().token, 1)
    fill(running, 1)
    assert commit(running, 1, running.head().token).pinned == {0}
    assert running.write_part(0, 1, {"loss": NAN}, parts=2) == ("written", [])
    assert running.parts_present(0) == {1}
    verdict, values = running.write_part(0, 0, {"loss": 1.0}, parts=2)
    assert verdict == "complete"
    assert values[0] == {"loss": 1.0}
    assert math.isnan(values[1]["loss"])
    assert running.record_evaluation(0, {"loss": 1.5})
    assert running.evaluations() == {0: {"loss": 1.5}}
    assert running.pending_evaluations() == {}
    assert running.parts_present(0) == set()
    assert running.read_events()[-1].data == {"version": 0, "metrics": {"loss": 1.5}}


def test_metrics_that_are_not_finite_are_values(plane: Plane, running: Ledger) -> None:
    metrics = {"loss": math.inf, "least": -math.inf, "auroc": NAN}
    assert running.record_evaluation(0, metrics)
    assert repr(running.evaluations()) == repr({0: metrics})
    assert repr(running.read_events()[-1].data["metrics"]) == repr(metrics)


def test_the_first_part_and_the_first_record_win(plane: Plane, running: Ledger) -> None:
    running.write_part(0, 0, {"loss": 1.0}, parts=2)
    running.write_part(0, 0, {"loss": 2.0}, parts=2)
    assert running.write_part(0, 1, {"loss": 3.0}, parts=2)[1] == [{"loss": 1.0}, {"loss": 3.0}]
    assert running.record_evaluation(0, {"loss": 2.0})
    assert not only_counters_change(plane, lambda: running.record_evaluation(0, {"loss": 9.0}))
    assert running.evaluations() == {0: {"loss": 2.0}}


def test_an_evaluation_that_is_done_does_not_begin_again(plane: Plane, running: Ledger) -> None:
    running.launch_evaluation(0, 1, pin_seconds=60)
    running.write_part(0, 0, {"loss": 1.0}, parts=1)
    running.record_evaluation(0, {"loss": 1.0})
    assert not only_counters_change(plane, lambda: running.launch_evaluation(0, 1, pin_seconds=60))
    assert only_counters_change(plane, lambda: running.write_part(0, 0, {"loss": 1.0}, parts=1)) == (
        "done",
        [],
    )
    assert running.pending_evaluations() == {}


def test_an_evaluation_is_given_up(plane: Plane, running: Ledger) -> None:
    running.launch_evaluation(0, 2, pin_seconds=60)
    running.launch_evaluation(1, 1, pin_seconds=60)
    running.write_part(0, 0, {"loss": 1.0}, parts=2)
    assert running.abandon_evaluation(0, "its bytes are gone")
    assert running.pending_evaluations() == {1: 1}
    assert running.parts_present(0) == set()
    last = running.read_events()[-1]
    assert (last.type, last.data) == ("evaluation lost", {"version": 0, "message": "its bytes are gone"})
    assert not only_counters_change(plane, lambda: running.abandon_evaluation(0, "again"))
    assert running.evaluations() == {}
    advance(running, running.head().token, 1)
    fill(running, 1)
    assert commit(running, 1, running.head().token).pinned == {1}, "it is not kept for its evaluation"


def test_a_part_that_is_dropped_is_written_again(running: Ledger) -> None:
    running.write_part(0, 0, {"loss": 1.0}, parts=2)
    running.write_part(0, 1, {"loss": 2.0}, parts=2)
    running.drop_part(0, 0)
    assert running.parts_present(0) == {1}
    assert running.write_part(0, 0, {"loss": 3.0}, parts=2) == ("complete", [{"loss": 3.0}, {"loss": 2.0}])


def test_what_is_recorded_is_not_given_up(plane: Plane, running: Ledger) -> None:
    running.launch_evaluation(0, 1, pin_seconds=60)
    running.record_evaluation(0, {"loss": 1.0})
    assert not only_counters_change(plane, lambda: running.abandon_evaluation(0, "late"))
    assert running.evaluations() == {0: {"loss": 1.0}}


def test_an_evaluation_is_launched_once(plane: Plane, running: Ledger) -> None:
    assert running.launch_evaluation(0, 4, pin_seconds=60)
    assert not running.launch_evaluation(0, 2, pin_seconds=60)
    assert running.pending_evaluations() == {0: 4}


# --- the end by a rule ----------------------------------------------------------------------------


def test_a_run_stops_at_its_present_version_once(plane: Plane, running: Ledger) -> None:
    token = running.head().token
    advance(running, token, 1)
    assert running.stop(0, rule="Plateau", reason="no better", token=token) == "stale"
    assert running.stop(1, rule="Plateau", reason="no better", token=token - 1) == "fenced"
    assert running.head().stopped is None
    assert running.stop(1, rule="Plateau", reason="no better", token=token) == "ok"
    verdict = {"version": 1, "rule": "Plateau", "reason": "no better"}
    assert (running.head().stopped, running.head().total_steps) == (verdict, 1)
    last = running.read_events()[-1]
    assert (last.type, last.data) == ("stopped", verdict)
    assert only_counters_change(
        plane, lambda: running.stop(1, rule="NotFinite", reason="another", token=token)
    ) == ("ok")


def test_a_run_that_stands_still_is_not_stopped(running: Ledger) -> None:
    token = running.head().token
    running.transition("paused", allowed=("running",), event="paused")
    assert running.stop(0, rule="Plateau", reason="no better", token=token) == "paused"
    assert running.head().stopped is None


def test_a_run_that_is_done_goes_on(plane: Plane, running: Ledger) -> None:
    head = running.head()
    following = f"{head.incarnation}.1"

    def extend(incarnation: str = head.incarnation) -> str:
        return running.extend(SPEC, incarnation=incarnation, following=following, data={"epochs": 3})

    assert only_counters_change(plane, extend) == "running"
    running.transition("done", allowed=("running",), event="done")
    running.retire()
    assert only_counters_change(plane, lambda: extend("another")) == "changed"
    assert extend() == "ok"
    found = running.head()
    assert (found.status, found.version, found.total_steps) == ("pending", head.version, None)
    assert found.incarnation == following
    assert running.read_events()[-1].type == "extended"
    assert only_counters_change(plane, extend) == "ok"


def test_a_run_that_a_rule_has_ended_does_not_go_on(running: Ledger) -> None:
    head = running.head()
    running.stop(head.version, rule="Plateau", reason="no better", token=head.token)
    running.transition("done", allowed=("running",), event="done")
    assert running.extend(SPEC, incarnation=head.incarnation, following="life.1", data={}) == "stopped"


# --- predictions ----------------------------------------------------------------------------------


def test_the_first_output_of_a_part_wins(plane: Plane) -> None:
    ledger = plane.ledger()
    assert ledger.write_output("q", 0, {"a": 1})
    assert not ledger.write_output("q", 0, {"a": 2})
    assert ledger.write_output("q", 1, {"a": NAN})
    assert ledger.outputs("q")[0] == {"a": 1}
    ledger.drop_outputs("q")
    assert ledger.outputs("q") == {}


# --- events ---------------------------------------------------------------------------------------


def test_events_are_read_from_a_resume_point(plane: Plane) -> None:
    ledger = plane.ledger()
    assert ledger.read_events() == []
    for number in range(5):
        ledger.emit("tick", {"n": number})
    events = ledger.read_events()
    assert [event.data["n"] for event in events] == [0, 1, 2, 3, 4]
    assert [event.data["n"] for event in ledger.read_events(events[2].id)] == [3, 4]
    assert [event.data["n"] for event in ledger.read_events(count=2)] == [0, 1]


def test_reading_events_waits_for_the_first(plane: Plane) -> None:
    ledger = plane.ledger()
    assert ledger.read_events(block_seconds=0.01) == []
    timer = threading.Timer(0.05, ledger.emit, ("tick", {}))
    timer.start()
    assert [event.type for event in ledger.read_events(block_seconds=10)] == ["tick"]
    timer.join()


# --- every operation, by a table ------------------------------------------------------------------

# What is called in each test below, on a run that has committed step 0 and has one slot of step 1.
CALLS: dict[str, Callable[[Ledger, int], Any]] = {
    "create": lambda ledger, token: ledger.create(SPEC, incarnation="again"),
    "spec": lambda ledger, token: ledger.spec(),
    "sealed_spec": lambda ledger, token: ledger.sealed_spec(),
    "respec": lambda ledger, token: ledger.respec(SPEC, incarnation="life.1", skew="admit"),
    "switch": lambda ledger, token: ledger.switch(
        SPEC, step=9, incarnation="life", following="life+1", total_steps=9, data={}
    ),
    "extend": lambda ledger, token: ledger.extend(SPEC, incarnation="life", following="life.1", data={}),
    "label": lambda ledger, token: ledger.label(tags=["b", "a"], notes="a note"),
    "share": lambda ledger, token: ledger.share(weight=3.0, priority=1),
    "server_memory": lambda ledger, token: ledger.server_memory(),
    "incarnation": lambda ledger, token: ledger.incarnation(),
    "head": lambda ledger, token: ledger.head(),
    "transition": lambda ledger, token: ledger.transition("paused", allowed=("running",), event="paused"),
    "retire": lambda ledger, token: ledger.retire([0]),
    "head_and_slots": lambda ledger, token: ledger.head_and_slots(1),
    "begin": lambda ledger, token: ledger.begin(1, 1, worker="w0", delivery="w0:1"),
    "end_lease": lambda ledger, token: ledger.end_lease(1, 0, worker="w0", delivery="w0:0"),
    "finish_slot": lambda ledger, token: ledger.finish_slot(1, slot(1, 1)),
    "late_shard": lambda ledger, token: ledger.late_shard(1, shards=1, seconds=0.01),
    "acquire": lambda ledger, token: ledger.acquire(worker="s0", node="celery@s0", queue="updates.s0"),
    "release": lambda ledger, token: ledger.release(token),
    "initialise": lambda ledger, token: ledger.initialise(
        token=token, manifest={}, record=record(1), dataset_size=9, evaluation_size=0, total_steps=3
    ),
    "slots": lambda ledger, token: ledger.slots(1),
    "some_slots": lambda ledger, token: ledger.some_slots(1, [0, 7]),
    "slots_present": lambda ledger, token: ledger.slots_present(1),
    "announce": lambda ledger, token: ledger.announce("slot:1", Notice.of(1, "k", 9, 4, {1: "0" * 16})),
    "underway": lambda ledger, token: ledger.underway(["slot:0", "slot:1"], 1),
    "leases": lambda ledger, token: ledger.leases(1),
    "drop_slot": lambda ledger, token: ledger.drop_slot(1, 0, nonce="n", token=token),
    "commit": lambda ledger, token: commit(
        ledger, 1, token, shards=1, entry=NEXT, record=record(2, NEXT.chain)
    ),
    "stop": lambda ledger, token: ledger.stop(1, rule="Plateau", reason="no better", token=token),
    "mark_launched": lambda ledger, token: ledger.mark_launched(1, token=token),
    "mark_called": lambda ledger, token: ledger.mark_called(1, token=token),
    "called": lambda ledger, token: ledger.called(1),
    "claim_toolchain": lambda ledger, token: ledger.claim_toolchain("g++ 12"),
    "claim": lambda ledger, token: ledger.claim("first", "what w0 has found"),
    "claims": lambda ledger, token: ledger.claims(),
    "rollback": lambda ledger, token: ledger.rollback(token=token, version=0, chain=GENESIS),
    "manifest": lambda ledger, token: ledger.manifest(),
    "version": lambda ledger, token: ledger.version(1),
    "versions": lambda ledger, token: ledger.versions(),
    "put_version": lambda ledger, token: ledger.put_version(record(1, state=True), token=token),
    "drop_versions": lambda ledger, token: ledger.drop_versions([0], token=token),
    "pin": lambda ledger, token: ledger.pin(0, seconds=60),
    "pinned": lambda ledger, token: ledger.pinned(0),
    "entries": lambda ledger, token: ledger.entries(),
    "entry_texts": lambda ledger, token: ledger.entry_texts(),
    "ledger_size": lambda ledger, token: ledger.ledger_size(),
    "trim_entries": lambda ledger, token: ledger.trim_entries([1]),
    "write_part": lambda ledger, token: ledger.write_part(1, 0, {"loss": 1.0}, parts=2),
    "drop_part": lambda ledger, token: ledger.drop_part(1, 0),
    "parts_present": lambda ledger, token: ledger.parts_present(1),
    "record_evaluation": lambda ledger, token: ledger.record_evaluation(1, {"loss": 1.0}),
    "launch_evaluation": lambda ledger, token: ledger.launch_evaluation(1, 2, pin_seconds=60),
    "abandon_evaluation": lambda ledger, token: ledger.abandon_evaluation(1, "gone"),
    "pending_evaluations": lambda ledger, token: ledger.pending_evaluations(),
    "evaluations": lambda ledger, token: ledger.evaluations(),
    "write_output": lambda ledger, token: ledger.write_output("q", 0, {}),
    "outputs": lambda ledger, token: ledger.outputs("q"),
    "drop_output": lambda ledger, token: ledger.drop_output("q", 0),
    "drop_outputs": lambda ledger, token: ledger.drop_outputs("q"),
    "open_round": lambda ledger, token: ledger.open_round(1, 3, token=token),
    "close_round": lambda ledger, token: ledger.close_round(token=token, committed=1),
    "forget_expected": lambda ledger, token: ledger.forget_expected(1),
    "round": lambda ledger, token: ledger.round(),
    "turn": lambda ledger, token: ledger.turn(
        seat(token), 2, shards=1, slot=slot(2, 0), report=Report(NEXT, {"step": 1}, 1)
    ),
    "end_round": lambda ledger, token: ledger.end_round(seat(token), 1, record=record(1, FIRST.chain)),
    "leave_round": lambda ledger, token: ledger.leave_round("w0"),
    "kept_versions": lambda ledger, token: ledger.kept_versions(),
    "claim_telling": lambda ledger, token: getattr(ledger.claim_telling("w0", seconds=60), "id", None),
    "settle_telling": lambda ledger, token: ledger.settle_telling(TOLD, "w0", "dead", error="away", to="it"),
    "outbox": lambda ledger, token: [each.id for each in ledger.outbox()],
    "tell_again": lambda ledger, token: ledger.tell_again(),
    "heard": lambda ledger, token: ledger.heard(),
    "hear": lambda ledger, token: ledger.hear("0", "1-0"),
    "emit": lambda ledger, token: ledger.emit("tick", {}),
    "read_events": lambda ledger, token: ledger.read_events(),
}
FIRST = entry(1, [slot(0, 0)])
NEXT = entry(2, [slot(1, 0)], FIRST.chain)
TOLD = Telling("evaluated-0.0", "evaluated", 0, 0.0, {}, tries=1)
TELLS = ("claim_telling", "settle_telling", "outbox", "tell_again")
IN_ROUND = ("close_round", "round", "turn", "end_round", "leave_round")

# Sent twice, these answer the second time that it has been done; callers count on no more than that.
ANSWERS_ONCE = {
    "drop_slot": "stale",
    "launch_evaluation": False,
    "record_evaluation": False,
    "write_output": False,
    "turn": Turn("complete", "written", "same", slots={0: slot(2, 0)}),
}
TELLS_THE_TIME = ("head", "head_and_slots", "acquire", "leases", "read_events", "round")


def under_way(plane: Plane, run: str = "run-1") -> tuple[Ledger, int]:
    """A run of one shard a step that has committed step 0 and has a slot and a lease of step 1."""
    ledger = plane.ledger(run)
    ledger.create(SPEC, incarnation="life")
    for id in ("w0", "w1", "s0"):
        plane.registry.beat(worker(id))
    token = start(ledger)
    write(ledger, 0, slot(0, 0))
    commit(ledger, 0, token, shards=1, entry=FIRST, record=record(1, FIRST.chain))
    begin(ledger, step=1)
    write(ledger, 1, slot(1, 0))
    return ledger, token


def seat(token: int) -> Seat:
    return Seat("w0", "memory", token, 1, "life", 3)


def prepared(plane: Plane, name: str, run: str = "run-1") -> tuple[Ledger, int]:
    """A run that is under way; in a round if the operation is one of those that need one."""
    ledger, token = under_way(plane, run)
    if name in TELLS:
        ledger.record_evaluation(0, {"loss": 1.0})
        if name == "settle_telling":
            assert ledger.claim_telling("w0", seconds=60) is not None
    if name in IN_ROUND:
        assert ledger.open_round(1, 3, token=token) == "ok"
        assert ledger.turn(seat(token), 1, shards=1).verdict == "complete"
    return ledger, token


def test_the_table_has_every_operation_and_so_has_the_twin() -> None:
    public = {name for name, _ in inspect.getmembers(Ledger, inspect.isfunction) if not name.startswith("_")}
    assert set(CALLS) == public
    assert not [name for name in public if getattr(MemoryLedger, name) is getattr(Ledger, name)]
    registry = {name for name, _ in inspect.getmembers(Registry, inspect.isfunction) if name[0] != "_"}
    assert registry - set(vars(MemoryRegistry)) <= {"consumers", "require_placement", "require_room_kept"}, (
        "built on the others"
    )


class Stammering(Ledger):
    """Sends all commands and each transaction twice, as a client does whose connection broke in between."""

    def _call(self, *commands: Command) -> list[Any]:
        super()._call(*commands)
        return super()._call(*commands)


def stammering(client: redis.Redis) -> redis.Redis:
    """The client, whose pipelines from now on run twice."""
    pipeline = client.pipeline

    def twice(*args: Any, **options: Any) -> Any:
        pipe = pipeline(*args, **options)
        execute = pipe.execute

        def both(*args: Any, **options: Any) -> Any:
            commands = list(pipe.command_stack)
            execute(*args, **options)
            pipe.command_stack = commands
            return execute(*args, **options)

        pipe.execute = both
        return pipe

    client.pipeline = twice
    return client


@pytest.mark.parametrize("name", sorted(CALLS))
def test_every_operation_may_be_sent_twice(redis_url: str, name: str) -> None:
    client, again = connect(redis_url), stammering(connect(redis_url))
    answers, states = [], []
    for ledger in (Ledger(client, redis_url, "run-1"), Stammering(again, redis_url, "run-1")):
        _, token = prepared(
            Plane(lambda run: Ledger(client, redis_url, run), Registry(client, redis_url), dict), name
        )
        answers.append(CALLS[name](ledger, token))
        states.append(comparable(redis_state(client), counters=False))
        client.flushdb()  # the test's own database
    client.close()
    again.close()
    once, twice = answers
    if name in ANSWERS_ONCE:
        assert twice == ANSWERS_ONCE[name]
    elif name not in TELLS_THE_TIME:
        assert twice == once
    assert states[1] == states[0]


@pytest.mark.parametrize("name", sorted(CALLS))
def test_every_operation_leaves_only_keys_with_a_ttl(redis_url: str, name: str) -> None:
    """On a run under way, on one at rest, and where there is no run at all: `redis_url` checks the TTLs."""
    client = connect(redis_url)
    real = Plane(lambda run: Ledger(client, redis_url, run), Registry(client, redis_url), dict)
    CALLS[name](*prepared(real, name))
    resting, token = prepared(real, name, "run-2")
    resting.retire()
    CALLS[name](resting, token)
    try:
        CALLS[name](real.ledger("run-3"), 0)
    except (CacheError, RunNotFound):
        assert name in ("spec", "sealed_spec", "head", "head_and_slots", "manifest", "commit")
    client.close()


def test_no_operation_leaves_half_a_head(redis_url: str) -> None:
    """What is sent to a run that has expired may not leave a head that cannot be read."""
    client = connect(redis_url)
    for name, call in CALLS.items():
        ledger = Ledger(client, redis_url, "gone")
        if name not in ("create", "commit", "spec", "sealed_spec", "head", "head_and_slots", "manifest"):
            call(ledger, 0)
            with pytest.raises(RunNotFound):
                ledger.head()
    client.close()


@pytest.mark.parametrize("name", sorted(CALLS))
def test_every_operation_says_that_nobody_answers(name: str) -> None:
    url = "redis://:secret@127.0.0.1:1/0"
    client = connect(url)
    client.connection_pool.connection_kwargs["retry"] = Retry(NoBackoff(), 0)
    with pytest.raises(CacheUnreachable) as caught:
        CALLS[name](Ledger(client, url, "run-1"), 1)
    assert isinstance(caught.value.__cause__, redis.RedisError)
    assert "'run-1'" in str(caught.value)
    assert "TORCHORD_URL" in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("name", sorted(CALLS))
def test_every_error_of_the_server_is_translated(redis_url: str, name: str) -> None:
    """Each key of the run holds another type than the operation expects."""
    client = connect(redis_url)
    ledger = Ledger(client, redis_url, "run-1")
    names = ledger.keys
    work = [f(n) for f in (names.slots, names.leases, names.parts) for n in (0, 1)]
    for key in [*names.lasting(), *work, names.predict("q"), names.underway]:
        client.zadd(key, {"another type": 1}, nx=True)
        client.expire(key, 60)
    if name in ("retire", "drop_outputs"):  # work on a key of any type
        CALLS[name](ledger, 1)
    else:
        with pytest.raises(CacheError) as caught:
            CALLS[name](ledger, 1)
        assert isinstance(caught.value.__cause__, redis.RedisError)
        assert "'run-1'" in str(caught.value)
    client.close()


def test_a_queue_is_read_without_taking_from_it(plane: Plane) -> None:
    registry, waiting = plane.registry, [{"run": "run-1", "step": 0, "shard": n} for n in range(3)]
    for arguments in waiting:
        if isinstance(registry, MemoryRegistry):
            registry.plane.push("gradients", arguments)
        else:
            registry.client.lpush("gradients", json.dumps({"headers": {"kwargsrepr": repr(arguments)}}))
    assert sorted(map(str, registry.queued("gradients"))) == sorted(map(str, waiting))
    assert registry.queued("updates") == []
    registry.expire_queue("gradients")
    registry.expire_queue("nobody's")
    assert len(registry.queued("gradients")) == 3


def test_the_server_has_a_name_for_its_life(plane: Plane) -> None:
    assert plane.registry.server_id() == plane.registry.server_id() != ""


# --- the registry ---------------------------------------------------------------------------------


def test_a_worker_is_alive_until_it_leaves(plane: Plane) -> None:
    registry = plane.registry
    assert registry.alive() == {}
    one = worker("w0", environment="torch 2.13", task="idle?")
    registry.beat(one)
    registry.beat(worker("w1", queues=("updates",)))
    assert registry.alive() == {"w0": one, "w1": worker("w1", queues=("updates",))}
    assert [info.id for info in registry.consumers(GRADIENTS)] == ["w0"]
    registry.leave(one)
    assert list(registry.alive()) == ["w1"]


def test_a_worker_whose_lease_ran_out_is_dead() -> None:
    now = 1000.0
    plane = MemoryPlane(clock=lambda: now)
    registry = MemoryRegistry(plane)
    registry.beat(worker("w0"))
    now += keys.WORKER_LEASE_MS / 1000 - 0.001
    assert list(registry.alive()) == ["w0"]
    now += 0.002
    assert registry.alive() == {}


def test_heartbeats_have_the_lease_as_their_ttl(redis_url: str) -> None:
    client = connect(redis_url)
    Registry(client, redis_url).beat(worker("w0"))
    assert 0 < client.pttl(keys.worker("w0")) <= keys.WORKER_LEASE_MS
    client.close()


class Turns(threading.Event):
    """An event that a heartbeat waits for in no time, and that is set after some beats.

    Attributes:
        waits: for how long it was waited for each time (s).
    """

    def __init__(self, beats: int) -> None:
        super().__init__()
        self.beats = beats
        self.waits: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.waits.append(timeout)
        return len(self.waits) > self.beats


def beaten(registry: Registry, beats: int) -> Turns:
    """Start the heartbeat of w0, wait for some more beats of its thread, and stop it."""
    turns = Turns(beats)
    heartbeat = Heartbeat(registry, worker("w0"))
    heartbeat._stop = turns
    heartbeat.start()
    heartbeat._thread.join()
    heartbeat.stop()
    return turns


def test_a_worker_lives_though_two_of_its_beats_are_lost() -> None:
    """And it does not beat without a pause."""
    lease = keys.WORKER_LEASE_MS / 1000
    waits = beaten(MemoryRegistry(MemoryPlane()), 3).waits
    assert len(waits) == 4 and len(set(waits)) == 1
    assert lease / 20 < waits[0] < lease / 3


def test_a_beat_that_fails_is_not_the_last(caplog: pytest.LogCaptureFixture) -> None:
    answers = [None, CacheUnreachable("away"), CacheUnreachable("away"), None]

    class Registry(MemoryRegistry):
        def beat(self, info: WorkerInfo) -> None:
            if (error := answers.pop(0)) is not None:
                raise error
            super().beat(info)
            beats.append(info.id)

        def leave(self, info: WorkerInfo) -> None:
            assert list(self.alive()) == beats[:1]
            super().leave(info)

    beats: list[str] = []
    registry = Registry(MemoryPlane())
    beaten(registry, 3)
    assert beats == ["w0", "w0"]
    assert [record.message for record in caplog.records] == ["heartbeat: away"] * 2
    assert registry.alive() == {}, "a worker that stops is gone at once"


def test_one_supervisor_at_a_time(plane: Plane) -> None:
    registry = plane.registry
    assert registry.elect("a") == "a"
    assert registry.elect("b") == "a"
    assert registry.elect("a") == "a"
    registry.step_down("b")
    assert registry.elect("b") == "a"
    registry.step_down("a")
    assert registry.elect("b") == "b"


def test_a_dead_supervisor_is_followed_at_once(plane: Plane) -> None:
    registry = plane.registry
    registry.elect("a")
    assert registry.elect("b", dead="c") == "a", "another one is dead"
    assert registry.elect("b", dead="a") == "b"
    assert registry.elect("a") == "b"


def test_a_worker_is_asked_for_by_its_id(plane: Plane) -> None:
    assert plane.registry.worker("w0") is None
    plane.registry.beat(worker("w0"))
    assert plane.registry.worker("w0") == worker("w0")


def test_an_active_run_is_not_forgotten(plane: Plane, running: Ledger) -> None:
    plane.registry.forget_run("run-1")
    assert plane.registry.active_runs() == ["run-1"]
    running.transition("paused", allowed=("running",), event="paused")
    assert plane.registry.active_runs() == []
    running.transition("running", allowed=("paused",), event="resumed")
    plane.registry.forget_run("run-1")
    assert plane.registry.active_runs() == ["run-1"]


def test_a_run_that_is_gone_is_forgotten(plane: Plane, running: Ledger) -> None:
    if isinstance(running, MemoryLedger):
        running.plane.delete(running.keys.head)
    else:
        running.client.delete(running.keys.head)
    plane.registry.forget_run("run-1")
    assert plane.registry.active_runs() == []


# --- the scripts and their headers ----------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(SCRIPTS.glob("*.lua")), ids=lambda path: path.stem)
def test_a_script_says_what_it_takes_and_gives(path: Path) -> None:
    """Its header numbers every key and argument that it uses, and names every word that it answers."""
    text = path.read_text()
    header = "".join(re.match(r"(--[^\n]*\n)+", text).group())  # type: ignore[union-attr]
    body = text.removeprefix(header)
    assert re.search(r"^-- Returns ", header, re.M)
    for what in ("KEYS", "ARGV"):
        section = re.search(rf"-- {what} ((?:.|\n)*?)(?=-- (?:ARGV|Returns|[A-Z]\w+ )|\Z)", header)
        documented = (
            {int(n) for n in re.findall(r"(?:(?<=[ ,])|^)(\d+)(?=\.\.\.| )", section[1])}
            if section
            else set()
        )
        used = {int(n) for n in re.findall(rf"{what}\[(\d+)\]", body)}
        assert used <= documented, f"{what} {sorted(used - documented)} are not in the header"
    answers = set(re.findall(r"return \{?'(\w+)'", body))
    answers -= {word for word in answers if f"'{word}'" in header}
    assert not answers, f"the header does not name {answers}"


def test_the_head_reads_what_the_scripts_write() -> None:
    """Every field that a script writes to the head is one that `Head` knows, or a private one named here."""
    private = {"called", "corrected_at", "changed", "changed_from", "server_environment", "shard_seconds"}
    seen = set()
    for path in SCRIPTS.glob("*.lua"):
        text = path.read_text()
        head = re.search(r"(\d+) head\b", text)
        if head is None:
            continue
        for verb, rest in re.findall(rf"'(HSET|HINCRBY|HDEL)', KEYS\[{head[1]}\],\s*((?:.|\n)*?)\)\n", text):
            arguments = [argument.strip() for argument in rest.split(",")]
            fields = arguments if verb == "HDEL" else arguments[:: 2 if verb == "HSET" else 99]
            seen |= {field.strip("'") for field in fields if field.startswith("'")}
    assert {"version", "chain", "token", "launched", "late", "incarnation"} <= seen
    assert seen - set(Head.__slots__) <= private


# --- where chunks lie ------------------------------------------------------------------------


def test_the_first_worker_says_where_chunks_lie_until_none_runs(plane: Plane) -> None:
    registry = plane.registry
    assert registry.placement() == ""
    assert registry.claim_placement("here") == "here"
    assert registry.claim_placement("there") == "here"
    registry.beat(worker("w0", placement="there"))
    registry.beat(worker("w1"))
    assert registry.placement() == "here"
    registry.require_placement("here")
    with pytest.raises(InvalidInput, match=r"told to keep there; the workers that run keep here.*REPLICAS"):
        registry.require_placement("there")


def test_a_worker_that_beats_says_it_too_after_the_server_lost_its_memory(plane: Plane) -> None:
    plane.registry.beat(worker("w0", placement="here"))
    assert plane.registry.placement() == "here"


def test_where_chunks_lay_is_forgotten_with_the_lease_of_the_last_worker(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that was killed keeps nobody from being started with other settings."""
    monkeypatch.setattr(keys, "WORKER_LEASE_MS", 200)
    plane.registry.claim_placement("here")
    with pytest.raises(InvalidInput):
        plane.registry.require_placement("there")
    plane.registry.require_placement("there", claim=True)
    assert plane.registry.placement() == "there"
    with pytest.raises(InvalidInput):
        stop = threading.Event()
        beating = threading.Thread(target=_beat, args=(plane.registry, stop))
        beating.start()
        try:
            plane.registry.require_placement("here", claim=True)
        finally:
            stop.set()
            beating.join()


def _beat(registry: Registry, stop: threading.Event) -> None:
    while not stop.wait(0.02):
        registry.beat(worker("w0", placement="there"))


def test_a_weight_is_part_of_what_was_applied_and_of_no_record_that_has_none() -> None:
    slots = [slot(0, 0), slot(0, 1)]
    plain = entry(1, slots)
    assert '"weight"' not in plain.to_json() and LedgerEntry.from_json(plain.to_json()) == plain
    weighed = replace(plain, slots=tuple(replace(slot, weight=0.5) for slot in plain.slots)).sealed()
    assert LedgerEntry.from_json(weighed.to_json()) == weighed
    assert weighed.chain != plain.chain


def test_metrics_are_part_of_a_record_that_has_any_and_are_bounded() -> None:
    metrics = {"accuracy": [0.5, None, "mean"], "perplexity": [math.nan, 3.0, "exp"]}
    told = slot(0, 0, metrics=metrics)
    assert '"metrics"' not in slot(0, 0).to_json()
    read = SlotRecord.from_json(told.to_json())
    assert repr(read.metrics) == repr(metrics) == repr(read.receipt().metrics)
    plain = entry(1, [slot(0, 0)])
    measured = replace(plain, slots=(told.receipt(),), notes={"metrics": {"accuracy": math.inf}}).sealed()
    again = LedgerEntry.from_json(measured.to_json())
    assert again.metrics == {"accuracy": math.inf} and again.computed_seal() == measured.seal
    assert measured.chain == plain.chain and plain.metrics == {}


@pytest.mark.parametrize(
    "metrics",
    [
        {"accuracy": 0.5},
        {"accuracy": [0.5, None]},
        {"accuracy": [0.5, None, "median"]},
        {"accuracy": ["high", None, "mean"]},
        {"accuracy": [0.5, "much", "mean"]},
        {"x" * 65: [0.5, None, "mean"]},
        {str(number): [0.5, None, "mean"] for number in range(33)},
    ],
)
def test_metrics_that_nobody_of_ours_writes_are_refused(metrics: dict[str, Any]) -> None:
    with pytest.raises(RecordDamaged, match="field 'metrics' of a slot"):
        SlotRecord.from_json(slot(0, 0, metrics=metrics).to_json())
