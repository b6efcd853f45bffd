"""Consistent hashing: even shares, and few keys move when nodes come and go."""

import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchord.cache.blobs.ring import Ring
from torchord.cache.errors import InvalidInput

KEYS = [f"torchord:blob:run:parameters:{i // 100}:{i % 100}" for i in range(10_000)]


def even(count):
    return Ring({f"redis://10.0.0.{i}:6379/0": 1.0 for i in range(count)})


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 16])
def test_shares_are_about_even(count):
    shares = Counter(map(even(count).owner, KEYS))
    assert len(shares) == count
    assert all(0.7 < share * count / len(KEYS) < 1.3 for share in shares.values())


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 16])
def test_a_node_more_moves_about_its_share_and_only_to_itself(count):
    before, after = even(count), even(count + 1)
    new = (set(after.names) - set(before.names)).pop()
    moved = [key for key in KEYS if before.owner(key) != after.owner(key)]
    assert all(after.owner(key) == new for key in moved)
    assert 0.7 < len(moved) * (count + 1) / len(KEYS) < 1.3


@pytest.mark.parametrize("count", [2, 3, 5, 8, 16])
def test_a_node_less_moves_only_its_own_keys_to_the_next_in_order(count):
    before, after = even(count), even(count - 1)
    lost = (set(before.names) - set(after.names)).pop()
    for key in KEYS:
        order = list(before.order(key))
        assert list(after.order(key)) == [name for name in order if name != lost]
        assert after.owner(key) == (order[1] if order[0] == lost else order[0])


def test_weights_are_shares():
    shares = Counter(map(Ring({"a": 1.0, "b": 2.0, "c": 0.5}).owner, KEYS))
    assert 0.8 < shares["b"] / (2 * shares["a"]) < 1.25 and 0.75 < 2 * shares["c"] / shares["a"] < 1.3


@settings(max_examples=50)
@given(st.sets(st.text(max_size=6), min_size=1, max_size=6), st.text(max_size=20))
def test_the_order_is_a_permutation_that_begins_with_the_owner(names, key):
    ring = Ring(dict.fromkeys(names, 1.0), points_per_node=8)
    order = list(ring.order(key))
    assert sorted(order) == sorted(names) and order[0] == ring.owner(key)
    assert order == list(Ring(dict.fromkeys(sorted(names, reverse=True), 1.0), points_per_node=8).order(key))


def test_every_process_draws_the_same_ring():
    script = (
        "from torchord.cache.blobs.ring import Ring\n"
        "print([Ring({'a': 1, 'b': 1, 'c': 1}).owner(f'k{i}') for i in range(50)])"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", script], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(seen) == 1


@pytest.mark.parametrize("weights", [{}, {"a": 0}, {"a": -1.0}, {"a": float("inf")}, {"a": float("nan")}])
def test_impossible_rings_are_refused(weights):
    with pytest.raises(InvalidInput):
        Ring(weights)
