"""A cluster for a whole test module, and the questions that every end-to-end test asks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.keys import keys_without_ttl
from torchord import LocalCluster, Master, Recipe, Run, TrainedModel, TrainingConfig

WAIT_SECONDS = 120.0  # far more than any run here needs: a run that hangs fails, a slow machine does not


class Fleet:
    """A started `LocalCluster` and a Master of it.

    Attributes:
        cluster: the cluster; all its workers are ready.
        master: shares the workers' checkpoint directory.
        folder: where logs and checkpoints lie.
    """

    def __init__(self, cluster: LocalCluster, folder: Path) -> None:
        self.cluster = cluster
        self.folder = folder
        self.master = Master(cluster.url, checkpoint_dir=str(folder / "checkpoints"))

    @property
    def clients(self) -> list[str]:
        """Names of the living Clients."""
        return [n for n, p in self.cluster.processes.items() if p.role == "client" and p.poll() is None]

    def resize(self, clients: int) -> None:
        """Start or end Clients until there are so many."""
        for name in self.clients[clients:]:
            self.cluster.processes[name].terminate()
            self.cluster.processes[name].wait(30)
        while len(self.clients) < clients:
            self.cluster.add_worker()
        running = [p for p in self.cluster.processes.values() if p.poll() is None]
        if not all(process.ready() for process in running):
            self._wait(running)

    def _wait(self, running: list[Any]) -> None:
        from tests.support.waiting import wait_until

        wait_until(lambda: all(process.ready() for process in running), message="the new workers")

    def train(self, recipe: Recipe, config: TrainingConfig, name: str) -> tuple[Run, TrainedModel]:
        """Submit, wait to the end, and check that the ledger is clean."""
        run = self.master.submit(recipe, config, name=name)
        trained = finished(run)
        return run, trained

    def log(self, name: str) -> str:
        """What a worker has logged so far."""
        return self.cluster.processes[name].log.read_text(errors="replace")


def finished(run: Run) -> TrainedModel:
    """Wait for the end of a run and check its ledger, its state and its history."""
    trained = run.wait(timeout=WAIT_SECONDS)
    audit = run.verify()
    assert audit.ok, audit.problems
    status = run.status()
    assert (status.state, status.version, status.error) == ("done", status.total_steps, None)
    assert [report.step for report in trained.history] == list(range(status.version))
    assert audit.steps == status.version
    assert audit.slots == sum(len(report.workers) for report in trained.history)
    return trained


@contextmanager
def fleet(folder: Path, workers: int = 2, **arguments: Any) -> Iterator[Fleet]:
    """A cluster with the arguments of `LocalCluster`, whose every key must have a TTL when it ends."""
    defaults = {"log_dir": folder / "logs", "checkpoint_dir": folder / "checkpoints", "wait_ready": True}
    cluster = LocalCluster(workers, **{**defaults, **arguments})
    cluster.start()
    try:
        yield Fleet(cluster, folder)
        forever = keys_without_ttl(cluster.url)
        assert not forever, f"keys without a TTL: {forever[:20]}"
    finally:
        for worker in cluster.processes.values():
            worker.kill()
        cluster.stop()
