"""Models whose names count what their process has made are matched by place; other models are refused."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support import models
from tests.support.inprocess import resolved, same
from tests.support.stepping import Stepping
from torchord import Recipe, TrainingConfig
from torchord.cache.errors import InvalidInput, ManifestMismatch
from torchord.cache.tensors.codec import layout
from torchord.coordinator.compute.counted_names import counterparts
from torchord.coordinator.compute.replica import Replica

CONFIG = TrainingConfig(epochs=1, batch_size=8, shards=2, seed=3)
_count = itertools.count()


class Counted(nn.Module):
    """Names its layers by a count of the process, as frameworks do."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.names = [f"dense_{next(_count)}" for _ in range(layers)]
        for name in self.names:
            self.add_module(name, nn.Linear(models.FEATURES, models.FEATURES))
        self.register_buffer(f"seen_{next(_count)}", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        for name in self.names:
            x = torch.tanh(self.get_submodule(name)(x))
        return x[:, : models.CLASSES]


class Sorted(Counted):
    """Keeps its layers sorted by name, as words."""

    def __init__(self) -> None:
        super().__init__(12)
        self._modules = dict(sorted(self._modules.items()))


class Named(nn.Module):
    """Names that somebody has chosen."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(models.FEATURES, models.FEATURES))


def recipe(model: Any) -> Recipe:
    return models.mlp(model=model, optimizer=partial(torch.optim.SGD, lr=0.1), metrics=None)


def test_a_second_model_takes_the_first_ones_versions() -> None:
    given = resolved(recipe(Counted))
    first, second = Replica.build(given, CONFIG), Replica.build(given, CONFIG)
    assert first.manifest != second.manifest
    second.arrange(first.manifest)
    assert first.manifest == second.manifest
    assert list(first.rules.items()) == list(second.rules.items())
    assert same(first.pack(), second.pack())


def test_a_run_trains_whatever_its_processes_have_made_before() -> None:
    expected = Stepping(recipe(Counted), CONFIG).train()
    next(_count)
    found = Stepping(recipe(Counted), CONFIG).train()
    assert list(found.state) != list(expected.state)
    assert all(map(same, found.state.values(), expected.state.values()))


def test_counts_that_do_not_say_what_is_what_are_refused() -> None:
    """From the ninth to the tenth, the order as words is not the order in which layers were made."""
    global _count
    given = resolved(recipe(Sorted))
    _count = itertools.count(0)
    first = Replica.build(given, CONFIG)
    _count = itertools.count(95)
    second = Replica.build(given, CONFIG)
    with pytest.raises(InvalidInput, match="names of their own"):
        second.arrange(first.manifest)


@pytest.mark.parametrize(
    ("here", "there"),
    [
        (partial(Named, "fc1", "fc2"), partial(Named, "fc1", "fc3")),
        (partial(Named, "one", "two"), partial(Named, "one", "three")),
    ],
)
def test_names_that_do_not_change_in_a_process_are_no_counts(here: Any, there: Any) -> None:
    ours, theirs = (Replica.build(resolved(recipe(model)), CONFIG) for model in (here, there))
    with pytest.raises(ManifestMismatch, match="not in the model here"):
        ours.arrange(theirs.manifest)


def test_a_model_of_another_size_is_another_model() -> None:
    ours, theirs = (Replica.build(resolved(recipe(partial(Counted, layers))), CONFIG) for layers in (3, 4))
    with pytest.raises(ManifestMismatch):
        ours.arrange(theirs.manifest)


@pytest.mark.parametrize(
    ("ours", "theirs", "matched"),
    [
        (["dense/kernel", "dense_1/kernel"], ["dense_7/kernel", "dense_8/kernel"], True),
        (["a1.w", "a1.b"], ["a5.w", "a5.b"], True),
        (["a_1.w", "a_2.w"], ["a_1.w", "a_3.w"], True),
        (["a_9.w", "a_10.w"], ["a_1.w", "a_0.w"], False),
        (["a_1.w", "a_1.b"], ["a_1.w", "a_2.b"], False),
        (["a_1.w", "a_2.w"], ["a_3.w", "a_3.v"], False),
        (["0.weight", "2.weight"], ["0.weight", "1.weight"], False),
        (["dense.w"], ["conv.w"], False),
        (["dense.w"], ["dense.w", "dense_1.w"], False),
    ],
)
def test_what_is_a_counterpart(ours: list[str], theirs: list[str], matched: bool) -> None:
    one, other = (layout({name: torch.zeros(2) for name in names}) for names in (ours, theirs))
    expected = dict(zip(ours, theirs, strict=False)) if matched else None
    assert counterparts(one, other) == expected


def test_counterparts_have_the_same_shapes() -> None:
    one, other = layout({"a_1": torch.zeros(2)}), layout({"a_2": torch.zeros(3)})
    assert counterparts(one, other) is None
