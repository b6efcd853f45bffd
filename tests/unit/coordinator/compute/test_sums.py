from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from tests.support import models
from tests.support.inprocess import InProcess, resolved, run, same
from torchord.cache.errors import InvalidInput
from torchord.coordinator.compute.batch import load_batch, open_dataset
from torchord.coordinator.compute.determinism import seed_everything
from torchord.coordinator.compute.gradient import compute
from torchord.coordinator.compute.sums import Accumulator
from torchord.coordinator.compute.trainer import Trainer
from torchord.coordinator.spec.config import TrainingConfig
from torchord.coordinator.spec.plan import Plan, derive_seed


def average(
    parts: list[dict[str, Tensor]], sizes: list[int], old: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Buffers of an aggregate of shards that have no gradients."""
    total = Accumulator(old or {}, sum(sizes))
    for part, size in zip(parts, sizes, strict=True):
        total.add({}, part, size)
    return total.result().buffers


# --- gradients --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch_size", "shards"),
    [(16, 4), (16, 2), (8, 8), (9, 1)],
)
def test_shards_are_in_order_accumulation_bit_for_bit(batch_size: int, shards: int) -> None:
    """With weights that are powers of two, a step is what one process does that accumulates."""
    config = TrainingConfig(batch_size=batch_size, shards=shards, seed=2)
    recipe = resolved(models.mlp(size=batch_size))
    ours = InProcess(recipe, config)
    data = open_dataset(recipe, config)
    plan = Plan(batch_size, config)
    trainer = Trainer.build(recipe, config)
    model = trainer.replica.model.train()
    for shard in range(shards):
        inputs, targets = load_batch(data, plan.indices(0, shard))
        seed_everything(derive_seed(2, "model", 0, shard))
        assert recipe.loss is not None
        loss = recipe.loss(model(inputs), targets)
        (loss * (len(inputs) / batch_size)).backward()
    trainer.optimizer.step()
    ours.step(0)
    assert ours.bits == bytes(trainer.replica.pack().numpy())


def test_the_sum_is_weighted_and_in_order() -> None:
    parts = [torch.tensor([1e8, 1.0]), torch.tensor([1.0, 2.0]), torch.tensor([-1e8, 3.0])]
    total = Accumulator({}, 4)
    for part, size in zip(parts, (1, 2, 1), strict=True):
        total.add({"w": part}, {}, size)
    expected = parts[0] * 0.25
    expected.add_(parts[1], alpha=0.5).add_(parts[2], alpha=0.25)
    assert same(total.result().gradients["w"], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_summed_in_float32(dtype: torch.dtype) -> None:
    parts = [torch.randn(100, generator=torch.Generator().manual_seed(k)).to(dtype) for k in range(8)]
    total = Accumulator({}, 8)
    for part in parts:
        total.add({"w": part}, {}, 1)
    found = total.result().gradients["w"]
    assert found.dtype == dtype
    assert same(found, (sum(p.float() * 0.125 for p in parts)).to(dtype))  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_other_types_keep_their_own(dtype: torch.dtype) -> None:
    total = Accumulator({}, 2)
    for value in (1.0, 2.0):
        total.add({"w": torch.tensor(value, dtype=dtype)}, {}, 1)
    assert same(total.result().gradients["w"], torch.tensor(1.5, dtype=dtype))


def test_a_parameter_without_gradient_in_a_shard_adds_nothing() -> None:
    total = Accumulator({}, 4)
    total.add({"a": torch.ones(1)}, {}, 1)
    total.add({"a": torch.ones(1), "b": torch.ones(1)}, {}, 1)
    total.add({}, {}, 2)
    gradients, _ = total.result()
    assert gradients["a"].item() == 0.5 and gradients["b"].item() == 0.25
    assert "c" not in gradients


def test_parameters_used_by_some_shards_train_as_in_one_process() -> None:
    config = TrainingConfig(epochs=2, batch_size=8, shards=4)
    recipe = models.mlp(size=32, model=models.Branching)
    some = InProcess(resolved(recipe), config)
    plan, data = some.plan, some.dataset
    some.trainer.replica.load(some.trainer.replica.pack())
    found = {
        frozenset(
            compute(some.trainer.replica, some.recipe, config, data, plan.indices(s, k), s, k).gradients
        )
        for s in range(plan.steps_per_epoch)
        for k in range(4)
    }
    assert len(found) == 2  # both kinds of shard occur
    assert run(recipe, config).bits == run(recipe, config, clients=2).bits


def test_inputs_are_never_written_to() -> None:
    gradient, buffer, old = torch.ones(3), torch.ones(3), torch.zeros(3)
    total = Accumulator({"b": old}, 2)
    total.add({"w": gradient}, {"b": buffer}, 1)
    total.add({"w": gradient}, {"b": buffer}, 1)
    gradients, buffers = total.result()
    gradients["w"].zero_(), buffers["b"].zero_()
    assert gradient.tolist() == buffer.tolist() == [1.0] * 3 and not old.any()


def test_a_single_shard_is_passed_through_bit_for_bit() -> None:
    gradient = torch.tensor([0.1, -0.0, math.inf, math.nan])
    buffer = torch.tensor([0.3, -0.0, math.inf, math.nan])
    total = Accumulator({"b": torch.tensor([7.7, 1.0, 0.0, 0.0])}, 3)
    total.add({"w": gradient}, {"b": buffer}, 3)
    gradients, buffers = total.result()
    assert same(gradients["w"], gradient) and same(buffers["b"], buffer)


def test_too_many_or_too_few_examples_are_refused() -> None:
    total = Accumulator({}, 4)
    total.add({}, {}, 3)
    with pytest.raises(InvalidInput, match="3 of the step's 4"):
        total.result()
    with pytest.raises(InvalidInput, match="added twice"):
        total.add({}, {}, 3)
    for examples in (0, -1):
        with pytest.raises(InvalidInput):
            Accumulator({}, examples)
    with pytest.raises(InvalidInput):
        Accumulator({}, 2).add({}, {}, 0)


# --- buffers ----------------------------------------------------------------------------


def test_floating_buffers_are_the_mean_weighted_by_examples() -> None:
    found = average(
        [{"m": torch.tensor([1.0, 5.0])}, {"m": torch.tensor([4.0, 5.0])}],
        [1, 3],
        {"m": torch.tensor([0.0, 9.0])},
    )
    assert found["m"].tolist() == [3.25, 5.0]


def test_shards_that_left_a_buffer_alone_count_with_its_old_value() -> None:
    old = {"m": torch.tensor([8.0])}
    assert average([{}, {"m": torch.tensor([0.0])}], [1, 1], old)["m"].tolist() == [4.0]
    assert average([{"m": torch.tensor([0.0])}, {}, {}], [1, 1, 2], old)["m"].tolist() == [6.0]
    assert average([{}, {}], [1, 1], old) == {}


def test_integer_and_bool_buffers_come_from_the_lowest_slot_that_changed_them() -> None:
    old = {"n": torch.tensor(3), "b": torch.tensor([False])}
    found = average(
        [{}, {"n": torch.tensor(5), "b": torch.tensor([True])}, {"n": torch.tensor(9)}], [1, 1, 1], old
    )
    assert same(found["n"], torch.tensor(5)) and found["b"].tolist() == [True]


def test_what_all_shards_agree_on_keeps_its_bits() -> None:
    value = torch.tensor([0.1, 1e30, -0.0, math.inf])
    found = average([{"m": value.clone()} for _ in range(3)], [3, 5, 4], {"m": torch.full((4,), 0.7)})
    assert same(found["m"], value)


def test_a_minimum_that_began_at_infinity_has_a_mean() -> None:
    found = average(
        [{"m": torch.tensor(1.0)}, {"m": torch.tensor(3.0)}], [1, 1], {"m": torch.tensor(math.inf)}
    )
    assert found["m"].item() == 2.0


def test_batchnorm_statistics_are_the_mean_over_the_shards() -> None:
    """Each shard normalises by its own statistics, as under DDP; all shards count here."""
    config = TrainingConfig(batch_size=8, shards=2, seed=1)
    recipe = resolved(models.cnn(size=8))
    ours = InProcess(recipe, config)
    before = {name: b.clone() for name, b in ours.trainer.replica.buffers.items()}
    assert {name: b.dtype for name, b in before.items()} == {
        "norm.running_mean": torch.float32,
        "norm.running_var": torch.float32,
        "norm.num_batches_tracked": torch.int64,
    }
    replica = ours.replicas[0]
    replica.load(ours.trainer.replica.pack())
    parts = [
        compute(replica, recipe, config, ours.dataset, ours.plan.indices(0, k), 0, k).buffers
        for k in range(2)
    ]
    ours.step(0)
    after = ours.trainer.replica.buffers
    assert after["norm.num_batches_tracked"] == 1
    mean = (parts[0]["norm.running_mean"] + parts[1]["norm.running_mean"]) / 2
    torch.testing.assert_close(after["norm.running_mean"], mean)
    assert not torch.equal(after["norm.running_var"], before["norm.running_var"])


def test_one_shard_of_batchnorm_is_one_process() -> None:
    config = TrainingConfig(epochs=2, batch_size=8, shards=1, seed=1)
    ours = run(models.cnn(size=22), config)
    recipe = resolved(models.cnn(size=22))
    trainer = Trainer.build(recipe, config)
    data, plan = open_dataset(recipe, config), Plan(22, config)
    model: nn.Module = trainer.replica.model.train()
    for step in range(plan.total_steps):
        seed_everything(derive_seed(1, "data", step, 0))
        inputs, targets = load_batch(data, plan.indices(step, 0))
        seed_everything(derive_seed(1, "model", step, 0))
        assert recipe.loss is not None and trainer.scheduler is not None
        trainer.optimizer.zero_grad()
        recipe.loss(model(inputs), targets).backward()
        trainer.optimizer.step()
        trainer.scheduler.step()
    assert ours.bits == bytes(trainer.replica.pack().numpy())
