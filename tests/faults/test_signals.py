"""Signals that operators and terminals send: the worker is there again, and the run keeps its bits."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.faults.recipes import Hoarding
from tests.support import models, reference
from tests.support.waiting import wait_until
from torchord import LocalCluster, Master, TrainingConfig

CONFIG = TrainingConfig(epochs=25, batch_size=8, shards=2, seed=3)

pytestmark = pytest.mark.slow


def test_a_hangup_restarts_the_only_client(cluster: Callable[..., LocalCluster]) -> None:
    """Celery ends it in order and runs the same program anew, in the same process."""
    here = cluster(1)
    recipe = models.mlp()
    run = Master(here.url, checkpoint_dir=here.checkpoint_dir).submit(recipe, CONFIG, name="hung-up")
    wait_until(lambda: run.status().version >= 5, message="the first steps")
    client = here.processes["client1"]
    os.kill(client.pid, signal.SIGHUP)
    trained = run.wait(timeout=120)
    assert client.poll() is None
    assert len({name for report in trained.history for name in report.workers}) == 2, "two lives"
    assert "Restarting celery worker" in client.log.read_text(errors="replace")
    assert run.verify().ok
    assert reference.bits(trained.module) == reference.accumulate(recipe, CONFIG).bits


@pytest.mark.parametrize("pool", ["solo", "prefork"])
def test_a_worker_that_hoards_memory_starts_anew_after_its_task(
    cluster: Callable[..., LocalCluster], tmp_path: Path, pool: str
) -> None:
    """Whichever worker reads that sample first; of a prefork pool Celery replaces the child."""
    here = cluster(1, pool=pool, env={"TORCHORD_MEMORY_LIMIT_BYTES": str(800 << 20)})
    recipe = models.mlp(dataset=partial(Hoarding, 800 << 20, at=17, mark=str(tmp_path / "hoarded")))
    run = Master(here.url, checkpoint_dir=here.checkpoint_dir).submit(recipe, CONFIG, name="hoarded")
    workers = here.processes.values()
    said = "takes its place: it holds" if pool == "prefork" else "starts anew: it holds"
    wait_until(
        lambda: any(said in worker.log.read_text(errors="replace") for worker in workers),
        message="the end of the first life",
    )
    trained = run.wait(timeout=120)
    assert all(worker.poll() is None for worker in workers)
    assert run.verify().ok
    assert reference.bits(trained.module) == reference.accumulate(recipe, CONFIG).bits
