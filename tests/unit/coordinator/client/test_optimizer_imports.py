"""What a first optimizer needs is imported in the background, by who will have one."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest

from tests.support import models
from tests.support.one_process import Fleet
from torchord import TrainingConfig
from torchord.coordinator.client import optimizer_imports
from torchord.coordinator.server import rounds


def test_it_is_imported_once_and_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer_imports, "_MODULE", "colorsys")
    monkeypatch.setattr(optimizer_imports, "_begun", False)
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    optimizer_imports.begin()
    for thread in threading.enumerate():
        if thread.name == "torchord-imports":
            assert thread.daemon
            thread.join()
    first = sys.modules.pop("colorsys")
    optimizer_imports.begin()
    assert first.__name__ == "colorsys" and "colorsys" not in sys.modules


@pytest.mark.parametrize(("steps", "wanted"), [("auto", True), (1, False)])
def test_a_single_step_of_a_run_with_rounds_begins_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int | str, wanted: bool
) -> None:
    begun: list[bool] = []
    monkeypatch.setattr(optimizer_imports, "begin", lambda: begun.append(True))
    monkeypatch.setattr(rounds, "ROUND_SECONDS", 0.0)
    recipe = models.mlp(evaluation=None, metrics=None)
    how = TrainingConfig(epochs=1, batch_size=20, shards=2, round_steps=steps, audit_fraction=0.0)
    assert Fleet(str(tmp_path), 1).run(recipe, how).state == "done"
    assert bool(begun) == wanted
