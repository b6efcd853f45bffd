"""Where a run stands, by the control plane alone: nothing of it loads torch."""

from __future__ import annotations

from contextlib import suppress

from torchord.cache.errors import RecordDamaged
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.ledger.outbox import Telling
from torchord.cache.ledger.records import Head
from torchord.coordinator.master.fleet import Fleet
from torchord.coordinator.master.follower import Follower
from torchord.coordinator.master.reports import RunStatus, stop_reason
from torchord.coordinator.master.switching import plan_of
from torchord.coordinator.master.waiting import RESTING, Quiet, Shown
from torchord.coordinator.messages.waits import Waits
from torchord.coordinator.runtime.control_plane import ControlPlane
from torchord.coordinator.spec.plan import Plan

_UNTOLD_SHOWN = 20


def untold(telling: Telling) -> str:
    """What could not be told at once, in words; "" where nothing has gone wrong."""
    if not telling.error:
        return ""
    tries = f"{telling.tries} {'try' if telling.tries == 1 else 'tries'}"
    stands = (
        f"given up after {tries}, until `torchord told NAME --again`" if telling.dead else f"{tries} so far"
    )
    return f"{telling.event} ({telling.id}), {stands}: {telling.error}"


class Standing:
    """Looks at one run.

    Args:
        plane: connections of this process.
        name: of the run.

    Attributes:
        ledger: the run's control plane.
        fleet: its workers.
    """

    def __init__(self, plane: ControlPlane, name: str) -> None:
        self.name = name
        self.ledger: Ledger = plane.ledger(name)
        self.fleet = Fleet(plane, name)
        self._waits = Waits(self.ledger, self.plan, memory=lambda: plane.registry.memory())
        self._planned: tuple[str, Plan] | None = None  # of which incarnation

    def status(self) -> RunStatus:
        """Where the run stands now.

        Raises:
            RunNotFound: if the server knows no such run.
        """
        head = self.ledger.head()
        epoch = None
        with suppress(RecordDamaged):  # a run whose spec is damaged has a status, too
            if head.total_steps is not None and head.dataset_size:
                plan = self.plan(head)
                epoch = plan.locate(max(0, min(head.version, head.total_steps - 1)))[0] if plan else None
        error = head.error or {}
        alive = {} if head.status in RESTING else self.fleet.alive()
        return RunStatus(
            name=self.name,
            state=head.status,
            version=head.version,
            total_steps=head.total_steps,
            epoch=epoch,
            error=error.get("message"),
            traceback=error.get("traceback", ""),
            submitted_at=head.submitted_at,
            server=head.owner,
            waiting_for=() if head.status in RESTING else tuple(self.fleet.idle_queues(alive)),
            refused=self.fleet.refused(alive),
            discarded=self.fleet.discarded(alive),
            waits=self._waits.look(head, alive),
            reason=stop_reason(head),
            untold=self._untold() if head.on else (),
        )

    def _untold(self) -> tuple[str, ...]:
        return tuple(filter(None, map(untold, self.ledger.outbox())))[-_UNTOLD_SHOWN:]

    def follow(self, after: str = "0-0") -> Follower:
        """See `Run.follow`."""
        return Follower(self.ledger, after)

    def quiet(self, shown: Shown) -> Quiet:
        """See `Run.quiet`."""
        return Quiet(self._waits, self.fleet, shown)

    def plan(self, head: Head) -> Plan | None:
        """The run's plan at a head, None where it is not known yet."""
        if self._planned is not None and self._planned[0] == head.incarnation:
            return self._planned[1]
        plan = plan_of(self.ledger, head, self.ledger.spec())
        self._planned = None if plan is None else (head.incarnation, plan)
        return plan
