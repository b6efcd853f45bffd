"""Whoever submits is told at once what the run's start would refuse of an optimizer, and nothing else."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from tests.support import models
from tests.support.inprocess import resolved
from torchord import Master, TrainingConfig
from torchord.cache.errors import InvalidInput
from torchord.coordinator.compute.optimizer_trial import try_optimizers
from torchord.coordinator.compute.trainer import Trainer
from torchord.coordinator.local_steps import diloco
from torchord.coordinator.spec.targets import Target

CONFIG = TrainingConfig()
SGD = partial(torch.optim.SGD, lr=0.1)
OWN = [
    kind
    for kind in vars(torch.optim).values()
    if isinstance(kind, type)
    and issubclass(kind, torch.optim.Optimizer)
    and kind not in (torch.optim.Optimizer, torch.optim.LBFGS, torch.optim.SparseAdam)
]


def one_rate(epoch: int) -> float:
    return 1.0


def by_shape(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """No weight decay for biases: an empty group where there are none, as there are none in a trial."""
    groups: dict[bool, list[Tensor]] = {True: [], False: []}
    for parameter in parameters:
        groups[parameter.ndim > 1].append(parameter)
    assert groups[False], "this model has biases"
    return torch.optim.SGD([{"params": groups[True]}, {"params": groups[False], "lr": 0.2}], lr=0.1)


def of_lbfgs(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(parameters)


def two(parameters: Any) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(parameters), torch.optim.AdamW(parameters)]


def listed(parameters: Any) -> list[Tensor]:
    return list(parameters)


def rated(optimizer: torch.optim.Optimizer) -> float:
    return 0.1


def drawing(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1 + random.random() * float(torch.rand(())) * np.random.random())


class Leaving(torch.optim.SGD):
    """What ends the process, and would end the program that submits."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.1)
        sys.exit("no licence on this machine")


class Named(torch.optim.SGD):
    """Needs what only the model's groups have."""

    def __init__(self, groups: Any) -> None:
        super().__init__([{"params": group["params"], "lr": group["rate"]} for group in groups])


def rates(model: nn.Module) -> list[dict[str, Any]]:
    return [{"params": [parameter], "rate": 0.1} for parameter in model.parameters()]


def wanting(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    return [{"params": list(model.parameters()), "weight_decay": weight_decay}]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "an argument out of range": ({"optimizer": partial(torch.optim.SGD, lr=-1)}, "Invalid learning rate: -1"),
    "one of another kind": ({"optimizer": partial(torch.optim.AdamW, betas=3)}, "'int' object"),
    "a misspelt one": (
        {"optimizer": partial(torch.optim.SGD, lrr=1)},
        r"'optimizer'.*keyword argument 'lrr'",
    ),
    "one too many": ({"optimizer": partial(Leaving, momentum=0.9)}, r"keyword argument 'momentum'.*Leaving"),
    "a misspelt one by name": (
        {"optimizer": Target("torch.optim:AdamW", kwargs={"weight_decy": 0.1})},
        "'weight_decy'",
    ),
    "a closure": ({"optimizer": torch.optim.LBFGS}, "LBFGS evaluates the loss several times"),
    "a closure by name": ({"optimizer": "torch.optim:LBFGS"}, "LBFGS evaluates the loss several times"),
    "a closure within": ({"optimizer": of_lbfgs}, "LBFGS evaluates the loss several times"),
    "sparse gradients": ({"optimizer": torch.optim.SparseAdam}, "use Adam"),
    "two optimizers": ({"optimizer": two}, "returned several optimizers"),
    "no optimizer": ({"optimizer": listed}, "returned a list"),
    "a scheduler's own": ({"scheduler": lr_scheduler.CosineAnnealingLR}, "'scheduler'.*'T_max'"),
    "a scheduler's misspelt": ({"scheduler": partial(lr_scheduler.StepLR, step_size=1, gama=1)}, "'gama'"),
    "a scheduler's groups": (
        {"optimizer": SGD, "scheduler": partial(lr_scheduler.LambdaLR, lr_lambda=[one_rate, one_rate])},
        "Expected 1 lr_lambdas, but got 2",
    ),
    "no scheduler": ({"scheduler": rated}, "returned a"),
    "groups": ({"parameter_groups": wanting}, "'parameter_groups'.*'weight_decay'"),
    "the outer one": ({"outer_optimizer": partial(diloco, lr=-1.0)}, "."),
    "the outer one's": ({"outer_optimizer": torch.optim.LBFGS}, "LBFGS evaluates"),
}
GOOD: dict[str, dict[str, Any]] = {
    "groups by shape": {"optimizer": by_shape},
    "groups by shape, with rates": {
        "optimizer": by_shape,
        "scheduler": partial(lr_scheduler.LambdaLR, lr_lambda=[one_rate, one_rate]),
    },
    "groups with words of their own": {"optimizer": Named, "parameter_groups": rates},
    "one that leaves": {"optimizer": Leaving},
    "what is not here": {"optimizer": "no_such_module:Sgd", "scheduler": "no_such_module:Warm"},
    "a function by name, which is not run": {"optimizer": "builtins:exit"},
    "a plateau": {"scheduler": partial(lr_scheduler.ReduceLROnPlateau, patience=3)},
    "local steps": {"outer_optimizer": diloco},
}


def config_of(changes: dict[str, Any]) -> TrainingConfig:
    return TrainingConfig(local_steps=2 if "outer_optimizer" in changes else 1)


@pytest.mark.parametrize("case", BAD)
def test_what_no_model_could_be_trained_with_is_refused(case: str) -> None:
    changes, text = BAD[case]
    with pytest.raises(InvalidInput, match=text):
        try_optimizers(models.mlp(**changes), config_of(changes))


@pytest.mark.parametrize("case", GOOD)
def test_what_the_model_decides_is_left_to_it(case: str) -> None:
    try_optimizers(models.mlp(**GOOD[case]), config_of(GOOD[case]))


@pytest.mark.parametrize("kind", OWN, ids=lambda kind: kind.__name__)
def test_each_of_torchs_own_passes(kind: type) -> None:
    try_optimizers(models.mlp(optimizer=kind), CONFIG)
    if kind.__name__ != "Muon":  # for matrices only
        Trainer.build(resolved(models.mlp(optimizer=kind)), CONFIG)


def test_the_programs_generators_and_the_class_are_as_they_were() -> None:
    method = torch.optim.Optimizer.add_param_group
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    try_optimizers(models.mlp(optimizer=drawing), CONFIG)
    found = float(torch.rand(())), random.random(), np.random.random()
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    assert found == (float(torch.rand(())), random.random(), np.random.random())
    assert torch.optim.Optimizer.add_param_group is method


@pytest.mark.parametrize("case", ["an argument out of range", "a closure", "no scheduler"])
def test_submit_refuses_and_creates_no_run(redis_url: str, case: str) -> None:
    master = Master(redis_url)
    changes, text = BAD[case]
    with pytest.raises(InvalidInput, match=text):
        master.submit(models.mlp(**changes), CONFIG, name="bad")
    assert not master.runs()
