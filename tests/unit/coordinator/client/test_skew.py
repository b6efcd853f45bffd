"""Whoever has other code than a run was submitted with leaves it to others, whatever it is asked to do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import models
from tests.support.shuffle import EvaluatingPost, Shuffle
from torchord import Master, Run, TrainingConfig
from torchord.cache.settings import Settings
from torchord.coordinator.client.client import Client
from torchord.coordinator.client.slot_lease import SlotTask

CONFIG = TrainingConfig(epochs=1, batch_size=8, shards=4, fan_in=2, seed=3, audit_fraction=0)


class Laboratory(Shuffle):
    """A run whose training server has the submitter's code; what its Clients have is the test's choice."""

    POST = EvaluatingPost

    def __init__(self, settings: Settings, run: Run) -> None:
        super().__init__(settings, run, None)
        self.ledger = run._ledger

    def submitted(self, change: str = "", **more: Any) -> None:
        """From now on whoever reads the run's spec finds another digest of the recipe's modules in it."""
        spec = self.run._ledger.spec()
        sources = spec["fingerprint"].split(",")
        spec["fingerprint"] = ",".join(source + change for source in sources)
        self.ledger.client.set(self.ledger.keys.spec, json.dumps({**spec, **more}), keepttl=True)

    def compute(self, client: Client, shard: int, delivery: str = "d") -> dict[str, Any]:
        return client.shards.compute_gradient(SlotTask(self.run.name, 0, shard, 0, delivery))

    def refused(self) -> list[str]:
        """The workers that have said for everybody to see that they refuse."""
        return [event.data["worker"] for event in self.ledger.read_events() if event.type == "refused"]


@pytest.fixture
def pending(redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Laboratory]:
    """A run that nobody serves yet."""
    monkeypatch.setattr("torchord.coordinator.client.slot_lease._REFUSAL_SECONDS", (0.0, 0.0))
    master = Master(redis_url, checkpoint_dir=str(tmp_path))
    run = master.submit(models.mlp(), CONFIG, name="skewed")
    yield Laboratory(Settings(url=redis_url, checkpoint_dir=str(tmp_path)), run)


@pytest.fixture
def lab(pending: Laboratory) -> Laboratory:
    """A run whose first step is launched."""
    pending.server.advance(pending.run.name)
    assert len(pending.post.gradients) == 4
    pending.post.gradients.clear()
    return pending


def test_a_shard_goes_to_those_that_have_the_code(lab: Laboratory) -> None:
    odd, like = lab.clients
    assert lab.compute(like, 1)["status"] == "written"
    lab.submitted("0")
    for number in range(2):
        receipt = lab.compute(odd, 0, delivery=f"d{number}")
        assert receipt["status"] == "refused"
        assert "another version of tests.support.models" in receipt["reason"]
    assert lab.ledger.slots_present(0) == {1}
    assert lab.post.gradients == [(0, 0, 0, None)] * 2, "it is sent again each time"
    assert odd.heartbeat.info.refuses == {lab.run.name: receipt["reason"]}
    assert lab.refused() == [odd.heartbeat.info.id], "that is news once"
    receipt = lab.compute(like, 0)
    assert (receipt["status"], receipt["attempt"]) == ("written", 1), "a refusal is no failed try"


def test_who_may_compute_again_says_so(lab: Laboratory) -> None:
    odd, _ = lab.clients
    lab.submitted("0")
    assert lab.compute(odd, 0)["status"] == "refused"
    lab.submitted("", skew="admit")
    odd.contexts.forget(lab.run.name)
    assert lab.compute(odd, 0)["status"] == "written"
    assert odd.heartbeat.info.refuses == {}


def test_a_partial_sum_goes_to_those_that_have_the_code(lab: Laboratory) -> None:
    odd, like = lab.clients
    for shard in (0, 1):
        lab.compute(like, shard)
    lab.post.gradients.clear()
    lab.submitted("0")
    receipt = odd.sums.partial_sum(SlotTask(lab.run.name, 0, 4, 0, "sum"))
    assert receipt["status"] == "refused" and lab.ledger.slots_present(0) == {0, 1}
    assert lab.post.gradients == [(0, 4, 0, None)]
    receipt = like.sums.partial_sum(SlotTask(lab.run.name, 0, 4, 0, "sum"))
    assert receipt["status"] == "written"


def test_a_part_of_an_evaluation_goes_to_those_that_have_the_code(lab: Laboratory) -> None:
    odd, like = lab.clients
    like.contexts.of(lab.run.name, lab.ledger.head().incarnation).require_same_code()
    lab.submitted("0")
    assert odd.inference.evaluate(lab.run.name, 0, 0, 2)["status"] == "refused"
    assert lab.post.parts == [(0, 0, 2)] and lab.ledger.parts_present(0) == set()
    assert like.inference.evaluate(lab.run.name, 0, 0, 2)["status"] == "written"


def test_a_training_server_with_other_code_does_not_take_the_run(pending: Laboratory) -> None:
    pending.submitted("0")
    for _ in range(2):
        receipt = pending.server.advance(pending.run.name)
        assert receipt["status"] == "refused"
        assert "another version of tests.support.models" in receipt["reason"]
    head = pending.ledger.head()
    assert (head.status, head.owner, head.token) == ("pending", "", 0)
    assert pending.post.gradients == []
    assert pending.refused() == [pending.server.heartbeat.info.id]


def test_new_code_is_admitted_by_a_person(lab: Laboratory) -> None:
    """An upgrade: nobody has the code that the run was submitted with any more."""
    odd, _ = lab.clients
    before = lab.ledger.spec()["fingerprint"]
    lab.submitted("0")
    assert lab.compute(odd, 0)["status"] == "refused"
    lab.run.resume(admit_code=True)
    spec = lab.ledger.spec()
    assert spec["fingerprint"] == before and spec.get("skew") is None
    (admitted,) = spec["admitted"]
    assert admitted == {"version": 0, "modules": ["tests.support.models"], "fingerprint": before}
    (event,) = [event.data for event in lab.ledger.read_events() if event.type == "code admitted"]
    assert event == {"version": 0, "modules": ["tests.support.models"]}
    assert lab.compute(odd, 0)["status"] == "written"


def test_code_that_does_the_same_needs_nobodys_consent(lab: Laboratory) -> None:
    lab.run.pause()
    lab.run.resume(admit_code=True)
    assert "admitted" not in lab.ledger.spec()
