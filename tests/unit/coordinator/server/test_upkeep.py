"""Which stored versions a training server deletes beside the steps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from torchord.coordinator.server.upkeep import Upkeep
from torchord.coordinator.server.warm_run import NEVER, WarmRun


class Parameters:
    """Notes the versions that are dropped."""

    def __init__(self) -> None:
        self.dropped: list[int] = []

    def publish_state(self, ledger: Any, record: Any, state: Any) -> Any:
        return record

    def drop(self, ledger: Any, versions: Any, *, token: int) -> None:
        self.dropped += versions


class Kept:
    """A run at a version, whose last published state is that of an earlier one."""

    def __init__(
        self,
        version: int,
        state_version: int,
        pinned: set[int],
        oldest_needed: int | None = None,
        best: frozenset[int] = frozenset(),
    ) -> None:
        self.parameters = Parameters()
        self.upkeep = Upkeep(cast(Any, SimpleNamespace(parameters=self.parameters)), lambda name: None)
        needed = version if oldest_needed is None else oldest_needed
        plan = SimpleNamespace(total_steps=100, version_for=lambda step: step - (version - needed))
        self.warm = cast(
            WarmRun,
            SimpleNamespace(
                run="unit", version=version, state_version=state_version, state_at=0.0, token=1, record=None,
                pinned=frozenset(pinned), trainer=SimpleNamespace(state=lambda copies: {}),
                ledger=SimpleNamespace(put_version=lambda record, token: True),
                oldest_needed=lambda: needed, context=SimpleNamespace(plan=lambda: plan),
                end=100, best=frozenset(best),
            ),
        )  # fmt: skip

    def publish(self) -> None:
        self.upkeep.publish_state(self.warm)
        assert self.warm.state_version == self.warm.version
        assert self.parameters.dropped == [], "readers of the version before may still be at it"


@pytest.mark.parametrize(
    ("one", "dropped"),
    [
        (Kept(20, 12, set()), [12]),
        (Kept(20, 12, {12}), []),
        (Kept(20, 12, {11}), [12]),
        (Kept(20, NEVER, set()), [12]),
        (Kept(20, 15, set(), oldest_needed=12), []),
    ],
    ids=["nobody needs it", "evaluated", "another is", "there was no state", "steps use it"],
)
def test_the_version_of_the_last_state_goes_once_there_is_another(one: Kept, dropped: list[int]) -> None:
    """While it is being evaluated it stays, or the evaluation could never be made."""
    if one.warm.state_version == 12:
        one.upkeep.retain(one.warm, (12, 19, 20), one.warm.pinned)
        assert one.parameters.dropped == [], "a restore starts from it"
    one.publish()
    one.upkeep.retain(one.warm, (12, 19, 20), one.warm.pinned)
    assert one.parameters.dropped == dropped


def test_the_best_versions_stay() -> None:
    one = Kept(20, 19, set(), best=frozenset({12}))
    one.warm.stored = (12, 13, 19, 20)
    assert one.upkeep.outlived(one.warm) == [13]
    one.upkeep.retain(one.warm, (12, 13, 19, 20), frozenset())
    assert one.parameters.dropped == [13]


def test_the_commit_after_a_state_outlives_the_version_of_the_state_before() -> None:
    one = Kept(20, 12, set())
    one.warm.stored = (12, 19, 20)
    assert one.upkeep.outlived(one.warm) == [19]
    one.publish()
    assert one.upkeep.outlived(one.warm) == [12, 19]


def test_a_version_that_was_evaluated_goes_with_a_later_commit() -> None:
    one = Kept(20, 12, {12})
    one.publish()
    one.upkeep.retain(one.warm, (12, 19, 20), frozenset({12}))
    assert one.parameters.dropped == []
    one.upkeep.retain(one.warm, (12, 19, 20), frozenset())
    assert one.parameters.dropped == [12]
