"""Ready orders and streamed data: pure, and what they say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Subset, TensorDataset

from tests.support import recipes_data
from torchord.cache.errors import InvalidInput, RecipeError
from torchord.coordinator import orders
from torchord.coordinator.spec.offered import offered
from torchord.coordinator.streaming import Streamed


def test_weighted_draws_in_proportion_and_never_what_weighs_nothing() -> None:
    weights = [0.0, 1.0, 3.0, 0.0]
    drawn = Counter(orders.weighted(4, 0, 7, None, weights=weights, examples=4000).tolist())
    assert set(drawn) == {1, 2}
    assert abs(drawn[2] - 3000) < 140  # 5 standard deviations
    assert orders.weighted(4, 0, 7, None, weights=weights).tolist() == [1, 2, 2, 2], "for all time"
    assert orders.weighted(4, 1, 7, None, weights=lambda data: weights).tolist() != [1, 2, 2, 2]


@pytest.mark.parametrize("weights", [[1.0], [0.0, 0.0], [1.0, -1.0], [1.0, float("nan")], [[1.0], [2.0]]])
def test_weights_that_cannot_be_used_are_refused(weights: Any) -> None:
    with pytest.raises(InvalidInput, match="weights"):
        orders.weighted(2, 0, 0, None, weights=weights)


def test_balanced_finds_the_labels_where_datasets_have_them() -> None:
    labels = torch.tensor([0] * 90 + [1] * 10)
    whole = TensorDataset(torch.zeros(100), labels)
    part = Subset(whole, list(range(50, 100)))
    for data in (whole, part):
        order = orders.balanced(len(data), 0, 3, data, examples=1000)
        ones = sum(int(data[int(index)][1]) for index in order)
        assert abs(ones - 500) < 80
    with pytest.raises(InvalidInput, match="neither targets nor labels"):
        orders.balanced(3, 0, 0, [1, 2, 3])


def test_bucketed_batches_visit_each_example_once_and_are_of_about_one_length() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 200)
    batches = orders.bucketed(200, 2, 5, None, 10, lengths=lengths, pool=10)
    assert sorted(int(i) for batch in batches for i in batch) == list(range(200))
    spread = np.mean([np.ptp(lengths[batch]) for batch in batches])
    assert spread < 20 < np.ptp(lengths)
    firsts = [lengths[batch].min() for batch in batches]
    assert firsts != sorted(firsts), "the batches come in random order"


def test_parts_are_visited_one_after_the_other() -> None:
    data = recipes_data.streamed((4, 0, 3, 5))
    order = orders.by_parts(12, 1, 9, data).tolist()
    assert sorted(order) == list(range(12))
    homes = [0 if index < 4 else 2 if index < 7 else 3 for index in order]
    assert sum(one != other for one, other in pairwise(homes)) == 2


# --- streamed -----------------------------------------------------------------------------


def test_a_streamed_example_is_the_same_whoever_reads_it_when() -> None:
    torch.manual_seed(3)
    one = recipes_data.streamed((4, 0, 3), kept=1)
    torch.manual_seed(3)
    other = recipes_data.streamed((4, 0, 3))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for index in (6, 0, 5, 3, 0):
        assert torch.equal(one[index][0], other[index][0])
    assert torch.equal(before, torch.get_rng_state()), (
        "reading a part draws nothing from the shard's generators"
    )
    both = one.__getitems__([5, 0, 5])
    assert [torch.equal(x, other[i][0]) for (x, _), i in zip(both, (5, 0, 5), strict=True)] == [True] * 3
    assert len(list(iter(one))) == len(one) == 7


def test_each_part_is_read_once_for_a_batch_and_forgotten_when_others_come() -> None:
    reads: list[int] = []

    def opened(number: int) -> Iterator[int]:
        reads.append(number)
        return iter(range(10 * number, 10 * number + 3))

    data = Streamed(opened, [1, 2, 3], [3, 3, 3], kept=1)
    assert data.__getitems__([8, 0, 4, 1]) == [32, 10, 21, 11]
    assert reads == [3, 1, 2]
    assert (data[4], data[0]) == (21, 10)
    assert reads == [3, 1, 2, 1]


@pytest.mark.parametrize(
    ("sizes", "stated", "given"),
    [((5, 5), (5, 6), "gives 5 examples"), ((5, 5), (5, 4), "gives more than 4")],
)
def test_a_part_of_another_size_is_refused(sizes: Any, stated: Any, given: str) -> None:
    data = recipes_data.streamed(sizes, stated)
    assert len(data) == sum(stated)
    with pytest.raises(
        InvalidInput, match=f"part 1 of the Streamed dataset {given}.*its size says {stated[1]}"
    ):
        data[6]


def test_parts_need_sizes() -> None:
    for parts, sizes in (([1], []), ([], []), ([1], [-1])):
        with pytest.raises(InvalidInput, match="the size of each of its parts"):
            Streamed(range, parts, sizes)
    with pytest.raises(InvalidInput, match="kept"):
        Streamed(range, [1], [1], kept=0)
    with pytest.raises(IndexError, match="outside 0 to 0"):
        Streamed(range, [1], [1])[1]


# --- what an entry is called with ---------------------------------------------------------


def test_an_order_takes_what_it_names() -> None:
    def order(size: int, seed: int = 3, *, dataset: Any, extra: int = 0, **more: Any) -> list[int]:
        return []

    assert offered("order", order) == ("size", "seed", "dataset")
    assert offered("order", partial(order, seed=1)) == ("size", "dataset")
    assert offered("order", partial(order, 10)) == ("seed", "dataset")
    assert offered("order", torch.utils.data.RandomSampler) == ("data_source",)
    shared = partial(torch.utils.data.DistributedSampler, num_replicas=1, rank=0)
    assert offered("order", shared) == ("dataset",), "its seed has a default"
    assert offered("batches", partial(torch.utils.data.BatchSampler, drop_last=True, sampler=[0])) == (
        "batch_size",
    )


def test_an_order_that_needs_something_else_is_refused() -> None:
    with pytest.raises(
        RecipeError, match=r"needs a value for 'labels'; bind it with functools.partial or name"
    ):
        offered("order", recipes_data.needy)
    with pytest.raises(RecipeError, match=r"needs a value for 'batch_size'.*size, epoch, seed and dataset"):
        offered("order", partial(orders.bucketed, lengths=[1]))
    with pytest.raises(RecipeError, match="no parameters that Python can tell"):
        offered("order", iter)
