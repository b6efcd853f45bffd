"""A sweep ends with the same best trial, whoever dies on the way."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

from tests.support import models
from tests.support.fleet import Fleet, fleet
from tests.support.waiting import wait_until
from torchord import Plateau, Recipe, TrainingConfig, sweep

optuna = pytest.importorskip("optuna")
pytestmark = pytest.mark.slow

TRIALS = 12


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with fleet(tmp_path_factory.mktemp("sweep"), 2) as found:
        yield found


def tried(trial: Any) -> tuple[Recipe, TrainingConfig]:
    rate = trial.suggest_float("lr", 1e-4, 3.0, log=True)
    recipe = models.mlp(
        optimizer=partial(torch.optim.SGD, lr=rate), evaluation=partial(models.points, 16, seed=5)
    )
    rules = Plateau("loss", patience=2)
    config = TrainingConfig(
        epochs=2, batch_size=8, shards=2, seed=1, evaluate_every=2, stop_when=rules, audit_fraction=0.0
    )
    return recipe, config


def results(study: Any) -> list[Any]:
    return [(each.state.name, each.params, each.value, each.intermediate_values) for each in study.trials]


def test_the_best_trial_is_the_same_with_two_clients_and_a_server_killed(made: Fleet) -> None:
    options: dict[str, Any] = {"trials": TRIALS, "parallel": 3, "pruned_by": ("Plateau", "NotFinite")}
    undisturbed = sweep(made.master, tried, name="calm", **options)
    cluster, killed = made.cluster, []

    def kill(name: str, after: str) -> None:
        wait_until(lambda: after in made.master.runs(), message=f"{after} to be submitted")
        cluster.processes[name].kill()
        killed.append(name)

    def strike() -> None:
        cluster.add_worker("standby", role="server")
        kill("client1", "stormy-1")
        cluster.add_worker("third")
        kill("server", "stormy-4")
        kill("client2", "stormy-7")

    striking = threading.Thread(target=strike)
    striking.start()
    try:
        stormy = sweep(made.master, tried, name="stormy", **options)
    finally:
        striking.join()
    assert killed == ["client1", "server", "client2"]
    assert results(stormy) == results(undisturbed)
    assert stormy.best_trial.number == undisturbed.best_trial.number
    assert {"COMPLETE", "PRUNED"} == {state for state, *_ in results(stormy)}
