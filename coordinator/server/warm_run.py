"""A run that a training server holds warm: its model and optimizer, at exactly one version."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from weakref import ref

from torchord.cache.blobs.blob import BlobRef
from torchord.cache.files.checkpoint import CheckpointStore
from torchord.cache.ledger.answers import Committed
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.ledger.records import LedgerEntry, VersionRecord
from torchord.cache.ledger.rounds import RoundState
from torchord.coordinator.compute.trainer import Trainer
from torchord.coordinator.runtime.context import RunContext
from torchord.coordinator.runtime.restoring import restore
from torchord.coordinator.runtime.services import Services
from torchord.coordinator.runtime.version_writer import VersionWriter
from torchord.coordinator.server.gradient_download import LEAST_CHUNKS, GradientDownload
from torchord.coordinator.server.step_watch import StepWatch

NEVER = -1


@dataclass
class WarmRun:
    """One run in one training server.

    Attributes:
        context: recipe, config, plan and data of the run.
        ledger: its control plane.
        made: model, optimizer and scheduler; ask for `trainer`, which is at `version`.
        made_writer: stores its versions; ask for `writer`.
        checkpoints: where its files go.
        token: fencing token under which this server acts.
        version: committed global steps.
        chain: ledger chain of the version.
        record: where the version's bytes are.
        committed_at: Unix time (s) of the last commit.
        seconds: what the last step took.
        own_seconds: what the last one took that this server made; 0.0: it has made none.
        rounds: how many it has gone on from.
        state_version: the newest version whose optimizer state is in the cache.
        state_at: when it went there (monotonic clock, s).
        spilled: up to which version the ledger is on disk.
        nbytes: memory that the run takes here.
        shared: several processes of this node take turns, so the state goes out with each version.
        far_until: up to which step it is taken for granted that Clients are on other hosts.
        download: reads the present step's gradients ahead; None where that does not pay.
        spent: gradient bytes of the last committed step, to be deleted.
        left: those of the last round's last steps, to be deleted once nobody can be behind any more.
        stored, pinned: versions in the cache, and those among them that readers hold, as of the last commit.
        alone_until: the last step that this server takes itself, since a round was lost there.
        disputed: a round in which two Clients made different bytes of a version: up to that, this server
            takes the steps itself, and then says who was wrong.
        behind: brings `made` to `version`, which Clients have made; None where it is there.
        stopped_at: the version with which a rule of the config ends the run, None if none does yet.
        settled: the newest version of which it is known what the config's rules and `keep` say.
        started_at: Unix time (s) at which version 0 was made.
        best: the versions that `keep` keeps.
        watch: the rules that read each step, with the steps up to `version`; None if there are none.
    """

    context: RunContext
    ledger: Ledger
    made: Trainer
    made_writer: VersionWriter
    checkpoints: CheckpointStore
    token: int
    version: int
    chain: str
    record: VersionRecord
    committed_at: float
    seconds: float = 0.0
    own_seconds: float = 0.0
    rounds: int = 0
    state_version: int = NEVER
    state_at: float = 0.0
    spilled: int = 0
    nbytes: int = 0
    shared: bool = False
    far_until: int = NEVER
    download: GradientDownload | None = field(default=None, repr=False)
    spent: list[BlobRef] = field(default_factory=list, repr=False)
    left: list[BlobRef] = field(default_factory=list, repr=False)
    stored: tuple[int, ...] = ()
    pinned: frozenset[int] = frozenset()
    behind: Callable[[Trainer], None] | None = field(default=None, repr=False)
    disputed: RoundState | None = None
    alone_until: int = NEVER
    stopped_at: int | None = None
    settled: int = NEVER
    started_at: float = 0.0
    best: frozenset[int] = frozenset()
    watch: StepWatch | None = field(default=None, repr=False)

    @property
    def run(self) -> str:
        """The run's name."""
        return self.context.run

    @property
    def trainer(self) -> Trainer:
        """Model, optimizer and scheduler, at `version`.

        Raises:
            CacheError: they are to be loaded first, and that failed.
        """
        self._catch_up()
        return self.made

    @property
    def writer(self) -> VersionWriter:
        """Stores what `trainer` holds; errors likewise."""
        self._catch_up()
        return self.made_writer

    @property
    def end(self) -> int:
        """The version that the run ends with, as far as that is known."""
        total = self.context.plan().total_steps
        return total if self.stopped_at is None else min(total, self.stopped_at)

    def evaluates(self, version: int) -> bool:
        """Whether a version, other than the last, is to be evaluated."""
        return version < self.end and self.context.config.evaluates(version) and self._has_evaluation

    @property
    def _has_evaluation(self) -> bool:
        return self.context.recipe.evaluation is not None

    def waits_at(self, version: int) -> bool:
        """Whether what comes behind a version depends on its evaluation."""
        return self.evaluates(version) and self.context.config.decides_by_evaluations

    @property
    def open_verdict(self) -> bool:
        """Whether it is still to be found out if the run goes on behind its present version."""
        if self.settled == self.version or self.version >= self.end:
            return False
        return self.watch is not None or self.waits_at(self.version)

    def _catch_up(self) -> None:
        if self.behind is not None:
            self.behind(self.made)
            self.behind = None

    def adopt(self, record: VersionRecord, seconds: float, committed_at: float) -> None:
        """Note a version that Clients have made and stored, with its optimizer state.

        Model and optimizer are loaded when they are needed: mostly the next steps are the Clients', too.

        Args:
            seconds: what a step took.
            committed_at: Unix time (s) of the version's commit.
        """
        parameters = self.made_writer.parameters
        self.version, self.chain, self.record = record.version, record.chain, record
        self.committed_at, self.seconds, self.spent = committed_at, max(seconds, 1e-6), []
        self.state_version, self.state_at = record.version, time.monotonic()
        self.behind = partial(restore, parameters, self.ledger, record=record)

    def dispute(self, state: RoundState) -> None:
        """Note that a version of which participants made different bytes is to be made here.

        What a replay was to meet from that version on is forgotten: it may be the wrong one's.
        """
        assert state.disputed is not None
        self.ledger.forget_expected(state.disputed)
        self.disputed = state

    def take(
        self, entry: LedgerEntry, record: VersionRecord, committed: Committed, *, spent: list[BlobRef]
    ) -> None:
        """Note a commit: `trainer` holds the version that it made.

        Args:
            spent: gradient bytes and slot states that nobody needs any more.
        """
        self.version, self.chain, self.record = entry.version, entry.chain, record
        self.committed_at, self.seconds, self.own_seconds = entry.committed_at, entry.seconds, entry.seconds
        self.spent, self.left = [*spent, *self.left], []
        self.stored, self.pinned = committed.stored, committed.pinned

    def oldest_needed(self) -> int:
        """The oldest version that a step from here on is computed at."""
        return self.context.plan().version_for(self.version) if self.version < self.end else self.version


def read_ahead(services: Services, warm: WarmRun, read_nbytes: int, step_seconds: float) -> None:
    """Begin to read the present step's gradients ahead, if that can pay.

    Args:
        read_nbytes: what the update of the step before had to read from the chunk store.
        step_seconds: what that step took.
    """
    if warm.download is not None:
        warm.download.stop()
        warm.download = None
    plan, store = warm.context.plan(), services.chunks
    if "collect" not in services.settings.overlap or read_nbytes < LEAST_CHUNKS * store.chunk_nbytes:
        return
    if warm.version >= warm.end:
        return
    held = ref(warm)
    warm.download = GradientDownload(
        warm.ledger,
        warm.version,
        plan.fan_in(warm.version).roots,
        services.chunks,
        most_nbytes=max(services.settings.server_memory_bytes // 4, read_nbytes),
        step_seconds=step_seconds,
        wanted=lambda: held() is not None,
    )
    warm.download.start()
