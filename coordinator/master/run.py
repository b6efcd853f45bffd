"""A run as a person sees it: follow it, stop it, continue it, audit it, use its model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torchord.cache import keys
from torchord.cache.errors import (
    InvalidInput,
    RunError,
    RunNotFound,
)
from torchord.cache.keyring import bare
from torchord.cache.ledger.answers import Event
from torchord.cache.ledger.outbox import Telling
from torchord.cache.ledger.records import GENESIS, LedgerEntry
from torchord.cache.ledger.share import checked
from torchord.coordinator.drawing.picture import Picture
from torchord.coordinator.master.admitting import respecify
from torchord.coordinator.master.audit import Audit, audit, opened, said_of_workers
from torchord.coordinator.master.extending import extend
from torchord.coordinator.master.follower import Follower
from torchord.coordinator.master.forking import begun_from, create, forked_spec, unlike_parent
from torchord.coordinator.master.plotting import pictured
from torchord.coordinator.master.progress import Progress
from torchord.coordinator.master.reports import (
    RunStatus,
    StepReport,
    TrainedModel,
)
from torchord.coordinator.master.run_versions import RunVersions
from torchord.coordinator.master.standing import Standing
from torchord.coordinator.master.stored_version import (
    Version,
    manifest_of,
    statement_of,
)
from torchord.coordinator.master.switching import SWITCHABLE, switch
from torchord.coordinator.master.verdicts import unfounded
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
from torchord.coordinator.spec.targets import Entry

log = logging.getLogger(__name__)


class Run(RunVersions):
    """A handle on one run; any number of processes may hold one.

    Made by `Master.submit` and `Master.run`.
    """

    def __init__(self, services: Services, sender: Sender, name: str, *, trusted: bool = False) -> None:
        super().__init__(services, sender, name, trusted=trusted)
        self._standing = Standing(services, name)
        self._fleet = self._standing.fleet

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
        return self._trained(self._ledger.head().version)

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

    def label(self, *, tags: Iterable[str] | None = None, notes: str | None = None) -> None:
        """Write tags or notes on the run, in the place of those before; None leaves what it has.

        Args:
            tags: at most 32 printable texts of at most 100 characters, by which `Master.runs(tag=...)` finds
                it.
            notes: a text of at most 10,000 characters.

        Raises:
            InvalidInput: they are none of these.
            RunNotFound: there is no such run.
        """
        if self._ledger.label(tags=tags, notes=notes) == "missing":
            self._ledger.head()  # raises

    def share(self, *, weight: float | None = None, priority: int | None = None) -> None:
        """Give the run another share of the fleet, from its next shards on; None leaves what it has.

        Args:
            weight, priority: as in `TrainingConfig`. The config keeps what it says; a run that is created
                anew from its checkpoint has that again.

        Raises:
            ConfigError: one of them is out of range.
            RunNotFound: there is no such run.
        """
        checked(1.0 if weight is None else weight, 0 if priority is None else priority)
        if self._ledger.share(weight=weight, priority=priority) == "missing":
            self._ledger.head()  # raises

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

    def extend(self, *, epochs: int) -> None:
        """Let the run go on for more epochs, now that it is done.

        It goes on from its last checkpoint, under its own name, and ends with the bits of a run that was
        submitted with all the epochs, unless its recipe says how long it is: a scheduler with a `total_steps`
        of its own keeps that, which a warning and the event `extended` say.

        Args:
            epochs: how many more, at least 1.

        Raises:
            RunError: the run is not done, or was ended by one of its rules, or has staleness.
        """
        if said := extend(self._ledger, epochs):
            log.warning("run %r: %s", self.name, said)
        self._sender.advance(self.name)

    def fork(
        self,
        *,
        name: str,
        version: Version = None,
        optimizer: Entry | None = None,
        scheduler: Entry | None = None,
        **fields: Any,
    ) -> Run:
        """Another run that goes on from a version of this one, step numbers and data order included.

        It is chained to the ledger's entry of that version, which the fork's `verify` looks at. With nothing
        changed it has this run's bits.

        Args:
            name: of the fork.
            version: a stored version above 0, as `model`; with the optimizer's state, which checkpoints have,
                where `optimizer` is left out.
            optimizer, scheduler: in place of the recipe's; given either, both begin afresh.
            fields: of the config, such as `epochs` or `stop_when`; none that moves examples to other steps.

        Raises:
            InvalidInput: a field cannot be changed, or the version is 0 or above the newest.
            VersionMissing: that version is stored nowhere, or without what is needed.
            ConfigMismatch: the name is another run's.
            ConfigError, RecipeError: a value cannot be used.
        """
        head, spec = self._ledger.head(), self._spec()
        wanted = self._wanted(head, version)
        text = self._entry_texts(head).get(wanted)
        if text is None:
            raise InvalidInput(
                f"run {self.name!r} has no step that made version {wanted}; a fork begins at 1 to "
                f"{head.version}, and a new run with start_from=... at any version's weights"
            )
        entry = LedgerEntry.from_json(bare(text))
        changes = {"optimizer": optimizer, "scheduler": scheduler, **fields}
        made = forked_spec(spec, head, entry, self.name, changes)
        fork = Run(self._services, self._sender, keys.check_name(name), trusted=self._trusted)
        checkpoints, fresh = self._checkpoints(head.incarnation), made["fork"]["fresh"]
        read = partial(begun_from, self._services, self._ledger, checkpoints, entry, fresh=fresh)
        create(fork._ledger, self._services, made, read)
        self._sender.advance(name)
        return fork

    def statement(self) -> str | None:
        """What the training server states of the run, sealed (docs/keys.md); None if it does not.

        Raises:
            NotAuthentic: this process has keys, and the seal is none that they trust.
        """
        return statement_of(self._services.keyring, self._checkpoints(self._ledger.head().incarnation))

    def untold(self) -> list[Telling]:
        """What others have not been told yet, oldest first, and what they could not be: see docs/told.md."""
        return self._ledger.outbox()

    def tell_again(self) -> int:
        """Have tried again whatever nobody could be told; returns how many entries that are."""
        return self._ledger.tell_again()

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
        ends = unfounded(head, self.config(), self.evaluations(), entries)
        begins, fork = (0, GENESIS), self._spec().get("fork")
        if fork is not None:
            parent = Run(self._services, self._sender, fork["run"])
            begins = fork["version"], fork["chain"]
            unlike += unlike_parent(fork, parent._ledger, parent._checkpoints)
        found = audit(head, entries, plan, stored, [*forged, *unlike, *ends], begins)
        steps = tuple(reexecute)
        if not steps or plan is None:
            return found
        from torchord.coordinator.master.replay import Replay

        replay = Replay(
            self.recipe(),
            plan,
            self._checkpoints(head.incarnation),
            {entry.version: entry for entry in entries},
            started_elsewhere="start_from" in self._spec() or fork is not None,
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
