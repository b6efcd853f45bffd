"""A training server's side of rounds: how many steps, for whom; taking over what they came to.

In a round the Clients step the optimizer themselves (`torchord.coordinator.client.round_task`). The server
opens it, and has nothing to do until it is over: then the last version lies in the cache with its optimizer
state, and the server goes on from there.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable
from typing import Literal

from torchord.cache.blobs.blob import BlobRef
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.ledger.records import FALSIFIED, Head, VersionRecord
from torchord.cache.ledger.rounds import KEPT_STEPS, RoundState
from torchord.cache.ledger.workers import WorkerInfo
from torchord.coordinator.messages.sender import Sender
from torchord.coordinator.messages.task_names import GRADIENTS
from torchord.coordinator.runtime.faults import Hook
from torchord.coordinator.runtime.services import Services
from torchord.coordinator.server.upkeep import Upkeep
from torchord.coordinator.server.warm_run import WarmRun

log = logging.getLogger(__name__)

ROUND_SECONDS = 1.0
"""What an automatic round is to last: a chord and two hand-overs cost some 20 ms, of this a fiftieth."""

_LOOK_AGAIN_SECONDS = 5.0  # whether what prevents rounds still does

_SLOWER, _COMPARED_SECONDS = 1.25, 30.0  # rounds of such steps rest for so long

Going = Literal["published", "under way", "lost", "waiting"]


class RoundOpener:
    """Opens rounds for one training server.

    Args:
        services: connections and stores of the process.
        sender: publishes their seats.
        upkeep: stores the optimizer state that they start from.
        queue: private queue where their chords call back.
        fault: called with the name of each point of the protocol; tests use it to die there.
    """

    def __init__(
        self, services: Services, sender: Sender, upkeep: Upkeep, *, queue: str, fault: Hook
    ) -> None:
        self.services = services
        self.sender = sender
        self.upkeep = upkeep
        self.queue = queue
        self.fault = fault
        self._rests: dict[str, float] = {}  # run -> until when (monotonic, s) single steps are taken for sure

    def open(self, warm: WarmRun) -> int | None:
        """Open a round at the present version; None if its next step is to be a single one.

        Returns:
            The round's last step.

        Raises:
            Fenced: another server has taken the run over.
        """
        steps = self.steps(warm, warm.version, seconds=warm.seconds)
        if steps < 2:
            return None
        here = [i for i in self.services.registry.alive().values() if GRADIENTS in i.queues and i.environment]
        if self._prevented(warm, here):
            self._rests[warm.run] = time.monotonic() + _LOOK_AGAIN_SECONDS
            return None
        seats = min(warm.context.plan().shards_in(warm.version), len(here))
        if not seats:
            return None
        if warm.state_version != warm.version:
            self.upkeep.publish_state(warm)
        first, last = warm.version, warm.version + steps - 1
        if warm.ledger.open_round(first, last, token=warm.token) != "ok":
            return None
        self.fault("server.after_open")
        self.sender.step(
            warm.run,
            first,
            range(seats),
            version=first,
            callback_queue=self.queue,
            steps=steps,
            seconds=steps * warm.seconds or None,
        )
        return last

    def _prevented(self, warm: WarmRun, clients: Iterable[WorkerInfo]) -> bool:
        """Whether there are Clients whose bits may be others, or who have no key to sign a version with."""
        keyring = self.services.keyring
        lacking = bool(keyring) and not keyring.local and any("server" not in i.signs for i in clients)
        return lacking or warm.ledger.head().skew != "refuse"

    def steps(self, warm: WarmRun, first: int, *, seconds: float) -> int:
        """How many steps the round from one step on would have; 1: none, a single step.

        Args:
            first: the step.
            seconds: what the one before took, 0 if that is not known.
        """
        context = warm.context
        plan, config = context.plan(), context.config
        if first >= plan.total_steps or not self._may(warm, first):
            return 1
        if warm.disputed is not None or first <= warm.alone_until:
            return 1
        if time.monotonic() < self._rests.get(warm.run, 0.0):
            return 1
        wanted = config.round_steps
        if isinstance(wanted, str):
            if not seconds:
                return 1
            wanted = max(1, math.floor(ROUND_SECONDS / seconds))
        end = min(first + wanted, plan.total_steps)
        for every in (config.checkpoint_every, config.evaluate_every):
            if every is not None:
                end = min(end, (first // every + 1) * every)
        end = min([end, *(step for step in plan.switches if step > first)])
        for step in range(first, end):
            if (tree := plan.fan_in(step)).partials or tree.checks:
                return max(1, step - first)
        return end - first

    def _may(self, warm: WarmRun, step: int) -> bool:
        """Whether the run's Clients can step its optimizer; what a single step has and a round has not."""
        config = warm.context.plan().config_at(step)
        if config.round_steps == 1 or config.staleness or not config.deterministic:
            return False
        return not config.decides_by_steps

    # --- what has become of one -----------------------------------------------------------------

    def look(self, ledger: Ledger, head: Head) -> tuple[Going, RoundState | None]:
        """How the open round stands.

        Returns:
            "published": its last version is stored; "under way": a participant lives; "waiting": nobody has
            begun; "lost": whoever was in it has died or left, and what they had come to with them.
        """
        state = ledger.round()
        if state is None or state.token != head.token or head.round is None:
            return "lost", state
        if state.published == head.version and state.disputed is None:
            return "published", state
        for worker in state.participants:
            info = self.services.registry.worker(worker)
            if info is not None and not info.ended and state.disputed is None:
                return "under way", state
        if state.disputed is None and head.version == state.first:
            return "waiting", state
        return "lost", state

    def adopt(self, warm: WarmRun, head: Head, record: VersionRecord, state: RoundState) -> None:
        """Go on from the version that a round came to.

        Args:
            record: of the head's version.
        """
        self.fault("server.before_adopt")
        taken = max(1, record.version - state.first)
        stored, pinned = warm.ledger.kept_versions()
        warm.adopt(record, (head.committed_at - warm.committed_at) / taken, head.committed_at)
        warm.stored, warm.pinned = stored, pinned
        self._compare(warm, state)
        over, left = record.version >= warm.end, self._left(warm, record)
        warm.spent = [*warm.left, *(left if over else [])]
        warm.left = [] if over else left
        warm.ledger.close_round(token=warm.token, committed=record.version)
        self.fault("server.after_adopt")

    def _compare(self, warm: WarmRun, state: RoundState) -> None:
        """Let automatic rounds rest whose steps take longer than this server's own: between hosts they may.

        There each participant reads what all others send; in a single step a Client reads the new version.
        """
        warm.rounds += 1  # of which the first has imports in it
        if warm.context.config.round_steps != "auto" or not state.apart or warm.rounds == 1:
            return
        if 0 < _SLOWER * warm.own_seconds < warm.seconds:
            log.info(
                "run %s: a step takes %.3f s in a round and %.3f s singly: single steps for a while",
                *(warm.run, warm.seconds, warm.own_seconds),
            )
            self._rests[warm.run] = time.monotonic() + _COMPARED_SECONDS

    def _left(self, warm: WarmRun, record: VersionRecord) -> list[BlobRef]:
        """The bytes of a round's last steps, which a participant that is behind may be reading at present."""
        kept = {blob.key for blob in record.blobs()}
        steps = range(max(0, record.version - KEPT_STEPS - 1), record.version)
        slots = [slot for step in steps for slot in warm.ledger.slots(step).values()]
        return [blob for slot in slots for blob in slot.blobs() if blob.key not in kept]

    def judge(self, warm: WarmRun, parameters: str) -> None:
        """Say who was wrong about a version that two participants made differently, now that it is made here.

        Args:
            parameters: digest of the version's parameters, as this server made them.
        """
        state = warm.disputed
        if state is None or state.disputed is None or warm.version < state.disputed:
            return
        warm.disputed = None
        if warm.version > state.disputed:
            return
        for worker, digest in state.rivals.items():
            if worker and digest != parameters:
                message = (
                    f"worker {worker} made other bytes of version {state.disputed} than the training server "
                    "and takes part in no further round of this run; look at its memory, torch and BLAS"
                )
                log.error("run %s: %s", warm.run, message)
                warm.ledger.claim(FALSIFIED + worker, message)
                warm.ledger.emit(
                    "falsified", {"worker": worker, "version": state.disputed, "message": message}
                )
