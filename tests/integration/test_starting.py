"""A program waits for the cluster that it started, however long its workers take, and says so."""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import pytest

from tests.support import models
from tests.support.waiting import PATIENCE_SECONDS, wait_until
from torchord import LocalCluster, Master, TrainingConfig
from torchord.cache.errors import NoWorker
from torchord.coordinator.local_cluster.starting import coming, forget, register, starting
from torchord.coordinator.master.progress import Progress

COLD = True
CONFIG = TrainingConfig(epochs=1, batch_size=8, shards=2)
HELD = "tests.support.held_app"


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[TextIO]:
    """The file that holds workers of `held_app` back while it is open; what is written tells them to end."""
    with (tmp_path / "gate").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def test_a_run_waits_for_the_workers_of_its_own_program(
    cluster: Callable[..., LocalCluster], gate: TextIO, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    made = cluster(1, layout="single", app=HELD, env={"HELD_BY": gate.name}, wait_ready=False)
    run = Master(made.url, checkpoint_dir=made.checkpoint_dir).submit(
        models.mlp(size=8), CONFIG, name="early"
    )
    with ThreadPoolExecutor(1) as pool:
        trained = pool.submit(run.wait, worker_timeout=0.0)
        wait_until(lambda: caplog.messages or trained.done(), message="the line")
        assert not trained.done(), trained.exception()
        assert not made.processes["worker"].ready()
        gate.close()
        assert trained.result(timeout=PATIENCE_SECONDS).version == 1
    assert caplog.messages == ["run 'early': waiting for the cluster's workers to start: worker"]


def test_a_worker_that_ends_before_it_is_ready_is_told_at_once_with_its_log(
    cluster: Callable[..., LocalCluster], gate: TextIO
) -> None:
    made = cluster(1, app=HELD, env={"HELD_BY": gate.name}, wait_ready=False)
    master = Master(made.url, checkpoint_dir=made.checkpoint_dir)
    run = master.submit(models.mlp(size=8), CONFIG, name="stillborn")
    gate.write("the disk is made of cheese")
    gate.close()
    with pytest.raises(NoWorker, match=r"ended with exit code 1 before it was ready") as caught:
        run.wait(worker_timeout=float("inf"))
    assert "the disk is made of cheese" in str(caught.value)
    assert f"celery -A {HELD} worker" in str(caught.value)


@dataclass(eq=False)
class Worker:
    """A worker that is where the test says."""

    name: str
    queue: str
    is_ready: bool = False
    ended: str | None = None

    def serves(self, queue: str) -> bool:
        return queue == self.queue

    def ready(self) -> bool:
        return self.is_ready

    def failure(self) -> str | None:
        return self.ended


URL = "redis://nowhere.invalid:1/0"


@pytest.fixture
def fleet() -> Iterator[list[Worker]]:
    """A training server and two Clients, registered for `URL`."""
    workers = [Worker("server", "updates"), Worker("client1", "gradients"), Worker("client2", "gradients")]
    for worker in workers:
        register(worker, URL)
    yield workers
    forget(workers)


def test_who_is_waited_for(fleet: list[Worker]) -> None:
    server, first, second = fleet
    assert starting("redis://elsewhere.invalid:1/0") == []
    assert coming(starting(URL), ["updates", "gradients"]) == ["server", "client1", "client2"]
    assert coming(starting(URL), ["gradients"]) == ["client1", "client2"]
    assert coming(starting(URL), []) == []
    before = starting(URL)
    first.is_ready = True
    assert coming(before, ["gradients"]) == ["client1", "client2"], (
        "it became ready since the registry's answer"
    )
    assert starting(URL) == [server, second]
    first.is_ready = False
    assert starting(URL) == [server, second], "who was ready once is not waited for again"


def test_an_end_is_told_only_if_nobody_else_is_coming(fleet: list[Worker]) -> None:
    _, first, second = fleet
    first.ended = "client1 ended"
    assert coming(starting(URL), ["updates", "gradients"]) == ["server", "client2"]
    second.ended = "client2 ended"
    assert coming(starting(URL), ["updates"]) == ["server"], "somebody else serves gradients"
    with pytest.raises(NoWorker, match="client1 ended"):
        coming(starting(URL), ["updates", "gradients"])
    forget([first, second])
    assert coming(starting(URL), ["gradients"]) == []


def test_a_progress_display_has_the_line_once(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("early", enabled=True) as bar:
        bar.waiting(["client1", "server"], overdue=False)
        bar.waiting(["client1"], overdue=True)
    assert capsys.readouterr().out.count("waiting for the cluster's workers to start: client1, server") == 1
