"""Processes that stop and come back: nothing of what they then send is applied twice."""

from __future__ import annotations

import pytest

from tests.faults.laboratory import HOURS, Laboratory, wait_version
from tests.support.processes import responds
from tests.support.waiting import wait_until
from torchord import Run


def tokens(run: Run) -> list[int]:
    """The fencing token under which each version was committed, in order."""
    return [entry.token for entry in run._entries(run._ledger.head())]


@pytest.mark.parametrize(
    "point",
    [
        "server.after_publish:3",  # one instruction from its commit
        "server.after_commit:3",
        "server.after_launch:3",
        "server.mid_checkpoint:1",
        "server.before_state:3",
    ],
)
def test_an_overtaken_server_wakes_up(lab: Laboratory, point: str) -> None:
    reference = lab.reference
    with lab.faults(f"{point}:stop"):
        run = lab.submit()
        pid = lab.wait_fired()
        version = run.status().version
        wait_version(run, version + 3)  # the standby serves the run
        lab.wake(pid)
        lab.check(run, reference=reference)
        found = tokens(run)
        assert found == sorted(found) and len(set(found)) >= 2


@pytest.mark.parametrize("point", ["client.after_begin:3", "client.before_put:3", "client.after_put:3"])
def test_a_client_wakes_up_late(lab: Laboratory, point: str) -> None:
    reference = lab.reference
    with lab.faults(f"{point}:stop"):
        run = lab.submit()
        pid = lab.wait_fired()
        version = run.status().version
        wait_version(run, version + 2)
        lab.wake(pid)
        lab.check(run, reference=reference)


def test_a_paused_redis(lab: Laboratory) -> None:
    """Every lease runs out meanwhile; nobody is taken for dead for it."""
    reference = lab.reference
    run = lab.submit()
    wait_version(run, 3)
    lab.cluster.broker.pause()
    try:
        wait_until(lambda: not responds(lab.cluster.broker), message="silence")
    finally:
        lab.cluster.broker.cont()
    lab.check(run, reference=reference)


@pytest.mark.parametrize(
    "plan",
    [
        "server.before_apply:2:raise;client.before_begin:5:raise",
        "server.after_publish:2:raise;client.after_begin:5:raise",
        "server.after_commit:2:raise;client.before_put:5:raise",
        "server.before_launch:2:raise;client.after_put:5:raise",
        "sender.mid_launch:2:raise;client.after_slot:5:raise",
        "server.after_launch:2:raise;server.before_state:4:raise",
        "server.after_acquire:1:raise;supervisor.before_look:2:raise",
    ],
)
def test_the_store_fails_for_a_moment(lab: Laboratory, plan: str) -> None:
    reference = lab.reference
    with lab.faults(plan):
        if "supervisor." in plan:
            lab.slow(HOURS)
        run = lab.submit()
        lab.hold_for_supervisor(plan, run)
        lab.check(run, reference=reference)
