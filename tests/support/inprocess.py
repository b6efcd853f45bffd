"""A run in one process: the pure parts chained as the workers chain them, without queue and store."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from torchord.coordinator.compute.batch import open_dataset
from torchord.coordinator.compute.gradient import compute
from torchord.coordinator.compute.replica import Replica
from torchord.coordinator.compute.shares import mean_loss
from torchord.coordinator.compute.sums import Accumulator
from torchord.coordinator.compute.trainer import ApplyReport, Trainer
from torchord.coordinator.compute.visiting import visiting_of
from torchord.coordinator.spec.config import TrainingConfig
from torchord.coordinator.spec.plan import Plan
from torchord.coordinator.spec.recipe import Recipe
from torchord.coordinator.spec.resolving import ResolvedRecipe, resolve


def resolved(recipe: Recipe) -> ResolvedRecipe:
    """Resolve a recipe by way of its spec, as a worker does."""
    return resolve(recipe.to_spec(), allowed=("*",))


@dataclass
class InProcess:
    """A training server and any number of Clients, called one after the other."""

    recipe: ResolvedRecipe
    config: TrainingConfig
    clients: int = 1
    attach: bool = False  # whether Clients take versions over as from the same-host tier
    reports: list[ApplyReport] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.dataset = open_dataset(self.recipe, self.config)
        visiting = visiting_of(self.recipe, self.config, self.dataset)
        visits = None if visiting is None else visiting.survey()
        self.plan = Plan(len(self.dataset), self.config, visits=visits, visited=visiting)
        self.trainer = Trainer.build(self.recipe, self.config)
        self.replicas = [Replica.build(self.recipe, self.config) for _ in range(self.clients)]

    def step(self, step: int) -> None:
        """One global step, its shards dealt to the clients, computed in reverse order."""
        version = self.trainer.replica.pack()
        for replica in self.replicas:
            (replica.attach if self.attach else replica.load)(version)
        shards = range(self.plan.shards_in(step))
        found = {
            shard: compute(
                self.replicas[shard % self.clients],
                self.recipe,
                self.config,
                self.dataset,
                self.plan.indices(step, shard),
                step,
                shard,
                whole=self.plan.examples(step),
            )
            for shard in reversed(shards)
        }
        replica = self.trainer.replica
        total = Accumulator(replica.state_tensors(), self.plan.examples(step), replica.rules)
        for shard in shards:
            each = found[shard]
            total.add(each.gradients, each.buffers, each.examples, each.weight)
        loss = mean_loss((found[s].loss, found[s].examples, found[s].weight) for s in shards)
        gradients, buffers = total.result()
        self.losses.append(loss)
        ends = self.plan.ends_epoch(step)
        self.reports.append(self.trainer.apply(gradients, buffers, step=step, loss=loss, epoch_ends=ends))

    def train(self, start: int = 0, stop: int | None = None) -> InProcess:
        """The steps from `start` to before `stop`; None: to the end."""
        for step in range(start, self.plan.total_steps if stop is None else stop):
            self.step(step)
        return self

    @property
    def bits(self) -> bytes:
        """The whole state as bytes."""
        return bytes(self.trainer.replica.pack().numpy())


def run(recipe: Recipe, config: TrainingConfig, *, clients: int = 1, attach: bool = False) -> InProcess:
    """Train to the end."""
    return InProcess(resolved(recipe), config, clients, attach).train()


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors agree in shape, dtype and every byte (NaN equals NaN, 0 differs from -0)."""
    return (
        one.shape == other.shape
        and one.dtype == other.dtype
        and torch.equal(
            one.contiguous().reshape(-1).view(torch.uint8), other.contiguous().reshape(-1).view(torch.uint8)
        )
    )
