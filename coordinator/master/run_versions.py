"""A run's versions as a person uses them: as a model, as tensors, for predictions."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchord.cache.errors import InvalidInput, RunError, VersionMissing
from torchord.cache.keyring import bare
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.ledger.records import Head, LedgerEntry
from torchord.coordinator.local_cluster.import_path import allow_list
from torchord.coordinator.master.audit import entry_texts
from torchord.coordinator.master.reports import StepReport, TrainedModel, state_of, stop_reason
from torchord.coordinator.master.stored_version import (
    BEST,
    Version,
    best_version,
    manifest_of,
    stored_tensors,
)
from torchord.coordinator.messages.sender import Sender
from torchord.coordinator.runtime.services import Services
from torchord.coordinator.spec.config import TrainingConfig
from torchord.coordinator.spec.resolving import resolve

if TYPE_CHECKING:
    import torch

    from torchord.coordinator.spec.resolving import ResolvedRecipe


_TRIES = 10


class RunVersions:
    """The part of `Run` that needs torch and the recipe.

    Args:
        services: connections and stores of the process.
        sender: publishes predictions.
        name: of the run.
        trusted: whether this very process gave the recipe.
    """

    def __init__(self, services: Services, sender: Sender, name: str, *, trusted: bool) -> None:
        self.name = name
        self._services = services
        self._sender = sender
        self._ledger: Ledger = services.ledger(name)
        self._trusted = trusted

    def best(self) -> TrainedModel:
        """The best version so far by `TrainingConfig.keep`, with its metrics; it stays while it is the best.

        Raises:
            InvalidInput: the run's config has no `keep`.
            VersionMissing: nothing is evaluated yet; else as `model`.
        """
        return self._trained(self._wanted(self._ledger.head(), "best"))

    def _trained(self, version: int) -> TrainedModel:
        """A version with what the run came to."""
        head, evaluations = self._ledger.head(), self._ledger.evaluations()
        return TrainedModel(
            module=self.model(version),
            history=[StepReport.of(entry) for entry in self._entries(head)],
            metrics=evaluations.get(version, {}),
            evaluations=evaluations,
            version=version,
            reason=stop_reason(head),
        )

    def model(self, version: Version = None, *, averaged: bool = True) -> torch.nn.Module:
        """The model in eval mode, on CPU.

        Args:
            version: a stored version, or "best", the best of those that `TrainingConfig.keep` keeps; None for
                the newest.
            averaged: with the averaged weights, where the recipe has an `average`; False: with those that
                are trained.

        Raises:
            VersionMissing: if that version is neither in the cache nor among the checkpoints.
            InvalidInput: `version` is something else, or "best" of a run that keeps none.
        """
        from torchord.coordinator.compute.replica import Replica

        head = self._ledger.head()
        wanted = self._wanted(head, version)
        replica = Replica.build(self.recipe(), self.config(), "cpu")
        replica.arrange(manifest_of(self._ledger))
        replica.load_tensors(stored_tensors(self._services, self._ledger, head, wanted))
        if averaged:
            replica.put_average()
        return replica.model.eval()

    def state_dict(self, version: Version = None, *, averaged: bool = True) -> dict[str, Any]:
        """The model's state dict, tensors on CPU; arguments and errors as `model`.

        What is no tensor (a module's extra state) is as the model's constructor made it.
        """
        return state_of(self.model(version, averaged=averaged))

    def tensors(self, version: Version = None) -> tuple[int, dict[str, torch.Tensor]]:
        """A version's number, and its tensors on CPU as they are stored; nothing of the recipe is imported.

        Beside parameters and buffers these are an average's (`torchord/average/NAME`) and a loss scale.

        Args:
            version: as `model`.

        Raises:
            VersionMissing: as `model`.
        """
        head = self._ledger.head()
        wanted = self._wanted(head, version)
        return wanted, stored_tensors(self._services, self._ledger, head, wanted)

    def predict(
        self, inputs: Any, batch_size: int = 256, *, version: Version = None, timeout: float | None = None
    ) -> Any:
        """Outputs for `inputs`, in their order, computed by the workers.

        Args:
            inputs: a tensor, or a mapping with tensors such as a tokenizer's, an example a row; or samples: a
                Dataset, a list or any iterable of them. Samples go through the recipe's collate, if it has
                one, on the workers; of (input, target) pairs the model gets the input.
            batch_size: examples a task.
            version: as `model`; pinned for the whole call.
            timeout: seconds; None waits as long as workers are alive.

        Returns:
            What the recipe's `predict` returns, or the model, its tensors joined along the first dimension
            (a list with one for each example, where they differ in another); an object with fields arrives
            as `torchord.coordinator.compute.outputs.Outputs`. The last bits of a row may depend on
            `batch_size` and on its place in the batch, as matrix products do; for the same inputs and
            `batch_size` they are the same on any fleet.

        Raises:
            InvalidInput: the inputs are of another kind, or empty; or the workers store chunks elsewhere.
            VersionMissing: that version is not in the cache (any more).
            RunFailed: the model raised on these inputs.
            NoWorker: nobody consumes the queue.
        """
        from torchord.coordinator.master.prediction import predict

        self._services.require_same_placement()
        return predict(
            self._services,
            self._sender,
            self._ledger,
            inputs,
            batch_size=batch_size,
            version=self._wanted(self._ledger.head(), version),
            timeout_seconds=timeout,
            recipe=self._spec()["recipe"],
        )

    def predict_newest(
        self, inputs: Any, batch_size: int = 256, *, timeout: float | None = None
    ) -> tuple[int, Any]:
        """The newest version, and its outputs for `inputs`, while the run goes on and lets older ones go.

        Args:
            inputs: as for `predict`, and no iterator, since they may be read again.
            batch_size: examples a task.
            timeout: seconds; None waits as long as workers are alive.

        Raises:
            TorchordError: as `predict`.
        """
        for tries in itertools.count(1):
            wanted = self._wanted(self._ledger.head(), None)
            try:
                return wanted, self.predict(inputs, batch_size, version=wanted, timeout=timeout)
            except VersionMissing:  # the run has gone on between the two
                if tries == _TRIES:
                    raise
        raise AssertionError("counting has no end")

    # --- parts ----------------------------------------------------------------------------

    def config(self) -> TrainingConfig:
        """The run's config, as submitted."""
        return TrainingConfig.from_json(self._spec()["config"])

    def _spec(self) -> dict[str, Any]:
        return self._ledger.spec()

    def recipe(self) -> ResolvedRecipe:
        """The run's recipe with its modules imported, as this process's allow-list permits."""
        # This very process's own may be anything; other runs' modules are as its user's directory has them.
        given = ("*",) if self._trusted else self._services.settings.allowed_modules
        return resolve(self._spec()["recipe"], allowed=allow_list(Path.cwd(), given))

    def _checkpoints(self, incarnation: str | None) -> Any:
        from torchord.cache.files.checkpoint import CheckpointStore

        services = self._services
        return CheckpointStore(
            services.settings.checkpoint_dir, self.name, incarnation, keyring=services.file_keyring
        )

    def _entries(self, head: Head) -> list[LedgerEntry]:
        """All entries up to the head: those on disk, overridden by those in Redis."""
        return [LedgerEntry.from_json(bare(text)) for text in self._entry_texts(head).values()]

    def _entry_texts(self, head: Head) -> dict[int, str]:
        return entry_texts(self._ledger, head.version, lambda: self._checkpoints(head.incarnation))

    def _wanted(self, head: Head, version: Version) -> int:
        """The version that is asked for, None being the newest."""
        if version == BEST:
            return best_version(self._ledger, self.config())
        wanted = head.version if version is None else version
        if type(wanted) is not int or wanted < 0:
            raise InvalidInput(
                f"version must be a whole number from 0 to {head.version}, or 'best', got {version!r}"
            )
        if head.total_steps is None:
            raise RunError(
                f"run {self.name!r} has no parameters yet; a training server must start it first, "
                "see run.status()"
            )
        if version is None and head.round is not None:  # its Clients store what a round comes to, at its end
            return max((v for v in self._ledger.kept_versions()[0] if v <= wanted), default=wanted)
        return wanted
