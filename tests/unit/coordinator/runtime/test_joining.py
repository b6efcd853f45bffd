"""Who joins a run compares its first shard with the first Client's, and who need not does not."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.support import models, recipes_impure
from tests.support.control import SPEC, record, worker
from tests.support.inprocess import resolved
from torchord.cache.errors import Impure, Skewed
from torchord.cache.ledger.records import UNLIKE
from torchord.cache.testing.memory_ledger import MemoryLedger
from torchord.cache.testing.memory_plane import MemoryPlane
from torchord.cache.testing.memory_registry import MemoryRegistry
from torchord.coordinator.compute.batch import open_dataset
from torchord.coordinator.compute.replica import Replica
from torchord.coordinator.runtime import joining
from torchord.coordinator.runtime.context import RunContext
from torchord.coordinator.spec.config import TrainingConfig
from torchord.coordinator.spec.plan import Plan

CONFIG = TrainingConfig(batch_size=8, shards=2)


class Process:
    """One process's view of a run: what `RunContext` has."""

    def __init__(self, ledger: MemoryLedger, config: TrainingConfig = CONFIG, **changes: Any) -> None:
        self.run, self.ledger, self.config, self.incarnation = "r", ledger, config, "life"
        self.spec = {"skew": config.skew}
        self.services = SimpleNamespace(registry=MemoryRegistry(ledger.plane))
        self.recipe = resolved(recipes_impure.recipe(**changes))
        self.joined, self.unlike = False, ""
        self._replica = Replica.build(self.recipe, config)

    def plan(self) -> Plan:
        return Plan(64, self.config)

    def dataset(self) -> Any:
        return open_dataset(self.recipe, self.config)

    def replica(self) -> Replica:
        return self._replica

    def join(self, id: str) -> None:
        joining.join(cast(RunContext, self), id)

    def serve(self) -> None:
        joining.compare_server(cast(RunContext, self), "s0")


@pytest.fixture
def ledger() -> MemoryLedger:
    """A run that is at version 0."""
    made = MemoryLedger(MemoryPlane(), "r")
    made.create(SPEC, incarnation="life")
    return made


OTHER_DATA = {"dataset": partial(models.points, 64, 3)}


def test_who_finds_the_same_takes_part_and_compares_once(ledger: MemoryLedger) -> None:
    for id in ("w0", "w1"):
        process = Process(ledger)
        process.join(id)
        assert process.joined and process.replica().loaded is None
        process.recipe = resolved(recipes_impure.recipe(**OTHER_DATA))
        process.join(id)
    Process(ledger).serve()
    assert list(ledger.claims()) == ["first life"]


def test_before_the_first_commit_a_difference_stops_the_run(ledger: MemoryLedger) -> None:
    Process(ledger).join("w0")
    with pytest.raises(
        Impure, match="worker w1 does not make the same as worker w0: of the first batch, '0'"
    ):
        Process(ledger, **OTHER_DATA).join("w1")
    assert f"{UNLIKE}w1" in ledger.claims()


@pytest.mark.parametrize("others", [True, False], ids=["others compute", "nobody else does"])
def test_later_the_newcomer_refuses_itself_if_there_are_others(ledger: MemoryLedger, others: bool) -> None:
    Process(ledger).join("w0")
    MemoryRegistry(ledger.plane).beat(worker("w2", pace={"r": 0.1} if others else {"another": 0.1}))
    token = ledger.acquire(worker="s0", node="n", queue="")[1]
    assert isinstance(token, int)
    ledger.initialise(
        token=token, manifest={}, record=record(0), dataset_size=64, evaluation_size=0, total_steps=8
    )
    ledger.plane.hset(ledger.keys.head, {"version": "1"})
    newcomer = Process(ledger, **OTHER_DATA)
    with pytest.raises(Skewed if others else Impure, match="worker w1 does not make the same"):
        newcomer.join("w1")
    assert not newcomer.joined and bool(newcomer.unlike) == others
    assert f"{UNLIKE}w1" in ledger.claims()


def test_corrected_code_is_compared_with_its_own_kind(ledger: MemoryLedger) -> None:
    Process(ledger).join("w0")
    corrected = Process(ledger, **OTHER_DATA)
    corrected.incarnation = "life.1"
    corrected.join("w0")
    assert corrected.joined


@pytest.mark.parametrize("fields", [{"audit_fraction": 0}, {"deterministic": False}, {"skew": "admit"}])
def test_where_bits_may_differ_nothing_is_compared(ledger: MemoryLedger, fields: dict[str, Any]) -> None:
    config = replace(CONFIG, **fields)
    Process(ledger, config).join("w0")
    Process(ledger, config, **OTHER_DATA).join("w1")
    Process(ledger, config, **OTHER_DATA).serve()
    assert ledger.claims() == {}


def test_what_the_recipe_raises_is_left_to_its_shards(ledger: MemoryLedger) -> None:
    process = Process(ledger, dataset=partial(models.Raising, at=int(Plan(64, CONFIG).indices(0, 0)[0])))
    process.join("w0")
    assert process.joined and ledger.claims() == {}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (OTHER_DATA, "of the first batch, '0'"),
        ({"model": partial(models.Mlp, hidden=9)}, "the initial value"),
        ({"loss": recipes_impure.salted}, "the first shard's gradient of"),
    ],
    ids=["data", "weights", "loss"],
)
def test_a_server_on_the_same_machine_compares_too(
    ledger: MemoryLedger, changes: dict[str, Any], said: str
) -> None:
    Process(ledger).join("w0")
    with pytest.raises(Impure, match=f"worker s0 does not make the same as worker w0: {said}"):
        Process(ledger, **changes).serve()


def test_a_server_elsewhere_or_with_much_to_compute_does_not(
    ledger: MemoryLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Process(ledger, **OTHER_DATA)
    server.serve()  # nobody has joined yet
    Process(ledger).join("w0")
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(joining.process, "place", lambda: "another machine")
        server.serve()
    monkeypatch.setattr(joining, "_SERVER_SECONDS", -1.0)
    server.serve()
