"""Steps in one process as workers take them: `shard.work`, codecs, the tree of partial sums, the trainer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.support.inprocess import resolved
from torchord.coordinator.compute.batch import open_dataset
from torchord.coordinator.compute.replica import Replica
from torchord.coordinator.compute.shard import ShardWork, work
from torchord.coordinator.compute.sums import Accumulator, Aggregate, Partial, PartialSum
from torchord.coordinator.compute.trainer import Trainer
from torchord.coordinator.spec.config import TrainingConfig
from torchord.coordinator.spec.plan import Plan
from torchord.coordinator.spec.recipe import Recipe


@dataclass
class Stepping:
    """A run without queue and store; local steps start anew in each step."""

    recipe: Recipe
    config: TrainingConfig

    def __post_init__(self) -> None:
        self.made = resolved(self.recipe)
        self.dataset = open_dataset(self.made, self.config)
        self.plan = Plan(len(self.dataset), self.config)
        self.trainer = Trainer.build(self.made, self.config)
        self.replica = Replica.build(self.made, self.config)
        self.replica.arrange(self.trainer.replica.manifest)

    def step(self, step: int) -> None:
        """One step, its shards computed from the last to the first."""
        self.replica.load(self.trainer.replica.pack())
        done = {shard: self.work(step, shard) for shard in reversed(range(self.plan.shards_in(step)))}
        mean = self._average(step, done)
        examples = self.plan.examples(step)
        loss = sum(each.loss * each.examples for each in done.values()) / examples
        ends = self.plan.ends_epoch(step)
        self.trainer.apply(mean.gradients, mean.buffers, step=step, loss=loss, epoch_ends=ends)

    def work(self, step: int, shard: int) -> ShardWork:
        """One shard at the version that the replica holds."""
        return work(self.replica, self.made, self.plan, self.dataset, step, shard, None)

    def _average(self, step: int, done: dict[int, ShardWork]) -> Aggregate:
        tree, rules, held = self.plan.fan_in(step), self.trainer.replica.rules, self.trainer.replica.held()
        examples = self.plan.examples(step)
        if not tree.partials:
            total = Accumulator(held, examples, rules)
            for shard in tree.roots:
                total.add(done[shard].payload, done[shard].buffers, done[shard].examples)
            return total.result()
        sums: dict[int, Partial] = {}
        for slot in tree.partials:
            part = PartialSum(examples, rules)
            for number in tree.inputs(slot):
                if number in sums:
                    part.add(sums[number])
                else:
                    part.add_shard(done[number].payload, done[number].buffers, done[number].examples)
            made = part.result()
            sums[slot] = Partial.of(made.tensors(), made.notes(), made.examples)
        whole = PartialSum(examples, rules)
        for root in tree.roots:
            whole.add(sums[root])
        return whole.average(held)

    def train(self, steps: int | None = None) -> Stepping:
        """The first so many steps; None: all."""
        for step in range(self.plan.total_steps if steps is None else steps):
            self.step(step)
        return self

    @property
    def state(self) -> dict[str, Tensor]:
        """Copies of the newest version's tensors."""
        return {name: tensor.clone() for name, tensor in self.trainer.replica.state_tensors().items()}


def plainly(recipe: Recipe, config: TrainingConfig, steps: int | None = None) -> dict[str, Tensor]:
    """The loop of one process over the same global batches, from the same start; no shards, no seeds."""
    made = resolved(recipe)
    plan, data = Plan(len(made.dataset()), config), made.dataset()
    replica = Replica.build(made, config)
    model = replica.model
    optimizer = made.optimizer([p for p in model.parameters() if p.requires_grad])
    modes = [(module, module.training) for module in model.modules()]
    for step in range(plan.total_steps if steps is None else steps):
        indices = [int(i) for shard in range(plan.shards_in(step)) for i in plan.indices(step, shard)]
        model.train()
        for module, training in modes:
            if not training:
                module.training = False
        inputs, targets = data[torch.tensor(indices)]
        optimizer.zero_grad()
        assert made.loss is not None
        made.loss(model(inputs), targets).backward()
        optimizer.step()
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in state.items()}
