"""Weights from elsewhere fit a new model, or are refused with the tensors' names."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.support.recipes_optim import Normed
from torchord.cache.errors import InvalidInput
from torchord.coordinator.compute.starting_weights import final_tensors, put_weights


def weights() -> dict[str, Tensor]:
    """A state dict of the tied model, other than that of a new one."""
    return {name: value + 1 for name, value in Normed().state_dict().items()}


def test_a_state_dict_is_taken_over() -> None:
    model, given = Normed(), weights()
    tied = model.second.weight
    put_weights(model, given, "file x")
    assert model.third.weight is tied is model.second.weight
    for name, value in model.state_dict().items():
        assert torch.equal(value, given[name]), name
    assert not model.frozen.weight.requires_grad and model.first.weight.requires_grad


@pytest.mark.parametrize("left_out", ["second.weight", "third.weight"])
def test_of_tied_tensors_one_name_will_do(left_out: str) -> None:
    model, given = Normed(), weights()
    expected = given["second.weight"].clone()
    del given[left_out]
    put_weights(model, given, "file x")
    assert torch.equal(model.second.weight, expected) and torch.equal(model.third.weight, expected)


class Passing(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 2)
        self.register_buffer("table", torch.arange(4.0), persistent=False)


@pytest.mark.parametrize("there", [torch.zeros(9), torch.zeros(4), None])
def test_buffers_that_no_state_dict_has_stay_as_they_were_made(there: Tensor | None) -> None:
    model = Passing()
    given = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    put_weights(model, given if there is None else {**given, "table": there}, "file x")
    assert torch.equal(model.table, torch.arange(4.0)) and not model.weight.any()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"first.weight": None, "norm.running_mean": None}, "it lacks 'first.weight', 'norm.running_mean'"),
        ({"other": torch.ones(1)}, "the model lacks 'other'"),
        (
            {"first.bias": torch.ones(9)},
            r"'first.bias' is float32 \(9,\) there and float32 \(8,\) in the model",
        ),
        (
            {"first.bias": torch.ones(8, dtype=torch.float16)},
            r"'first.bias' is float16 \(8,\) there and float32",
        ),
        (
            {"third.weight": torch.ones(8, 8)},
            "'second.weight' and 'third.weight' are one tensor in the model",
        ),
        ({f"n{i}": torch.ones(1) for i in range(7)}, "the model lacks 'n0', 'n1', 'n2', 'n3' and 3 more"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_taken(
    changes: dict[str, Tensor | None], told: str
) -> None:
    model = Normed()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    given = {name: value for name, value in {**weights(), **changes}.items() if value is not None}
    with pytest.raises(InvalidInput, match=f"start_from: file x does not fit the recipe's model: .*{told}"):
        put_weights(model, given, "file x")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_version_stands_for_its_average() -> None:
    version = {
        "weight": torch.zeros(2),
        "bias": torch.zeros(1),
        "torchord/loss_scale": torch.ones(2),
        "torchord/average": torch.tensor(3),
        "torchord/average/weight": torch.ones(2),
    }
    found = final_tensors(version)
    assert list(found) == ["weight", "bias"]
    assert torch.equal(found["weight"], torch.ones(2)) and torch.equal(found["bias"], torch.zeros(1))
