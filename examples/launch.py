"""What the examples share: options, a cluster to train on, Flower beside it, and a clean Ctrl-C."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shlex
import signal
import socket
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from torchord.cache.errors import TorchordError

if TYPE_CHECKING:
    from torchord import Master, Recipe, Run, TrainedModel, TrainingConfig

INTERRUPTED = 130
FLOWER_PORT = 5555
ROOT = Path(__file__).resolve().parent.parent


class Missing(ImportError):
    """A package that an example needs is not installed."""


class Interrupted(BaseException):
    """Ctrl-C, while this program owns a cluster that it has to stop."""


@dataclass(frozen=True)
class Options:
    """What was asked for on the command line.

    Attributes:
        name: of the run; another one each time, unless it was given.
        url: Redis URL of a cluster that is up; None starts one for the time of the program.
        workers: Clients of the cluster that is started.
        epochs: passes over the dataset.
        folder: where this program writes what it makes of the run.
        checkpoints: where the training server of the cluster that is started writes.
        flower: whether to start Flower, and to stay until Ctrl-C.
        arguments: the example's own options.
    """

    name: str
    url: str | None
    workers: int
    epochs: int
    folder: Path
    checkpoints: Path
    flower: bool
    arguments: argparse.Namespace


def run_as(module: str) -> int:
    """Run `main` of a module under the name by which workers import it, and return an exit code.

    Under `python -m examples.digits` that file is `__main__`, and a worker cannot import the model
    from there; so the file imports itself by its proper name, and nothing else happens in `__main__`.
    """
    signal.signal(signal.SIGINT, _leave_at_once)
    try:
        return int(importlib.import_module(module).main(sys.argv[1:]))
    except (Interrupted, KeyboardInterrupt):
        return INTERRUPTED
    except Missing as error:
        print(error, file=sys.stderr)
        return 2
    except TorchordError as error:
        print(error, file=sys.stderr)
        return 1


@contextmanager
def needed(package: str, *, extras: str) -> Iterator[None]:
    """Imports within the block are of what an example needs and torchord does not.

    Raises:
        Missing: a package is not installed; the message has the line for pip.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise Missing(
            f"this example needs {package}, and {error.name} is not installed here: "
            f"pip install 'torchord[{extras}]'"
        ) from error


def train(
    chosen: Options,
    recipe: Recipe,
    config: TrainingConfig,
    *,
    show: Sequence[str],
) -> int:
    """Train a recipe, show some of its metrics and the bytes of a step, audit it; returns an exit code.

    Args:
        show: names of the metrics.
    """
    with cluster(chosen) as master:
        run = master.submit(recipe, config, name=chosen.name)
        trained = run.wait(progress=True)
        for name in show:
            print(f"{name:<12} {trained.metrics[name]:.4f}")
        sent = sum(step.nbytes for step in trained.history) / len(trained.history)
        print(f"Gradients:   {sent:,.0f} bytes a step, from all shards together")
        clean = report(chosen, run, trained)
        what_next(chosen, f"examples.{chosen.arguments.prefix}")
    return 0 if clean else 1


def parser(description: str, *, name: str, epochs: int) -> argparse.ArgumentParser:
    """The options that every example has.

    Args:
        description: first line of --help.
        name: beginning of the run's name.
        epochs: default number of passes over the dataset.
    """
    made = argparse.ArgumentParser(prog=f"python -m examples.{name}", description=description)
    made.add_argument(
        "--url",
        default=os.environ.get("TORCHORD_URL") or None,
        help="train on the workers at this Redis URL, for instance redis://localhost:6379/0 (default: "
        "$TORCHORD_URL, and without it a cluster is started and stopped)",
    )
    made.add_argument("--workers", type=_at_least_one, default=2, help="Clients to start (default: 2)")
    made.add_argument(
        "--epochs", type=_at_least_one, default=epochs, help=f"passes over the data (default: {epochs})"
    )
    made.add_argument("--name", help="the run's name (default: a new one each time)")
    made.add_argument("--out", type=Path, default=Path("out"), help="folder for pictures, model and logs")
    made.add_argument(
        "--checkpoints",
        type=Path,
        default=Path("checkpoints"),
        help="folder for a started cluster's checkpoints",
    )
    made.add_argument(
        "--flower", action="store_true", help="start Flower as well, and stay up after training until Ctrl-C"
    )
    made.set_defaults(prefix=name)
    return made


def options(made: argparse.ArgumentParser, arguments: Sequence[str] | None) -> Options:
    """Parse the command line."""
    found = made.parse_args(arguments)
    name = found.name or f"{found.prefix}-{time.strftime('%m%d-%H%M%S')}-{uuid.uuid4().hex[:3]}"
    return Options(
        name=name,
        url=found.url,
        workers=found.workers,
        epochs=found.epochs,
        folder=found.out / name,
        checkpoints=found.checkpoints,
        flower=found.flower,
        arguments=found,
    )


@contextmanager
def cluster(chosen: Options) -> Iterator[Master]:
    """A Master of the cluster that was asked for, which ends with the block if it was started here.

    Ctrl-C ends a cluster that was started here. It leaves a run on another cluster alone: that
    goes on, and `Run.wait` says how to come back to it.
    """
    from torchord import LocalCluster, Master
    from torchord.cache.servers.address import masked

    chosen.folder.mkdir(parents=True, exist_ok=True)
    if chosen.url is not None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        master = Master(chosen.url)
        print(f"Run {chosen.name} on the workers at {masked(chosen.url)}", flush=True)
        yield master
        return
    signal.signal(signal.SIGINT, _interrupt)
    print(f"Run {chosen.name}: starting a server, a training server and {chosen.workers} Clients", flush=True)
    started = LocalCluster(
        chosen.workers,
        checkpoint_dir=chosen.checkpoints,
        log_dir=chosen.folder / "logs",
        keys=True,  # who gets hold of the password can still forge nothing
        # Wherever this program was started, its workers may import what it trains.
        env={"TORCHORD_ALLOWED_MODULES": "examples,torch"},
    )
    try:
        started.start()
        started.wait_ready()  # on a busy machine Python's imports take longer than wait() has patience
        with _flower(chosen, started.url, workers=len(started.processes)):
            yield Master(started.url, checkpoint_dir=str(chosen.checkpoints))
            if chosen.flower:
                _stay(chosen.folder / "url", started.url)
    except Interrupted:
        print("Interrupted; stopping the cluster.", file=sys.stderr, flush=True)
        raise
    finally:
        started.stop()


def report(chosen: Options, run: Run, trained: TrainedModel) -> bool:
    """Audit the run, save its model, and say where everything is; returns whether the audit is clean."""
    audit = run.verify()
    print(audit)
    shares = ", ".join(
        f"{worker.partition('@')[0]} {slots}" for worker, slots in sorted(audit.workers.items())
    )
    print(f"Gradients computed by: {shares}")
    model = trained.save(chosen.folder / "model.safetensors")
    checkpoint = (
        f"{chosen.checkpoints / chosen.name}/"
        if chosen.url is None
        else f"in {chosen.name}/ below the training server's TORCHORD_CHECKPOINT_DIR"
    )
    print(f"Model:       {model}")
    print(f"Checkpoints: {checkpoint}")
    return audit.ok


def what_next(chosen: Options, command: str) -> None:
    """Say how to train on workers that stay up, and how to watch them; `command` follows `python -m`."""
    if chosen.url is not None or chosen.flower:
        return
    print(
        f"\nWatch every task in Flower:      python -m {command} --flower\n"
        "Train on workers that stay up, each line in a terminal of its own:\n"
        "    redis-server                              (or any Redis or Valkey that is up)\n"
        "    celery -A torchord worker\n"
        "    celery -A torchord flower\n"
        f"    python -m {command} --url redis://localhost:6379/0"
    )


# --- Flower ---------------------------------------------------------------------------


@contextmanager
def _flower(chosen: Options, url: str, *, workers: int) -> Iterator[None]:
    """Flower beside the cluster, on loopback, ended with it whatever happens to this process.

    Training begins when Flower hears of all the workers and they tell of their tasks, so that none is missed.
    """
    if not chosen.flower:
        yield
        return
    from torchord.coordinator.local_cluster.embedded_server import free_port
    from torchord.coordinator.local_cluster.guardian import Guardian

    port = FLOWER_PORT if _is_free(FLOWER_PORT) else free_port()
    page = f"http://127.0.0.1:{port}"
    arguments = ["--address=127.0.0.1", f"--port={port}"]
    guardian = Guardian()
    try:
        guardian.spawn(
            [sys.executable, "-P", "-m", "celery", "-A", "torchord", "flower", *arguments],
            env={"TORCHORD_URL": url, "CELERY_BROKER_URL": None, "PYTHONPATH": str(ROOT)},
            log=(chosen.folder / "logs" / "flower.log").absolute(),
        )
        deadline = time.monotonic() + 30
        while not _watches(page, url, workers) and time.monotonic() < deadline:
            time.sleep(0.1)
        print(f"Flower:      {page}/tasks", flush=True)
        yield
    finally:
        guardian.close()


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _watches(page: str, url: str, workers: int) -> bool:
    """Whether Flower hears of so many workers, and they tell of their tasks."""
    from urllib.request import urlopen

    from celery import Celery

    from torchord.coordinator.messages.broker import celery_url

    try:
        with urlopen(f"{page}/workers?json=1", timeout=2) as reply:
            heard = [worker for worker in json.load(reply)["data"] if worker.get("status")]
    except (OSError, ValueError, KeyError):
        return False
    if len(heard) < workers:
        return False
    with Celery(broker=celery_url(url), set_as_current=False) as app:
        told = app.control.enable_events(reply=True, timeout=1.0)
    return len(told or ()) >= workers


def _stay(file: Path, url: str) -> None:
    """Wait for Ctrl-C, with the server's URL in a file of this user: its password is not for the screen."""
    file.unlink(missing_ok=True)
    try:
        file.touch(0o600, exist_ok=False)
        file.write_text(url)
        print(
            f"\nThe cluster stays up; Ctrl-C ends it. Submit more from another terminal:\n"
            f'    export TORCHORD_URL="$(cat {shlex.quote(str(file.absolute()))})"',
            flush=True,
        )
        while True:
            time.sleep(3600)
    finally:
        file.unlink(missing_ok=True)


# --- Ctrl-C ---------------------------------------------------------------------------


def _leave_at_once(_number: int, _frame: FrameType | None) -> NoReturn:
    """Nothing is running yet: no traceback out of half an import."""
    os.write(2, b"Interrupted.\n")
    os._exit(INTERRUPTED)


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # stopping takes a second or two, and is under way
    raise Interrupted


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number
