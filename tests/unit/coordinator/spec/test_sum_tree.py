from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchord.cache.errors import ConfigError
from torchord.coordinator.spec.config import TrainingConfig
from torchord.coordinator.spec.plan import Plan
from torchord.coordinator.spec.sum_tree import FanIn

TREES = st.builds(FanIn, st.integers(1, 700), st.integers(2, 9))


def test_up_to_the_fan_in_there_are_only_the_shards() -> None:
    for shards in range(1, 9):
        tree = FanIn(shards, 8)
        assert (list(tree.roots), tree.total, list(tree.partials)) == (list(range(shards)), shards, [])
        assert all(tree.parent(shard) is None for shard in range(shards))


def test_twenty_shards() -> None:
    tree = FanIn(20, 8)
    assert [list(tree.inputs(slot)) for slot in tree.partials] == [
        list(range(7)),
        list(range(7, 14)),
        list(range(14, 20)),
    ]
    assert list(tree.roots) == [20, 21, 22]
    assert tree.ready(set(range(14))) == [20, 21]
    assert tree.ready({*range(14), 20}) == [21]


def test_levels_above_the_square_of_the_fan_in() -> None:
    tree = FanIn(65, 8)
    assert tree.total == 65 + 9 + 2
    assert list(tree.roots) == [74, 75]
    assert list(tree.inputs(74)) == [65, 66, 67, 68, 69]
    assert tree.below(74) == [*range(37), 65, 66, 67, 68, 69]
    assert FanIn(10_000, 8).total == 10_000 + 1250 + 157 + 20 + 3


@given(TREES)
def test_every_slot_goes_into_one_sum_in_order(tree: FanIn) -> None:
    assert 1 <= len(tree.roots) <= tree.fan_in
    taken = []
    for slot in tree.partials:
        inputs = list(tree.inputs(slot))
        assert 1 <= len(inputs) <= tree.fan_in
        assert all(tree.parent(each) == slot for each in inputs)
        assert tree.below(slot)[-len(inputs) :] == inputs
        taken += inputs
    assert taken == list(range(tree.roots.start)), "each slot but the roots once, in order"
    made_from = [slot for root in tree.roots for slot in (*tree.below(root), root)]
    assert [slot for slot in made_from if slot < tree.shards] == list(range(tree.shards))
    assert all(tree.parent(root) is None for root in tree.roots)


@given(st.builds(FanIn, st.integers(1, 80), st.integers(2, 9)), st.randoms(use_true_random=False))
def test_whatever_is_made_first_the_sums_become_ready(tree: FanIn, chance: random.Random) -> None:
    present = set(range(tree.shards))
    while ready := tree.ready(present):
        present.add(chance.choice(ready))
    assert present == set(range(tree.total))


def test_a_plan_has_the_tree_of_each_step() -> None:
    config = TrainingConfig(batch_size=20, shards=20, fan_in=4, audit_fraction=0)
    plan = Plan(35, config, {1: {"shards": 3}})
    assert plan.fan_in(0) == FanIn(20, 4)
    assert plan.fan_in(1) == FanIn(3, 4)
    assert not plan.fan_in(1).partials


@pytest.mark.parametrize(("shards", "limit", "first"), [(4, 8, 4), (9, 4, 12), (1, 2, 1)])
def test_checks_are_slots_beyond_the_tree_and_go_into_no_sum(shards: int, limit: int, first: int) -> None:
    checked = tuple(range(shards))[-2:]
    tree, plain = FanIn(shards, limit, checked), FanIn(shards, limit)
    assert list(tree.checks) == [first + number for number in range(len(checked))]
    assert tree.total == plain.total + len(checked)
    assert (tree.roots, tree.partials) == (plain.roots, plain.partials)
    assert [tree.parent(slot) for slot in tree.checks] == [None] * len(checked)
    assert [tree.shard_of(slot) for slot in tree.gradients] == [*range(shards), *checked]


def test_the_fan_in_is_part_of_what_a_run_is() -> None:
    assert TrainingConfig(fan_in=4).differences(TrainingConfig()) == ["fan_in: 4 here, 8 there"]
    with pytest.raises(ConfigError, match="fan_in must be an integer, at least 2, not 1"):
        TrainingConfig(fan_in=1)
