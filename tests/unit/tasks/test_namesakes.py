"""Two workers of one name on a host are told so, and nobody else is."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any, cast

import pytest

from torchord.cache.errors import CacheUnreachable
from torchord.cache.ledger.workers import Registry, WorkerInfo, new_info
from torchord.tasks.namesakes import warn_of_namesakes

OURS = new_info("client1@here", ["torchord.gradients"])
ANOTHER = replace(OURS, id="another", pid=os.getppid(), started=0, place="")


class Told:
    """A registry that knows some workers, or does not answer."""

    def __init__(self, *workers: WorkerInfo, away: bool = False) -> None:
        self.workers, self.away = workers, away

    def alive(self) -> dict[str, WorkerInfo]:
        if self.away:
            raise CacheUnreachable("away")
        return {info.id: info for info in self.workers}


def warned(caplog: pytest.LogCaptureFixture, *workers: WorkerInfo, **more: Any) -> list[str]:
    warn_of_namesakes(cast(Registry, Told(*workers, **more)), OURS)
    return [record.getMessage() for record in caplog.records]


def test_a_living_process_of_the_same_name_is_told(caplog: pytest.LogCaptureFixture) -> None:
    [said] = warned(caplog, ANOTHER)
    assert (
        said.startswith(f"process {ANOTHER.pid} is a worker named client1@here, too")
        and "-n client2@%h" in said
    )


@pytest.mark.parametrize(
    "other",
    [
        replace(ANOTHER, node="client2@here"),
        replace(ANOTHER, host="elsewhere"),
        OURS,  # before it started its program anew
        replace(OURS, id="ended", pid=1 << 30, started=1),
    ],
    ids=["another name", "another host", "itself", "ended"],
)
def test_nobody_else_is_told(other: WorkerInfo, caplog: pytest.LogCaptureFixture) -> None:
    assert warned(caplog, other) == []


def test_a_server_that_is_away_is_no_reason_to_say_anything(caplog: pytest.LogCaptureFixture) -> None:
    assert warned(caplog, away=True) == []
