from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

from torchord.cache.errors import InvalidInput
from torchord.cache.tensors.codec import layout, pack, views
from torchord.coordinator.compute.sums import Accumulator, Aggregate, Partial, PartialSum
from torchord.coordinator.spec.sum_tree import FanIn

Shard = tuple[dict[str, Tensor], dict[str, Tensor], int]


def travelled(partial: Partial) -> Partial:
    """What arrives after a partial sum went through the store."""
    tensors = partial.tensors()
    manifest = layout(tensors)
    received = views(pack(tensors, manifest), manifest)
    return Partial.of(received, json.loads(json.dumps(partial.notes())), partial.examples)


def through(tree: FanIn, shards: list[Shard], old: dict[str, Tensor] | None = None) -> Aggregate:
    """The average of shards through a tree, each sum stored and read again."""
    examples = sum(shard[2] for shard in shards)
    sums: dict[int, Partial] = {}
    for slot in tree.partials:
        total = PartialSum(examples)
        for number in tree.inputs(slot):
            if number < tree.shards:
                total.add_shard(*shards[number])
            else:
                total.add(sums[number])
        sums[slot] = travelled(total.result())
    root = PartialSum(examples)
    for number in tree.roots:
        root.add(sums[number])
    return root.average(old or {})


def plainly(shards: list[Shard], old: dict[str, Tensor] | None = None) -> Aggregate:
    total = Accumulator(old or {}, sum(shard[2] for shard in shards))
    for shard in shards:
        total.add(*shard)
    return total.result()


def gradients(count: int, seed: int = 0) -> list[Shard]:
    generator = torch.Generator().manual_seed(seed)
    return [({"w": torch.randn(5, generator=generator)}, {}, 1 + shard % 3) for shard in range(count)]


def test_the_order_of_the_additions_is_the_trees() -> None:
    shards = gradients(9)
    examples = sum(shard[2] for shard in shards)
    halves = []
    for group in (shards[:5], shards[5:]):
        total = group[0][0]["w"] * (group[0][2] / examples)
        for values, _, size in group[1:]:
            total = total.add(values["w"], alpha=size / examples)
        halves.append(total)
    found = through(FanIn(9, 8), shards).gradients["w"]
    assert torch.equal(found, halves[0] + halves[1])


@pytest.mark.parametrize("count", [9, 20, 65])
def test_a_tree_averages_like_a_chain_up_to_rounding(count: int) -> None:
    shards = gradients(count, seed=count)
    for fan_in in (2, 8):
        torch.testing.assert_close(
            through(FanIn(count, fan_in), shards).gradients["w"], plainly(shards).gradients["w"]
        )


def test_a_parameter_that_only_some_shards_reach() -> None:
    one = torch.ones(2)
    shards: list[Shard] = [({"w": one} if shard in (3, 7) else {}, {}, 1) for shard in range(9)]
    shards.append(({"v": one}, {}, 1))
    found = through(FanIn(10, 4), shards).gradients
    assert {name: value.tolist() for name, value in found.items()} == {
        "w": pytest.approx([0.2, 0.2]),
        "v": pytest.approx([0.1, 0.1]),
    }


def test_half_precision_is_summed_in_single_and_rounded_once() -> None:
    small = torch.full((1,), 2.0**-8, dtype=torch.bfloat16)
    shards: list[Shard] = [
        ({"w": torch.ones(1, dtype=torch.bfloat16) if k == 0 else small}, {}, 1) for k in range(16)
    ]
    found = through(FanIn(16, 4), shards).gradients["w"]
    assert found.dtype == torch.bfloat16
    assert found.item() == torch.tensor((1 + 15 * 2.0**-8) / 16).to(torch.bfloat16).item()


# --- buffers ------------------------------------------------------------------------------


def test_what_all_shards_agree_on_stays_bit_for_bit() -> None:
    value = torch.tensor([0.1, -0.0, math.inf, 3e-39])
    shards: list[Shard] = [({}, {"b": value.clone()}, 1 + k % 2) for k in range(20)]
    found = through(FanIn(20, 3), shards, {"b": torch.zeros(4)}).buffers["b"]
    assert found.numpy().tobytes() == value.numpy().tobytes()


@pytest.mark.parametrize("count", [9, 20, 65])
def test_buffers_are_averaged_by_examples(count: int) -> None:
    """As for BatchNorm's running mean: every example counts, whether its shard changed the buffer or not."""
    generator = torch.Generator().manual_seed(count)
    old = {"b": torch.randn(3, generator=generator), "n": torch.tensor(4)}
    shards: list[Shard] = [
        (
            {},
            {} if k % 4 == 1 else {"b": torch.randn(3, generator=generator), "n": torch.tensor(5 + k)},
            1 + k % 3,
        )
        for k in range(count)
    ]
    found, plain = through(FanIn(count, 4), shards, old).buffers, plainly(shards, old).buffers
    torch.testing.assert_close(found["b"], plain["b"])
    assert found["n"].item() == plain["n"].item() == 5, "an integer: the lowest slot that changed it"


def test_half_precision_buffers_keep_their_dtype() -> None:
    shards: list[Shard] = [({}, {"b": torch.full((1,), float(k), dtype=torch.float16)}, 1) for k in range(9)]
    found = through(FanIn(9, 8), shards, {"b": torch.zeros(1, dtype=torch.float16)}).buffers["b"]
    assert (found.dtype, found.item()) == (torch.float16, 4.0)


# --- misuse -------------------------------------------------------------------------------


def test_inputs_that_do_not_make_the_step() -> None:
    total = PartialSum(4)
    total.add_shard({"w": torch.ones(1)}, {}, 3)
    with pytest.raises(InvalidInput, match="3 of the step's 4 examples"):
        total.average({})
    with pytest.raises(InvalidInput, match="2 more examples make 5 in a step of 4; was an input added twice"):
        total.add(Partial({}, {}, {}, {}, {}, 2))
    with pytest.raises(InvalidInput, match="at least one example, not 0"):
        PartialSum(0)
