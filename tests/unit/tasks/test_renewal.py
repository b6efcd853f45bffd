"""Which worker starts anew, and which is left alone however long it takes."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from tests.support.control import worker
from torchord.cache.errors import CacheUnreachable, RunNotFound
from torchord.cache.ledger.workers import DEAF_SECONDS, WorkerInfo
from torchord.coordinator.runtime import activity
from torchord.tasks import renewal
from torchord.tasks.renewal import ABANDONED_SECONDS, Renewal

SHARD = activity.gradient("run-1", 3, 0)
UPDATE = activity.update("run-1", 3)
EVALUATION = activity.evaluation("run-1", 3, 0)
PREDICTION = activity.prediction("run-1", 3, 0)


class Lab:
    """A worker that is told to start anew in words alone."""

    def __init__(self) -> None:
        self.now = 0.0
        self.states: dict[str, str | Exception] = {"run-1": "running", "run-2": "running"}
        self.said: list[str] = []
        self.asked = 0
        self.awaited = {("run-1", 3)}
        self.renewal = Renewal(
            self._status,
            lambda run, version: (run, version) in self.awaited,
            lambda info, why: self.said.append(why),
            clock=lambda: self.now,
        )

    def _status(self, run: str) -> str:
        self.asked += 1
        found = self.states[run]
        if isinstance(found, Exception):
            raise found
        return found

    def beats(self, info: WorkerInfo, seconds: float) -> list[str]:
        """What it says, beating each second for so long."""
        for _ in range(int(seconds)):
            self.now += 1
            self.renewal(info)
        return self.said


@pytest.fixture
def lab() -> Lab:
    return Lab()


def at(*tasks: str) -> WorkerInfo:
    """A worker that has been at these for long."""
    return replace(worker("w0"), task="; ".join(tasks), where=dict.fromkeys(tasks, "model.py:12 in forward"))


LONG = 100 * ABANDONED_SECONDS


def test_a_deaf_worker_starts_anew_at_once(lab: Lab) -> None:
    (why,) = lab.beats(replace(worker("w0"), silent=DEAF_SECONDS + 1), 1)
    assert why == "idle, and the loop that takes its messages has not turned for 16 s"


def test_one_that_is_at_a_task_of_another_app_is_not(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renewal, "state", SimpleNamespace(active_requests={object()}))
    assert lab.beats(replace(worker("w0"), silent=LONG), 10) == []


@pytest.mark.parametrize("task", [SHARD, UPDATE, EVALUATION, PREDICTION])
def test_who_computes_what_somebody_waits_for_goes_on(lab: Lab, task: str) -> None:
    assert lab.beats(replace(at(task), silent=LONG), LONG) == []
    assert lab.asked <= LONG / 5, "not with each beat"


def test_an_idle_worker_asks_nobody(lab: Lab) -> None:
    assert lab.beats(worker("w0"), LONG) == [] and lab.asked == 0
    assert lab.beats(replace(worker("w0"), task=SHARD), LONG) == [] and lab.asked == 0, "a short task"


@pytest.mark.parametrize("task", [SHARD, UPDATE, EVALUATION, activity.partial_sum("run-1", 3, 9)])
@pytest.mark.parametrize("state", ["failed", "cancelled", "done", RunNotFound("gone")])
def test_what_a_run_at_rest_has_no_use_for_is_given_up(lab: Lab, task: str, state: str | Exception) -> None:
    lab.states["run-1"] = state
    assert lab.beats(at(task), ABANDONED_SECONDS) == []
    (why, *_) = lab.beats(at(task), 10)
    assert why == f"at what nobody has waited for since 1 min: {task}, model.py:12 in forward"


def test_a_prediction_of_a_run_that_is_done_is_not(lab: Lab) -> None:
    lab.states["run-1"] = "done"
    assert lab.beats(at(PREDICTION), LONG) == []


def test_one_that_nobody_waits_for_any_more_is_given_up(lab: Lab) -> None:
    lab.beats(at(PREDICTION), LONG)
    lab.awaited.clear()
    assert lab.beats(at(PREDICTION), ABANDONED_SECONDS) == []
    (why, *_) = lab.beats(at(PREDICTION), 10)
    assert why == f"at what nobody has waited for since 1 min: {PREDICTION}, model.py:12 in forward"


@pytest.mark.parametrize("state", ["pending", "paused", CacheUnreachable("away")])
def test_a_run_that_may_go_on_keeps_its_workers(lab: Lab, state: str | Exception) -> None:
    lab.states["run-1"] = state
    assert lab.beats(at(SHARD), LONG) == []


def test_a_run_that_is_resumed_keeps_them_too(lab: Lab) -> None:
    lab.states["run-1"] = "failed"
    assert lab.beats(at(SHARD), ABANDONED_SECONDS) == []
    lab.states["run-1"] = "running"
    lab.beats(at(SHARD), 10)
    lab.states["run-1"] = "failed"
    assert lab.beats(at(SHARD), ABANDONED_SECONDS) == [], "counted anew"


def test_a_worker_with_several_tasks_goes_on_while_one_is_of_use(lab: Lab) -> None:
    lab.states["run-1"] = "failed"
    other = activity.gradient("run-2", 0, 0)
    assert lab.beats(at(SHARD, other), LONG) == []
    lab.beats(at(SHARD), 10)
    assert len(lab.said) >= 1


def test_nor_beside_a_task_of_another_app(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renewal, "state", SimpleNamespace(active_requests={object(), object()}))
    lab.states["run-1"] = "failed"
    assert lab.beats(at(SHARD), LONG) == []
