"""A head that says what no run can be at costs its own run, and nobody any memory or time."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import models
from tests.support.shuffle import Shuffle
from torchord import Master, TrainingConfig
from torchord.cache.errors import RecordDamaged
from torchord.cache.ledger.commits import steps_under_way
from torchord.cache.settings import Settings

CONFIG = TrainingConfig(batch_size=8, shards=2, seed=3, audit_fraction=0.0, checkpoint_every=2)
FAR = 10**15


@pytest.fixture
def lab(redis_url: str, tmp_path: Path) -> Shuffle:
    """A run that is done."""
    run = Master(redis_url, checkpoint_dir=str(tmp_path)).submit(
        models.mlp(evaluation=None), CONFIG, name="forged"
    )
    found = Shuffle(Settings(url=redis_url, checkpoint_dir=str(tmp_path)), run, None)
    found.server.advance(run.name)
    found.train()
    return found


@pytest.mark.parametrize("reached", [str(FAR), "9" * 18, "9" * 30, "x", "-5", "1e9"])
def test_steps_that_no_run_has_reached_are_not_counted(lab: Shuffle, reached: str) -> None:
    ledger = lab.run._ledger
    ledger.client.hset(ledger.keys.head, "reached", reached)
    head = ledger.client.hgetall(ledger.keys.head)
    with pytest.raises(RecordDamaged, match="field 'reached' of a run's head is"):
        ledger.rollback(token=int(head["token"]), version=1, chain="x")
    assert ledger.client.hgetall(ledger.keys.head) == head


def test_a_version_far_beyond_the_ledger_is_rolled_back_at_once(lab: Shuffle) -> None:
    """The script looks at the entries that there are, and not at all between two numbers."""
    ledger = lab.run._ledger
    before = sorted(map(int, ledger.client.hkeys(ledger.keys.ledger)))
    assert before[0] <= 2 < before[-1]
    ledger.client.hset(ledger.keys.head, mapping={"version": FAR, "reached": FAR})
    token = int(ledger.client.hget(ledger.keys.head, "token"))
    done, _ = ledger.rollback(token=token, version=2, chain="x")
    assert done and ledger.client.hget(ledger.keys.head, "version") == "2"
    assert sorted(map(int, ledger.client.hkeys(ledger.keys.ledger))) == [v for v in before if v <= 2]
    expected = sorted(map(int, ledger.client.hkeys(ledger.keys.expected)))
    assert expected == [v for v in before if v > 2]


def test_what_is_lacking_between_two_versions_is_one_problem(lab: Shuffle) -> None:
    ledger = lab.run._ledger
    ledger.client.hset(ledger.keys.head, "version", FAR)
    last = max(map(int, ledger.client.hkeys(ledger.keys.ledger)))
    found = lab.run.verify()
    assert f"the entries of versions {last + 1} to {FAR} are missing from the ledger" in found.problems
    assert len(found.problems) < 5


@pytest.mark.parametrize(("part", "parts"), [(0, 10**15), (0, 0), (5, 5), (-1, 1)])
def test_a_part_of_an_evaluation_that_there_is_not_is_not_computed(
    redis_url: str, tmp_path: Path, part: int, parts: int
) -> None:
    run = Master(redis_url, checkpoint_dir=str(tmp_path)).submit(models.mlp(), CONFIG, name="measured")
    made = Shuffle(Settings(url=redis_url, checkpoint_dir=str(tmp_path)), run, None)
    made.server.advance(run.name)
    assert made.clients[0].inference.evaluate(run.name, 0, part, parts)["status"] == "no such part"
    assert run._ledger.evaluations() == {} and run.status().state == "running"


def test_what_a_run_can_have_reached_is_counted() -> None:
    assert steps_under_way("5", None) == range(5, 8)
    assert steps_under_way("5", "-1") == range(5, 8)
    assert steps_under_way("5", "9") == range(5, 12)
    assert steps_under_way(None, "2") == range(5)
