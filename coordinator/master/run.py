"""A run as a person sees it: follow it, stop it, continue it, audit it, use its model."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torchord.cache.errors import (
    CheckpointError,
    InvalidInput,
    NoWorker,
    RunCancelled,
    RunError,
    RunFailed,
    RunNotFound,
    VersionMissing,
    WaitTimeout,
)
from torchord.cache.ledger.answers import Event
from torchord.cache.ledger.incarnation import revised, switched
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.ledger.records import Head, LedgerEntry
from torchord.cache.settings import located
from torchord.coordinator.local_cluster.starting import coming, starting
from torchord.coordinator.master.audit import Audit, audit
from torchord.coordinator.master.follower import Follower
from torchord.coordinator.messages.sender import Sender
from torchord.coordinator.messages.task_names import GRADIENTS, UPDATES, worker_command
from torchord.coordinator.runtime.context import switches_of
from torchord.coordinator.runtime.recreate import recreate
from torchord.coordinator.runtime.services import Services
from torchord.coordinator.spec.config import TrainingConfig
from torchord.coordinator.spec.plan import Plan
from torchord.coordinator.spec.recipe import fingerprint, resolve, skewed

if TYPE_CHECKING:
    import torch

    from torchord.coordinator.spec.recipe import ResolvedRecipe

log = logging.getLogger(__name__)

_RESTING = ("done", "failed", "cancelled")
_PACE_SECONDS = 0.05
_POLL_SECONDS = 0.5
SWITCHABLE = ("shards", "local_steps", "staleness", "compression")
_SWITCH_TRIES = 20


class Detached(KeyboardInterrupt):
    """Waiting was interrupted; the run goes on without this process.

    A program that this ends shows no traceback: what there is to say was said before.
    """


def _show_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not isinstance(error, Detached):
        sys.__excepthook__(kind, error, trace)


@dataclass(frozen=True)
class RunStatus:
    """Where a run stands.

    Attributes:
        name: the run's name.
        state: pending, running, paused, failed, cancelled or done.
        version: committed global steps, which is also the version of the parameters.
        total_steps: global steps of the whole run; None until a training server has seen the data.
        epoch: the epoch that the next step belongs to, from 0; None likewise.
        error: why it failed, one sentence; None otherwise.
        traceback: the last frames of the recipe's code where it raised, "" otherwise.
        submitted_at: Unix time (s).
        server: worker id of the training server, "" if none serves it.
        waiting_for: queues that the run needs and no living worker consumes.
        refused: living workers that may not work on the run, each with the reason: their torch,
            hardware or code would give other bits.
        discarded: queues whose messages somebody throws away who is no torchord worker, each with what to
            look for; the run goes on, many times slower.
    """

    name: str
    state: str
    version: int
    total_steps: int | None
    epoch: int | None
    error: str | None
    traceback: str
    submitted_at: float
    server: str
    waiting_for: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    discarded: tuple[str, ...] = ()


@dataclass(frozen=True)
class StepReport:
    """One committed global step.

    Attributes:
        step: its number, from 0.
        version: the version it made (`step + 1`).
        loss: count-weighted mean loss over its shards, at the parameters before the update.
        examples: examples in the step.
        seconds: from the previous commit to this one.
        nbytes: gradient bytes that its shards stored.
        grad_norm: L2 norm of the averaged gradient, before clipping.
        lr: learning rate of each parameter group.
        skipped: the update was left out because of a NaN or Inf.
        workers: which worker computed each shard, in shard order.
    """

    step: int
    version: int
    loss: float
    examples: int
    seconds: float
    nbytes: int
    grad_norm: float
    lr: tuple[float, ...] = ()
    skipped: bool = False
    workers: tuple[str, ...] = ()

    @classmethod
    def of(cls, entry: LedgerEntry) -> StepReport:
        """The report of one ledger entry."""
        return cls(
            step=entry.version - 1,
            version=entry.version,
            loss=entry.loss,
            examples=entry.examples,
            seconds=entry.seconds,
            nbytes=sum(slot.nbytes for slot in entry.slots),
            grad_norm=entry.grad_norm,
            lr=entry.lr,
            skipped=entry.skipped,
            workers=tuple(slot.worker for slot in entry.slots),
        )


@dataclass
class TrainedModel:
    """What `Run.wait` returns.

    Attributes:
        module: the model in eval mode, on CPU, holding the last version.
        history: one report a global step.
        metrics: the last evaluation, {"loss": ..., metric: ...}; empty without an evaluation.
        evaluations: version -> metrics.
        version: the version that `module` holds.
    """

    module: torch.nn.Module
    history: list[StepReport]
    metrics: dict[str, float] = field(default_factory=dict)
    evaluations: dict[int, dict[str, float]] = field(default_factory=dict)
    version: int = 0

    def save(self, path: str | Path) -> Path:
        """Write the state dict as a safetensors file and return its path.

        Tied tensors are written once each; `torch.nn.Module.load_state_dict` of the file gives the
        same model.
        """
        from safetensors.torch import save_file

        target = Path(located(path))
        tensors = {name: t.detach().clone().contiguous() for name, t in self.module.state_dict().items()}
        try:
            save_file(tensors, target)
        except OSError as error:
            raise CheckpointError(
                f"cannot write {target}: {error}; choose a directory that exists"
            ) from error
        return target


class Run:
    """A handle on one run; any number of processes may hold one.

    Made by `Master.submit` and `Master.run`.
    """

    def __init__(self, services: Services, sender: Sender, name: str, *, trusted: bool = False) -> None:
        self.name = name
        self._services = services
        self._sender = sender
        self._ledger: Ledger = services.ledger(name)
        self._trusted = trusted

    def __repr__(self) -> str:
        return f"<Run {self.name!r}>"

    # --- looking ------------------------------------------------------------------------

    def status(self) -> RunStatus:
        """Where the run stands now.

        Raises:
            RunNotFound: if the server knows no such run.
        """
        head = self._ledger.head()
        epoch = None
        if head.total_steps is not None and head.dataset_size:
            plan = self._plan(head)
            epoch = plan.locate(min(head.version, head.total_steps - 1))[0] if plan else None
        error = head.error or {}
        return RunStatus(
            name=self.name,
            state=head.status,
            version=head.version,
            total_steps=head.total_steps,
            epoch=epoch,
            error=error.get("message"),
            traceback=error.get("traceback", ""),
            submitted_at=head.submitted_at,
            server=head.owner,
            waiting_for=() if head.status in _RESTING else tuple(self.idle_queues()),
            refused=() if head.status in _RESTING else self._refused(),
            discarded=() if head.status in _RESTING else self._discarded(),
        )

    def history(self) -> list[StepReport]:
        """One report a committed step, oldest first (from Redis and the ledger segments on disk)."""
        return [StepReport.of(entry) for entry in self._entries(self._ledger.head())]

    def evaluations(self) -> dict[int, dict[str, float]]:
        """Metrics of each evaluated version."""
        return self._ledger.evaluations()

    def events(self, after: str = "0-0") -> Iterator[Event]:
        """Live iterator over the run's events; ends when the run is done, failed or cancelled.

        Goes on by itself when Redis was away for a while.

        Args:
            after: id of the last event seen, to go on from there.
        """
        follower = self.follow(after)
        while True:
            head, found = follower.look(block_seconds=_POLL_SECONDS, resting=_RESTING)
            yield from found
            if head is not None and not found and head.status in _RESTING:
                return

    def follow(self, after: str = "0-0") -> Follower:
        """What looks at the run whenever it is asked to, through outages; for whoever follows several runs.

        Args:
            after: id of the last event seen, to go on from there.
        """
        return Follower(self._ledger, after)

    def wait(
        self, *, timeout: float | None = None, progress: bool = False, worker_timeout: float = 15.0
    ) -> TrainedModel:
        """Wait until the run is done.

        Ctrl-C detaches: the run goes on, and the message says how to come back to it. A Redis that is
        away is waited for, like the workers do.

        Args:
            timeout: seconds; None waits as long as it takes.
            progress: show a progress bar (step, loss, metric, samples/s, time left).
            worker_timeout: seconds without any worker on a queue before giving up waiting; workers of a
                `LocalCluster` of this program that are starting are waited for as long as they take.

        Raises:
            RunFailed: with the message of what failed.
            RunCancelled: the run was cancelled.
            NoWorker: nobody consumes a queue; the run stays queued.
            WaitTimeout: the run goes on, but `timeout` is over.
        """
        from torchord.coordinator.master.progress import Progress

        try:
            with Progress(self.name, enabled=progress) as bar:
                self._wait(bar, timeout, worker_timeout)
        except KeyboardInterrupt:
            sys.stderr.write(
                f"\nDetached. Run {self.name!r} goes on as long as its workers do; come back with\n"
                f"    Master({self._services.settings.url!r}).run({self.name!r}).wait(progress=True)\n"
            )
            if sys.excepthook is sys.__excepthook__:  # nobody else shows this program's errors
                sys.excepthook = _show_error
            raise Detached(f"run {self.name!r} goes on") from None
        head = self._ledger.head()
        evaluations = self.evaluations()
        return TrainedModel(
            module=self.model(),
            history=[StepReport.of(entry) for entry in self._entries(head)],
            metrics=evaluations.get(head.version, {}),
            evaluations=evaluations,
            version=head.version,
        )

    def _wait(self, bar: Any, timeout: float | None, worker_timeout: float) -> None:
        began = workers_seen = time.monotonic()
        deadline = None if timeout is None else began + timeout
        follower = self.follow()
        while True:
            head, events = follower.look(block_seconds=_POLL_SECONDS, resting=_RESTING)
            now = time.monotonic()
            if head is None:
                if deadline is not None and now > deadline:
                    raise WaitTimeout(f"run {self.name!r} cannot be asked: Redis is away; call wait() again")
                workers_seen = now
                continue
            bar.head(head)
            for event in events:
                bar.event(event)
                if event.type == "discarded":
                    log.warning("run %s: %s", self.name, event.data["message"])
            if head.status == "done" and not events:
                return
            if head.status == "failed" and not events:
                raise RunFailed(_failure(self.name, head))
            if head.status == "cancelled":
                raise RunCancelled(f"run {self.name!r} was cancelled at version {head.version}")
            if deadline is not None and now > deadline:
                raise WaitTimeout(
                    f"run {self.name!r} is {head.status} at version {head.version} of {head.total_steps} "
                    f"after {timeout:g} s; it goes on, call wait() again"
                )
            if (
                events
                or head.status == "paused"
                or self._worked_on(
                    bar, alone=now - workers_seen > worker_timeout, overdue=now - began > worker_timeout
                )
            ):
                workers_seen = now
            if events and head.status == "running":
                time.sleep(_PACE_SECONDS)  # steps may take a few milliseconds: don't ask after each

    def _worked_on(self, bar: Any, *, alone: bool, overdue: bool) -> bool:
        """Whether each queue has a worker, or will get one from a cluster that this program has started.

        Args:
            bar: shows whom the run waits for.
            alone: whether it is high time; else only a program's own cluster is looked at.
            overdue: whether a starting cluster has taken long.

        Raises:
            NoWorker: it is high time and nobody will come, or a worker of the cluster failed to start.
        """
        started = starting(self._services.settings.url)  # before the registry, see there
        if not started and not alone:
            return False
        idle = self.idle_queues()
        names = coming(started, idle)
        if names:
            bar.waiting(names, overdue=overdue)
        elif idle and alone:
            raise NoWorker(_no_worker(self.name, idle, self._refused()))
        return bool(names) or not idle

    def idle_queues(self) -> list[str]:
        """The queues, of those that the run needs, that no living worker consumes that may work on it."""
        alive = self._services.registry.alive().values()
        willing = [info for info in alive if self.name not in info.refuses]
        return [queue for queue in (UPDATES, GRADIENTS) if not any(queue in info.queues for info in willing)]

    def _refused(self) -> tuple[str, ...]:
        alive = self._services.registry.alive().values()
        return tuple(f"{info.id}: {info.refuses[self.name]}" for info in alive if self.name in info.refuses)

    def _discarded(self) -> tuple[str, ...]:
        alive = self._services.registry.alive().values()
        return tuple(sorted({said for info in alive for said in info.discarded.values()}))

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

    def resume(self, *, admit_skew: bool = False) -> None:
        """Continue after a pause, a failure, or the loss of Redis (from the last checkpoint).

        Finished shards of the interrupted step are kept. After a failure, the recipe's sources as this
        process sees them are the run's from now on: the workers must have them, too. Should a server
        later have to replay steps from before the correction, it replays them with the corrected code.

        Args:
            admit_skew: let workers take part whose torch, hardware or code differs from the run's;
                its bits are then theirs. A running run is paused for a moment for that.

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
        if admit_skew and head.status in ("pending", "running"):
            self.pause()
        self._respecify(head, admit_skew=admit_skew)
        status = "pending" if head.total_steps is None else "running"
        done, before = self._ledger.transition(
            status, allowed=("paused", "failed"), event="resumed", error=None
        )
        if not done and before not in ("running", "pending"):
            raise RunError(f"run {self.name!r} is {before}; submit it under a new name to train again")
        self._sender.advance(self.name)

    def _respecify(self, head: Head, *, admit_skew: bool) -> None:
        """Record corrected sources, or that skew is admitted, while the run stands still."""
        spec = self._spec()
        before = str(spec.get("fingerprint", ""))
        here = fingerprint(spec["recipe"])
        corrected = head.status == "failed" and bool(skewed(before, here))
        if not corrected and not admit_skew:
            return
        if corrected:
            digests = dict(item.split("=", 1) for item in f"{before},{here}".split(",") if item)
            spec["fingerprint"] = ",".join(f"{name}={digest}" for name, digest in sorted(digests.items()))
        if admit_skew:
            spec["skew"] = "admit"
        skew = spec.get("skew", spec["config"].get("skew", "refuse"))
        self._ledger.respec(spec, incarnation=revised(head.incarnation), skew=skew)

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
        for _ in range(_SWITCH_TRIES):
            head, spec = self._ledger.head(), self._spec()
            plan = self._plan(head)
            started = head.total_steps is not None
            step = max(head.version, head.reached) + 3 if started else 0
            if plan is not None and started and step >= plan.total_steps:
                raise RunError(
                    f"run {self.name!r} has {plan.total_steps - head.version} steps left, too few to switch"
                )
            switches = {int(at): dict(values) for at, values in spec.get("switches", {}).items()}
            switches[step] = {**switches.get(step, {}), **fields}
            config = TrainingConfig.from_json(spec["config"])
            after = Plan(head.dataset_size or 10**12, config, switches)
            after.config_at(min(step, after.total_steps - 1))  # raises ConfigError for a bad value
            verdict = self._ledger.switch(
                {**spec, "switches": {str(at): values for at, values in sorted(switches.items())}},
                step=step,
                incarnation=head.incarnation,
                following=switched(head.incarnation),
                total_steps=after.total_steps if started else None,
                data={"step": step, **fields},
            )
            if verdict == "ok":
                return step
            if verdict not in ("late", "changed"):
                raise RunError(f"run {self.name!r} is {verdict}; only a live run can be switched")
        raise RunError(f"run {self.name!r} advances too fast to be switched; pause() it first, then switch")

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
        entries, plan = self._entries(head), self._plan(head)
        found = audit(head, entries, plan, self._ledger.version(head.version))
        steps = tuple(reexecute)
        if not steps or plan is None:
            return found
        from torchord.coordinator.master.replay import Replay

        replay = Replay(
            self._recipe(),
            plan,
            self._checkpoints(head.incarnation),
            {entry.version: entry for entry in entries},
            progress=progress,
        )
        computed, problems = replay.compare(steps)
        return replace(
            found,
            ok=found.ok and not problems,
            problems=(*found.problems, *problems),
            reexecuted=tuple(computed),
        )

    def model(self, version: int | None = None) -> torch.nn.Module:
        """The model in eval mode, on CPU.

        Args:
            version: a stored version; None for the newest.

        Raises:
            VersionMissing: if that version is neither in the cache nor among the checkpoints.
        """
        from torchord.coordinator.compute.replica import Replica

        head = self._ledger.head()
        wanted = self._wanted(head, version)
        replica = Replica.build(self._recipe(), self._config(), "cpu")
        self._load(replica, head, wanted)
        return replica.model.eval()

    def state_dict(self, version: int | None = None) -> dict[str, torch.Tensor]:
        """The model's state dict, tensors on CPU; arguments and errors as `model`."""
        return {name: tensor.detach().clone() for name, tensor in self.model(version).state_dict().items()}

    def predict(
        self, inputs: Any, batch_size: int = 256, *, version: int | None = None, timeout: float | None = None
    ) -> Any:
        """Outputs for `inputs`, in their order, computed by the workers.

        Args:
            inputs: a tensor (first dimension: examples) or a map-style Dataset; of a dataset's
                (input, target) pairs the input is taken.
            batch_size: examples a task.
            version: pinned for the whole call; None for the newest.
            timeout: seconds; None waits as long as workers are alive.

        Returns:
            What the model returns, its tensors joined along the first dimension.

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
        )

    # --- parts ----------------------------------------------------------------------------

    def _config(self) -> TrainingConfig:
        return TrainingConfig.from_json(self._spec()["config"])

    def _spec(self) -> dict[str, Any]:
        return self._ledger.spec()

    def _recipe(self) -> ResolvedRecipe:
        # What this very process submitted it may import; any other run's modules must be allowed.
        allowed = ("*",) if self._trusted else self._services.settings.allowed_modules
        return resolve(self._spec()["recipe"], allowed=allowed)

    def _plan(self, head: Head) -> Plan | None:
        if not head.dataset_size:
            return None
        spec = self._spec()
        return Plan(head.dataset_size, TrainingConfig.from_json(spec["config"]), switches_of(spec))

    def _checkpoints(self, incarnation: str | None) -> Any:
        from torchord.cache.files.checkpoint import CheckpointStore

        return CheckpointStore(self._services.settings.checkpoint_dir, self.name, incarnation)

    def _entries(self, head: Head) -> list[LedgerEntry]:
        """All entries up to the head: those on disk, overridden by those in Redis."""
        found = {entry.version: entry for entry in self._ledger.entries()}
        if len(found) < head.version:
            for text in self._checkpoints(head.incarnation).read_ledger():
                entry = LedgerEntry.from_json(text)
                found.setdefault(entry.version, entry)
        return [found[version] for version in sorted(found) if version <= head.version]

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
        return wanted

    def _load(self, replica: Any, head: Head, wanted: int) -> None:
        try:
            _, flat, _ = self._services.parameters.fetch(self._ledger, wanted)
            replica.load(flat)
        except VersionMissing as error:
            store = self._checkpoints(head.incarnation)
            if wanted not in store.versions():
                raise VersionMissing(
                    f"{error}; checkpoints hold {store.versions()}. Ask for one of these, or for the newest"
                ) from error
            replica.load_tensors(store.load(wanted).tensors)


def _failure(name: str, head: Head) -> str:
    error = head.error or {}
    text = f"run {name!r} stopped at version {head.version}: {error.get('message', 'no reason recorded')}"
    if error.get("traceback"):
        text += "\n" + "\n".join("    " + line for line in str(error["traceback"]).splitlines())
    return (
        f"{text}\nCorrect the cause, restart the workers if code changed, then "
        f"Master(...).run({name!r}).resume()."
    )


def _no_worker(name: str, queues: list[str], refused: tuple[str, ...]) -> str:
    commands = "\n".join(f"    {worker_command(queue)}" for queue in queues)
    listed = " and ".join(repr(queue) for queue in queues)
    if refused:
        reasons = "\n".join(f"    {reason}" for reason in refused)
        return (
            f"no worker that may work on run {name!r} is consuming queue {listed}; it stays queued.\n"
            f"{reasons}"
        )
    return (
        f"no worker is consuming queue {listed}, so run {name!r} cannot go on; it stays queued. Start\n"
        f"{commands}\n(or `celery -A torchord worker` for everything on one worker), then wait() again"
    )
