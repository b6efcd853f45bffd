"""One cluster for many experiments: arm a fault, train, compare with the run that nothing disturbed."""

from __future__ import annotations

import hashlib
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tests.faults.recipes import Slow
from tests.support import models
from tests.support.receiver import KEY, receiving
from tests.support.waiting import wait_until
from torchord import Audit, LocalCluster, Master, Recipe, Run, TrainingConfig
from torchord.coordinator.local_cluster.cluster import WorkerProcess
from torchord.coordinator.local_steps import diloco
from torchord.coordinator.runtime.faults import fired, parse

CONFIG = TrainingConfig(epochs=3, batch_size=8, shards=3, checkpoint_every=4, evaluate_every=6, seed=3)
WAIT_SECONDS = 120.0
"""Far below the visibility timeout of the broker (an hour): what waits for that fails here."""
HOURS = 36000.0
"""What a sample takes that must not be done before the test says so."""


def recipe(**changes: Any) -> Recipe:
    """Dropout, AdamW and an evaluation: 15 steps with `CONFIG`. Local steps are DiLoCo's."""
    return models.mlp(size=40, **{"outer_optimizer": diloco, **changes})


def digest(run: Run) -> str:
    """SHA-256 over every tensor of the run's newest version."""
    found = hashlib.sha256()
    for name, tensor in sorted(run.state_dict().items()):
        found.update(name.encode() + tensor.numpy().tobytes())
    return found.hexdigest()


@dataclass(frozen=True)
class Outcome:
    """What a run came to: the same for every run of one recipe and config, whatever happened to it."""

    bits: str
    losses: tuple[float, ...]
    evaluations: dict[int, dict[str, float]] = field(hash=False)


def outcome(run: Run) -> Outcome:
    """The outcome of a run that is done."""
    return Outcome(digest(run), tuple(report.loss for report in run.history()), run.evaluations())


class Laboratory:
    """A cluster whose processes read their faults from a file.

    Args:
        folder: for logs, checkpoints, the plan, and (in `code`) modules that workers may import.
        arguments: further arguments of `LocalCluster`; `env` comes on top of what is said here.
    """

    _numbers = itertools.count(1)

    def __init__(self, folder: Path, **arguments: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.plan = folder / "faults.txt"
        self.speeds = folder / "speeds.txt"
        self.code = folder / "code"
        self.code.mkdir(exist_ok=True)
        self.checkpoints = str(folder / "checkpoints")
        self._held = ExitStack()
        self.receiver = self._held.enter_context(receiving())
        self.cluster = LocalCluster(
            arguments.pop("workers", 2),
            **{
                "standby": 1,
                "log_dir": folder / "logs",
                "checkpoint_dir": self.checkpoints,
                "env": {
                    "TORCHORD_FAULTS": f"@{self.plan}",
                    "TORCHORD_ALLOWED_MODULES": "tests,benchmarks,torch,my_loss",
                    "TORCHORD_REMOTE_CONTROL": "shutdown",
                    "TORCHORD_TELL_URLS": self.receiver.url,
                    "TORCHORD_TELL_KEY": KEY,
                    **arguments.pop("env", {}),
                },
                "wait_ready": True,
                **arguments,
            },
        )
        sys.path.append(str(self.code))
        self.cluster.start()
        self.master = Master(self.cluster.url, checkpoint_dir=self.checkpoints)
        self._undisturbed: dict[tuple[TrainingConfig, str], Outcome] = {}

    def close(self) -> None:
        """End the cluster."""
        sys.path.remove(str(self.code))
        for worker in self.cluster.processes.values():
            worker.kill()
        self.cluster.stop()
        self._held.close()

    # --- faults ---------------------------------------------------------------------------

    @contextmanager
    def faults(self, plan: str) -> Iterator[None]:
        """Arm a plan for the block; afterwards each of its faults must have fired, once."""
        count = len(parse(plan))
        for number in range(count):
            fired(self.plan, number).unlink(missing_ok=True)
        self._arm(plan)
        try:
            yield
            missing = [n for n in range(count) if not fired(self.plan, n).exists()]
            assert not missing, f"faults {missing} of {plan!r} did not fire"
        finally:
            self._arm("")
            self.fast()
            self.mend(count)

    def _arm(self, plan: str) -> None:
        draft = self.plan.with_suffix(".draft")
        draft.write_text(plan)
        os.replace(draft, self.plan)

    def wait_fired(self, number: int = 0) -> int:
        """Wait until a fault has fired; the id of the process that it struck."""
        marker = fired(self.plan, number)
        wait_until(lambda: marker.exists() and marker.read_text(), message=f"fault {number} to fire")
        return int(marker.read_text().split()[0])

    def hold_for_supervisor(self, plan: str, run: Run) -> None:
        """Where a plan strikes the supervisor, keep the run from its end until it has.

        The supervisor looks four times a second, whatever the run does: a fast machine could be done
        before the round that the plan names.
        """
        for number, fault in enumerate(parse(plan)):
            if fault.point.startswith("supervisor."):
                self.wait_fired(number)
                assert run.status().state in ("pending", "running")

    def mend(self, count: int) -> None:
        """Wake what was stopped and start what was killed, for the next experiment."""
        for number in range(count):
            marker = fired(self.plan, number)
            if marker.exists():
                pid = int(marker.read_text().split()[0])
                if any(pid == worker.pid for worker in self.cluster.processes.values()):
                    self.wake(pid)
                marker.unlink()
        self.revive()

    def wake(self, pid: int) -> None:
        """SIGCONT to a worker that a fault has stopped."""
        self.worker(pid).cont()

    def worker(self, pid: int) -> Any:
        """The cluster's worker with this process id."""
        return next(worker for worker in self.cluster.processes.values() if worker.pid == pid)

    def revive(self) -> list[str]:
        """Start every worker again that has ended; their names."""
        dead = [name for name, worker in self.cluster.processes.items() if worker.poll() is not None]
        for name in dead:
            self.cluster.restart(name)
        return dead

    # --- runs -----------------------------------------------------------------------------

    def slow(self, seconds: float, *names: str | int) -> None:
        """Let each sample take so long from now on, on all workers or on these; `fast` ends that.

        A process of a worker's pool is named by its id.

        What has to happen in the middle of a run then does, on whatever machine: no run ends before
        the test has come so far.
        """
        pids = [name if isinstance(name, int) else self.cluster.processes[name].pid for name in names]
        who = pids or ["*"]
        draft = self.speeds.with_suffix(".draft")
        draft.write_text("".join(f"{pid} {seconds}\n" for pid in who))
        os.replace(draft, self.speeds)

    def fast(self) -> None:
        """No sample takes any time, those under way included."""
        self.speeds.unlink(missing_ok=True)

    def submit(self, config: TrainingConfig = CONFIG, **changes: Any) -> Run:
        """Submit the laboratory's recipe under a fresh name; `slow` decides how fast it is."""
        made = recipe(**{"dataset": partial(Slow, speeds=str(self.speeds)), **changes})
        return self.master.submit(made, config, name=f"experiment-{next(self._numbers)}")

    @property
    def reference(self) -> Outcome:
        """What the undisturbed run comes to."""
        return self.undisturbed(CONFIG)

    def undisturbed(self, config: TrainingConfig, **changes: Any) -> Outcome:
        """What a run with this config comes to; it is made when first asked for."""
        key = (config, repr(changes))
        if key not in self._undisturbed:
            self._arm("")
            self.fast()
            self._undisturbed[key] = self.check(self.submit(config, **changes), reference=None)
        return self._undisturbed[key]

    def check(self, run: Run, *, reference: Outcome | None) -> Outcome:
        """Wait for a run; its audit must be clean and its outcome the reference's."""
        self.fast()
        while_reviving(self, run)
        audit = run.verify()
        assert_clean(audit)
        found = outcome(run)
        if reference is not None:
            for name in Outcome.__slots__ if hasattr(Outcome, "__slots__") else vars(reference):
                assert getattr(found, name) == getattr(reference, name), name
        return found

    def clients(self) -> list[WorkerProcess]:
        """The Clients that live."""
        workers = self.cluster.processes.values()
        return [worker for worker in workers if worker.role == "client" and worker.poll() is None]

    def dismiss(self, name: str) -> None:
        """End a worker that an experiment added; it is not started again."""
        self.cluster.processes[name].kill()
        del self.cluster._processes[name]


def while_reviving(lab: Laboratory, run: Run) -> None:
    """Wait until the run is done, starting again whatever dies in the meantime, as an init system would."""

    def done() -> bool:
        lab.revive()
        status = run.status()
        assert status.state in ("pending", "running", "done"), f"{status.state}: {status.error}"
        return status.state == "done"

    wait_until(done, WAIT_SECONDS, lambda: f"the end of {run.name}: {run.status()}", interval=0.1)


def assert_clean(audit: Audit) -> None:
    """Every slot applied once, no problem found."""
    assert audit.ok, audit.problems
    assert not audit.divergent


def wait_version(run: Run, version: int, *, also: Callable[[], object] | None = None) -> None:
    """Wait until the run has committed `version`."""

    def there() -> bool:
        if also is not None:
            also()
        return run.status().version >= version

    wait_until(there, WAIT_SECONDS, lambda: f"version {version}: {run.status()}")
