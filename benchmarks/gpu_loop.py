"""What `bench_gpu` measures beside torchord: the same loop without a queue, and how busy the GPU is."""

from __future__ import annotations

import multiprocessing
import shutil
import statistics
import subprocess
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.workloads import BATCH, recipe
from torchord import TrainingConfig
from torchord.coordinator.compute.batch import load_batch, to_device
from torchord.coordinator.compute.determinism import pinned, seed_everything
from torchord.coordinator.compute.replica import Replica
from torchord.coordinator.spec.plan import Plan, derive_seed
from torchord.coordinator.spec.resolving import resolve

_SAMPLE_MILLISECONDS = 100
_ANSWER_SECONDS = 600.0


@dataclass(frozen=True)
class Trace:
    """What a loop did.

    Attributes:
        seconds: from each step's end to the next.
        losses: of each step.
        ends: Unix time (s) of each step's end.
    """

    seconds: list[float]
    losses: list[float]
    ends: list[float]


def train(workload: str, steps: int, examples: int, precision: str, device: str) -> Trace:
    """The plain loop: load, forward, backward, step, read the loss; one process, the whole batch.

    The model, the batches, torch's switches and the way of a batch to the device are those of a run of
    torchord with one shard.
    """
    made = resolve(recipe(workload, examples=examples).to_spec(), allowed=("*",))
    batch = BATCH[workload]
    config = TrainingConfig(batch_size=batch, shards=1, epochs=-(-steps * batch // examples))
    where = torch.device(device)
    model = Replica.build(made, config, where).model.train()
    seed_everything(derive_seed(config.seed, "dataset"))
    dataset, plan = made.dataset(), Plan(examples, config)
    assert made.loss is not None
    optimizer = made.optimizer(model.parameters())
    seconds, losses, ends = [], [], []
    with pinned(config.threads, config.deterministic, where):
        before = time.perf_counter()
        for step in range(steps):
            inputs, targets = to_device(load_batch(dataset, plan.indices(step, 0)), where)
            optimizer.zero_grad()
            with torch.autocast(where.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext():
                loss = made.loss(model(inputs), targets)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
            now = time.perf_counter()
            seconds.append(now - before)
            ends.append(time.time())
            before = now
    return Trace(seconds, losses, ends)


def _serve(pipe: Any) -> None:
    while (work := pipe.recv()) is not None:
        try:
            pipe.send(train(*work))
        except Exception as error:  # noqa: BLE001  # the words go to whoever asked
            frames = "".join(traceback.format_tb(error.__traceback__)[-1:])
            pipe.send(f"{type(error).__name__}: {error}\n{frames}")


class PlainLoop:
    """A process that trains when it is told to, so that its CUDA context is made once."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()

    def train(self, *work: Any) -> Trace:
        """`train` with these arguments, over there.

        Raises:
            RuntimeError: it failed, with its words.
        """
        self._pipe.send(work)
        if not self._pipe.poll(_ANSWER_SECONDS):
            raise RuntimeError(f"the plain loop gave no answer within {_ANSWER_SECONDS:g} s")
        answer = self._pipe.recv()
        if isinstance(answer, str):
            raise RuntimeError(answer)
        assert isinstance(answer, Trace)
        return answer

    def close(self) -> None:
        """End the process."""
        with suppress(OSError):
            self._pipe.send(None)
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.kill()


@dataclass
class Busy:
    """Samples of how busy the GPU was: (Unix time, percent of NVML's last sampling period)."""

    samples: list[tuple[float, float]] = field(default_factory=list)

    def between(self, begin: float, end: float) -> float | None:
        """Mean percent of the samples between two Unix times, None if there are none."""
        found = [percent for at, percent in self.samples if begin <= at <= end]
        return statistics.fmean(found) if found else None


@contextmanager
def sampled(uuid: str) -> Iterator[Busy]:
    """Sample a GPU's utilisation while the block runs, by nvidia-smi; no samples where there is none.

    NVML's figure is the share of its last period (some 20 to 200 ms) in which any kernel ran, of
    whichever process.
    """
    busy = Busy()
    if not uuid or shutil.which("nvidia-smi") is None:
        yield busy
        return
    command = ["nvidia-smi", "-i", uuid, "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
    asked = subprocess.Popen(
        [*command, "-lms", str(_SAMPLE_MILLISECONDS)], stdout=subprocess.PIPE, text=True, bufsize=1
    )

    def read() -> None:
        assert asked.stdout is not None
        for line in asked.stdout:
            with suppress(ValueError):  # "[N/A]" on a MIG slice
                busy.samples.append((time.time(), float(line)))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        yield busy
    finally:
        asked.terminate()
        asked.wait()
        reader.join(timeout=5)
