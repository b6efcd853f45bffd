"""A model as a program gives what the model gives, for any number of examples, without its code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tests.support import models
from tests.support.inprocess import resolved
from torchord import Recipe, TrainingConfig
from torchord.cache.errors import InvalidInput
from torchord.coordinator.master.exporting import write_program
from torchord.coordinator.master.run_versions import RunVersions


class Labelled(nn.Module):
    """As a Hugging Face model: its loss where there are labels."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Tensor:
        out = self.linear(features)
        return out if labels is None else nn.functional.cross_entropy(out, labels)


class Branching(nn.Module):
    """Its path depends on what goes in."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear(features) if float(features.sum()) > 0 else self.linear(-features)


def samples() -> TensorDataset:
    return TensorDataset(torch.randn(6, 4), torch.arange(6) % 2)


def labelled_step(model: nn.Module, batch: list[Tensor]) -> Tensor:
    return cast(Tensor, model(features=batch[0], labels=batch[1]))


def inner_step(model: Any, batch: list[Tensor]) -> Tensor:
    return cast(Tensor, model.linear(batch[0]).sum())


def run_of(recipe: Recipe, model: nn.Module) -> RunVersions:
    """A run that knows no server."""
    config = TrainingConfig(batch_size=4)
    tensors, made = (lambda version=None: (3, {})), (lambda version=None: model.eval())
    found = SimpleNamespace(
        recipe=lambda: resolved(recipe), config=lambda: config, tensors=tensors, model=made
    )
    return cast(RunVersions, found)


def recipe(step: Callable[..., Any], model: type[nn.Module]) -> Recipe:
    return Recipe(model=model, dataset=samples, step=step, optimizer=torch.optim.SGD)


CASES: dict[str, tuple[Recipe, type[nn.Module], Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]]] = {
    "pairs": (models.mlp(), models.Mlp, lambda n: ((models.points(n).tensors[0],), {})),
    "step": (models.gpt(), models.Gpt, lambda n: ((torch.randint(models.VOCABULARY, (n, 8)),), {})),
    "labels": (recipe(labelled_step, Labelled), Labelled, lambda n: ((), {"features": torch.randn(n, 4)})),
}


@pytest.mark.parametrize("case", CASES)
def test_a_program_is_the_model(case: str, tmp_path: Path) -> None:
    given, kind, inputs = CASES[case]
    model = kind()
    assert write_program(run_of(given, model), tmp_path / "m.pt2", "torch-export") == 3
    program = torch.export.load(tmp_path / "m.pt2").module()
    for number in (1, 2, 5):
        args, kwargs = inputs(number)
        assert torch.equal(program(*args, **kwargs), model(*args, **kwargs))


@pytest.mark.parametrize(
    ("given", "model", "said"),
    [
        (recipe(inner_step, Labelled), Labelled(), "never calls Labelled as a whole"),
        (
            models.mlp(model=Branching, dataset=samples, evaluation=None, metrics=None),
            Branching(),
            "cannot be a program",
        ),
    ],
)
def test_what_cannot_be_one_is_refused_in_one_sentence(
    given: Recipe, model: nn.Module, said: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidInput, match=said) as refused:
        write_program(run_of(given, model), tmp_path / "m.pt2", "torch-export")
    assert "--format safetensors" in str(refused.value) and "\n" not in str(refused.value)
