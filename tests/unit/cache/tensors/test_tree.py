from __future__ import annotations

import json
import math
from collections import Counter, OrderedDict, deque, namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.inprocess import same
from torchord.cache.errors import CheckpointError
from torchord.cache.tensors.tree import flatten, unflatten

leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=5),
    st.just(torch.float16),
    st.builds(lambda n: torch.arange(n, dtype=torch.float32), st.integers(0, 4)),
)
keys = st.one_of(st.text(max_size=3), st.integers(-3, 3))
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(keys, inner, max_size=4),
        st.dictionaries(keys, inner, max_size=3).map(OrderedDict),
    ),
    max_leaves=15,
)


def identical(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return same(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(identical(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(identical, one, other))
    if isinstance(one, float):
        return (math.isnan(one) and math.isnan(other)) or (one, math.copysign(1, one)) == (
            other,
            math.copysign(1, other),
        )
    return bool(one == other)


def there_and_back(tree: Any) -> Any:
    skeleton, tensors = flatten(tree)
    return unflatten(json.loads(json.dumps(skeleton, allow_nan=False)), tensors)


@settings(max_examples=300, deadline=None)
@given(trees)
def test_any_tree_comes_back_as_it_was(tree: Any) -> None:
    assert identical(there_and_back(tree), tree)


def test_counters_stay_counters() -> None:
    """MultiStepLR keeps its milestones in one."""
    found = there_and_back({"milestones": Counter({30: 1, 80: 2})})
    assert type(found["milestones"]) is Counter and found["milestones"][99] == 0


def test_tensors_are_named_by_their_path() -> None:
    skeleton, tensors = flatten({"state": {0: {"step": torch.tensor(3.0)}}, "groups": [torch.ones(1)]})
    assert list(tensors) == ["state.0.step", "groups.0"]
    assert json.dumps(skeleton).count("tensor") == 2


def test_paths_that_coincide_get_names_of_their_own() -> None:
    tree = {"a.b": torch.tensor(1), "a": {"b": torch.tensor(2)}, "a.b~2": torch.tensor(3)}
    assert identical(there_and_back(tree), tree)
    assert identical(there_and_back(torch.tensor(4)), torch.tensor(4))
    tree = {"": torch.tensor(1), 1: torch.tensor(2), "1": torch.tensor(3)}
    assert identical(there_and_back(tree), tree)


def test_numpy_scalars_become_pythons() -> None:
    found = there_and_back({"f": np.float64(0.1), "i": np.int32(4), "b": np.bool_(True)})
    assert found == {"f": 0.1, "i": 4, "b": True}
    assert [type(value) for value in found.values()] == [float, int, bool]


@pytest.mark.parametrize(
    ("tree", "path"),
    [
        ({"a": [1, {"b": object()}]}, r"'a\.1\.b'.*builtins\.object"),
        ({"a": deque([1])}, "'a'.*deque"),
        ({"a": {1, 2}}, "'a'.*set"),
        ({"a": lambda: 0}, "'a'.*function"),
        ({"a": {(1, 2): 3}}, r"'a'.*\(1, 2\)"),
        ({"a": {True: 3}}, "'a'.*True"),
        ({"a": namedtuple("Point", "x")(1)}, "'a'.*Point"),
        ({"a": b"raw"}, "'a'.*bytes"),
        (object(), "the state"),
    ],
)
def test_what_cannot_be_saved_is_named_by_its_path(tree: Any, path: str) -> None:
    with pytest.raises(CheckpointError, match=path):
        flatten(tree)


@pytest.mark.parametrize(
    "skeleton",
    [
        {"tensor": "absent"},
        {"unknown": 1},
        {"float": "huge"},
        {"dtype": "nn"},
        {"dict": [1]},
        {},
        {"a": 1, "b": 2},
        {"dict": [[[1], 2]]},
        {"tuple": 3},
        {"dtype": "nothing"},
        {"tensor": []},
    ],
)
def test_malformed_skeletons_are_refused(skeleton: Any) -> None:
    with pytest.raises(CheckpointError, match="damaged"):
        unflatten(skeleton, {})
