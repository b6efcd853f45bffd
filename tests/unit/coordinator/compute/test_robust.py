"""Robust averages, against the formulas of their papers written plainly."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from torchord.cache.errors import InvalidInput
from torchord.coordinator.compute.robust import accumulator, krum, median, trimmed_mean

SHAPES = {"weight": (3, 2), "bias": (3,)}


def shards(count: int, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{n: torch.randn(s, generator=generator) for n, s in SHAPES.items()} for _ in range(count)]


def averaged(found: list[dict[str, Tensor]], aggregation: str, faults: int = 1) -> dict[str, Tensor]:
    total = accumulator({}, 2 * len(found), None, aggregation=aggregation, faults=faults)
    for shard in found:
        total.add(shard, {}, 2)
    return total.result().gradients


@pytest.mark.parametrize("count", [3, 4, 5, 8])
def test_the_median_is_numpys(count: int) -> None:
    found = shards(count)
    for name, value in averaged(found, "median").items():
        plain = np.median(np.stack([shard[name].numpy() for shard in found]), axis=0)
        np.testing.assert_allclose(value.numpy(), plain, rtol=1e-6)


@pytest.mark.parametrize(("count", "faults"), [(3, 1), (5, 1), (5, 2), (8, 3)])
def test_the_trimmed_mean_leaves_out_what_it_says(count: int, faults: int) -> None:
    found = shards(count)
    for name, value in averaged(found, "trimmed_mean", faults).items():
        rows = np.sort(np.stack([shard[name].numpy() for shard in found]), axis=0)
        np.testing.assert_allclose(value.numpy(), rows[faults : count - faults].mean(axis=0), rtol=1e-6)


@pytest.mark.parametrize(("count", "faults"), [(5, 1), (7, 2), (8, 2)])
def test_krum_selects_the_shard_nearest_to_its_neighbours(count: int, faults: int) -> None:
    found = shards(count)
    flat = [np.concatenate([shard[name].numpy().ravel() for name in SHAPES]) for shard in found]
    scores = []
    for one in range(count):
        apart = sorted(np.square(flat[one] - flat[other]).sum() for other in range(count) if other != one)
        scores.append(sum(apart[: count - faults - 2]))
    best = int(np.argmin(scores))
    got = averaged(found, "krum", faults)
    assert all(torch.equal(got[name], found[best][name]) for name in SHAPES)


@pytest.mark.parametrize("lie", [1e9, -1e9, float("inf")])
@pytest.mark.parametrize("aggregation", ["median", "trimmed_mean"])
def test_a_coordinate_stays_among_the_honest(aggregation: str, lie: float) -> None:
    """The bound of Yin et al.: between the least and the largest of the honest, whatever the others are."""
    honest, liar = shards(4), {name: torch.full(shape, lie) for name, shape in SHAPES.items()}
    for place in range(5):
        found = [*honest[:place], liar, *honest[place:]]
        for name, value in averaged(found, aggregation).items():
            rows = torch.stack([shard[name] for shard in honest])
            assert bool(((value >= rows.min(0).values) & (value <= rows.max(0).values)).all())


@pytest.mark.parametrize("lie", [1e9, float("inf"), float("nan")])
def test_krum_never_selects_what_is_far_from_all(lie: float) -> None:
    honest, liar = shards(4), {name: torch.full(shape, lie) for name, shape in SHAPES.items()}
    for place in range(5):
        found = [*honest[:place], liar, *honest[place:]]
        assert krum([list(shard.values()) for shard in found], 1) != place


def test_the_order_of_the_values_changes_no_bit_of_a_coordinate() -> None:
    values = torch.stack([shard["weight"] for shard in shards(4)])
    for order in itertools.permutations(range(4)):
        assert torch.equal(median(values[list(order)]), median(values))
        assert torch.equal(trimmed_mean(values[list(order)], 1), trimmed_mean(values, 1))


def test_a_shard_without_a_gradient_counts_as_zero() -> None:
    found: list[dict[str, Tensor]] = [{"w": torch.tensor([3.0])}, {}, {"w": torch.tensor([5.0])}]
    assert averaged(found, "median")["w"].item() == 3.0


@pytest.mark.parametrize("aggregation", ["median", "trimmed_mean", "krum"])
@pytest.mark.parametrize("count", [1, 2])
def test_the_last_step_of_an_epoch_may_have_few_shards(aggregation: str, count: int) -> None:
    found = shards(count)
    value = averaged(found, aggregation, 2)["bias"]
    assert torch.equal(value, torch.stack([shard["bias"] for shard in found]).sum(0) / count)


def test_what_is_not_looked_at_is_refused_by_name() -> None:
    total = accumulator({}, 8, None, aggregation="median", faults=1)
    with pytest.raises(InvalidInput, match=r"changes the buffer 'norm.running_mean', .*GroupNorm"):
        total.add({}, {"norm.running_mean": torch.zeros(2)}, 2)
    with pytest.raises(InvalidInput, match="weighs what its loss says"):
        total.add({}, {}, 2, 3.0)
    with pytest.raises(InvalidInput, match="'w' is complex"):
        total.add({"w": torch.zeros(2, dtype=torch.complex64)}, {}, 2)


def test_half_precision_is_averaged_in_float32() -> None:
    found = [{"w": torch.tensor([value], dtype=torch.bfloat16)} for value in (1.0, 1.0078125, 2.0, 3.0)]
    assert averaged(found, "median")["w"].dtype == torch.bfloat16
