from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support import recipes_impure
from tests.support.inprocess import resolved
from torchord.coordinator.client import fresh_copy
from torchord.coordinator.client.fresh_copy import FREE_SECONDS, SHARE, Allowance, FreshCopies
from torchord.coordinator.compute.batch import open_dataset
from torchord.coordinator.compute.replica import Replica
from torchord.coordinator.compute.shard import work
from torchord.coordinator.spec.config import TrainingConfig
from torchord.coordinator.spec.plan import Plan

CONFIG = TrainingConfig(batch_size=8, shards=4)


class Context:
    """What a check asks of a run's context."""

    def __init__(self, **changes: Any) -> None:
        self.run, self.config = "r", CONFIG
        self.recipe = resolved(recipes_impure.recipe(**changes))
        self.made = open_dataset(self.recipe, CONFIG)
        self.own = Replica.build(self.recipe, CONFIG)
        self.own.load(self.own.pack())

    def dataset(self) -> Any:
        return self.made

    def plan(self) -> Plan:
        return Plan(len(self.made), CONFIG)

    def twice(self, copies: FreshCopies, shard: int) -> bool:
        """Whether a shard comes out the same in the process's own copies and in a check."""
        args: Any = (self.plan(), self.made, 0, shard, None)
        own = work(self.own, self.recipe, *args).payload
        check = copies.work(self, self.own, 0, shard, None).payload  # type: ignore[arg-type]
        return all(torch.equal(own[name], check[name]) for name in own)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(fresh_copy.time, "monotonic", lambda: clock.seconds)
    return clock


def test_a_part_is_made_once_whatever_that_takes_and_again_as_time_allows(now: SimpleNamespace) -> None:
    allowance = Allowance()
    assert allowance.covers("dataset")
    allowance.made("dataset", 60.0)
    assert not allowance.covers("dataset")
    assert allowance.covers("model"), "another part is another matter"
    now.seconds += (60.0 - FREE_SECONDS) / SHARE + 1.0
    assert allowance.covers("dataset")
    allowance.made("dataset", 60.0)
    assert not allowance.covers("dataset")


def test_what_is_cheap_is_made_for_every_check_at_the_start(now: SimpleNamespace) -> None:
    allowance = Allowance()
    for _ in range(20):
        assert allowance.covers("model")
        allowance.made("model", FREE_SECONDS / 20)
    allowance.longer("model", FREE_SECONDS)
    assert not allowance.covers("model")


def test_what_the_processs_own_copies_remember_shows_in_fresh_ones() -> None:
    assert Context().twice(FreshCopies(), 0)
    context = Context(model=recipes_impure.Counting)
    assert context.twice(FreshCopies(), 0), "the first call of both"
    assert not context.twice(FreshCopies(), 1)


@pytest.mark.parametrize("where", ["making it", "using it"])
def test_where_a_fresh_copy_fails_the_own_one_serves(where: str) -> None:
    """A dataset that can be opened once a process, say."""
    context = Context(dataset=partial(recipes_impure.OnlyOnce, where))
    try:
        assert context.twice(FreshCopies(), 0)
    finally:
        recipes_impure.OnlyOnce.opened.clear()


def test_without_memory_to_spare_nothing_is_made_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    context = Context(model=recipes_impure.Counting)
    monkeypatch.setattr(fresh_copy, "spare_memory_nbytes", lambda: 0)
    context.own.model.calls = 5
    context.twice(FreshCopies(), 0)
    assert context.own.model.calls == 7
