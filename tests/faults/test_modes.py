"""Deaths under what a slot carries from step to step: residuals, inner optimizers, steps in flight."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from tests.faults.laboratory import CONFIG, Laboratory

MODES: dict[str, dict[str, Any]] = {
    "compression": {"compression": "topk:0.1"},
    "local steps": {"local_steps": 3, "epochs": 6},
    "staleness": {"staleness": 1},
    "all": {"compression": "topk:0.1", "local_steps": 2, "staleness": 2, "epochs": 6},
}


@pytest.mark.parametrize("mode", MODES)
def test_killed_in_mode(lab: Laboratory, mode: str) -> None:
    config = dataclasses.replace(CONFIG, **MODES[mode])
    reference = lab.check(lab.submit(config), reference=None)
    with lab.faults("server.after_commit:5:kill;client.after_put:5:kill"):
        run = lab.submit(config)
        lab.check(run, reference=reference)
    assert run.verify(reexecute=[run.status().version - 1]).ok
