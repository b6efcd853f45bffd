"""What a sweep proposes follows from what its trials came to, and from nothing else."""

from __future__ import annotations

import random
from typing import Any, cast

import pytest

from tests.support.control import entry, record, slot
from torchord import sweep
from torchord.cache.errors import InvalidInput, RunNotFound
from torchord.cache.testing.memory_ledger import MemoryLedger
from torchord.cache.testing.memory_plane import MemoryPlane

optuna = pytest.importorskip("optuna")


class Run:
    """A run whose loss is (x - 3)², once it has been looked at some times."""

    def __init__(self, name: str, x: float, fleet: Fleet) -> None:
        self.name, self.x, self.fleet = name, x, fleet
        self.resumed = 0
        self._memory = MemoryLedger(fleet.plane, name)
        self._looks = fleet.random.randrange(1, 9)

    @property
    def _ledger(self) -> MemoryLedger:
        if self.fleet.lost == self.name and not self.resumed:
            raise RunNotFound("lost")
        self._looks -= 1
        if self._looks == 0:
            self.fleet.end(self, self._memory)
        return self._memory

    def resume(self) -> None:
        self.resumed += 1
        self._memory.transition("running", allowed=("failed",), event="resumed")
        self._looks = 2


class Fleet:
    """A Master whose runs end in a random order."""

    def __init__(self, seed: int, *, failing: dict[str, str] | None = None, lost: str = "") -> None:
        self.random, self.plane = random.Random(seed), MemoryPlane()
        self.failing, self.lost = failing or {}, lost
        self.runs: dict[str, Run] = {}

    def submit(self, recipe: Any, config: Any, *, name: str) -> Run:
        if name not in self.runs:
            made = self.runs[name] = Run(name, recipe, self)
            ledger = made._memory
            ledger.create({}, incarnation="life")
            _, token = ledger.acquire(worker="s0", node="s@h", queue="q")
            ledger.initialise(
                token=cast(int, token),
                manifest={},
                record=record(0),
                dataset_size=8,
                evaluation_size=0,
                total_steps=1,
            )
        return self.runs[name]

    def end(self, run: Run, ledger: MemoryLedger) -> None:
        kind = self.failing.get(run.name)
        if kind is not None and not (kind == "Poison" and run.resumed):
            error = {"kind": kind, "message": "it took its worker down"}
            ledger.transition("failed", allowed=("running",), event="failed", error=error)
            return
        one = slot(0, 0)
        ledger.begin(0, 0, worker="w0", delivery="d")
        ledger.finish_slot(0, one)
        made = entry(1, [one], loss=(run.x - 3.0) ** 2)
        token = ledger.head().token
        ledger.commit(step=0, token=token, shards=1, entry=made, record=record(1, made.chain), event={})
        ledger.transition("done", allowed=("running",), event="done")


def tried(fleet: Fleet, **options: Any) -> Any:
    def make(trial: Any) -> Any:
        return trial.suggest_float("x", -10, 10), None

    defaults: dict[str, Any] = {"name": "s", "trials": 12, "parallel": 3}
    return sweep(cast(Any, fleet), make, **{**defaults, **options})


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchord.coordinator.sweeps._POLL_SECONDS", 0.0)
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def values(study: Any) -> list[tuple[Any, Any]]:
    return [(each.params, each.value) for each in study.trials]


def test_the_same_trials_whatever_ends_first_and_whoever_dies() -> None:
    expected = values(tried(Fleet(0)))
    assert len(expected) == 12 and len({value for _, value in expected}) == 12
    for seed in (1, 2):
        assert values(tried(Fleet(seed))) == expected
    killed = Fleet(3, failing={"s-4": "Poison", "s-7": "Poison"}, lost="s-2")
    assert values(tried(killed)) == expected
    assert [killed.runs[name].resumed for name in ("s-2", "s-4", "s-7", "s-8")] == [1, 1, 1, 0]


def test_a_sweep_that_is_begun_again_goes_on(tmp_path: Any) -> None:
    fleet, storage = Fleet(0), f"sqlite:///{tmp_path}/study.db"
    expected = values(tried(Fleet(0)))
    assert values(tried(fleet)) == values(tried(fleet)) == expected, "its runs are there already"
    study = optuna.create_study(storage=storage, sampler=optuna.samplers.TPESampler(seed=0))
    left = [study.ask() for _ in range(2)]  # by a process that died
    for trial in left:
        fleet.submit(trial.suggest_float("x", -10, 10), None, name=f"t-{trial.number}")
    again = tried(fleet, name="t", trials=5, study=study)
    assert [each.state.name for each in again.trials] == ["COMPLETE"] * 5


def test_what_fails_by_itself_is_a_failed_trial() -> None:
    study = tried(Fleet(0, failing={"s-3": "ValueError"}))
    states = [each.state.name for each in study.trials]
    assert states == ["COMPLETE"] * 3 + ["FAIL"] + ["COMPLETE"] * 8
    assert study.trials[3].user_attrs["error"] == "it took its worker down"


@pytest.mark.parametrize("options", [{"trials": 0}, {"parallel": 0}, {"trials": True}])
def test_a_sweep_of_nothing_is_refused(options: Any) -> None:
    with pytest.raises(InvalidInput, match="must be a whole number of at least 1"):
        tried(Fleet(0), **options)
