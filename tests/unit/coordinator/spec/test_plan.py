from __future__ import annotations

import json
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchord.cache.errors import InvalidInput
from torchord.coordinator.spec.config import TrainingConfig
from torchord.coordinator.spec.epochs import Visits
from torchord.coordinator.spec.plan import Plan, derive_seed, epoch_order, shown

plans = st.builds(
    lambda size, batch, shards, epochs: Plan(
        size, TrainingConfig(batch_size=batch, shards=shards, epochs=epochs, seed=5)
    ),
    st.integers(1, 60),
    st.integers(1, 20),
    st.integers(1, 25),
    st.integers(1, 3),
)


@settings(max_examples=150, deadline=None)
@given(plans)
def test_each_epoch_visits_every_example_once(plan: Plan) -> None:
    for epoch in range(plan.config.epochs):
        visited: list[int] = []
        for index in range(plan.steps_per_epoch):
            step = epoch * plan.steps_per_epoch + index
            assert plan.locate(step) == (epoch, index)
            shards = [plan.indices(step, shard) for shard in range(plan.shards_in(step))]
            assert [len(part) for part in shards] == plan.shard_sizes(step)
            assert sum(plan.shard_sizes(step)) == plan.examples(step)
            assert min(plan.shard_sizes(step)) >= 1
            assert max(plan.shard_sizes(step)) - min(plan.shard_sizes(step)) <= 1
            visited.extend(int(i) for part in shards for i in part)
        assert sorted(visited) == list(range(plan.size))
    assert plan.total_steps == plan.config.epochs * plan.steps_per_epoch


@settings(max_examples=60, deadline=None)
@given(plans)
def test_shards_cut_a_batch_as_tensor_split_does(plan: Plan) -> None:
    step = plan.total_steps - 1
    epoch, index = plan.locate(step)
    start = index * plan.config.batch_size
    batch = epoch_order(5, epoch, plan.size)[start : start + plan.config.batch_size]
    for shard, part in enumerate(np.array_split(batch, plan.shards_in(step))):
        assert np.array_equal(plan.indices(step, shard), part)


def test_the_batches_do_not_depend_on_the_number_of_shards() -> None:
    one = Plan(50, TrainingConfig(batch_size=16, shards=1))
    many = Plan(50, TrainingConfig(batch_size=16, shards=5))
    for step in range(one.total_steps):
        parts = [many.indices(step, shard) for shard in range(many.shards_in(step))]
        assert np.array_equal(one.indices(step, 0), np.concatenate(parts))


def test_the_order_is_fixed_for_all_time() -> None:
    """If this fails, runs that began with an older version would continue in another order."""
    assert epoch_order(0, 0, 8).tolist() == [5, 7, 0, 2, 1, 6, 3, 4]
    assert epoch_order(3, 1, 6).tolist() == [4, 5, 0, 2, 1, 3]
    assert derive_seed(0, "init") == 121537278642401442
    assert derive_seed(7, "data", 12, 3) == 8852363095237914068


def test_epochs_and_seeds_give_other_orders() -> None:
    orders = {epoch_order(seed, epoch, 100).tobytes() for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_the_order_is_evenly_spread() -> None:
    firsts = np.array([epoch_order(seed, 0, 5)[0] for seed in range(2000)])
    assert np.abs(np.bincount(firsts, minlength=5) - 400).max() < 90  # 5 standard deviations


def test_derived_seeds_tell_parts_apart() -> None:
    seeds = [
        derive_seed(1, 2),
        derive_seed(12),
        derive_seed("1", 2),
        derive_seed(1, "2"),
        derive_seed("12"),
        derive_seed(2, 1),
        derive_seed(-1, 2),
        derive_seed(1, 2, ""),
        derive_seed(),
        derive_seed(2**70),
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("step", [-1, 6])
def test_steps_outside_the_run_are_refused(step: int) -> None:
    plan = Plan(10, TrainingConfig(batch_size=4, shards=3, epochs=2))
    with pytest.raises(InvalidInput, match="steps 0 to 5"):
        plan.indices(step, 0)


def test_shards_outside_the_step_are_refused() -> None:
    plan = Plan(10, TrainingConfig(batch_size=4, shards=3))
    assert plan.shards_in(2) == 2
    with pytest.raises(InvalidInput, match="shard 2 "):
        plan.indices(2, 2)
    with pytest.raises(InvalidInput):
        plan.indices(0, -1)


def test_an_empty_dataset_is_refused() -> None:
    with pytest.raises(InvalidInput, match="empty"):
        Plan(0, TrainingConfig())


def test_indices_cannot_be_written_to() -> None:
    plan = Plan(10, TrainingConfig(batch_size=4, shards=2))
    with pytest.raises(ValueError, match="read-only"):
        plan.indices(0, 0)[0] = 3


def test_threads_may_share_a_plan() -> None:
    plan = Plan(300, TrainingConfig(batch_size=10, shards=2, epochs=6))
    expected = [Plan(300, plan.config).indices(step, 1).tolist() for step in range(plan.total_steps)]
    wrong: list[int] = []

    def read(offset: int) -> None:
        for i in range(plan.total_steps):
            step = (i * 31 + offset) % plan.total_steps
            if plan.indices(step, 1).tolist() != expected[step]:
                wrong.append(step)

    threads = [threading.Thread(target=read, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# --- local steps, staleness and switches ----------------------------------------------------


@given(plans, st.integers(1, 5))
def test_local_steps_visit_every_example_of_an_epoch_once_and_in_order(plan: Plan, stride: int) -> None:
    local = Plan(plan.size, replace(plan.config, local_steps=stride))
    batches = -(-plan.size // plan.config.batch_size)
    assert local.total_steps == plan.config.epochs * -(-batches // stride)
    for epoch in range(plan.config.epochs):
        visited: list[int] = []
        for step in range(local.steps_per_epoch * epoch, local.steps_per_epoch * (epoch + 1)):
            parts = [local.parts(step, shard) for shard in range(local.shards_in(step))]
            assert [sum(map(len, part)) for part in parts] == local.shard_sizes(step)
            assert sum(local.shard_sizes(step)) == local.examples(step)
            assert all(len(part) for shard in parts for part in shard)
            for number in range(len(parts[0])):
                visited += [int(i) for shard in parts if number < len(shard) for i in shard[number]]
        assert visited == epoch_order(plan.config.seed, epoch, plan.size).tolist()


def test_a_shard_of_a_local_step_has_its_part_of_each_batch() -> None:
    plan = Plan(20, TrainingConfig(batch_size=4, shards=2, local_steps=3))
    order = epoch_order(0, 0, 20)
    assert [part.tolist() for part in plan.parts(0, 1)] == [order[i : i + 2].tolist() for i in (2, 6, 10)]
    assert plan.batch_sizes(1) == [4, 4]
    assert plan.indices(0, 1).tolist() == [*order[2:4], *order[6:8], *order[10:12]]


def test_staleness_takes_earlier_versions_and_the_first_while_there_are_none() -> None:
    plan = Plan(40, TrainingConfig(batch_size=4, staleness=2))
    assert [plan.version_for(step) for step in range(5)] == [0, 0, 0, 1, 2]
    assert [list(plan.window(head)) for head in (0, 1, 8, 9)] == [[0, 1, 2], [1, 2, 3], [8, 9], [9]]
    assert list(Plan(40, TrainingConfig(batch_size=4)).window(3)) == [3]


def test_a_switch_takes_effect_at_its_step_and_changes_nothing_before() -> None:
    config = TrainingConfig(batch_size=4, shards=2, epochs=2)
    plan, switched = Plan(20, config), Plan(20, config, {3: {"shards": 4}, 7: {"staleness": 1}})
    assert switched.total_steps == plan.total_steps == 10
    assert [switched.shards_in(step) for step in range(5)] == [2, 2, 2, 4, 4]
    assert [switched.version_for(step) for step in (6, 7, 8, 9)] == [6, 7, 7, 8]
    for step in range(3):
        assert [switched.indices(step, k).tolist() for k in (0, 1)] == [
            plan.indices(step, k).tolist() for k in (0, 1)
        ]
    for step in range(10):
        together = [i for k in range(switched.shards_in(step)) for i in switched.indices(step, k).tolist()]
        assert together == [i for k in (0, 1) for i in plan.indices(step, k).tolist()]


@given(plans, st.integers(1, 4), st.integers(1, 4), st.integers(0, 20))
def test_switching_the_local_steps_still_visits_every_example_once(
    plan: Plan, first: int, then: int, at: int
) -> None:
    switched = Plan(
        plan.size, replace(plan.config, local_steps=first), {at: {"local_steps": then}} if at else {}
    )
    visited: list[int] = []
    for step in range(switched.total_steps):
        epoch, batch = switched.locate(step)
        for number in range(len(switched.batch_sizes(step))):
            start = (batch + number) * plan.config.batch_size
            visited += epoch_order(plan.config.seed, epoch, plan.size)[
                start : start + plan.config.batch_size
            ].tolist()
    assert visited == [
        i for e in range(plan.config.epochs) for i in epoch_order(plan.config.seed, e, plan.size).tolist()
    ]


def test_switches_hold_in_the_order_of_their_steps_however_they_are_stored() -> None:
    """JSON sorts them as text: 10 before 3."""
    config, switches = TrainingConfig(batch_size=4, shards=2), {10: {"shards": 1}, 3: {"shards": 4}}
    plan = Plan(48, config, switches)
    assert [plan.shards_in(step) for step in range(12)] == [2] * 3 + [4] * 7 + [1] * 2


def test_a_switch_beyond_the_end_is_without_effect() -> None:
    assert Plan(8, TrainingConfig(batch_size=4), {5: {"shards": 1}}).total_steps == 2


def test_the_indices_of_a_shard_cannot_be_written_to_however_many_parts_it_has() -> None:
    """They may be views of the epoch's order, which all shards share."""
    plan = Plan(16, TrainingConfig(batch_size=4, shards=2, local_steps=2))
    for indices in (plan.indices(0, 0), *plan.parts(0, 0), Plan(8, TrainingConfig()).indices(0, 0)):
        with pytest.raises(ValueError, match="read-only"):
            indices[0] = 0


@pytest.mark.parametrize(
    ("size", "text"),
    [(1, "[0]"), (8, "[0, 1, 2, 3, 4, 5, 6, 7]"), (9, "[0, 1, 2, 3, 4, 5, 6, 7, … 9 in all]")],
)
def test_a_message_shows_the_first_samples_and_says_how_many_there_are(size: int, text: str) -> None:
    assert shown(range(size)) == text


# --- an order or batches of the recipe's own ------------------------------------------------


def test_without_shuffle_each_epoch_goes_from_the_first_to_the_last() -> None:
    plan = Plan(10, TrainingConfig(batch_size=4, shards=2, epochs=2, shuffle=False))
    assert [plan.indices(step, 1).tolist() for step in range(6)] == [[2, 3], [6, 7], [9]] * 2


@given(plans, st.integers(1, 3))
def test_drop_last_leaves_the_smaller_batch_out(plan: Plan, stride: int) -> None:
    config = replace(plan.config, drop_last=True, local_steps=stride)
    if plan.size < config.batch_size:
        with pytest.raises(InvalidInput, match="drop_last leaves nothing"):
            Plan(plan.size, config)
        return
    cut = Plan(plan.size, config)
    kept = plan.size // config.batch_size
    assert cut.total_steps == config.epochs * -(-kept // stride)
    assert {n for step in range(cut.total_steps) for n in cut.batch_sizes(step)} == {config.batch_size}
    whole = [i for step in range(cut.total_steps) for i in visited_in(cut, step)]
    order = [epoch_order(5, epoch, plan.size)[: kept * config.batch_size] for epoch in range(config.epochs)]
    assert whole == np.concatenate(order).tolist()


def visited_in(plan: Plan, step: int) -> list[int]:
    """The indices of a step, batch after batch."""
    parts = [plan.parts(step, shard) for shard in range(plan.shards_in(step))]
    found: list[int] = []
    for number in range(len(parts[0])):
        found += [int(i) for shard in parts if number < len(shard) for i in shard[number]]
    return found


batches = st.lists(
    st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=9), min_size=1, max_size=6),
    min_size=1,
    max_size=4,
)


@settings(max_examples=200, deadline=None)
@given(
    batches,
    st.integers(1, 5),
    st.integers(1, 3),
    st.dictionaries(
        st.integers(1, 12),
        st.fixed_dictionaries({"local_steps": st.integers(1, 3), "shards": st.integers(1, 4)}),
    ),
)
def test_given_batches_are_visited_as_they_are_given(
    epochs: list[list[list[int]]], shards: int, stride: int, switches: dict[int, dict[str, int]]
) -> None:
    """Whatever their sizes and numbers; who has no dataset knows all but which samples they are."""
    config = TrainingConfig(epochs=len(epochs), batch_size=4, shards=shards, local_steps=stride)
    visits = Visits(sizes=tuple(tuple(map(len, epoch)) for epoch in epochs))
    visits = Visits.from_json(json.loads(json.dumps(visits.to_json()))) or visits
    flat = [np.array([i for batch in epoch for i in batch], dtype=np.int64) for epoch in epochs]
    plan = Plan(31, config, switches, visits=visits, visited=flat.__getitem__)
    blind = Plan(31, config, switches, visits=visits)
    whole = np.concatenate(flat).tolist()
    done, sizes = 0, []
    for step in range(plan.total_steps):
        here = [int(i) for shard in range(plan.shards_in(step)) for i in plan.indices(step, shard)]
        assert sorted(here) == sorted(whole[done : done + len(here)])
        done += len(here)
        sizes += plan.batch_sizes(step)
        parts = [plan.parts(step, shard) for shard in range(plan.shards_in(step))]
        assert [sum(map(len, part)) for part in parts] == plan.shard_sizes(step) == blind.shard_sizes(step)
        assert all(len(part) for shard in parts for part in shard) and all(parts)
        assert plan.locate(step) == blind.locate(step)
    assert done == len(whole)
    assert sizes == [len(batch) for epoch in epochs for batch in epoch]
    assert not blind.knows_samples and blind.total_steps == plan.total_steps
    with pytest.raises(InvalidInput, match="has not loaded"):
        blind.indices(0, 0)


@settings(max_examples=100, deadline=None)
@given(batches, st.integers(1, 5), st.integers(1, 3))
def test_a_plan_finds_the_first_shard_with_one_example(
    epochs: list[list[list[int]]], shards: int, stride: int
) -> None:
    config = TrainingConfig(epochs=len(epochs), shards=shards, local_steps=stride)
    visits = Visits(sizes=tuple(tuple(map(len, epoch)) for epoch in epochs))
    flat = [np.array([i for batch in epoch for i in batch], dtype=np.int64) for epoch in epochs]
    plan = Plan(31, config, visits=visits, visited=flat.__getitem__)
    lonely = [
        step
        for step in range(plan.total_steps)
        if any(len(part) == 1 for shard in range(plan.shards_in(step)) for part in plan.parts(step, shard))
    ]
    found = plan.alone()
    assert (found and found[0]) == (lonely[0] if lonely else None)
    assert found is None or any(len(part) == 1 for part in plan.parts(*found))


@settings(max_examples=100, deadline=None)
@given(plans, st.integers(1, 3))
def test_equal_epochs_show_it_at_their_ends(plan: Plan, stride: int) -> None:
    local = Plan(plan.size, replace(plan.config, local_steps=stride))
    anywhere = any(
        len(part) == 1
        for step in range(local.total_steps)
        for shard in range(local.shards_in(step))
        for part in local.parts(step, shard)
    )
    assert (local.alone() is not None) == anywhere


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"length": None, "sizes": None, "digests": []},
        {"length": 0, "sizes": None, "digests": []},
        {"length": None, "sizes": [[3], []], "digests": []},
        {"length": None, "sizes": [[3, 0]], "digests": []},
        {"length": "many", "sizes": None, "digests": []},
        {"length": None, "sizes": 3, "digests": []},
    ],
)
def test_a_malformed_record_of_batches_is_refused(record: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match="malformed"):
        Visits.from_json(record)


def test_a_record_of_other_epochs_is_refused() -> None:
    with pytest.raises(InvalidInput, match="batches of 1 epochs, not 2"):
        Plan(9, TrainingConfig(epochs=2), visits=Visits(sizes=((3, 3),)))


# --- what is computed twice ---------------------------------------------------------------


def test_the_first_steps_are_checked_and_a_fraction_of_the_others() -> None:
    config = TrainingConfig(batch_size=2, shards=2, epochs=1, seed=4, audit_fraction=0.05)
    plan = Plan(8_000, config)
    checked = {step: plan.checked(step) for step in range(plan.total_steps) if plan.checked(step)}
    assert checked.pop(0) == (0, 1)
    assert list(checked)[:3] == [1, 2, 3]
    assert all(len(shards) == 1 for shards in checked.values())
    assert 150 < len(checked) < 250
    assert {shards[0] for shards in checked.values()} == {0, 1}
    assert [Plan(8_000, config).checked(step) for step in range(400)] == [
        plan.checked(step) for step in range(400)
    ], "it follows from config and step"
    assert {step for step in range(4_000) if Plan(8_000, replace(config, seed=5)).checked(step)} != {
        *checked,
        0,
    }


def test_of_a_first_step_with_many_shards_the_last_four_are_checked() -> None:
    plan = Plan(200, TrainingConfig(batch_size=100, shards=100, fan_in=8))
    assert plan.checked(0) == (96, 97, 98, 99)
    assert plan.fan_in(0).checked == (96, 97, 98, 99)
    assert len(plan.checked(1)) == 1


def test_the_second_epoch_begins_with_a_check() -> None:
    """A dataset that keeps what it has drawn for a sample gives the same again."""
    plan = Plan(80, TrainingConfig(batch_size=4, shards=2, epochs=4, audit_fraction=1e-9))
    assert [step for step in range(plan.total_steps) if plan.checked(step)] == [0, 1, 2, 3, 20]


@pytest.mark.parametrize("fields", [{"audit_fraction": 0}, {"deterministic": False}])
def test_nothing_is_checked_where_it_is_switched_off_or_need_not_be_the_same(fields: dict[str, Any]) -> None:
    plan = Plan(80, TrainingConfig(batch_size=4, shards=2, epochs=2, **fields))
    assert not any(plan.checked(step) for step in range(plan.total_steps))
