"""Callbacks hear of every step, of rounds as of single ones, through the death of who calls them."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path

import pytest

from tests.faults.laboratory import CONFIG, WAIT_SECONDS, Laboratory, recipe
from tests.faults.recipes import Slow
from tests.support.hearing import Failing, Noted, noted
from tests.support.waiting import wait_until
from torchord.coordinator.callbacks import JsonLines


@pytest.mark.parametrize(
    ("mode", "plan"),
    [("single steps", "server.after_commit:8:kill"), ("rounds", "server.after_adopt:2:kill")],
)
def test_every_step_is_heard_of_and_the_bits_are_the_same(
    lab: Laboratory, tmp_path: Path, mode: str, plan: str
) -> None:
    config = dataclasses.replace(CONFIG, round_steps=1 if mode == "single steps" else 6)
    reference, path = lab.reference, tmp_path / "noted"
    made = recipe(dataset=partial(Slow, speeds=str(lab.speeds)))
    with lab.faults(plan):
        run = lab.master.submit(
            made,
            config,
            name=f"heard-{len(mode)}",
            callbacks=[partial(Noted, str(path)), JsonLines, partial(Failing, str(tmp_path / "bad"))],
        )
        lab.check(run, reference=reference)
    wait_until(lambda: noted(path)[-1][0] == "close", WAIT_SECONDS, message="the callbacks' end")
    found = noted(path)
    steps = [version for what, (version, _) in [each for each in found if each[0] == "step"]]
    assert list(dict.fromkeys(steps)) == list(range(1, 16)), "each, in order"
    losses = {value[0]: value[1] for what, value in found if what == "step"}
    assert list(losses.values()) == [report.loss for report in run.history()]
    evaluations = {value[0]: value[1] for what, value in found if what == "evaluation"}
    assert evaluations == run.evaluations()
    tensors = sorted(run.tensors()[1])
    versions = [value for what, value in found if what == "version"]
    assert versions and all(names == tensors for _, names in versions)
    events = list(run.events())
    written_at = {event.data["version"] for event in events if event.type == "checkpoint"}
    assert {value for what, value in found if what == "checkpoint"} == written_at
    lines = Path(lab.checkpoints) / run.name / "callbacks" / "history.jsonl"
    written = [json.loads(line) for line in lines.read_text().splitlines()]
    assert len({each["id"] for each in written}) == len(written), "no event twice"
    told = {event.data["callback"] for event in events if event.type == "callback failed"}
    assert told == {"tests.support.hearing:Failing"}
