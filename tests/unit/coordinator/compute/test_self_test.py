"""The digests of operators: the same at any time and in any state of the process, and one bit shows."""

from __future__ import annotations

import pytest
import torch

from tests.support.falsified import falsify
from torchord.coordinator.compute import self_test
from torchord.coordinator.compute.determinism import pinned
from torchord.coordinator.compute.known_kernels import PORTABLE_DIGESTS
from torchord.coordinator.compute.self_test import OF_NUMPY, OPERATORS


def found() -> dict[str, str]:
    with pinned(1, True):
        return self_test.digests()


def test_they_depend_on_nothing_that_was_before() -> None:
    first = found()
    torch.manual_seed(5)
    torch.randn(100)
    assert found() == first
    assert len(first) >= 20 and len(set(first.values())) == len(first)


@pytest.mark.parametrize("name", ["matmul", "conv2d", "softmax", "adam", OF_NUMPY])
def test_one_bit_of_one_operator_shows_there_alone(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    first = found()
    monkeypatch.setitem(OPERATORS, name, OPERATORS[name])
    falsify(name)
    other = found()
    assert [each for each in first if first[each] != other[each]] == [name]


def test_inputs_are_exact_numbers_of_every_size() -> None:
    values = self_test.values(40, 50)
    assert ((values * 1024).round() == values * 1024).all() and values.abs().max() <= 2
    assert len(values.unique()) > 1000


@pytest.mark.parametrize("release", PORTABLE_DIGESTS)
def test_what_is_known_of_a_release_is_all_but_numpy(release: str) -> None:
    assert set(PORTABLE_DIGESTS[release]) == set(OPERATORS) - {OF_NUMPY}
