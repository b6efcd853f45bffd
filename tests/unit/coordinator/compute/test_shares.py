"""Weighted sums: what shards count beside each other, in one sum and in a tree of partial ones."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.support.inprocess import same
from torchord.coordinator.compute.shares import Shares, mean_loss, total_weight
from torchord.coordinator.compute.sums import Accumulator, Partial, PartialSum
from torchord.coordinator.spec.sum_tree import FanIn

SIZES = [3, 3, 2, 2, 2, 2, 2]
WEIGHTS: list[float | None] = [0.0, None, 7.5, 1.0, 0.0, 0.25, 12.0]


def shards() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [{"w": torch.randn(5, generator=generator)} for _ in SIZES]


def chained(weights: list[float | None]) -> dict[str, Tensor]:
    total = Accumulator({}, sum(SIZES))
    for gradients, size, weight in zip(shards(), SIZES, weights, strict=True):
        total.add(gradients, {}, size, weight)
    return total.result().gradients


def in_a_tree(weights: list[float | None], fan_in: int = 2) -> dict[str, Tensor]:
    """The same through partial sums, each as it travels."""
    tree, found, parts = FanIn(len(SIZES), fan_in), shards(), {}
    for slot in tree.partials:
        total = PartialSum(sum(SIZES))
        for number in tree.inputs(slot):
            if number < tree.shards:
                total.add_shard(found[number], {}, SIZES[number], weights[number])
            else:
                total.add(parts[number])
        made = total.result()
        parts[slot] = Partial.of(made.tensors(), made.notes(), made.examples)
    whole = PartialSum(sum(SIZES))
    for root in tree.roots:
        whole.add(parts[root])
    return whole.average({}).gradients


def expected(weights: list[float | None]) -> Tensor:
    each = [size if weight is None else weight for size, weight in zip(SIZES, weights, strict=True)]
    gradients = [shard["w"].double() * weight for shard, weight in zip(shards(), each, strict=True)]
    return torch.stack(gradients).sum(0) / math.fsum(each)


@pytest.mark.parametrize("averaged", [chained, in_a_tree])
def test_an_average_is_weighted(averaged) -> None:  # type: ignore[no-untyped-def]
    torch.testing.assert_close(averaged(WEIGHTS)["w"].double(), expected(WEIGHTS), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("averaged", [chained, in_a_tree])
@pytest.mark.parametrize("rate", [3.0, 0.1, 1e-9])
def test_weights_in_proportion_to_the_examples_have_the_bits_of_none(averaged, rate: float) -> None:  # type: ignore[no-untyped-def]
    unweighted = averaged([None] * len(SIZES))["w"]
    powers = averaged([size * 4.0 for size in SIZES])["w"]
    assert same(powers, unweighted)
    torch.testing.assert_close(averaged([size * rate for size in SIZES])["w"], unweighted)


@pytest.mark.parametrize("averaged", [chained, in_a_tree])
def test_what_weighs_nothing_has_no_part(averaged) -> None:  # type: ignore[no-untyped-def]
    assert averaged([0.0] * len(SIZES)) == {}
    alone = averaged([0.0] * (len(SIZES) - 1) + [5.0])["w"]
    torch.testing.assert_close(alone, shards()[-1]["w"])


def test_only_ratios_count() -> None:
    shares = Shares()
    assert [shares.take(4, weight) for weight in (0.0, 8.0, 2.0)] == [0.0, 4, 1.0]
    assert (shares.unit, shares.total) == (2.0, 5.0)


def test_losses_are_weighted_alike() -> None:
    assert mean_loss([(1.0, 4, 12.0), (5.0, 4, 4.0), (math.nan, 4, 0.0)]) == 2.0
    assert mean_loss([(1.0, 3, None), (5.0, 1, None)]) == 2.0
    assert math.isnan(mean_loss([(1.0, 4, 0.0)]))
    assert total_weight([(4, None), (4, None)]) is None
    assert total_weight([(4, None), (4, 0.5)]) == 4.5
