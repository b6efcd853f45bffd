"""Whoever is to be told is told, whichever process dies on the way: each event once, by its id."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest

from tests.faults.laboratory import CONFIG, WAIT_SECONDS, Laboratory, recipe
from tests.faults.recipes import Slow
from tests.support.waiting import wait_until
from torchord import Master

PLANS = (
    ("single steps", "messenger.before_send:1:kill;messenger.after_send:1:kill;server.after_commit:8:kill"),
    ("rounds", "messenger.after_send:2:kill;server.after_adopt:2:kill"),
)


@pytest.mark.parametrize(("mode", "plan"), PLANS)
def test_each_event_is_told_once_by_its_id_through_kills_of_the_server(
    lab: Laboratory, monkeypatch: pytest.MonkeyPatch, mode: str, plan: str
) -> None:
    config = dataclasses.replace(CONFIG, round_steps=1 if mode == "single steps" else 6)
    monkeypatch.setenv("TORCHORD_TELL_URLS", lab.receiver.url)
    master, hook = Master(lab.cluster.url, checkpoint_dir=lab.checkpoints), f"{lab.receiver.url}/{len(mode)}"
    reference = lab.reference
    made = recipe(dataset=partial(Slow, speeds=str(lab.speeds)))
    with lab.faults(plan):
        run = master.submit(made, config, name=f"told-{len(mode)}", on={"done": hook, "evaluated": [hook]})
        lab.check(run, reference=reference)
        wait_until(lambda: lab.revive() is not None and not run.untold(), WAIT_SECONDS, "all to be told")
    told = lab.receiver.of(run.name)
    once = {notice["id"]: notice for notice in told}
    assert [id.rpartition("/")[2] for id in sorted(once)] == [
        "done-15.0",
        *(f"evaluated-{version}.0" for version in (12, 15, 6)),
    ]
    assert all(notice == once[notice["id"]] for notice in told), "told again it says the same"
    assert len(told) > len(once), "the kill after a call leaves it to be made again"
    found = {
        notice["version"]: notice["metrics"] for notice in once.values() if notice["event"] == "evaluated"
    }
    assert found == run.evaluations()
    assert sorted(e.data["event"] for e in run.events() if e.type == "told") == ["done"] + ["evaluated"] * 3
    assert run.status().untold == ()
