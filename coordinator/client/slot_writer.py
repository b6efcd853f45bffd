"""What a Client does once a slot's bytes are stored: write the slot, and send what it makes possible."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torchord.cache.ledger.answers import Group, SlotVerdict
from torchord.cache.ledger.records import SlotRecord
from torchord.cache.servers.fast_client import Command
from torchord.coordinator.client import backups
from torchord.coordinator.messages.sender import Join, Sender
from torchord.coordinator.messages.task_names import UPDATES
from torchord.coordinator.runtime.faults import Hook
from torchord.coordinator.runtime.services import RunContext, Services
from torchord.coordinator.spec.sum_tree import FanIn

log = logging.getLogger(__name__)

WRITTEN: tuple[SlotVerdict, ...] = ("written", "group", "spare")


def group_of(tree: FanIn, slot: int) -> Group | None:
    """The partial sum that a slot goes into, as the ledger is told; None for a root."""
    parent = tree.parent(slot)
    if parent is None:
        return None
    inputs = tree.inputs(parent)
    return Group(parent, inputs[0], inputs[-1])


class SlotWriter:
    """Writes slots for one worker process.

    Args:
        services: connections and stores of the process.
        sender: for the partial sum that a slot makes possible, or the update of a complete step.
        fault: called with the name of each point of the protocol.
    """

    def __init__(self, services: Services, sender: Sender, fault: Hook) -> None:
        self.services = services
        self.sender = sender
        self.fault = fault

    def write(
        self,
        context: RunContext,
        step: int,
        slot: SlotRecord,
        *,
        incarnation: str,
        join: Join | None,
        then: Callable[[], Command | None] | None = None,
    ) -> tuple[SlotVerdict, Any]:
        """Write a slot, and send what can be done now that it is there.

        Args:
            slot: a gradient's or a partial sum's; its bytes are stored.
            incarnation: what `Ledger.begin` answered.
            join: the chord that the writing task belongs to.
            then: makes a command that may follow in the same round trip.

        Returns:
            The ledger's verdict, "written" for every one that means so, and the answer to the command
            that was to follow (None if it was not sent).
        """
        plan, ledger = context.plan(), self.services.ledger(context.run)
        tree, version = plan.fan_in(step), plan.version_for(step)
        into = group_of(tree, slot.shard)
        finished = ledger.finish_slot(
            step,
            slot,
            incarnation=incarnation,
            version=version,
            into=into,
            then=None if then is None else then(),
            idle=backups.question(tree.shards, slot.shard, slot.seconds),
        )
        verdict = finished.verdict
        if verdict not in WRITTEN:
            log.info("step %d slot %d of run %s: %s", step, slot.shard, context.run, verdict)
            self.services.gradients.delete(slot.blobs())
        elif verdict == "spare":
            self.services.gradients.delete([slot.blob])
        elif verdict == "group" and into is not None:
            self.fault("writer.before_send")
            self.sender.partial_sum(context.run, step, into.slot, version=version, join=join)
        if verdict in WRITTEN and finished.present == tree.total and (join is None or finished.called):
            self.sender.advance(context.run, queue=ledger.head().queue or UPDATES)
        if finished.late is not None:
            backups.send(self.sender, context, step, finished.late)
        return "written" if verdict in WRITTEN else verdict, finished.answer
