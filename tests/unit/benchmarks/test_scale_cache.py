"""The arithmetic of docs/scale-cache.md: its tree is the coordinator's, and its limits are the right ones."""

from __future__ import annotations

import pytest

from benchmarks.scale_cache import Costs, Fleet, levels, memory, phases, traffic
from torchord.coordinator.spec.sum_tree import FanIn


@pytest.mark.parametrize("shards", [1, 8, 9, 64, 65, 1000])
def test_the_tree_is_the_coordinators(shards: int) -> None:
    assert sum(levels(shards, 8)) == FanIn(shards, 8).total - shards
    assert levels(shards, 0) == []


def test_known_quantities() -> None:
    plain = Fleet(workers=1000, per_host=8, model=10.0, fan_in=0, host_tier=False)
    assert traffic(plain) == (10_010, 20_000) and memory(plain) == 10_020
    shared = Fleet(workers=1000, per_host=8, model=10.0, fan_in=8, ratio=100)
    assert traffic(shared) == (100 + 144 * 10, 125 * 10 + 100 + 143 * 10)


def test_more_nodes_never_make_a_step_longer_and_the_server_is_a_floor() -> None:
    seconds = [
        sum(phases(Fleet(1000, 8, 10.0, nodes=nodes), Costs()).values()) for nodes in (1, 8, 64, 512, 4096)
    ]
    assert seconds == sorted(seconds, reverse=True)
    floor = phases(Fleet(1000, 8, 10.0, nodes=4096), Costs())
    assert seconds[-1] > floor["the server's sum"] > 0
