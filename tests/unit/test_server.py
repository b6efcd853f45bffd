"""When a training server launches an evaluation."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from torchord.coordinator.server.finish import Finish


class Ends(Finish):
    """Notes the versions whose evaluation it would launch."""

    def __init__(self) -> None:
        self.launched: list[int] = []

    def launch_evaluation(self, warm: Any) -> None:
        self.launched.append(warm.version)


def evaluated(every: int | None, evaluation: object = "a dataset", total: int = 6) -> list[int]:
    """The versions of a run of `total` steps at which an evaluation is launched beside the steps."""
    ends = Ends()
    for version in range(total + 1):
        context = SimpleNamespace(
            config=SimpleNamespace(evaluate_every=every),
            plan=lambda: SimpleNamespace(total_steps=total),
            recipe=SimpleNamespace(evaluation=evaluation),
        )
        ends.evaluate_if_due(SimpleNamespace(version=version, context=context))  # type: ignore[arg-type]
    return ends.launched


@pytest.mark.parametrize(
    ("every", "versions"),
    [(2, [2, 4]), (4, [4]), (1, [1, 2, 3, 4, 5]), (7, []), (None, [])],
    ids=["not the first, nor the last, which its end evaluates", "4", "each", "beyond the end", "never"],
)
def test_an_evaluation_is_launched_at_each_version_that_the_config_asks_for(
    every: int | None, versions: list[int]
) -> None:
    assert evaluated(every) == versions


def test_no_evaluation_without_a_dataset_for_it() -> None:
    assert evaluated(2, evaluation=None) == []
