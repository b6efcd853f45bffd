"""What a training server does beside the steps: publish state, keep and delete versions, checkpoint."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import Any

from torchord.cache import keys
from torchord.cache.errors import CacheError, ChunkLost, Fenced, RecordDamaged
from torchord.cache.ledger.records import StateRecord
from torchord.coordinator.runtime.faults import Hook
from torchord.coordinator.runtime.services import Services
from torchord.coordinator.server.warm_run import NEVER, WarmRun

log = logging.getLogger(__name__)

_STATE_SHARE = 4  # published optimizer state may cost 1/4 of the parameters' bytes a step
_STATE_ALWAYS_NBYTES = 256 << 10
_STATE_SECONDS = 0.02  # steps that are shorter share one publication of a cheap state,
_STATE_STEPS = 8  # at most so many: what a restore replays of them
_REPLAY_SECONDS = 0.5  # larger states wait until a restore would replay this much besides


class Upkeep:
    """Keeps what a run needs to be restored from, and nothing else.

    Args:
        services: connections and stores of the process.
        fault: called with the name of each point of the protocol.
    """

    def __init__(self, services: Services, fault: Hook) -> None:
        self.services = services
        self.fault = fault

    # --- optimizer state in the cache -------------------------------------------------------

    def state_due(self, warm: WarmRun) -> bool:
        """Whether the optimizer state should go to the cache with the present version."""
        if warm.shared or warm.state_version == NEVER:
            return True
        steps, seconds = warm.version - warm.state_version, time.monotonic() - warm.state_at
        nbytes = warm.trainer.state_nbytes()
        if nbytes <= _STATE_ALWAYS_NBYTES:
            return steps >= _STATE_STEPS or seconds >= _STATE_SECONDS
        return seconds >= _REPLAY_SECONDS and steps * warm.record.blob.nbytes >= _STATE_SHARE * nbytes

    def publish_state(self, warm: WarmRun) -> None:
        """Store optimizer and scheduler state beside the present version.

        Raises:
            Fenced: another server has taken the run over.
        """
        self.fault("server.before_state")
        state = warm.trainer.state(copies=False)
        warm.record = self.services.parameters.publish_state(warm.ledger, warm.record, state)
        if not warm.ledger.put_version(warm.record, token=warm.token):
            raise Fenced(f"run {warm.run!r}: overtaken while publishing the state of version {warm.version}")
        warm.state_version, warm.state_at = warm.version, time.monotonic()
        self.fault("server.after_state")  # the version that had the state before goes with the next commit

    # --- versions -----------------------------------------------------------------------------

    def _oldest_kept(self, warm: WarmRun) -> int:
        """The present version, the one before, and what the steps under way are computed at."""
        return min(warm.version - 1, warm.oldest_needed())

    def outlived(self, warm: WarmRun) -> list[int]:
        """The stored versions that nobody needs any more once the present step is committed."""
        following = warm.version + 1
        if following >= warm.end:
            return []
        oldest = min(warm.version, warm.context.plan().version_for(following))
        kept = {*self._restorable(warm), *warm.best}
        return [version for version in warm.stored if version < oldest and version not in kept]

    def _restorable(self, warm: WarmRun) -> range:
        """The restore point, with the earlier versions that a replay from there would compute at."""
        if warm.state_version == NEVER:
            return range(0)
        plan = warm.context.plan()
        oldest = plan.version_for(min(warm.state_version, plan.total_steps - 1))
        return range(min(oldest, warm.state_version), warm.state_version + 1)

    def retain(self, warm: WarmRun, stored: tuple[int, ...], pinned: frozenset[int]) -> None:
        """Delete the versions that nobody needs.

        Kept are the recent ones, the pinned ones, the best ones, and what a restore needs.
        """
        recent = range(self._oldest_kept(warm), warm.version + 1)
        kept = {*recent, *self._restorable(warm), *warm.best} | pinned
        doomed = [version for version in stored if version not in kept]
        self.services.parameters.drop(warm.ledger, doomed, token=warm.token)

    def keep_stored(self, warm: WarmRun) -> None:
        """Store the present version again if its bytes were lost (a cache node died, or evicted them).

        Raises:
            Fenced: another server has taken the run over.
            CacheError: what else the steps under way are computed from is lost, of which nobody has a copy:
                the run has to be restored.
        """
        self._keep_recorded(warm)
        try:
            for blob in (warm.record.blob, *warm.record.shared_blobs()):
                self.services.chunks.require_stored(blob)
        except ChunkLost as error:
            log.warning("run %s: version %d is stored again: %s", warm.run, warm.version, error)
            warm.writer.doubt()
            record = warm.writer.store(warm.version, chain=warm.chain)
            record = replace(record, slots=warm.record.slots, delta=warm.record.delta)
            if not warm.ledger.put_version(record, token=warm.token):
                raise Fenced(f"run {warm.run!r}: overtaken while storing version {warm.version}") from error
            warm.record, warm.state_version = record, NEVER
        if warm.version < warm.end:
            self._require_others(warm)

    def _keep_recorded(self, warm: WarmRun) -> None:
        """Write the present version's record again where there is none, or something that is none."""
        try:
            if warm.ledger.version(warm.version) is not None:
                return
        except RecordDamaged as error:
            log.warning("run %s: version %d is recorded again: %s", warm.run, warm.version, error)
        if not warm.ledger.put_version(warm.record, token=warm.token):
            raise Fenced(f"run {warm.run!r}: overtaken while recording version {warm.version}")

    def _require_others(self, warm: WarmRun) -> None:
        """Make sure of what the steps under way need beside the present version's parameters.

        These are what slots kept, and with staleness earlier versions with what slots kept there.
        """
        record = self.services.parameters.record
        earlier = [record(warm.ledger, version) for version in range(warm.oldest_needed(), warm.version)]
        states = [state for each in (*earlier, warm.record) for state in each.slots.values()]
        parameters = [blob for each in earlier for blob in (each.blob, *each.shared_blobs())]
        needed = [*parameters, *(blob for state in states for blob in state.blobs())]
        for blob in {blob.key: blob for blob in needed}.values():  # a state may be several versions'
            self.services.chunks.require_stored(blob)

    # --- checkpoints --------------------------------------------------------------------------

    def checkpoint(self, warm: WarmRun) -> None:
        """Write the present version to disk and spill the ledger's older entries beside it."""
        self.fault("server.before_checkpoint")
        config = warm.context.config
        entries = warm.ledger.entry_texts(warm.spilled + 1, warm.version)
        warm.checkpoints.append_ledger(list(entries.values()))
        head = warm.ledger.head()
        meta = {
            "run": warm.run,
            # Of what a lost database of runs is made again.
            "run_record": {
                "total_steps": warm.end,
                "submitted_at": head.submitted_at,
                "committed_at": head.committed_at,
                "tags": list(head.tags),
                "notes": head.notes,
            },
            "incarnation": warm.context.incarnation,
            "chain": warm.chain,
            "parameters": warm.record.digest,
            "dataset_size": warm.context.plan().size,
            "evaluations": {str(v): m for v, m in warm.ledger.evaluations().items()},
        }
        state = warm.trainer.state()
        if warm.record.slots:
            state["slots"] = self._slot_trees(warm.record.slots)
        if warm.oldest_needed() < warm.version:
            state["window"] = self._window(warm)
        warm.checkpoints.save(warm.version, warm.trainer.replica.state_tensors(), state, meta)
        self.fault("server.after_checkpoint")
        warm.checkpoints.prune(config.keep_checkpoints, also=_lasting(warm))
        warm.spilled = warm.version
        kept_from = warm.version - keys.LEDGER_KEPT + 1
        if kept_from > 1 and warm.ledger.ledger_size() > keys.LEDGER_KEPT:
            warm.ledger.trim_entries(
                range(max(1, kept_from - 2 * config.checkpoint_every - keys.LEDGER_KEPT), kept_from)
            )
        warm.ledger.emit("checkpoint", {"version": warm.version, "path": warm.checkpoints.path(warm.version)})

    def _slot_trees(self, slots: dict[int, StateRecord]) -> dict[int, Any]:
        """The slots' states themselves."""
        return {shard: self.services.gradients.get_state(record) for shard, record in slots.items()}

    def _window(self, warm: WarmRun) -> dict[int, Any]:
        """The earlier versions that the steps under way are computed at (staleness)."""
        found, rest = {}, warm.writer.resting()
        for version in range(warm.oldest_needed(), warm.version):
            record, flat, _ = self.services.parameters.fetch(warm.ledger, version, rest=rest)
            found[version] = {"flat": flat, "slots": self._slot_trees(record.slots), "chain": record.chain}
        return found

    # --- departure ----------------------------------------------------------------------------

    def let_go(self, warm: WarmRun) -> None:
        """Publish the optimizer state, so that whoever serves the run next need not replay."""
        try:
            if warm.state_version != warm.version:
                self.publish_state(warm)
        except (CacheError, Fenced) as error:
            log.warning("run %s: state of version %d not published: %s", warm.run, warm.version, error)


def _lasting(warm: WarmRun) -> frozenset[int]:
    """The checkpoints that stay: the best ones, and what a fork begins with."""
    fork = warm.context.spec.get("fork")
    return warm.best if fork is None else warm.best | {fork["version"]}
