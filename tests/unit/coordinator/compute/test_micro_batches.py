"""A shard in micro-batches: a plain loop's accumulation, bit by bit, and the whole shard within rounding."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from tests.support.inprocess import InProcess, resolved
from torchord import Recipe, TrainingConfig
from torchord.cache.errors import ConfigError, InvalidInput, RecipeError
from torchord.coordinator.compute.determinism import pinned
from torchord.coordinator.compute.gradient import micro_batches
from torchord.coordinator.spec.buffer_entries import require_apart
from torchord.coordinator.spec.plan import Plan, derive_seed

CONFIG = TrainingConfig(epochs=1, batch_size=22, shards=2, micro_batch_size=4, seed=5, probe=False)
IGNORED = -100


class Net(nn.Module):
    """With running statistics, and with dropout if it is asked for."""

    def __init__(self, dropout: float = 0.0, norm: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(6, 12)
        self.norm = nn.BatchNorm1d(12) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.dropout(torch.relu(self.norm(self.first(x)))))


def data(size: int = 40, unlabelled: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(size) % 4
    labels[:unlabelled] = IGNORED
    return TensorDataset(torch.randn(size, 6, generator=generator), labels)


def summed(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets, reduction="sum")


def recipe(**changes: Any) -> Recipe:
    fields: dict[str, Any] = {
        "model": Net,
        "dataset": data,
        "loss": functional.cross_entropy,
        "optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    }
    return Recipe(**{**fields, **changes})


def added(total: list[Tensor], gradients: list[Any], share: float) -> list[Tensor]:
    if not total:
        return [gradient * share for gradient in gradients]
    return [each.add_(gradient, alpha=share) for each, gradient in zip(total, gradients, strict=True)]


def by_hand(given: Recipe, config: TrainingConfig, reduction: str = "mean") -> dict[str, Tensor]:
    """A plain loop that accumulates each shard's micro-batches, and then averages the shards' gradients."""
    torch.manual_seed(derive_seed(config.seed, "init"))
    model, dataset = given.model(), given.dataset()
    optimizer = given.optimizer(model.parameters())
    plan = Plan(len(dataset), config)
    for step in range(plan.total_steps):
        total: list[Tensor] = []
        for shard in range(plan.shards_in(step)):
            indices = plan.indices(step, shard)
            found: list[Tensor] = []
            for number, part in enumerate(np.array_split(indices, -(-len(indices) // 4))):
                torch.manual_seed(derive_seed(config.seed, "model", step, shard, number))
                inputs, targets = dataset[part.tolist()]
                model.train().zero_grad()
                loss = functional.cross_entropy(model(inputs), targets, reduction=reduction)
                if reduction == "sum":
                    loss = loss * (plan.examples(step) / len(part))
                loss.backward()
                found = added(found, [p.grad for p in model.parameters()], len(part) / len(indices))
            total = added(total, found, len(indices) / plan.examples(step))
        for parameter, gradient in zip(model.parameters(), total, strict=True):
            parameter.grad = gradient
        optimizer.step()
    return model.state_dict()


def trained(given: Recipe, config: TrainingConfig) -> dict[str, Tensor]:
    return InProcess(resolved(given), config, clients=2).train().trainer.replica.state_tensors()


@pytest.mark.parametrize(
    ("changes", "reduction"),
    [
        ({}, "mean"),
        ({"model": partial(Net, dropout=0.3)}, "mean"),
        ({"loss": summed, "loss_over": "sum"}, "sum"),
    ],
    ids=["mean", "dropout", "sum"],
)
def test_they_are_a_plain_loops_accumulation(changes: dict[str, Any], reduction: str) -> None:
    given = recipe(**changes)
    found = trained(given, CONFIG)
    with pinned(1, True):
        expected = by_hand(given, CONFIG, reduction)
    assert {name: value.numpy().tobytes() for name, value in found.items()} == {
        name: value.numpy().tobytes() for name, value in expected.items()
    }


@pytest.mark.parametrize(
    "changes",
    [{}, {"loss": summed, "loss_over": "sum"}, {"dataset": partial(data, unlabelled=17)}],
    ids=["mean", "sum", "some parts weigh less, some nothing"],
)
@pytest.mark.parametrize("shards", [1, 3])
def test_the_step_is_the_whole_batchs(changes: dict[str, Any], shards: int) -> None:
    given = recipe(**changes)
    config = replace(CONFIG, shards=shards)
    whole = trained(given, replace(config, shards=1, micro_batch_size=None))
    for size in (1, 7):
        parts = trained(given, replace(config, micro_batch_size=size))
        for name, value in whole.items():
            torch.testing.assert_close(parts[name], value, rtol=1e-4, atol=1e-6)


def test_running_statistics_are_averaged_over_the_parts_as_over_shards() -> None:
    """One shard of 20 in parts of 5 has the statistics of four shards of 5."""
    given = recipe(model=partial(Net, norm=True), dataset=partial(data, 20))
    config = replace(CONFIG, epochs=2, batch_size=20, shards=1, micro_batch_size=5)
    parts, shards = trained(given, config), trained(given, replace(config, shards=4, micro_batch_size=None))
    assert int(parts["norm.num_batches_tracked"]) == 2
    for name, value in shards.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("size", "sizes"), [(None, [11]), (11, [11]), (10, [6, 5]), (4, [4, 4, 3]), (1, [1] * 11)]
)
def test_parts_are_even_and_a_shard_that_fits_is_one(size: int | None, sizes: list[int]) -> None:
    parts = micro_batches(np.arange(11), size)
    assert [len(part) for part in parts] == sizes and np.concatenate(parts).tolist() == list(range(11))


def test_what_it_does_not_go_with_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="micro_batch_size is for shards of exact steps"):
        replace(CONFIG, local_steps=2)
    with pytest.raises(RecipeError, match=r"rule of 'norm\.running_mean' is one of whole shards"):
        require_apart({"norm.running_mean": "sum"}, CONFIG)
    with pytest.raises(InvalidInput, match="BatchNorm cannot train on a shard of one example"):
        trained(recipe(model=partial(Net, norm=True)), replace(CONFIG, micro_batch_size=1))
