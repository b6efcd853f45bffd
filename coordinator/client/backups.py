"""Who is idle at the end of a step offers to compute what a slow worker still holds.

A step lasts as long as its slowest shard. As its last shards are under way, each Client that writes a slot
asks the ledger in the same round trip whether another's shard is better computed once more (Dean and
Ghemawat, MapReduce, OSDI 2004; by the time that the holder will need, Zaharia et al., OSDI 2008). The first
to write the slot counts, so the bits are the same. On even machines nobody is late, and nothing is computed
twice. While shards wait in the queue, nobody is idle: what is late then is not in anyone's way, and the
ledger names none.
"""

from __future__ import annotations

import logging

from torchord.cache.errors import CacheError
from torchord.coordinator.messages.sender import Sender
from torchord.coordinator.runtime.services import RunContext

log = logging.getLogger(__name__)


def question(shards: int, slot: int, seconds: float) -> tuple[int, float] | None:
    """What the writer of a slot asks with, None if there is no point in it.

    Args:
        shards: of the step.
        slot: that was written; the writer of a partial sum does not know how long a shard takes.
        seconds: that it took.
    """
    return (shards, seconds) if slot < shards > 1 else None


def send(sender: Sender, context: RunContext, step: int, shard: int) -> None:
    """Publish the backup of a shard; whoever is idle takes it."""
    run = context.run
    log.info("run %s: shard %d of step %d is late; a backup is sent", run, shard, step)
    try:
        sender.gradient(run, step, shard, version=context.plan().version_for(step), backup=True)
    except CacheError as error:  # the supervisor asks, too
        log.warning("run %s: no backup in step %d: %s", run, step, error)
