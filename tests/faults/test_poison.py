"""A shard that takes down, or holds up, whoever computes it: a few tries, then the run says so and stops."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import pytest

from tests.faults.laboratory import CONFIG, WAIT_SECONDS, Laboratory
from tests.faults.recipes import HARMS, Harmful
from tests.support.waiting import wait_until

AT = 17  # a sample that the first epoch reads in a step of its own shards


@pytest.mark.parametrize("harm", HARMS)
def test_poison(lab: Laboratory, tmp_path: Path, harm: str) -> None:
    reference = lab.reference
    cure = tmp_path / "cure"
    config = dataclasses.replace(CONFIG, max_attempts=2, shard_timeout_seconds=2.0, audit_fraction=0)
    run = lab.submit(config, dataset=partial(Harmful, harm=harm, at=AT, cure=str(cure)))

    def failed() -> bool:
        if harm == "kill":
            lab.revive()
        return run.status().state == "failed"

    wait_until(failed, WAIT_SECONDS, lambda: f"the end of the tries: {run.status()}")
    head = run._ledger.head()
    reason = head.error or {}
    shard, step = reason["shard"], reason["step"]
    assert AT in reason["samples"]
    assert f"shard {shard} of step {step} (samples [" in reason["message"]
    said = "took its worker down 2 times in a row" if harm == "kill" else "exceeded shard_timeout_seconds=2"
    assert said in reason["message"]
    kept = {number: slot.worker for number, slot in run._ledger.slots(step).items()}
    assert kept and shard not in kept

    cure.touch()  # the cause is corrected; workers that hang go on
    lab.revive()
    run.resume()
    lab.check(run, reference=reference)
    entry = next(entry for entry in run._entries(run._ledger.head()) if entry.version == step + 1)
    assert {slot.shard: slot.worker for slot in entry.slots if slot.shard in kept} == kept
