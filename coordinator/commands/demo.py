"""`torchord demo`: a run on a cluster of its own, one worker of which is killed in the middle."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from torchord.cache.errors import TorchordError
from torchord.coordinator.commands.common import BAD, OK, guarded, told, with_json

if TYPE_CHECKING:
    from torchord.coordinator.local_cluster.cluster import LocalCluster
    from torchord.coordinator.master.run import Run

MODULE = "torchord_demo"
_CODE = '''"""Two spirals, and a small network that tells them apart: edit it, and demo again."""

import math
from functools import partial

import torch
from torch import nn
from torch.utils.data import TensorDataset

from torchord import Recipe, TrainingConfig


def spirals(seed, size=2048):
    """Points of two spirals and which one each is of."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(size) % 2
    turn = torch.rand(size, generator=generator).sqrt() * 3 * math.pi
    angle = turn + math.pi * labels
    points = torch.stack([turn * angle.cos(), turn * angle.sin()], 1) / (3 * math.pi)
    return TensorDataset(points + 0.02 * torch.randn(size, 2, generator=generator), labels)


class Net(nn.Sequential):
    """Two hidden layers."""

    def __init__(self, hidden=64):
        inner = nn.Linear(2, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh()
        super().__init__(*inner, nn.Linear(hidden, 2))


def accuracy(outputs, targets):
    return (outputs.argmax(1) == targets).float().mean()


recipe = Recipe(
    model=Net,
    dataset=partial(spirals, seed=0),
    loss=nn.functional.cross_entropy,
    optimizer=partial(torch.optim.AdamW, lr=0.01),
    evaluation=partial(spirals, seed=1),
    metrics={"accuracy": accuracy},
)


def config(epochs):
    return TrainingConfig(epochs=epochs, batch_size=256, shards=4, evaluate_every=20)
'''


@click.command(
    "demo",
    help="Start a server, a training server and Clients here, train a small network on them, kill a "
    "Client in the middle, and audit what came out. Leaves its recipe, checkpoints, logs and a "
    "report in a directory.",
)
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), default="torchord-demo", show_default=True
)
@click.option("--workers", type=click.IntRange(2), default=2, show_default=True)
@click.option("--epochs", type=click.IntRange(1), default=25, show_default=True)
@with_json
def demo(out: Path, workers: int, epochs: int, as_json: bool) -> int:
    """See the help."""

    def perform() -> int:
        from torchord.coordinator.commands.report import written
        from torchord.coordinator.local_cluster.cluster import LocalCluster
        from torchord.coordinator.master.master import Master

        folder = out.absolute()
        made = _recipe(folder)
        name = time.strftime("demo-%m%d-%H%M%S")
        checkpoints = folder / "checkpoints"

        def say(said: str) -> None:
            if not as_json:
                click.echo(said)

        say(f"starting a server, a training server and {workers} Clients")
        with LocalCluster(
            workers,
            checkpoint_dir=checkpoints,
            log_dir=folder / "logs",
            env={"TORCHORD_ALLOWED_MODULES": f"{MODULE},torch"},
        ) as cluster:
            master = Master(cluster.url, checkpoint_dir=checkpoints)
            run = master.submit(made.recipe, made.config(epochs), name=name)
            say(f"run {name} trains {folder / MODULE}.py")
            _kill_in_the_middle(run, cluster, say)
            trained = run.wait(progress=not as_json)
            audit = run.verify()
            say(str(run.plot()).partition("\n\n")[0])
            say(f"{name}: {audit}")
            written(name, cluster.url, str(checkpoints), folder / "report.html")
        value = {"name": name, "metrics": trained.metrics, "audit": asdict(audit), "directory": str(folder)}
        said = ", ".join(f"{key} {value:.4g}" for key, value in trained.metrics.items())
        told(f"{name}: done, {said}; report.html and the recipe are in {folder}", value, as_json=as_json)
        return OK if audit.ok else BAD

    return guarded(perform)


def _recipe(folder: Path) -> Any:
    """The module of the demo, written where it is not there yet, and imported.

    Raises:
        TorchordError: it cannot be written, or what somebody made of it cannot be imported.
    """
    path = folder / f"{MODULE}.py"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text(_CODE, encoding="utf-8")
        if str(folder) not in sys.path:
            sys.path.append(str(folder))  # and so on the workers' path
        return __import__(MODULE)
    except OSError as error:
        raise TorchordError(f"cannot write {path}: {error}; choose another directory with --out") from error
    except Exception as error:
        raise TorchordError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error


def _kill_in_the_middle(run: Run, cluster: LocalCluster, say: Any) -> None:
    for event in run.events():
        total = run.status().total_steps or 0
        if event.type == "step" and 3 * event.data["version"] >= total:
            victim = cluster.processes["client1"]
            victim.kill()
            victim.wait()
            say(f"step {event.data['step']}: killed client1 (SIGKILL); the run goes on, with the same bits")
            return
