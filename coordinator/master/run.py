"""A run as a person sees it: follow it, stop it, continue it, audit it, use its model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchord.cache.errors import (
    InvalidInput,
    RunError,
    RunNotFound,
)
from torchord.cache.keyring import bare
from torchord.cache.ledger.answers import Event
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.ledger.records import Head, LedgerEntry
from torchord.coordinator.drawing.picture import Picture
from torchord.coordinator.local_cluster.import_path import allow_list
from torchord.coordinator.master.admitting import respecify
from torchord.coordinator.master.audit import Audit, audit, entry_texts, opened, said_of_workers
from torchord.coordinator.master.follower import Follower
from torchord.coordinator.master.plotting import pictured
from torchord.coordinator.master.progress import Progress
from torchord.coordinator.master.reports import RunStatus, StepReport, TrainedModel, state_of
from torchord.coordinator.master.standing import Standing
from torchord.coordinator.master.stored_version import manifest_of, statement_of, stored_tensors
from torchord.coordinator.master.switching import SWITCHABLE, switch
from torchord.coordinator.master.waiting import (
    POLL_SECONDS,
    RESTING,
    Quiet,
    Shown,
    Waiting,
    detached,
)
from torchord.coordinator.messages.sender import Sender
from torchord.coordinator.runtime.recreate import recreate
from torchord.coordinator.runtime.services import Services
from torchord.coordinator.spec.config import TrainingConfig
from torchord.coordinator.spec.resolving import resolve

if TYPE_CHECKING:
    import torch

    from torchord.coordinator.spec.resolving import ResolvedRecipe


class Run:
    """A handle on one run; any number of processes may hold one.

    Made by `Master.submit` and `Master.run`.
    """

    def __init__(self, services: Services, sender: Sender, name: str, *, trusted: bool = False) -> None:
        self.name = name
        self._services = services
        self._sender = sender
        self._ledger: Ledger = services.ledger(name)
        self._standing = Standing(services, name)
        self._fleet = self._standing.fleet
        self._trusted = trusted

    def __repr__(self) -> str:
        return f"<Run {self.name!r}>"

    # --- looking ------------------------------------------------------------------------

    def status(self) -> RunStatus:
        """Where the run stands now.

        Raises:
            RunNotFound: if the server knows no such run.
        """
        return self._standing.status()

    def history(self) -> list[StepReport]:
        """One report a committed step, oldest first (from Redis and the ledger segments on disk)."""
        return [StepReport.of(entry) for entry in self._entries(self._ledger.head())]

    def evaluations(self) -> dict[int, dict[str, float]]:
        """Metrics of each evaluated version."""
        return self._ledger.evaluations()

    def plot(self, path: str | Path | None = None) -> Picture:
        """The run's curves: a notebook shows them, `print` draws them in a terminal, `save` writes a file.

        Args:
            path: of a file, .svg or .png (which needs matplotlib), that is written at once.

        Raises:
            InvalidInput: a path with another ending, or no matplotlib.
        """
        drawn = pictured(self.name, self.history(), self.evaluations())
        if path is not None:
            drawn.save(path)
        return drawn

    def events(self, after: str = "0-0") -> Iterator[Event]:
        """Live iterator over the run's events; ends when the run is done, failed or cancelled.

        Goes on by itself when Redis was away for a while.

        Args:
            after: id of the last event seen, to go on from there.
        """
        follower = self.follow(after)
        while True:
            head, found = follower.look(block_seconds=POLL_SECONDS, resting=RESTING)
            yield from found
            if head is not None and not found and head.status in RESTING:
                return

    def follow(self, after: str = "0-0") -> Follower:
        """What looks at the run whenever it is asked to, through outages; for whoever follows several runs.

        Args:
            after: id of the last event seen, to go on from there.
        """
        return self._standing.follow(after)

    def quiet(self, shown: Shown) -> Quiet:
        """What says on `shown` what the run waits for, whenever nothing has happened in it for a while."""
        return self._standing.quiet(shown)

    def wait(
        self, *, timeout: float | None = None, progress: bool = False, worker_timeout: float | None = None
    ) -> TrainedModel:
        """Wait until the run is done.

        Ctrl-C detaches: the run goes on, and the message says how to come back to it. Whatever the run
        waits for is waited for, a worker or a Redis that is away included; after 15 s without a step it is
        said what that is: in the bar, else as a warning of the logger `torchord`.

        Args:
            timeout: seconds; None waits as long as it takes.
            progress: show a progress bar (step, loss, metric, samples/s, time left).
            worker_timeout: seconds without any worker on a queue after which to give up waiting; workers of
                a `LocalCluster` of this program that are starting are waited for as long as they take. None:
                workers are waited for, too.

        Raises:
            RunFailed: with the message of what failed.
            RunCancelled: the run was cancelled.
            NoWorker: nobody consumes a queue for `worker_timeout`, and the run stays queued; or a worker of a
                `LocalCluster` of this program ended before it was ready.
            WaitTimeout: the run goes on, but `timeout` is over.
        """
        try:
            with Progress(self.name, enabled=progress) as bar:
                waiting = Waiting(self._ledger, self._fleet, self.quiet(bar))
                waiting.until_done(bar, timeout, worker_timeout)
        except KeyboardInterrupt:
            raise detached(self.name, self._services.settings.url) from None
        head = self._ledger.head()
        evaluations = self.evaluations()
        return TrainedModel(
            module=self.model(),
            history=[StepReport.of(entry) for entry in self._entries(head)],
            metrics=evaluations.get(head.version, {}),
            evaluations=evaluations,
            version=head.version,
        )

    def idle_queues(self) -> list[str]:
        """The queues, of those that the run needs, that no living worker consumes that may work on it."""
        return self._fleet.idle_queues()

    # --- acting --------------------------------------------------------------------------

    def pause(self) -> None:
        """Stop within the step: shards at work finish and are kept, no other begins.

        Raises:
            RunError: if the run is not running.
        """
        done, before = self._ledger.transition("paused", allowed=("pending", "running"), event="paused")
        if not done and before != "paused":
            self._ledger.head()  # raises if there is no such run
            raise RunError(f"run {self.name!r} is {before}; only a running run can be paused")

    def cancel(self) -> None:
        """End the run for good; what it computed stays readable for a week.

        Raises:
            RunError: if it is done already.
        """
        done, before = self._ledger.transition(
            "cancelled", allowed=("pending", "running", "paused", "failed"), event="cancelled"
        )
        if not done and before != "cancelled":
            self._ledger.head()  # raises if there is no such run
            raise RunError(f"run {self.name!r} is {before}; there is nothing to cancel")
        self._ledger.retire()

    def resume(self, *, admit_skew: bool = False, admit_code: bool = False) -> None:
        """Continue after a pause, a failure, or the loss of Redis (from the last checkpoint).

        Finished shards of the interrupted step are kept. After a failure, the recipe's sources as this
        process sees them are the run's from now on: the workers must have them, too. Should a server
        later have to replay steps from before the correction, it replays them with the corrected code.

        Args:
            admit_skew: let workers take part whose torch, hardware or code differs from the run's;
                its bits are then theirs. A running run is paused for a moment for that.
            admit_code: the recipe's sources as this process sees them are the run's from now on, as they are
                after a failure: for an upgrade whose bits do not differ, or shall differ. The run's spec and
                the event `code admitted` say from which version on.

        Raises:
            RunError: if the run is done or cancelled.
            RunNotFound: if neither Redis nor the checkpoint directory knows it.
        """
        try:
            head = self._ledger.head()
        except RunNotFound:
            recreate(self._services, self.name)
            self._sender.advance(self.name)
            return
        if (admit_skew or admit_code) and head.status in ("pending", "running"):
            self.pause()
        respecify(self._ledger, head, admit_skew=admit_skew, admit_code=admit_code)
        status = "pending" if head.total_steps is None else "running"
        done, before = self._ledger.transition(
            status, allowed=("paused", "failed"), event="resumed", error=None
        )
        if not done and before not in ("running", "pending"):
            raise RunError(f"run {self.name!r} is {before}; submit it under a new name to train again")
        self._sender.advance(self.name)

    def switch(self, **fields: Any) -> int:
        """Change the config of a live run from a step boundary on; the history records it.

        A replay from any checkpoint takes the same switches at the same steps, so the run keeps its
        bits: they are those of a run that was switched so, wherever it computes.

        Args:
            fields: any of `shards`, `local_steps`, `staleness`, `compression`. Between plain and
                local steps the server's optimizer starts afresh; a slot's state from another
                compression is set aside.

        Returns:
            The first step to which it applies: a few steps ahead of what is under way.

        Raises:
            ConfigError: a value is out of range.
            InvalidInput: another field, or none.
            RunError: the run is at rest, or so near its end that nothing is left to switch.
        """
        unknown = sorted(set(fields) - set(SWITCHABLE))
        if unknown or not fields:
            raise InvalidInput(
                f"switch() changes {', '.join(SWITCHABLE)}, not {', '.join(unknown) or 'nothing at all'}; "
                "submit a new run for another value of anything else"
            )
        return switch(self._ledger, fields)

    def statement(self) -> str | None:
        """What the training server states of the run, sealed (docs/keys.md); None if it does not.

        Raises:
            NotAuthentic: this process has keys, and the seal is none that they trust.
        """
        return statement_of(self._services.keyring, self._checkpoints(self._ledger.head().incarnation))

    # --- using ---------------------------------------------------------------------------

    def verify(
        self, *, reexecute: Iterable[int] = (), progress: Callable[[int], None] | None = None
    ) -> Audit:
        """Audit the ledger: every (step, shard) applied exactly once, each version from the one before.

        Args:
            reexecute: steps, from 0, that this process also computes again, from the nearest
                checkpoint on, to compare their bytes with the ledger's; needs the recipe's code and data.
            progress: called with each step that is computed again.

        Raises:
            InvalidInput: a step of `reexecute` is not committed.
        """
        head = self._ledger.head()
        texts, plan = self._entry_texts(head), self._standing.plan(head)
        entries = [LedgerEntry.from_json(bare(text)) for text in texts.values()]
        unlike = said_of_workers(self._ledger.claims(), entries)
        stored, forged = opened(self._ledger, texts, head.version)
        found = audit(head, entries, plan, stored, [*forged, *unlike])
        steps = tuple(reexecute)
        if not steps or plan is None:
            return found
        from torchord.coordinator.master.replay import Replay

        replay = Replay(
            self._recipe(),
            plan,
            self._checkpoints(head.incarnation),
            {entry.version: entry for entry in entries},
            started_elsewhere="start_from" in self._spec(),
            manifest=manifest_of(self._ledger),
            progress=progress,
        )
        computed, problems = replay.compare(steps)
        return replace(
            found,
            ok=found.ok and not problems,
            problems=(*found.problems, *problems),
            reexecuted=tuple(computed),
        )

    def model(self, version: int | None = None, *, averaged: bool = True) -> torch.nn.Module:
        """The model in eval mode, on CPU.

        Args:
            version: a stored version; None for the newest.
            averaged: with the averaged weights, where the recipe has an `average`; False: with those that
                are trained.

        Raises:
            VersionMissing: if that version is neither in the cache nor among the checkpoints.
        """
        from torchord.coordinator.compute.replica import Replica

        head = self._ledger.head()
        wanted = self._wanted(head, version)
        replica = Replica.build(self._recipe(), self._config(), "cpu")
        replica.arrange(manifest_of(self._ledger))
        replica.load_tensors(stored_tensors(self._services, self._ledger, head, wanted))
        if averaged:
            replica.put_average()
        return replica.model.eval()

    def state_dict(self, version: int | None = None, *, averaged: bool = True) -> dict[str, Any]:
        """The model's state dict, tensors on CPU; arguments and errors as `model`.

        What is no tensor (a module's extra state) is as the model's constructor made it.
        """
        return state_of(self.model(version, averaged=averaged))

    def tensors(self, version: int | None = None) -> tuple[int, dict[str, torch.Tensor]]:
        """A version's number, and its tensors on CPU as they are stored; nothing of the recipe is imported.

        Beside parameters and buffers these are an average's (`torchord/average/NAME`) and a loss scale.

        Args:
            version: a stored version; None for the newest.

        Raises:
            VersionMissing: as `model`.
        """
        head = self._ledger.head()
        wanted = self._wanted(head, version)
        return wanted, stored_tensors(self._services, self._ledger, head, wanted)

    def predict(
        self, inputs: Any, batch_size: int = 256, *, version: int | None = None, timeout: float | None = None
    ) -> Any:
        """Outputs for `inputs`, in their order, computed by the workers.

        Args:
            inputs: a tensor, or a mapping with tensors such as a tokenizer's, an example a row; or samples: a
                Dataset, a list or any iterable of them. Samples go through the recipe's collate, if it has
                one, on the workers; of (input, target) pairs the model gets the input.
            batch_size: examples a task.
            version: pinned for the whole call; None for the newest.
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

    # --- parts ----------------------------------------------------------------------------

    def _config(self) -> TrainingConfig:
        return TrainingConfig.from_json(self._spec()["config"])

    def _spec(self) -> dict[str, Any]:
        return self._ledger.spec()

    def _recipe(self) -> ResolvedRecipe:
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

    def _wanted(self, head: Head, version: int | None) -> int:
        """The version that is asked for, None being the newest."""
        wanted = head.version if version is None else version
        if type(wanted) is not int or wanted < 0:
            raise InvalidInput(f"version must be a whole number from 0 to {head.version}, got {version!r}")
        if head.total_steps is None:
            raise RunError(
                f"run {self.name!r} has no parameters yet; a training server must start it first, "
                "see run.status()"
            )
        if version is None and head.round is not None:  # its Clients store what a round comes to, at its end
            return max((v for v in self._ledger.kept_versions()[0] if v <= wanted), default=wanted)
        return wanted
