"""Re-execution: compute chosen steps again, in this process, and compare bytes with the ledger.

The audit shows that the ledger is whole; this shows that it is true. A step is a pure function of
its version, so whoever has the code, the data and a checkpoint can compute it again: from the
nearest checkpoint at or before it, through the steps in between, and each shard and each version
on the way must have the bytes that the ledger names. It asks no worker and writes nothing.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from torchord.cache.blobs.blob import BlobRef
from torchord.cache.blobs.chunk_store import CHUNK_NBYTES
from torchord.cache.errors import CheckpointError, InvalidInput, RunError, ShardFailed, TorchordError
from torchord.cache.files.checkpoint import CheckpointStore
from torchord.cache.ledger.records import LedgerEntry, SlotReceipt, combined_digest
from torchord.cache.stores.trees import put_tree
from torchord.cache.tensors.codec import Manifest, aligned, as_bytes, layout, pack
from torchord.coordinator.compute.batch import open_dataset
from torchord.coordinator.compute.compiling import toolchain
from torchord.coordinator.compute.determinism import pinned
from torchord.coordinator.compute.replica import Replica
from torchord.coordinator.compute.robust import accumulator as accumulated
from torchord.coordinator.compute.shard import ShardWork, decoded, keeps_state, work
from torchord.coordinator.compute.shares import mean_loss
from torchord.coordinator.compute.sums import Aggregate, Partial, PartialSum
from torchord.coordinator.compute.trainer import Trainer
from torchord.coordinator.compute.visiting import visiting_of
from torchord.coordinator.runtime.environment import device, environment
from torchord.coordinator.spec.plan import Plan
from torchord.coordinator.spec.resolving import ResolvedRecipe

log = logging.getLogger(__name__)


class Replay:
    """Computes steps of one run again.

    Args:
        recipe: the run's recipe, imported here.
        plan: the run's plan, with its switches.
        checkpoints: where the run's checkpoints are; without any, everything is computed from the start.
        entries: the run's ledger by version.
        started_elsewhere: whether the run began with other weights than the recipe's own (`start_from`).
        manifest: layout of the run's versions; None: the one that the model has here.
        progress: called with each step before it is computed.
    """

    def __init__(
        self,
        recipe: ResolvedRecipe,
        plan: Plan,
        checkpoints: CheckpointStore,
        entries: Mapping[int, LedgerEntry],
        *,
        started_elsewhere: bool = False,
        manifest: Manifest | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self.started_elsewhere = started_elsewhere
        self.recipe = recipe
        self.plan = plan
        self.checkpoints = checkpoints
        self.entries = entries
        self.manifest = manifest
        self.progress = progress
        self._trainer: Trainer | None = None
        self._replica: Replica | None = None
        self._dataset: Any = None
        self._version = -1
        self._flats: dict[int, Tensor] = {}
        self._slots: dict[int, dict[int, Any]] = {}

    def compare(self, steps: Iterable[int]) -> tuple[list[int], list[str]]:
        """Compute steps again.

        Args:
            steps: which, from 0.

        Returns:
            (every step that was computed, one sentence a difference); after a first difference the
            later steps are left out, since nothing after it could agree.

        Raises:
            InvalidInput: a step is not committed, or its ledger entry is missing; or nothing is there to
                begin from.
            ShardFailed: the recipe's code raised here.
            RecipeError: the recipe cannot be imported here.
        """
        computed: list[int] = []
        with self._pinned():
            for step in sorted(set(steps)):
                if step + 1 not in self.entries:
                    last = max(self.entries, default=0) - 1
                    raise InvalidInput(
                        f"step {step} cannot be computed again: the ledger has no entry for it (its last is "
                        f"that of step {last})"
                    )
                self._go_back(step)
                while self._version <= step:
                    problems = self._try_step()
                    computed.append(self._version - 1)
                    if problems:
                        return computed, problems
        return computed, []

    # --- parts of one step ----------------------------------------------------------------------

    def starting(self, step: int) -> dict[str, Tensor]:
        """The version that a step starts from, by name; errors as of `compare`.

        Raises:
            RunError: a step before it came out otherwise than the ledger says.
        """
        with self._pinned():
            self._go_back(step)
            while self._version < step:
                if problems := self._try_step():
                    raise RunError(problems[0])
        assert self._trainer is not None
        return {name: tensor.clone() for name, tensor in self._trainer.replica.state_tensors().items()}

    def sent(self, step: int, shard: int) -> dict[str, Tensor]:
        """What a shard sends: its gradient as it travels, and the buffers that changed; errors likewise."""
        self.starting(step)
        with self._pinned():
            found = self._shard(step, shard)
        return {**found.payload, **found.buffers}

    def ending(self, step: int) -> dict[str, Tensor]:
        """The version that a step makes, by name, whatever the ledger says of it; errors likewise."""
        self.starting(step)
        with self._pinned():
            self._try_step()
        assert self._trainer is not None
        return {name: tensor.clone() for name, tensor in self._trainer.replica.state_tensors().items()}

    def unlike(self, step: int, shard: int) -> list[str]:
        """How a shard that is computed here differs from what the ledger says; errors likewise."""
        self.starting(step)
        with self._pinned():
            found = self._shard(step, shard)
        return self._compared(step, shard, found, self.entries[step + 1].slots[shard])

    def _pinned(self) -> AbstractContextManager[None]:
        config = self.plan.config
        return pinned(config.threads, config.deterministic, device(), restore=True)

    # --- where to start -------------------------------------------------------------------------

    def _go_back(self, step: int) -> None:
        """Hold a version from which `step` can be reached, the nearest one."""
        for version in reversed([v for v in self.checkpoints.versions() if v <= step]):
            if version <= self._version <= step:
                return
            try:
                self._load(version)
                return
            except CheckpointError as error:
                log.warning("replay: checkpoint %d passed over: %s", version, error)
        if not 0 <= self._version <= step:
            if self.started_elsewhere:
                raise InvalidInput(
                    f"step {step} cannot be computed again: the run began with start_from, and its "
                    f"checkpoint 0 is not in {self.checkpoints.path()}"
                )
            self._trainer = self._built(0)
            self._hold(0, {})

    def _load(self, version: int) -> None:
        found = self.checkpoints.load(version)
        trainer = self._built(version)
        trainer.replica.load_tensors(found.tensors)
        trainer.load_state(found.state)
        self._trainer = trainer
        self._flats.clear()
        self._slots.clear()
        for earlier, kept in found.state.get("window", {}).items():
            self._flats[int(earlier)] = aligned(kept["flat"])  # where a file's bytes lie is up to its reader
            self._slots[int(earlier)] = dict(kept["slots"])
        self._hold(version, dict(found.state.get("slots", {})))

    def _built(self, version: int) -> Trainer:
        config = self.plan.config_at(max(0, version - 1))  # of the step that left the version's state
        return Trainer.build(self.recipe, config, device(), arrange=self._arrange)

    def _arrange(self, replica: Replica) -> None:
        if self.manifest is not None:
            replica.arrange(self.manifest)

    def _hold(self, version: int, slots: dict[int, Any]) -> str:
        """Keep the version that the trainer has come to; its digest."""
        assert self._trainer is not None
        flat = self._trainer.replica.pack(None)
        self._version = version
        self._flats[version] = flat
        self._slots[version] = slots
        needed = version if version >= self.plan.total_steps else self.plan.version_for(version)
        for old in [v for v in self._flats if v < needed]:
            del self._flats[old], self._slots[old]
        return _stored(flat).digest

    # --- one step -------------------------------------------------------------------------------

    def _try_step(self) -> list[str]:
        step = self._version
        try:
            return self._step()
        except TorchordError:
            raise
        except Exception as error:
            raise ShardFailed(
                f"computing step {step} again failed: {type(error).__name__}: {error}; this process needs "
                "the run's code and data as the workers have them"
            ) from error

    def _step(self) -> list[str]:
        """Compute the present step and compare it with its entry."""
        step, trainer = self._version, self._trainer
        assert trainer is not None
        if self.progress is not None:
            self.progress(step)
        entry = self.entries[step + 1]
        config = self.plan.config_at(step)
        trainer.adopt(self.recipe, config)
        problems: list[str] = []
        done = [self._shard(step, shard) for shard in range(self.plan.shards_in(step))]
        for shard, (result, slot) in enumerate(zip(done, entry.slots, strict=True)):
            problems += self._compared(step, shard, result, slot)
        examples = sum(result.examples for result in done)
        mean = self._average(step, done, examples)
        loss = mean_loss((result.loss, result.examples, result.weight) for result in done)
        finite = all(_finite(result) for result in done)
        report = trainer.apply(
            mean.gradients,
            mean.buffers,
            step=step,
            loss=loss,
            finite=finite,
            epoch_ends=self.plan.ends_epoch(step),
        )
        slots: dict[int, Any] = {}
        if keeps_state(config, self.recipe):
            kept = {shard: result.state for shard, result in enumerate(done) if result.state is not None}
            slots = {**self._slots[step], **({} if report.skipped else kept)}
        digest = self._hold(step + 1, slots)
        if not problems and digest != entry.parameters:
            problems.append(
                f"step {step}: the same gradients give other parameters, {digest} in place of "
                f"{entry.parameters} by {entry.server}; its optimizer code or hardware differs from this "
                "process's"
            )
        return problems

    def _average(self, step: int, done: list[ShardWork], examples: int) -> Aggregate:
        """The average of the step's shards, in the order in which the step's tree sums them."""
        assert self._trainer is not None
        replica, codec = self._trainer.replica, self.recipe.codec(self.plan.config_at(step).compression)
        tree = self.plan.fan_in(step)
        held = replica.held()
        if not tree.partials:
            config = self._trainer.config
            accumulator = accumulated(
                held,
                examples,
                replica.rules,
                aggregation=config.aggregation,
                faults=config.aggregation_faults,
            )
            for result in done:
                gradients = decoded(result.payload, replica, codec)
                accumulator.add(gradients, result.buffers, result.examples, result.weight)
            return accumulator.result()
        sums: dict[int, Partial] = {}
        for slot in tree.partials:
            total = PartialSum(examples, replica.rules)
            for number in tree.inputs(slot):
                if number >= tree.shards:
                    total.add(sums.pop(number))
                    continue
                result = done[number]
                gradients = decoded(result.payload, replica, codec)
                total.add_shard(gradients, result.buffers, result.examples, result.weight)
            sums[slot] = total.result()
        whole = PartialSum(examples, replica.rules)
        for root in tree.roots:
            whole.add(sums[root])
        return whole.average(held)

    def _shard(self, step: int, shard: int) -> ShardWork:
        version = self.plan.version_for(step)
        if self._replica is None:
            config = self.plan.config_at(step)
            self._replica = Replica.build(self.recipe, config, device(), computing=True)
            self._arrange(self._replica)
            self._replica.watch.whole = True
            self._dataset = open_dataset(self.recipe, self.plan.config)
            visited = visiting_of(self.recipe, self.plan.config, self._dataset, self.plan.visits)
            self.plan = self.plan.with_samples(visited)
        self._replica.load(self._flats[version])
        state = self._slots[version].get(shard)
        return work(self._replica, self.recipe, self.plan, self._dataset, step, shard, state)

    def _compared(self, step: int, shard: int, result: ShardWork, slot: SlotReceipt) -> list[str]:
        sent = {**result.payload, **result.buffers}
        digest = _stored(pack(sent, layout(sent))).digest
        if result.state is not None:
            digest = combined_digest(digest, put_tree(result.state, _stored))
        if digest == slot.digest and result.weight == slot.weight:
            return []
        if digest == slot.digest:
            return [
                f"step {step}, shard {shard}: computed again it weighs {result.weight} in place of "
                f"{slot.weight} by worker {slot.worker} (None: its examples); is it a matter of chance?"
            ]
        config = self.plan.config_at(step)
        here = environment(toolchain(device()) if config.compile else "")
        unlike = f" on {slot.environment}, and this process has {here}" if slot.environment != here else ""
        return [
            f"step {step}, shard {shard}: computing it again gives other bytes ({digest} in place of "
            f"{slot.digest}); worker {slot.worker} computed it{unlike}"
        ]


def _stored(flat: Tensor) -> BlobRef:
    """The reference that the store gave to these bytes, but for its key."""
    return BlobRef.of("replay", as_bytes(flat), CHUNK_NBYTES)


def _finite(result: ShardWork) -> bool:
    return math.isfinite(result.loss) and math.isfinite(result.grad_norm)
