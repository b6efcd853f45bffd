"""Workers that live and are of no use: a deaf one, and ones whose code of a recipe never comes back.

Each says at which line it is while it is waited for, and starts its program anew once nobody waits for it;
the next run has its bits. `tests/support/stuck_app.py` shortens their patience.
"""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from tests.faults.recipes import Stuck, StuckSGD, stuck_metric
from tests.support import models, reference
from tests.support.waiting import wait_until
from torchord import LocalCluster, Master, Recipe, TrainingConfig
from torchord.coordinator.messages.waits import WaitKind

CONFIG = TrainingConfig(epochs=1, batch_size=8, shards=2, seed=3, evaluate_every=2)
WAIT_SECONDS = 60.0

pytestmark = pytest.mark.slow


@pytest.fixture
def here(cluster: Callable[..., LocalCluster], request: pytest.FixtureRequest) -> LocalCluster:
    """A training server and one Client, whose pool the test may name."""
    return cluster(1, app="tests.support.stuck_app", pool=getattr(request, "param", None))


def lives(master: Master) -> set[str]:
    """The ids of the workers that live: another one after each start."""
    return set(master._services.registry.alive())


def train(master: Master, name: str) -> None:
    """A run that nothing disturbs has its bits."""
    recipe = models.mlp()
    trained = master.fit(recipe, CONFIG, name=name)
    assert reference.bits(trained.module) == reference.accumulate(recipe, CONFIG).bits


def test_a_deaf_client_starts_anew_and_so_does_one_whose_time_is_over(here: LocalCluster) -> None:
    master = Master(here.url, checkpoint_dir=here.checkpoint_dir)
    client = here.processes["client1"]
    os.kill(client.pid, signal.SIGUSR2)
    config = dataclasses.replace(CONFIG, shard_timeout_seconds=1.0, max_attempts=1, audit_fraction=0)
    run = master.submit(models.mlp(dataset=partial(Stuck, how="deadlock")), config, name="limited")
    wait_until(lambda: run.status().state == "failed", WAIT_SECONDS, lambda: f"the limit: {run.status()}")
    assert "exceeded shard_timeout_seconds=1" in (run.status().error or "")
    train(master, "after")
    assert client.poll() is None, "the same process"
    said = client.log.read_text(errors="replace")
    assert said.count("this worker starts anew: it was idle, and the loop that takes its messages") == 1
    assert said.count("this worker starts anew: it was at what nobody has waited for") == 1


STUCK: dict[str, tuple[dict[str, Any], WaitKind, str]] = {
    "endless loop": ({"dataset": partial(Stuck, how="endless_loop")}, WaitKind.SHARDS, "endless_loop"),
    "deadlock": ({"dataset": partial(Stuck, how="deadlock")}, WaitKind.SHARDS, "deadlock"),
    "update": ({"optimizer": partial(StuckSGD, lr=0.1)}, WaitKind.UPDATE, "step"),
    "metric": ({"metrics": {"stuck": stuck_metric}}, WaitKind.START, "stuck_metric"),  # tried at the start
}


@pytest.mark.parametrize(
    ("here", "names"),
    [(None, ("deadlock", "update")), ("prefork", ("endless loop", "metric"))],
    indirect=["here"],
    ids=["threads", "prefork"],
)
def test_what_never_comes_back_is_said_and_given_up(here: LocalCluster, names: tuple[str, ...]) -> None:
    master = Master(here.url, checkpoint_dir=here.checkpoint_dir)
    for name in names:
        changes, kind, function = STUCK[name]
        before = lives(master)
        recipe: Recipe = models.mlp(size=40, **changes)
        run = master.submit(recipe, CONFIG, name=name.replace(" ", "-"))

        def said() -> str:
            waits = {wait.kind: wait for wait in run.status().waits}  # noqa: B023
            return waits[kind].what if kind in waits else ""  # noqa: B023

        wait_until(
            lambda: "recipes.py:" in said() and f"in {function}" in said(),  # noqa: B023
            WAIT_SECONDS,
            lambda: f"the place of the {name}: {run.status()}",  # noqa: B023
        )
        (wait,) = [wait for wait in run.status().waits if wait.kind is kind]
        assert "run.cancel()" in wait.ends
        run.cancel()
        wait_until(lambda: lives(master) - before, WAIT_SECONDS, f"another life after the {name}")  # noqa: B023
    train(master, "after")
