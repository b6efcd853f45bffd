"""The whole list of waits: each entry is reached, and said in the words of the table for people."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.control import begin
from tests.unit.coordinator.messages.test_waits import RUN, Laboratory, Shown
from torchord.cache.ledger.workers import DEAF_SECONDS, StoreMemory
from torchord.coordinator.master.fleet import Fleet
from torchord.coordinator.master.waiting import QUIET_SECONDS, Quiet
from torchord.coordinator.messages.task_names import GRADIENTS
from torchord.coordinator.messages.waits import WaitKind
from torchord.coordinator.runtime import activity
from torchord.coordinator.server.supervisor.discards import said_of

ERRORS = Path(__file__).resolve().parents[4] / "docs" / "errors.md"


def paused(lab: Laboratory) -> None:
    lab.begun().ledger.transition("paused", allowed=("running",), event="paused")


def nobody(*ids: str) -> Callable[[Laboratory], None]:
    def arrange(lab: Laboratory) -> None:
        for id in ids:
            del lab.begun().living[id]

    return arrange


def refused(lab: Laboratory) -> None:
    for id in ("w0", "w1"):
        lab.begun().say(id, refuses={RUN: "another torch"})


def says(id: str, **changes: Any) -> Callable[[Laboratory], None]:
    return lambda lab: lab.begun().say(id, **changes)


def computed(lab: Laboratory) -> None:
    begin(lab.begun().ledger, 0, 1, worker="w1", delivery="d1")


def in_a_round(lab: Laboratory) -> None:
    lab.begun().round()
    lab.turn("w0")


def evaluated(lab: Laboratory) -> None:
    lab.begun().ledger.launch_evaluation(0, 2, pin_seconds=60)
    lab.version = 3


def full(lab: Laboratory) -> None:
    lab.begun().memory = StoreMemory(1_000_001, 1_000_000, "noeviction")


def away(lab: Laboratory) -> None:
    lab.away = True


REACHED: dict[WaitKind, Callable[[Laboratory], None]] = {
    WaitKind.PERSON: paused,
    WaitKind.REDIS: away,
    WaitKind.ROOM: full,
    WaitKind.SERVER: nobody("s0"),
    WaitKind.CLIENT: nobody("w0", "w1"),
    WaitKind.REFUSED: refused,
    WaitKind.DEAF: says("w0", silent=DEAF_SECONDS + 5),
    WaitKind.HINDERED: says("s0", hindered={RUN: "try 3 of 10: cannot write /mnt: No space left on device"}),
    WaitKind.DISCARDED: says("s0", discarded={GRADIENTS: said_of(GRADIENTS)}),
    WaitKind.CALL: lambda lab: None,
    WaitKind.START: lambda lab: lab.say("s0", task=activity.update(RUN, 0)),
    WaitKind.UPDATE: says("s0", task=activity.update(RUN, 0)),
    WaitKind.QUEUE: lambda lab: lab.begun() and None,
    WaitKind.SHARDS: computed,
    WaitKind.ROUND: in_a_round,
    WaitKind.EVALUATION: evaluated,
}


def table() -> dict[str, list[str]]:
    """What a run waits for -> the words that a person reads, of the table in docs/errors.md."""
    text = ERRORS.read_text().partition("## What a run waits for")[2].partition("\n###")[0]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: re.findall(r'"([^"]+)"', row[1]) for row in rows[2:]}


def test_the_table_has_each_entry_once_and_no_other() -> None:
    assert sorted(table()) == sorted(kind.value for kind in WaitKind)
    assert set(REACHED) == set(WaitKind)


class Watch:
    """What a person is told of a run in which nothing happens, by a clock that the test turns."""

    def __init__(self, lab: Laboratory, patch: pytest.MonkeyPatch) -> None:
        self.lab, self.shown, self.passed = lab, Shown(), 0.0
        patch.setattr("torchord.coordinator.master.waiting.time.monotonic", lambda: self.passed)
        lab.memory = None
        self.quiet = Quiet(lab.waits, Fleet(self, RUN), self.shown)  # type: ignore[arg-type]

    @property
    def registry(self) -> Any:
        return self

    def alive(self) -> Any:
        return self.lab.living


@pytest.mark.parametrize("kind", WaitKind, ids=lambda kind: kind.name)
def test_it_is_said_within_fifteen_seconds(kind: WaitKind, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = Laboratory()
    watch = Watch(lab, monkeypatch)
    REACHED[kind](lab)
    head = replace(lab.ledger.head(), version=lab.version)
    watch.quiet.look(None if lab.away else head, moved=False)
    watch.passed = QUIET_SECONDS
    watch.quiet.look(None if lab.away else head, moved=False)
    words = table()[kind.value]
    assert words, "the table quotes what is read"
    telling = [line for line in watch.shown.lines if all(word in line for word in words)]
    assert telling, (words, watch.shown.lines)
    assert all(re.search(r", since [\d hmins]+; \w", line) for line in telling), "since when, and who ends it"
    assert f"waits for {kind.value}" in watch.shown.notes or len(watch.shown.lines) > 1
