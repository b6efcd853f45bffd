"""What a Client does once a slot's bytes are stored: write the slot, and send what it makes possible.

That may be a backup. A step lasts as long as its slowest shard. As its last shards are under way, each Client
that writes a slot asks the ledger in the same round trip whether another's shard is better computed once more
(Dean and Ghemawat, MapReduce, OSDI 2004; by the time that the holder will need, Zaharia et al., OSDI 2008).
The first to write the slot counts, so the bits are the same. On even machines nobody is late, and nothing is
computed twice. While shards wait in the queue, nobody is idle: what is late then is not in anyone's way, and
the ledger names none.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torchord.cache.errors import CacheError
from torchord.cache.ledger.answers import Group, SlotVerdict
from torchord.cache.ledger.records import SlotRecord
from torchord.cache.servers.fast_client import Command
from torchord.coordinator.client.slot_lease import SlotTask
from torchord.coordinator.messages.sender import Sender
from torchord.coordinator.messages.task_names import UPDATES
from torchord.coordinator.runtime.context import RunContext
from torchord.coordinator.runtime.faults import Hook
from torchord.coordinator.runtime.services import Services
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
        task: SlotTask,
        slot: SlotRecord,
        *,
        incarnation: str,
        then: Callable[[], Command | None] | None = None,
    ) -> tuple[SlotVerdict, Any]:
        """Write a slot, and send what can be done now that it is there.

        Args:
            task: what was asked for.
            slot: a gradient's or a partial sum's; its bytes are stored.
            incarnation: what `Ledger.begin` answered.
            then: makes a command that may follow in the same round trip.

        Returns:
            The ledger's verdict, "written" for every one that means so, and the answer to the command
            that was to follow (None if it was not sent).
        """
        plan, ledger, step = context.plan(), context.ledger, task.step
        tree, version = plan.fan_in(step), plan.version_for(step)
        into = group_of(tree, slot.shard)
        finished = ledger.finish_slot(
            step,
            slot,
            incarnation=incarnation,
            version=version,
            into=into,
            then=None if then is None else then(),
            idle=_idle(tree.shards, slot.shard, slot.seconds),
        )
        verdict = finished.verdict
        if verdict not in WRITTEN:
            log.info("step %d slot %d of run %s: %s", step, slot.shard, context.run, verdict)
            self.services.gradients.delete(slot.blobs())
        elif verdict == "spare":
            self.services.gradients.delete([slot.blob])
        elif verdict == "group" and into is not None:
            self.fault("writer.before_send")
            self.sender.partial_sum(context.run, step, into.slot, version=version, join=task.join)
        if verdict in WRITTEN and finished.present == tree.total and (task.join is None or finished.called):
            self.sender.advance(context.run, queue=ledger.head().queue or UPDATES)
        if finished.late is not None:
            _send_backup(self.sender, context, step, finished.late)
        return "written" if verdict in WRITTEN else verdict, finished.answer


def _idle(shards: int, slot: int, seconds: float) -> tuple[int, float] | None:
    """What the writer of a slot asks with, None if there is no point in it.

    Args:
        shards: of the step.
        slot: that was written; the writer of a partial sum does not know how long a shard takes.
        seconds: that it took.
    """
    return (shards, seconds) if slot < shards > 1 else None


def _send_backup(sender: Sender, context: RunContext, step: int, shard: int) -> None:
    """Publish the backup of a shard; whoever is idle takes it."""
    run = context.run
    log.info("run %s: shard %d of step %d is late; a backup is sent", run, shard, step)
    try:
        sender.gradient(run, step, shard, version=context.plan().version_for(step), backup=True)
    except CacheError as error:  # the supervisor asks, too
        log.warning("run %s: no backup in step %d: %s", run, step, error)
