"""The old names in a checkout lead to the same modules, and what was written under them still loads."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import redis
import torch
from torch.utils.data import TensorDataset

from tests.support import models
from torchord import LocalCluster, Master, TrainingConfig, stored_dataset
from torchord.cache.keys import RunKeys
from torchord.coordinator.local_cluster.import_path import ROOT
from torchord.coordinator.spec.targets import Target

COLD = True
SAME = """
import sys
from celery.app.utils import find_app
from coordinator import Master
import coordinator.local_steps, cache.errors, cache.ledger.ledger, tasks.celery_app
import torchord.coordinator.master.master
app = find_app("tasks")
app.loader.import_default_modules()

import torchord
assert app is torchord.app and Master is torchord.Master is torchord.coordinator.master.master.Master
doors = {name for name in sys.modules if name.partition(".")[0] in ("cache", "coordinator", "tasks")}
assert {"coordinator", "coordinator.local_steps", "cache.errors", "cache.ledger.ledger", "tasks"} <= doors
for name in doors:
    module = sys.modules[name]
    assert module is sys.modules[f"torchord.{name}"], name
    assert module.__name__ == module.__spec__.name == f"torchord.{name}", (name, module.__spec__)
ours = {id(module): module.__file__ for name, module in sys.modules.items() if name.startswith("torchord")}
assert len(ours) == len(set(ours.values())), "a file that was loaded twice"
print("the same")
"""


def shell(*command: str) -> str:
    """What a command prints that is started in the checkout."""
    environment = {"PATH": os.defpath, "HOME": os.devnull, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_old_name_is_the_same_module() -> None:
    assert shell(sys.executable, "-c", SAME) == "the same\n"


def test_old_commands() -> None:
    celery = str(Path(sys.executable).with_name("celery"))
    for app in ("tasks", "torchord"):
        assert "torchord.gradients" in shell(celery, "-A", app, "report")
    for module in ("coordinator", "torchord.coordinator", "torchord"):
        assert "verify" in shell(sys.executable, "-m", module, "--help")
    assert "TensorBoard" in shell(sys.executable, "-m", "coordinator.tensorboard", "--help")


def old(text: str) -> str:
    """A spec as it was written when the packages were called so."""
    assert "torchord.coordinator" in text
    return text.replace("torchord.coordinator", "coordinator")


def test_runs_of_the_old_names_load_and_are_found_again(cluster: Callable[..., LocalCluster]) -> None:
    made = cluster(1, layout="single")
    master = Master(made.url, checkpoint_dir=made.checkpoint_dir)
    inputs = torch.randn(16, models.FEATURES, generator=torch.Generator().manual_seed(0))
    master.datasets.put("kept", TensorDataset(inputs, inputs[:, 0].long().abs() % models.CLASSES))
    recipe = models.mlp(
        dataset=partial(stored_dataset, name="kept"),
        evaluation=Target("torchord.coordinator:stored_dataset", kwargs={"name": "kept"}),
        outer_optimizer="torchord.coordinator.local_steps:diloco",
    )
    config = TrainingConfig(epochs=1, batch_size=8, shards=1, local_steps=2, checkpoint_every=1)
    weights = master.submit(recipe, config, name="veteran").wait().module.state_dict()
    [file] = Path(str(made.checkpoint_dir)).rglob("run.json")
    file.write_text(old(file.read_text()))
    with redis.Redis.from_url(made.url, decode_responses=True) as client:
        key = RunKeys("veteran").spec
        client.set(key, old(str(client.get(key))), keepttl=True)
    for forgotten in (False, True):
        again = Master(made.url, checkpoint_dir=made.checkpoint_dir)
        if forgotten:  # as after a loss of Redis: the spec beside the checkpoints is what there is
            with redis.Redis.from_url(made.url, decode_responses=True) as client:
                client.delete(*client.scan_iter(f"*{RunKeys('veteran').head.rpartition(':')[0]}:*"))
            again.run("veteran").resume()
        run = again.submit(recipe, config, name="veteran")
        found = run.wait().module.state_dict()
        assert all(torch.equal(found[name], weights[name]) for name in weights)
        assert run.verify().ok
