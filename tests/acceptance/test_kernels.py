"""An operator that is not deterministic ends the run with what can be done, wherever it is met."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support import models
from tests.support.inprocess import InProcess, resolved, run
from torchord import TrainingConfig
from torchord.cache.errors import InvalidInput, RunFailed
from torchord.coordinator.compute import inference, inner_steps
from torchord.coordinator.compute.kernels import worded

CONFIG = TrainingConfig(epochs=1, batch_size=8, shards=2, seed=3)


class Unpooling(nn.Module):
    """Half of an autoencoder of old: what was pooled goes back to where it came from."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(1, 3)

    def forward(self, x: Tensor) -> Tensor:
        pooled, places = F.max_pool1d(x[:, None], 2, return_indices=True)
        return self.inner(F.max_unpool1d(pooled, places, 2).mean(-1))


class Putting(nn.Linear):
    """Writes with `put`, in training or in evaluation alone."""

    def __init__(self, training: bool) -> None:
        super().__init__(models.FEATURES, 3)
        self.at = training

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.training is not self.at else y.put(torch.tensor([0, 1]), torch.ones(2))


class PuttingBack(torch.autograd.Function):
    """A product whose backward writes with `put_`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient.clone().put_(torch.tensor([0]), torch.ones(1))


class BackwardOnly(nn.Linear):
    """The operator is met in the backward alone."""

    def __init__(self) -> None:
        super().__init__(models.FEATURES, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = PuttingBack.apply(super().forward(x))  # type: ignore[no-untyped-call]
        return found


class PuttingOptimizer(torch.optim.SGD):
    """An optimizer whose own step needs the operator."""

    def step(self, closure: Any = None) -> Any:
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))
        return super().step(closure)


MEMBERS = {
    "a layer": (Unpooling, "max_unpool", "interpolate"),
    "in the forward": (partial(Putting, training=True), "put_", "index_put"),
    "in the backward": (BackwardOnly, "put_", "index_put"),
}


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("local_steps", [1, 2])
def test_training(name: str, local_steps: int) -> None:
    model, operator, replacement = MEMBERS[name]
    config = TrainingConfig(epochs=1, batch_size=8, shards=2, seed=3, local_steps=local_steps)
    parts = InProcess(resolved(models.mlp(model=model)), config)
    replica = parts.replicas[0]
    replica.load(parts.trainer.replica.pack())
    with pytest.raises(InvalidInput) as met:
        if local_steps == 1:
            parts.step(0)
        else:
            inner_steps.compute(replica, parts.recipe, config, parts.dataset, parts.plan.parts(0, 0), 0, 0)
    told = str(met.value)
    assert operator in told and replacement in told
    assert "deterministic=False" in told and "CUDA_VISIBLE_DEVICES" in told
    assert "\n" not in told
    assert any("raised while computing" in note for note in met.value.__notes__)


def test_evaluation_and_prediction() -> None:
    parts = InProcess(resolved(models.mlp(model=partial(Putting, training=False))), CONFIG).train(stop=1)
    with pytest.raises(InvalidInput, match="put_ has no deterministic implementation"):
        inference.evaluate(parts.replicas[0], parts.recipe, CONFIG, parts.dataset, [0, 1])
    with pytest.raises(InvalidInput, match="put_ has no deterministic implementation"):
        inference.predict(parts.replicas[0], parts.recipe, parts.dataset.tensors[0], CONFIG)


def test_an_optimizer() -> None:
    with pytest.raises(RunFailed, match="put_ has no deterministic implementation"):
        run(models.mlp(optimizer=partial(PuttingOptimizer, lr=0.1)), CONFIG)


@pytest.mark.parametrize("name", MEMBERS)
def test_one_way_on_is_to_do_without(name: str) -> None:
    config = TrainingConfig(epochs=1, batch_size=8, shards=2, seed=3, deterministic=False)
    assert run(models.mlp(model=MEMBERS[name][0]), config).losses


def test_other_errors_pass_as_they_are() -> None:
    for error in (
        RuntimeError("shapes differ"),
        ValueError("x does not have a deterministic implementation"),
    ):
        assert worded(error) is error
    unknown = RuntimeError("new_op_cuda does not have a deterministic implementation, but you set")
    assert "write it with others" in str(worded(unknown))
