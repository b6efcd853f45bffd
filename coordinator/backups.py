"""Who is idle at the end of a step offers to compute what a slow worker still holds.

A step lasts as long as its slowest shard. As its last shards are under way, each Client that has finished one
asks the ledger whether another's is better computed once more (Dean and Ghemawat, MapReduce, OSDI 2004; by
the time that the holder will need, Zaharia et al., OSDI 2008). The first to write the slot counts, so the
bits are the same. On even machines nobody is late, and nothing is computed twice.
"""

from __future__ import annotations

import logging

from cache.errors import CacheError
from cache.ledger import Ledger
from coordinator.services import RunContext
from coordinator.step import Sender

log = logging.getLogger(__name__)


class Backups:
    """Asks when there is a point in it.

    While shards wait in the queue, nobody is idle: what is late then is not in anyone's way. So the ledger's
    answer says how many have not begun, and as many slots are waited for before it is asked again.

    Args:
        sender: publishes the backup; whoever is idle takes it.
    """

    def __init__(self, sender: Sender) -> None:
        self.sender = sender
        self._not_before: dict[str, tuple[int, int]] = {}  # run -> step, slots that must be present

    def offer(self, context: RunContext, ledger: Ledger, step: int, *, present: int, seconds: float) -> None:
        """Called after a slot was written.

        Args:
            present: slots of the step that are there now.
            seconds: what this shard took here.
        """
        run = context.run
        shards = context.plan().shards_in(step)
        asked, bar = self._not_before.get(run, (step, 0))
        if present >= shards or (asked == step and present < bar):
            return
        try:
            shard, waiting = ledger.late_shard(step, shards=shards, seconds=seconds)
            self._not_before = {run: (step, present + waiting)}
            if shard is not None:
                log.info("run %s: shard %d of step %d is late; a backup is sent", run, shard, step)
                version = context.plan().version_for(step)
                self.sender.gradient(run, step, shard, version=version, backup=True)
        except CacheError as error:  # the supervisor asks, too
            log.warning("run %s: no backup in step %d: %s", run, step, error)
