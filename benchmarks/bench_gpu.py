"""One GPU: torchord with one and two workers beside the same loop without the queue.

    python -m benchmarks gpu                                     the figures; skipped without a GPU
    python -m benchmarks.bench_gpu --precision bf16 --rounds 5
    python -m benchmarks.bench_gpu --device cpu --small          that the script runs through, on any CPU

Claim: milliseconds of one optimizer step of exact synchronous SGD on one GPU, for `gpt` (10.7 M parameters)
and `gpt100` (99.6 M), with one worker (shards=1) and with two on the same GPU (shards=2, half a batch each),
beside a plain loop in one process with the same model, batches, switches (deterministic, no TF32) and
precision; and with local steps (H = 16), where a step is one of the 16. The loss of the last step must agree
with the loop's. Shown is the median of the rounds and the worst, each round being the mean over its steps
after the first ones.

*Busy* is the mean of NVML's utilisation (nvidia-smi, ten samples a second) over those steps: the share of
time in which any kernel ran. It says nothing about how well a kernel fills the device. It counts the
training server's kernels too, which runs on the same GPU.

Rounds are interleaved: each takes every opponent once, and the processes of the others are stopped
meanwhile (SIGSTOP). Bias: for torchord, one machine, so that tensors pass through its memory. Against it,
training server, Redis and the workers share one machine's cores and one GPU, and the loop keeps no ledger,
publishes no version and writes no checkpoint (torchord's periodic ones are turned off too). The figures
depend on the host's memory bandwidth and the GPU's link as much as on the GPU.

With `--small` a model of 13 thousand parameters takes a few steps, and nothing is written unless --output is
given.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

from benchmarks import RESULTS, machine
from benchmarks.bench_ddp import SAME_LOSS, stopped
from benchmarks.gpu_loop import PlainLoop, Trace, sampled
from benchmarks.workloads import BATCH, recipe
from torchord import LocalCluster, Master, TrainingConfig
from torchord.cache.settings import Settings
from torchord.coordinator.runtime.services import Services

H = 16
WORKERS = (1, 2)


class Sizes(NamedTuple):
    """How long a workload is trained: counted and skipped steps, exact and local; examples of an epoch."""

    steps: int
    skipped: int
    local: int  # global steps of H local ones each, the first of which is skipped
    examples: int


SIZES = {
    "gpt": Sizes(236, 20, 21, 4096),
    "gpt100": Sizes(56, 8, 9, 1024),
    "gpt-tiny": Sizes(12, 4, 3, 64),
}


class Measured(NamedTuple):
    """One opponent's figures of one round."""

    milliseconds: float
    busy: float | None
    losses: list[float]


def measured(trace: Trace, skipped: int, samples: Any, each: int = 1) -> Measured:
    """Milliseconds of a step after the first ones, and how busy the GPU was meanwhile."""
    busy = samples.between(trace.ends[skipped - 1], trace.ends[-1])
    return Measured(statistics.fmean(trace.seconds[skipped:]) / each * 1000, busy, trace.losses)


def ours(cluster: LocalCluster, workload: str, name: str, shards: int, each: int, precision: str) -> Trace:
    """Train with torchord; a step is a global one, of `each` local steps."""
    size, batch = SIZES[workload], BATCH[workload]
    steps = size.local if each > 1 else size.steps + size.skipped
    examples = batch * each * steps if each > 1 else size.examples
    config = TrainingConfig(
        batch_size=batch, shards=shards, local_steps=each, precision=precision, checkpoint_every=10**6,
        epochs=-(-steps * each * batch // examples),
    )  # fmt: skip
    Master(cluster.url).fit(recipe(workload, examples=examples), config, name=name, progress=False)
    services = Services(Settings(url=cluster.url))
    try:
        entries = services.ledger(name).entries()[:steps]
    finally:
        services.close()
    return Trace(
        [entry.seconds for entry in entries],
        [entry.loss for entry in entries],
        [entry.committed_at for entry in entries],
    )


def one_round(
    turn: int, workload: str, clusters: dict[int, LocalCluster], loop: PlainLoop, options: argparse.Namespace
) -> dict[str, Measured]:
    """Each opponent once."""
    size, found = SIZES[workload], {}
    with ExitStack() as still, sampled(options.uuid) as samples:
        for cluster in clusters.values():
            still.enter_context(stopped(cluster))
        work = (workload, size.steps + size.skipped, size.examples, options.precision, options.device)
        found["loop"] = measured(loop.train(*work), size.skipped, samples)
    for workers, cluster in clusters.items():
        with ExitStack() as still:
            for other in clusters.values():
                if other is not cluster:
                    still.enter_context(stopped(other))
            for each in (1, H):
                name = f"{workload}-{workers}-{each}-{turn}"
                with sampled(options.uuid) as samples:
                    trace = ours(cluster, workload, name, workers, each, options.precision)
                what = f"{workers} worker{'s' if workers > 1 else ''}{f', H={H}' if each > 1 else ''}"
                found[what] = measured(trace, size.skipped if each == 1 else 1, samples, each)
    for what, one in found.items():
        theirs = found["loop"].losses[-1]
        if "H=" not in what and abs(one.losses[-1] - theirs) > SAME_LOSS * abs(theirs):
            raise SystemExit(f"{workload}: {what} came to the loss {one.losses[-1]}, the loop to {theirs}")
    return found


def show(rounds: dict[str, list[dict[str, Measured]]]) -> None:
    """The table: median and worst of the rounds, ratio to the loop, busy share."""
    print(f"\n{'workload':<10}{'':<17}{'median ms':>10}{'worst ms':>10}{'of loop':>9}{'busy %':>8}")
    for workload, turns in rounds.items():
        base = statistics.median(turn["loop"].milliseconds for turn in turns)
        for what in turns[0]:
            values = [turn[what].milliseconds for turn in turns]
            busy = [turn[what].busy for turn in turns if turn[what].busy is not None]
            shown = f"{statistics.median(busy):.1f}" if busy else "-"  # type: ignore[type-var]
            ratio = base / statistics.median(values)
            print(
                f"{workload:<10}{what:<17}{statistics.median(values):>10.2f}{max(values):>10.2f}"
                f"{ratio:>9.2f}{shown:>8}"
            )


def device_named(device: str) -> dict[str, Any]:
    """Name, memory and UUID of the device."""
    if not device.startswith("cuda"):
        return {"name": "CPU"}
    found: Any = torch.cuda.get_device_properties(device)
    return {
        "name": found.name,
        "memory_bytes": found.total_memory,
        "multiprocessors": found.multi_processor_count,
        "uuid": f"GPU-{str(found.uuid).removeprefix('GPU-')}" if hasattr(found, "uuid") else "",
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print and write JSON; returns 0 without a GPU, after saying so."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--small", action="store_true", help="a tiny model and one round: that it runs")
    parser.add_argument("--workloads", nargs="+", choices=list(SIZES), default=["gpt", "gpt100"])
    parser.add_argument("--workers", nargs="+", type=int, default=list(WORKERS))
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", default="")
    options = parser.parse_args(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print(
            f"skipped: no CUDA device here (torch {torch.__version__}); "
            "to try the script: python -m benchmarks.bench_gpu --device cpu --small"
        )
        return 0
    if options.small:
        options.workloads, options.rounds = ["gpt-tiny"], 1
    named = device_named(options.device)
    options.uuid = named.get("uuid", "")
    print(f"device: {named['name']}, {options.precision}", flush=True)
    rounds: dict[str, list[dict[str, Measured]]] = {workload: [] for workload in options.workloads}
    with ExitStack() as stack:
        folder = stack.enter_context(TemporaryDirectory())
        loop = PlainLoop()
        stack.callback(loop.close)
        environment = {"TORCHORD_DEVICE": options.device}
        clusters = {
            workers: stack.enter_context(
                LocalCluster(workers, env=environment, checkpoint_dir=f"{folder}/{workers}")
            )
            for workers in options.workers
        }
        for turn in range(options.rounds):
            for workload in options.workloads:
                found = one_round(turn, workload, clusters, loop, options)
                rounds[workload].append(found)
                shown = ", ".join(f"{what} {one.milliseconds:.2f}" for what, one in found.items())
                print(f"round {turn + 1} {workload}: {shown} ms", flush=True)
    show(rounds)
    write(options, named, rounds)
    return 0


def write(
    options: argparse.Namespace, named: dict[str, Any], rounds: dict[str, list[dict[str, Measured]]]
) -> None:
    """Leave the figures in results/gpu.json, or where --output says; a trial on the CPU leaves none."""
    output = options.output or ("" if named["name"] == "CPU" or options.small else str(RESULTS / "gpu.json"))
    if not output:
        print("a trial: no figures are kept", file=sys.stderr)
        return
    figures = {
        field: {
            workload: {what: [getattr(turn[what], field) for turn in turns] for what in turns[0]}
            for workload, turns in rounds.items()
        }
        for field in ("milliseconds", "busy")
    }
    last = {
        workload: {what: one.losses[-1] for what, one in turns[-1].items()}
        for workload, turns in rounds.items()
    }
    record = {
        "machine": machine(), "device": named, "precision": options.precision, "local_steps": H,
        "milliseconds": figures["milliseconds"], "busy_percent": figures["busy"], "last_loss": last,
        "sizes": {workload: SIZES[workload]._asdict() for workload in rounds},
    }  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    with open(output, "w") as file:
        json.dump(record, file, indent=1)


if __name__ == "__main__":
    raise SystemExit(main())
