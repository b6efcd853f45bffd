"""Evaluation and prediction by the Clients: one part at one version.

Safe to run twice: what is computed depends on (run, version, part) alone, and each part is written once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from torchord.cache.errors import (
    CacheError,
    CacheUnreachable,
    CheckpointError,
    ChunkCorrupt,
    ChunkMissing,
    ManifestMismatch,
    RunNotFound,
    ShardFailed,
    Skewed,
)
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.ledger.records import StateRecord
from torchord.cache.servers.redis_client import WORKER_PATIENCE_SECONDS
from torchord.coordinator.client.slot_lease import LOSSES, SlotLease
from torchord.coordinator.compute import inference
from torchord.coordinator.compute.inference import Measured
from torchord.coordinator.messages.task_names import UPDATES
from torchord.coordinator.runtime import activity
from torchord.coordinator.runtime.context import Contexts, RunContext
from torchord.coordinator.runtime.failures import Failure, contained, noted
from torchord.coordinator.runtime.faults import Hook

log = logging.getLogger(__name__)


class InferenceTask:
    """Evaluates and predicts for one worker process.

    Args:
        contexts: the process's view of the runs.
        lease: refuses what this worker may not compute.
        fault: called with the name of each point of the protocol; tests use it to die there.
    """

    def __init__(self, contexts: Contexts, lease: SlotLease, fault: Hook) -> None:
        self.contexts = contexts
        self.services = contexts.services
        self.lease = lease
        self.heartbeat = lease.heartbeat
        self.sender = lease.sender
        self.fault = fault
        self._silent_since: dict[tuple[str, int], float] = {}  # (run, version) to evaluate -> monotonic clock

    def evaluate(self, run: str, version: int, part: int, parts: int) -> dict[str, Any]:
        """Evaluate one part of the evaluation dataset at one version and write it once.

        Returns:
            The receipt that Flower shows: metrics of the part, and of the whole when it is the last.
        """
        ledger = self.services.ledger(run)
        receipt: dict[str, Any] = {
            "run": run,
            "version": version,
            "part": part,
            "worker": self.heartbeat.info.id,
        }
        head = ledger.head()
        if head.status != "running" or version in ledger.evaluations():
            return {**receipt, "status": "nothing to do"}
        context = self.contexts.of(run, head.incarnation)
        try:
            if unlike := self.lease.unlike(run, head):
                raise Skewed(unlike)
            context.require_same_code()
        except Skewed as error:
            return self.lease.refuse({**receipt, "parts": parts}, str(error))
        self.heartbeat.doing(activity.evaluation(run, version, part))
        try:
            with contained(), context.lock:
                dataset = context.dataset("evaluation")
                if not 0 <= part < parts <= max(1, len(dataset)):
                    return {**receipt, "status": "no such part"}
                samples = torch.arange(len(dataset)).tensor_split(parts)[part].tolist()
                replica, _ = context.replica_at(version)
                measured = inference.evaluate(replica, context.recipe, context.config, dataset, samples)
            states = self._stored(ledger, version, part, measured)
        except ManifestMismatch as error:
            return self.lease.refuse({**receipt, "parts": parts}, str(error))
        except CacheError as error:
            return self._evaluation_back({**receipt, "parts": parts}, error)
        except Exception as error:
            raise self._evaluation_failed(context, error, version=version, part=part) from error
        finally:
            self.heartbeat.doing("")
        self.fault("client.before_part")
        written = {"examples": measured.examples, "metrics": measured.means}
        if measured.weights:
            written["weights"] = measured.weights
        verdict, values = ledger.write_part(version, part, {**written, **states}, parts=parts)
        self.fault("client.after_part")
        self.lease.worked()
        self._silent_since.pop((run, version), None)
        if verdict == "complete":
            whole = self._whole(context, version, values)
            if whole is None:
                return {**receipt, "status": "a part is lost"}
            ledger.record_evaluation(version, whole)
            self.fault("client.after_evaluation")
            receipt["evaluation"] = whole
            self._call_if_evaluated(ledger, waits=context.config.decides_by_evaluations)
        if verdict in ("complete", "done"):
            self.services.evaluations.delete(map(_record_of, [*values, states]))
        return {**receipt, "status": verdict, "examples": measured.examples, **measured.means}

    def _stored(self, ledger: Ledger, version: int, part: int, measured: Measured) -> dict[str, Any]:
        """Store what the part keeps for figures that no mean gives; returns what its record says of it."""
        if not measured.states:
            return {}
        return {"states": self.services.evaluations.put(ledger, version, part, measured.states).as_dict()}

    def _whole(
        self, context: RunContext, version: int, values: Sequence[dict[str, Any]]
    ) -> dict[str, float] | None:
        """The figures of all parts; None if what a part kept is lost, which is then computed again.

        Raises:
            ShardFailed: the recipe's code raised; the run has failed with its message.
        """
        found = []
        for part, value in enumerate(values):
            try:
                states = self.services.evaluations.get(_record_of(value)) if "states" in value else {}
                measured = Measured(value["examples"], value["metrics"], states, value.get("weights", {}))
            except (ChunkMissing, ChunkCorrupt, ManifestMismatch, CheckpointError, KeyError) as error:
                log.warning("part %d of the evaluation of run %s goes back: %s", part, context.run, error)
                context.ledger.drop_part(version, part)
                self.sender.evaluation(context.run, version, [part], len(values))
                return None
            found.append(measured)
        try:
            with contained(), context.lock:
                return inference.combine(found, context.recipe, context.config)
        except Exception as error:
            raise self._evaluation_failed(context, error, version=version, part=None) from error

    def _evaluation_back(self, receipt: dict[str, Any], error: CacheError) -> dict[str, Any]:
        """Give a part of an evaluation back that the store does not let this worker compute.

        Of the present version the training server still holds the bytes and stores them again. Those of an
        earlier one are gone for good, unless a cache node that may have them comes back in time, and the run
        goes on without its evaluation.
        """
        run, version = receipt["run"], receipt["version"]
        log.warning("evaluation part %d of run %s goes back: %s", receipt["part"], run, error)
        ledger = self.services.ledger(run)
        try:
            if isinstance(error, LOSSES):
                if version != ledger.head().version and self._gone_for_good(run, version, error):
                    why = f"version {version} cannot be evaluated any more: {error}"
                    ledger.abandon_evaluation(version, why)
                    self._call_if_evaluated(ledger, waits=False)
                    return {**receipt, "status": "version lost", "error": str(error)}
                self.lease.report_loss(run, version)
            self.lease.send_again(receipt)
        except (CacheError, RunNotFound) as away:  # the supervisor sends it again
            log.warning("evaluation part %d of run %s not sent again: %s", receipt["part"], run, away)
        return {**receipt, "status": "handed back", "error": str(error)}

    def _gone_for_good(self, run: str, version: int, error: CacheError) -> bool:
        """Whether every node said that it lacks a version's bytes, or one has been silent for too long."""
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, CacheUnreachable):
            cause = cause.__cause__
        now = time.monotonic()
        since = self._silent_since.setdefault((run, version), now)
        if cause is not None and now - since < WORKER_PATIENCE_SECONDS:
            return False
        self._silent_since.pop((run, version), None)
        return True

    def _call_if_evaluated(self, ledger: Ledger, *, waits: bool) -> None:
        """Call the training server if the run has waited for nothing but its evaluations.

        Args:
            waits: whether the steps behind an evaluation wait for it.
        """
        head = ledger.head()
        if (waits or head.version == head.total_steps) and not ledger.pending_evaluations():
            self.sender.advance(ledger.run, queue=head.queue or UPDATES)

    def _evaluation_failed(
        self, context: RunContext, error: Exception, *, version: int, part: int | None
    ) -> ShardFailed:
        what = "the end" if part is None else f"part {part}"
        what += f" of the evaluation of version {version}"
        failure = Failure.of(error, what, worker=self.heartbeat.info.id, version=version)
        failure.stop(context.ledger, incarnation=context.incarnation)
        self.contexts.forget(context.run)
        return ShardFailed(f"run {context.run!r}: {failure.message}")

    # --- prediction ---------------------------------------------------------------------

    def predict(
        self,
        run: str,
        version: int,
        request: str,
        part: int,
        inputs: dict[str, Any],
        *,
        samples: bool = False,
    ) -> dict[str, Any]:
        """Compute the outputs of one part of a prediction and write them once.

        Args:
            inputs: record of the part's inputs, as JSON has it (`StateRecord.as_dict`).
            samples: whether they are samples for the recipe's collate.
        """
        ledger = self.services.ledger(run)
        receipt: dict[str, Any] = {
            "run": run,
            "version": version,
            "part": part,
            "worker": self.heartbeat.info.id,
        }
        predictions = self.services.predictions
        answer: StateRecord | str
        context = self.contexts.of(run, ledger.head().incarnation)
        self.heartbeat.doing(activity.prediction(run, version, part))
        try:
            batch = predictions.get(StateRecord.from_dict(inputs))
            with contained(), context.lock:
                replica, _ = context.replica_at(version)
                outputs = inference.predict(replica, context.recipe, batch, samples=samples)
            answer = predictions.put_outputs(ledger, request, part, outputs)
        except ChunkCorrupt as error:  # and so it will stay; what is only missing may be stored again
            answer = f"part {part} cannot be computed: {error}"
        except CacheError:
            raise
        except Exception as error:  # noqa: BLE001  the recipe's own code; it goes to whoever asked
            kind = type(error).__name__
            answer = f"part {part} failed on worker {receipt['worker']}: {kind}: {error}{noted(error)}"
        finally:
            self.heartbeat.doing("")
        asked = predictions.question(version, inputs, samples)
        predictions.answer(ledger, request, part, answer, asked=asked)
        return {**receipt, "status": "failed" if isinstance(answer, str) else "written"}


def _record_of(value: Mapping[str, Any]) -> StateRecord:
    """Where a part of an evaluation keeps its states; an empty record for one that keeps none."""
    found = value.get("states")
    return StateRecord({}, {}, None) if found is None else StateRecord.from_dict(found)
