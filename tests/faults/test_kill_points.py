"""SIGKILL at every named point of the protocol: the run ends with the undisturbed run's bits."""

from __future__ import annotations

import pytest

from coordinator.faults import POINTS, parse
from tests.faults.laboratory import Laboratory

PLANS = (
    "server.before_acquire:1:kill",
    "server.after_acquire:1:kill",
    "server.before_initialise:1:kill",
    "server.after_initialise:1:kill",
    "server.before_apply:2:kill;client.before_begin:4:kill",
    "server.after_apply:2:kill;client.after_begin:4:kill",
    "server.after_publish:2:kill;client.before_put:4:kill",
    # Killed before the optimizer state of the new version is stored: the next server rolls the head back.
    "server.after_commit:4:kill;server.before_rollback:1:kill;server.after_rollback:1:kill",
    "server.before_launch:3:kill;client.after_put:4:kill",
    "sender.mid_launch:3:kill",
    "server.after_launch:3:kill;client.after_slot:4:kill",
    "server.before_checkpoint:2:kill;client.before_part:1:kill",
    "server.mid_checkpoint:2:kill;client.after_part:2:kill",
    "server.after_checkpoint:2:kill",
    "server.before_state:3:kill",
    "server.after_state:3:kill",
    "server.before_finish:1:kill",
    "server.after_finish:1:kill",
    "supervisor.before_look:1:kill",
)


@pytest.mark.parametrize("plan", PLANS)
def test_killed_at(lab: Laboratory, plan: str) -> None:
    reference = lab.reference
    with lab.faults(plan):
        lab.check(lab.submit(), reference=reference)


def test_every_point_is_tried() -> None:
    assert {fault.point for plan in PLANS for fault in parse(plan)} == set(POINTS)
