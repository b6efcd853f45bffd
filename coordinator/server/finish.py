"""What a run does beside and after its steps: evaluations that are due, and its end."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torchord.cache.blobs.blob import BlobRef
from torchord.cache.errors import Fenced
from torchord.cache.ledger.records import StateRecord
from torchord.coordinator.messages.sender import Sender
from torchord.coordinator.runtime.faults import Hook
from torchord.coordinator.runtime.services import Services
from torchord.coordinator.runtime.statement import statement
from torchord.coordinator.server.upkeep import Upkeep
from torchord.coordinator.server.warm_run import WarmRun

log = logging.getLogger(__name__)

_EVALUATION_PIN_SECONDS = 6 * 3600.0
_EVALUATION_PART = 4096


class Finish:
    """Launches evaluations and ends runs, for one training server.

    Args:
        services: connections and stores of the process.
        sender: publishes evaluations.
        upkeep: stores again what was lost.
        checkpointed: writes the last checkpoint; False if that is to be tried again.
        fault: called with the name of each point of the protocol; tests use it to die there.
    """

    def __init__(
        self,
        services: Services,
        sender: Sender,
        upkeep: Upkeep,
        checkpointed: Callable[[WarmRun], bool],
        fault: Hook,
    ) -> None:
        self.services = services
        self.sender = sender
        self.upkeep = upkeep
        self.checkpointed = checkpointed
        self.fault = fault

    def evaluate_if_due(self, warm: WarmRun) -> None:
        """Launch the evaluation that the config asks for at the present version, if there is one."""
        if warm.evaluates(warm.version):
            self.launch_evaluation(warm)

    def launch_evaluation(self, warm: WarmRun) -> bool:
        """Publish the evaluation of the present version; it stays stored until that is done.

        Returns:
            False if there is nothing to evaluate it with.
        """
        size = warm.ledger.head().evaluation_size
        if not size:
            return False
        parts = evaluation_parts(size, warm.context.config.shard_count)
        if warm.ledger.launch_evaluation(warm.version, parts, pin_seconds=_EVALUATION_PIN_SECONDS):
            self.sender.evaluation(warm.run, warm.version, range(parts), parts)
        return True

    def end(self, warm: WarmRun, receipt: dict[str, Any]) -> dict[str, Any]:
        """Evaluate the last version, write the last checkpoint, end the run."""
        ledger, version = warm.ledger, warm.version
        if warm.context.recipe.evaluation is not None:
            if version not in ledger.evaluations():
                self.launch_evaluation(warm)
            if ledger.pending_evaluations():
                if receipt["status"] == "waiting":  # somebody called for another reason than a commit
                    self.upkeep.keep_stored(warm)
                return {**receipt, "status": "evaluating"}
        if (keep := warm.context.config.keep_rule) is not None:
            warm.best = frozenset(keep.best(ledger.evaluations()))
        if warm.spilled != version and not self.checkpointed(warm):
            return {**receipt, "status": "checkpoint not written"}  # the supervisor calls again
        if warm.record.slots or warm.record.delta is not None:  # no slot and no Client has a next step
            kept, warm.record = warm.record, replace(warm.record, slots={}, delta=None)
            if not ledger.put_version(warm.record, token=warm.token):
                raise Fenced(f"run {warm.run!r}: overtaken at its end")
            left = warm.record.blobs()
            self.services.gradients.delete(blob for blob in kept.blobs() if blob not in left)
        if self.services.file_keyring:
            self._state(warm)
        stopped = ledger.head().stopped
        why = {} if stopped is None else {"reason": f"stopped: {stopped['reason']}"}
        self.fault("server.before_finish")
        done, _ = ledger.transition(
            "done", allowed=("running",), event="done", data={"version": version, **why}, token=warm.token
        )
        if done:
            log.info("run %s: done, with %d steps", warm.run, version)
            stored = ledger.versions()
            outlived = [v for v in stored if v != version and v not in warm.best]
            self.services.parameters.drop(ledger, outlived, token=warm.token)
            ledger.retire(self._begun(warm))
            for record in (warm.record, *(stored[v] for v in warm.best if v != version and v in stored)):
                self.services.parameters.keep(record)
            self.services.chunks.delete(_started_from(warm.context.spec))
        self.fault("server.after_finish")
        return {**receipt, "status": "done", "version": version}

    def _begun(self, warm: WarmRun) -> range:
        """The steps that were begun behind the version that a run stopped with; their gradients go."""
        if warm.stopped_at is None:
            return range(0)
        begun = range(warm.version, max(warm.version, warm.ledger.head().reached) + 1)
        for step in begun:
            slots = warm.ledger.slots(step).values()
            self.services.gradients.delete(blob for slot in slots for blob in slot.blobs())
        return begun

    def _state(self, warm: WarmRun) -> None:
        """Seal a statement of what the run has made, beside its checkpoints."""
        made = statement(
            warm.run,
            warm.context.spec,
            version=warm.version,
            chain=warm.chain,
            tensors={name: tensor.cpu() for name, tensor in warm.trainer.replica.state_tensors().items()},
            finished_at=time.time(),
        )
        warm.checkpoints.save_statement(made)


def _started_from(spec: Mapping[str, Any]) -> list[BlobRef]:
    """The bytes that a run was to start from; by now there are checkpoints."""
    start, fork = spec.get("start_from"), spec.get("fork")
    stored = [start["weights"]] if start is not None else [] if fork is None else [fork["start"]]
    return [blob for record in stored for blob in StateRecord.from_dict(record).blobs()]


def evaluation_parts(size: int, shards: int) -> int:
    """Into how many tasks an evaluation of `size` samples is split: fixed by the run alone."""
    return max(1, min(size, max(shards, -(-size // _EVALUATION_PART))))
