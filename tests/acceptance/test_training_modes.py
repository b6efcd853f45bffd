"""Which modules train: those that the model function put in evaluation mode stay so, and nothing leaks."""

from __future__ import annotations

import sys
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support import models
from tests.support.inprocess import resolved
from tests.support.stepping import Stepping, plainly
from torchord import Recipe, TrainingConfig
from torchord.cache.errors import InvalidInput
from torchord.coordinator.compute import inference
from torchord.coordinator.compute.modes import Modes
from torchord.coordinator.compute.replica import Replica

CONFIG = TrainingConfig(epochs=1, batch_size=8, shards=2, seed=3)


class Net(nn.Module):
    """A BatchNorm, a dropout that would be seen, and a head."""

    def __init__(self, rate: float = 0.5) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(models.FEATURES)
        self.drop = nn.Dropout(rate)
        self.out = nn.Linear(models.FEATURES, models.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.out(self.drop(self.norm(x)))
        return found


def frozen_norm() -> Net:
    """Fine-tuning as it is usually done: statistics as they are, no dropout either."""
    net = Net()
    with torch.no_grad():
        net.norm.running_mean.copy_(torch.linspace(-1, 1, models.FEATURES))  # type: ignore[operator]
    net.norm.eval()
    net.drop.eval()
    return net


def scripted() -> nn.Module:
    """The same, compiled to TorchScript, whose modules are no ordinary ones."""
    made: nn.Module = torch.jit.script(frozen_norm())
    return made


def all_in_evaluation(rate: float = 0.0) -> nn.Module:
    """As a library hands out what it has loaded."""
    return Net(rate).eval()


class Overridden(Net):
    """The usual idiom: `train` leaves the statistics alone."""

    def __init__(self) -> None:
        super().__init__(0.0)

    def train(self, mode: bool = True) -> Overridden:
        super().train(mode)
        self.norm.eval()
        return self


class Partly(Net):
    """A `train` that does not pass on: the dropout stays as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.drop.training = False

    def train(self, mode: bool = True) -> Partly:
        self.training = mode
        self.norm.train(mode)
        return self


def meddling(model: nn.Module, batch: Any) -> Tensor:
    """A step that computes a part in evaluation mode and leaves it so, and trains what was not to train."""
    inputs, targets = batch
    loss = F.cross_entropy(model(inputs), targets)
    model.eval()
    model.get_submodule("drop").train()
    return loss


def recipe(model: Any, **changes: Any) -> Recipe:
    return models.mlp(model=model, optimizer=partial(torch.optim.SGD, lr=0.1), **changes)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("model", [frozen_norm, Overridden, scripted])
def test_statistics_that_were_put_in_evaluation_mode_stay(model: Any) -> None:
    given = recipe(model)
    run = Stepping(given, CONFIG).train()
    expected = plainly(given, CONFIG)
    assert run.state.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(run.state[name], value)
    assert run.state["norm.num_batches_tracked"].item() == 0


def test_a_model_that_is_in_evaluation_mode_as_a_whole_trains() -> None:
    run = Stepping(recipe(all_in_evaluation), CONFIG).train()
    assert run.state["norm.num_batches_tracked"].item() == run.plan.total_steps
    assert run.replica.train().training


def test_a_train_that_does_not_pass_on_is_called_all_the_same() -> None:
    replica = Replica.build(resolved(recipe(Partly)), CONFIG)
    model = replica.train()
    assert (model.training, model.norm.training, model.drop.training) == (True, True, False)
    model = replica.eval()
    assert (model.training, model.norm.training, model.drop.training) == (False, False, False)


@pytest.mark.parametrize("model", [Net, frozen_norm, Partly])
def test_what_a_step_does_to_modes_does_not_reach_the_next(model: Any) -> None:
    given = {"loss": None, "metrics": None, "step": meddling}
    run = Stepping(recipe(model, **given), CONFIG)
    run.replica.load(run.trainer.replica.pack())
    fresh = Stepping(recipe(model, **given), CONFIG)
    fresh.replica.load(fresh.trainer.replica.pack())
    run.work(0, 1)
    inference.evaluate(run.replica, run.made, CONFIG, run.dataset, [0, 1, 2])
    one, other = run.work(0, 0), fresh.work(0, 0)
    assert one.loss == other.loss
    assert [(m.training) for m in run.replica.train().modules()] == [
        (m.training) for m in fresh.replica.train().modules()
    ]


def test_a_pretrained_part_of_transformers_trains_and_a_frozen_one_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`from_pretrained` gives models in evaluation mode; a stand-in has the library's names."""
    library = ModuleType("transformers.modeling_utils")
    pretrained = type("PreTrainedModel", (nn.Module,), {"__module__": library.__name__})
    monkeypatch.setitem(sys.modules, library.__name__, library)

    def made(*, frozen: bool) -> nn.Module:
        part = pretrained()
        part.inner = Net()
        part.requires_grad_(not frozen)
        return nn.Sequential(part.eval(), nn.Linear(3, 3))

    for frozen in (False, True):
        model = made(frozen=frozen)
        Modes(model).train()
        assert model.training and model[1].training
        assert model[0].inner.drop.training is not frozen


def test_a_batchnorm_over_all_processes_of_another_library_is_refused() -> None:
    model = Net()
    model.norm = type("SyncBatchNorm", (nn.BatchNorm1d,), {})(models.FEATURES)
    with pytest.raises(InvalidInput, match="'norm' is a SyncBatchNorm"):
        Modes(model).require_apart(CONFIG)


def test_a_batchnorm_over_all_processes_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"'norm' is a SyncBatchNorm.*BatchNorm.*shards=1"):
        Replica.build(resolved(recipe(Synced)), CONFIG)
    one = TrainingConfig(epochs=1, batch_size=8, shards=1)
    assert Replica.build(resolved(recipe(Synced)), one).buffers
    assert Replica.build(resolved(recipe(partial(Synced, frozen=True))), CONFIG).buffers


class Synced(Net):
    """Converted for DDP, and perhaps frozen."""

    def __init__(self, frozen: bool = False) -> None:
        super().__init__()
        self.norm = nn.SyncBatchNorm(models.FEATURES).train(not frozen)
