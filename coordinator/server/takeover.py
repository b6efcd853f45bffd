"""How a training server becomes a run's: the first version, or the newest one with optimizer state."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torchord.cache.errors import (
    CacheError,
    CheckpointError,
    ChunkCorrupt,
    ChunkMissing,
    Fenced,
    ManifestMismatch,
    RunError,
    Skewed,
)
from torchord.cache.files.checkpoint import CheckpointStore
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.ledger.records import GENESIS, Head, StateRecord, VersionRecord
from torchord.coordinator.compute.alone import require_company
from torchord.coordinator.compute.inference import try_metrics
from torchord.coordinator.compute.starting_weights import put_weights
from torchord.coordinator.compute.trainer import Prepare, Trainer, nothing_to_prepare
from torchord.coordinator.runtime.context import RunContext
from torchord.coordinator.runtime.environment import device
from torchord.coordinator.runtime.faults import Hook
from torchord.coordinator.runtime.services import Services
from torchord.coordinator.runtime.version_writer import VersionWriter
from torchord.coordinator.server.step_watch import StepWatch
from torchord.coordinator.server.warm_run import WarmRun
from torchord.coordinator.spec.config import TrainingConfig
from torchord.coordinator.spec.plan import Plan

log = logging.getLogger(__name__)


class TakeOver:
    """Makes one run warm, under a token that was just acquired.

    Args:
        services: connections and stores of the process.
        fault: called with the name of each point of the protocol.
        context: the run.
        token: fencing token.
    """

    def __init__(self, services: Services, fault: Hook, context: RunContext, token: int) -> None:
        self.services = services
        self.fault = fault
        self.context = context
        self.token = token
        self.restores = False  # whether there are versions, and with them the layout of the run's model
        self.ledger: Ledger = services.ledger(context.run)
        self._writer: VersionWriter | None = None  # that has stored the version that was taken over
        self.checkpoints = CheckpointStore(
            services.settings.checkpoint_dir,
            context.run,
            context.incarnation,
            keyring=services.file_keyring,
            fault=fault,
        )

    def warm(self, head: Head) -> WarmRun:
        """Initialise or restore the run.

        Raises:
            Fenced: another server or a person acted meanwhile.
            Skewed: this process's code builds another model than the run's.
        """
        if head.status == "pending" or head.total_steps is None:
            return self._ruled(self._initialise(head))
        self.restores = True
        return self._ruled(self._restore(head))

    def _ruled(self, warm: WarmRun) -> WarmRun:
        """Note what the run's rules have said so far."""
        config, head = self.context.config, self.ledger.head()
        warm.stopped_at = None if head.stopped is None else head.stopped["version"]
        warm.started_at = head.started_at
        if (keep := config.keep_rule) is not None:
            warm.best = frozenset(keep.best(self.ledger.evaluations()))
        if config.decides_by_steps:
            warm.watch = StepWatch(config.rules, head.started_at)
            warm.watch.catch_up(self.ledger, self.checkpoints, warm.version)
        return warm

    def _trainer(self, version: int, prepare: Prepare = nothing_to_prepare) -> Trainer:
        """A trainer with the optimizer that a version's state is of: that of the step that made it."""
        context = self.context
        config = context.config
        if context.switches:
            config = context.plan().config_at(max(0, version - 1))  # a switch follows when it is applied
        try:
            return self._built(config, prepare)
        except ManifestMismatch as error:
            raise Skewed(str(error)) from error

    def _built(self, config: TrainingConfig, prepare: Prepare = nothing_to_prepare) -> Trainer:
        arrange = self.context.lay_out if self.restores else None
        return Trainer.build(self.context.recipe, config, device(), arrange=arrange, prepare=prepare)

    def _tried(self, plan: Plan, evaluation_size: int, prepare: Prepare = nothing_to_prepare) -> Trainer:
        """A trainer at version 0 whose shards can be computed, and whose evaluations will do."""
        trainer, context = self._built(plan.config_at(0), prepare), self.context
        require_company(trainer.replica, context.recipe, context.dataset(), plan)
        if evaluation_size and context.recipe.metrics:
            try_metrics(trainer.replica, context.recipe, context.config, context.dataset("evaluation"))
        return trainer

    def _initialise(self, head: Head) -> WarmRun:
        """Make the first version: the recipe's own initial weights, or a checkpoint's."""
        context, ledger = self.context, self.ledger
        plan = context.first_plan()
        evaluation_size, evaluation_seed = context.first_evaluation()
        self.checkpoints.save_spec(context.saved_spec())
        if head.version:
            self._keep_start(head.version)
            trainer, record = self._from_checkpoint(head.version)
        else:
            make = partial(self._tried, plan, evaluation_size)
            trainer, record = self._first(make, plan.size)
        before = ledger.version(head.version)
        self.fault("server.before_initialise")
        verdict = ledger.initialise(
            token=self.token,
            manifest={**trainer.replica.manifest.to_json(), **_beside(plan, evaluation_seed)},
            record=record,
            dataset_size=plan.size,
            evaluation_size=evaluation_size,
            total_steps=plan.total_steps,
            dataset_digest=getattr(context.dataset(), "digest", ""),
        )
        if verdict != "ok":
            raise Fenced(f"run {context.run!r}: another server or a person acted before it was initialised")
        self.fault("server.after_initialise")
        if before is not None and before.blob.key != record.blob.key:  # a run that was done goes on
            self.services.chunks.delete(before.own_blobs())
        return self._made(trainer, record, time.time(), spilled=head.version)

    def _restore(self, head: Head) -> WarmRun:
        """Load the newest version whose optimizer state is at hand, and replay from there."""
        found = self._from_cache(head)
        on_disk = [v for v in self.checkpoints.versions() if v <= head.version]
        if found is None or any(version > found[1].version for version in on_disk):
            found = self._from_disk(on_disk)
            if not self.ledger.put_version(found[1], token=self.token):
                raise Fenced(f"run {self.context.run!r}: overtaken while restoring")
        trainer, record = found
        if record.version != head.version:
            self.fault("server.before_rollback")
            done, above = self.ledger.rollback(token=self.token, version=record.version, chain=record.chain)
            if not done:
                raise Fenced(f"run {self.context.run!r}: overtaken while restoring")
            self.fault("server.after_rollback")
            self.services.parameters.drop(self.ledger, above, token=self.token)
            log.warning(
                "run %s: replaying from version %d to %d", self.context.run, record.version, head.version
            )
        spilled = self.checkpoints.latest_version(at_most=record.version) or 0
        return self._made(trainer, record, head.committed_at, spilled=spilled, shared=head.shared)

    def _made(
        self,
        trainer: Trainer,
        record: VersionRecord,
        committed_at: float,
        *,
        spilled: int,
        shared: bool = False,
    ) -> WarmRun:
        return WarmRun(
            self.context,
            self.ledger,
            trainer,
            self._writer
            or VersionWriter(self.services.parameters, self.ledger, trainer.replica, record.rest),
            self.checkpoints,
            self.token,
            record.version,
            record.chain,
            record,
            committed_at,
            state_version=record.version,
            spilled=spilled,
            nbytes=trainer.nbytes(),
            shared=shared,
        )

    # --- where versions come from -------------------------------------------------------------

    def _from_cache(self, head: Head) -> tuple[Trainer, VersionRecord] | None:
        """Load the newest stored version that has its optimizer state; None if there is none."""
        stored = self.ledger.versions()
        plan = self.context.plan()
        for version in sorted((v for v in stored if v <= head.version), reverse=True):
            record = stored[version]
            needed = range(plan.version_for(min(version, plan.total_steps - 1)), version)
            if record.state is None or any(earlier not in stored for earlier in needed):
                continue
            try:
                trainer = self._trainer(version)
                fetch = partial(
                    self.services.parameters.fetch_bytes, self.ledger, manifest=trainer.replica.manifest
                )
                _, found, _ = fetch(version, record=record)
                state = self.services.parameters.fetch_state(record.state)
                for earlier in needed:
                    fetch(earlier, record=stored[earlier], rest=found.rest)
                for each in (*needed, version):
                    for slot in stored[each].slots.values():
                        self.services.gradients.get_state(slot)
            except CacheError as error:
                log.warning("run %s: version %d cannot be restored: %s", self.ledger.run, version, error)
                continue
            trainer.replica.load(found.own, found.rest)
            trainer.load_state(state)
            return trainer, record
        return None

    def _from_disk(self, versions: list[int]) -> tuple[Trainer, VersionRecord]:
        """Load the newest whole checkpoint of `versions`, or the initial weights, and publish it."""
        for candidate in sorted(versions, reverse=True):
            try:
                return self._from_checkpoint(candidate)
            except CheckpointError as error:
                log.warning("run %s: checkpoint %d passed over: %s", self.context.run, candidate, error)
        return self._first(partial(self._trainer, 0), self.context.plan().size)

    def _keep_start(self, version: int) -> None:
        """Write the version that a fork begins with as a checkpoint, since nothing else makes it again.

        Raises:
            RunError: it is neither in the cache nor on disk.
        """
        fork = self.context.spec.get("fork")
        if fork is None or fork["version"] != version or version in self.checkpoints.versions():
            return
        try:
            start = self.services.parameters.fetch_state(StateRecord.from_dict(fork["start"]))
        except (ChunkMissing, ChunkCorrupt) as error:
            raise self._gone(fork, error) from error
        trainer = self._trainer(version)
        trainer.replica.load_tensors(start["tensors"])
        state = trainer.state() if fork["fresh"] else {}
        meta = {
            "run": self.context.run,
            "incarnation": self.context.incarnation,
            "chain": fork["chain"],
            "parameters": fork["parameters"],
            "dataset_size": self.context.plan().size,
            "evaluations": {},
        }
        tensors = trainer.replica.state_tensors()
        self.checkpoints.save(version, tensors, {**state, **start["state"]}, meta)

    def _gone(self, fork: Mapping[str, Any], error: object) -> RunError:
        return RunError(
            f"run {self.context.run!r}: version {fork['version']} of run {fork['run']!r}, which it was "
            f"forked from, is neither in the cache nor in {self.checkpoints.path()}: {error}; fork it anew, "
            "under another name"
        )

    def _first(self, make: Callable[..., Trainer], size: int) -> tuple[Trainer, VersionRecord]:
        """Make and publish version 0: with the recipe's own weights, or with those that the run starts from.

        These are kept as a checkpoint, since nothing else makes them again.
        """
        if (fork := self.context.spec.get("fork")) is not None:
            raise self._gone(fork, "no checkpoint can be read")
        if (start := self.context.spec.get("start_from")) is None:
            trainer = make()
            return trainer, self._published(trainer, 0, GENESIS)
        if 0 in self.checkpoints.versions():
            try:
                return self._from_checkpoint(0)
            except CheckpointError as error:
                log.warning("run %s: checkpoint 0 passed over: %s", self.context.run, error)
        try:
            weights = self.services.parameters.fetch_start(StateRecord.from_dict(start["weights"]))
        except (ChunkMissing, ChunkCorrupt) as error:
            raise RunError(
                f"run {self.context.run!r}: the weights that it starts from ({start['source']}) are gone "
                f"from the cache, and {self.checkpoints.path()} has no checkpoint 0: {error}; submit it anew"
            ) from error
        trainer = make(prepare=lambda model: put_weights(model, weights, start["source"]))
        record = self._published(trainer, 0, GENESIS)
        meta = {
            "run": self.context.run,
            "incarnation": self.context.incarnation,
            "chain": GENESIS,
            "parameters": record.digest,
            "dataset_size": size,
            "evaluations": {},
        }
        self.checkpoints.save(0, trainer.replica.state_tensors(), trainer.state(), meta)
        return trainer, record

    def _from_checkpoint(self, version: int) -> tuple[Trainer, VersionRecord]:
        """Load a checkpoint and publish it, with what the steps under way need beside it.

        Raises:
            CheckpointError: it is damaged, or another run's.
        """
        found = self.checkpoints.load(version)
        if found.meta.get("run") != self.context.run:
            raise CheckpointError(
                f"checkpoint {self.checkpoints.path(version)} belongs to run {found.meta.get('run')!r}, not "
                f"{self.context.run!r}"
            )
        chain = str(found.meta["chain"])
        if any(entry.chain != chain for entry in self.ledger.entries(version, version)):
            raise CheckpointError(
                f"checkpoint {self.checkpoints.path(version)} is of another course of run "
                f"{self.context.run!r}: its chain is not the ledger's"
            )
        trainer = self._trainer(version)
        trainer.replica.load_tensors(found.tensors)
        trainer.load_state(found.state)
        for earlier, kept in found.state.get("window", {}).items():
            record = self.services.parameters.publish(
                self.ledger, earlier, kept["flat"].contiguous(), chain=kept["chain"]
            )
            record = replace(record, slots=self._stored_slots(earlier, kept["slots"]))
            if not self.ledger.put_version(record, token=self.token):
                raise Fenced(f"run {self.context.run!r}: overtaken while restoring")
        record = self._published(trainer, version, chain)
        return trainer, replace(record, slots=self._stored_slots(version, found.state.get("slots", {})))

    def _published(self, trainer: Trainer, version: int, chain: str) -> VersionRecord:
        """Store what a trainer holds as a version with its optimizer state."""
        parameters = self.services.parameters
        self._writer = VersionWriter(parameters, self.ledger, trainer.replica)
        record = self._writer.store(version, chain=chain)
        return parameters.publish_state(self.ledger, record, trainer.state(copies=False))

    def _stored_slots(self, version: int, trees: Mapping[int, Any]) -> dict[int, StateRecord]:
        """Store slot states that a checkpoint holds."""
        put = self.services.gradients.put_state
        return {shard: put(self.ledger, version, shard, kept) for shard, kept in trees.items()}


def _beside(plan: Plan, evaluation_seed: str) -> dict[str, Any]:
    """What the run's manifest says beside the layout of its model."""
    visits = {} if plan.visits is None else {"visits": plan.visits.to_json()}
    return visits | ({"evaluation_seed": evaluation_seed} if evaluation_seed else {})
