"""Exact synchronous SGD, and local steps, beside the collectives at their own job.

    python -m benchmarks.bench_ddp                               all, three interleaved rounds
    python -m benchmarks.bench_ddp --workloads mlp cnn --rounds 5 --without torchft hivemind

Claim: milliseconds of one optimizer step of torchord with two Clients (shards=2), beside DDP over gloo with
two processes, torchft with two groups, hivemind with two peers, one process alone, and the limit: two
processes that never talk, each with half of the batch; and of torchord in rounds, where the Clients take
the steps by themselves. All train the same model from the same weights on the same batches with one thread a
process, and (but for the limit) must come to the same loss. With local steps (H = 16) a step is one of 16.

A figure of a round is the mean over its steps after the first ones; shown are the median of the rounds and
the worst. Not among them are torchord's first four steps, in each of which it computes a shard twice: later
it does so in one step of 250. Rounds are interleaved: each takes every opponent once. Bias: for torchord, one
machine, so that tensors pass through its memory; against it, the training server and Redis share the two
cores with the two Clients, and the opponents' processes write no ledger, no version and no checkpoint
(torchord's checkpoints are turned off too; versions and optimizer state are published). While the others
run, torchord's processes are stopped (SIGSTOP); torchft's and hivemind's, whose helpers are never idle, are
ended before torchord runs. torchord's workers have glibc keep freed memory (`torchord.tasks.allocator`); the
others are given the same setting, unless `--as-they-come`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from benchmarks import RESULTS, machine
from benchmarks.opponents import Peers, Trace, peers
from benchmarks.workloads import BATCH, recipe
from torchord import LocalCluster, Master, TrainingConfig

STEPS = {"mlp": 172, "cnn": 27, "gpt": 12}  # that count; with those skipped, whole epochs
SKIPPED = {"mlp": 20, "cnn": 5, "gpt": 4}  # while everything is loaded, and shards are computed twice
EXAMPLES = {"mlp": 8192, "cnn": 8192, "gpt": 256}
LOCAL_STEPS = {"mlp": 6, "cnn": 6, "gpt": 2}  # global steps; the first is skipped
LOCAL_EXAMPLES = {"mlp": 8192, "cnn": 8192, "gpt": 256}
HIVEMIND_STEPS = {"mlp": 60, "cnn": 12, "gpt": 3}  # it is slow
LOCAL = 16
SAME_LOSS = 1e-3  # relative difference of the last step's losses
FOREIGN = ("torchft", "hivemind")

Found = dict[str, dict[str, list[float]]]  # workload -> opponent -> milliseconds of each round


def cluster_processes(cluster: LocalCluster) -> dict[str, psutil.Process]:
    """The cluster's processes by name, Redis included."""
    found = {name: psutil.Process(worker.pid) for name, worker in cluster.processes.items()}
    return {**found, "redis": psutil.Process(cluster.broker.pid)}


@contextmanager
def stopped(cluster: LocalCluster) -> Iterator[None]:
    """Keep the cluster's workers from running."""
    for worker in cluster.processes.values():
        worker.pause()
    try:
        yield
    finally:
        for worker in cluster.processes.values():
            worker.cont()
        time.sleep(0.5)  # they renew their leases


def ours(master: Master, workload: str, name: str, local_steps: int, rounds: int | str = 1) -> Trace:
    """Train with torchord; the seconds are those of one optimizer step."""
    local = local_steps > 1
    examples = (LOCAL_EXAMPLES if local else EXAMPLES)[workload]
    steps = LOCAL_STEPS[workload] if local else STEPS[workload] + SKIPPED[workload]
    config = TrainingConfig(
        batch_size=BATCH[workload], shards=2, local_steps=local_steps, checkpoint_every=10**6,
        round_steps=rounds, epochs=steps * local_steps * BATCH[workload] // examples,
    )  # fmt: skip
    history = master.fit(recipe(workload, examples=examples), config, name=name, progress=False).history
    return Trace([report.seconds / local_steps for report in history], [report.loss for report in history])


def figure(trace: Trace, skipped: int) -> float:
    """Mean milliseconds of a step after the first ones."""
    return statistics.fmean(trace.seconds[skipped:]) * 1000


def same(workload: str, traces: dict[str, Trace]) -> dict[str, float]:
    """The last losses, after checking that they are the same.

    Raises:
        SystemExit: they are not.
    """
    exact = {name: trace.losses for name, trace in traces.items() if name not in ("limit", "local16")}
    for name, losses in exact.items():
        expected = exact["ddp"][len(losses) - 1]
        if abs(losses[-1] - expected) > SAME_LOSS * abs(expected):
            raise SystemExit(f"{workload}: {name} came to the loss {losses[-1]}, DDP to {expected}")
    return {name: losses[-1] for name, losses in exact.items()}


def show(found: Found) -> None:
    """The table: median and worst of the rounds, and ratios."""
    print(f"\n{'workload':<9}{'':<12}{'median ms':>10}{'worst ms':>10}{'x DDP':>8}{'of limit':>10}")
    for workload, rows in found.items():
        middle = {name: statistics.median(values) for name, values in rows.items()}
        for name, values in rows.items():
            ratios = "".join(
                f"{middle[base] / middle[name]:>{width}.2f}" if base in middle else " " * width
                for base, width in (("ddp", 8), ("limit", 10))
            )
            print(f"{workload:<9}{name:<12}{middle[name]:>10.1f}{max(values):>10.1f}{ratios}")


def one_round(
    turn: int, workload: str, master: Master, cluster: LocalCluster, plain: Peers,
    foreign: dict[str, Callable[[], AbstractContextManager[Peers]]], failed: dict[str, str], local: bool,
) -> tuple[dict[str, Trace], dict[str, float]]:  # fmt: skip
    """Each opponent once; also the CPU milliseconds of a step of torchord, all processes together."""
    steps, traces = STEPS[workload] + SKIPPED[workload], {}
    with stopped(cluster):
        for mode in ("limit", "ddp", "alone"):
            traces[mode] = plain.train(mode, workload, steps, EXAMPLES[workload])
        for kind, group in foreign.items():
            if kind in failed:
                continue
            try:
                most = HIVEMIND_STEPS[workload] if kind == "hivemind" else steps
                with group() as started:  # their helpers use the processor also when they have nothing to do
                    traces[kind] = started.train(kind, workload, most, EXAMPLES[workload])
            except RuntimeError as error:
                failed[kind] = str(error)
                print(f"  {kind} does not run: {error}", file=sys.stderr)
    used: dict[str, float] = {}
    for name, rounds in (("torchord", 1), ("rounds", "auto")):
        before = sum(sum(p.cpu_times()[:2]) for p in cluster_processes(cluster).values())
        traces[name] = ours(master, workload, f"{workload}-{name}-{turn}", 1, rounds)
        after = sum(sum(p.cpu_times()[:2]) for p in cluster_processes(cluster).values())
        used[name] = (after - before) / steps * 1000
    if local:
        traces["local16"] = ours(master, workload, f"{workload}-local-{turn}", LOCAL)
    return traces, used


def store(path: Path, workload: str, parts: dict[str, Any]) -> None:
    """Put what was found of a workload into the file, in the place of what an earlier run found of it."""
    record = json.loads(path.read_text()) if path.exists() else {}
    record |= {"machine": machine(), "steps": STEPS, "skipped": SKIPPED}
    for name, value in parts.items():
        record.setdefault(name, {})[workload] = value
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workloads", nargs="+", default=list(STEPS), choices=list(STEPS))
    parser.add_argument("--without", nargs="*", default=[], choices=[*FOREIGN, "local16"])
    parser.add_argument("--as-they-come", action="store_true", help="opponents under glibc's own settings")
    parser.add_argument("--output", default=str(RESULTS / "ddp.json"))
    options = parser.parse_args(arguments)
    found: Found = {workload: {} for workload in options.workloads}
    cpu: dict[str, dict[str, list[float]]] = {workload: {} for workload in options.workloads}
    losses: dict[str, dict[str, float]] = {}
    failed: dict[str, str] = {}
    with (
        TemporaryDirectory() as folder,
        LocalCluster(
            workers=2, checkpoint_dir=folder, wait_ready=True, env={"TORCHORD_TASK_LOG": "off"}
        ) as cluster,
        peers("plain", folder, keep=not options.as_they_come) as plain,
    ):
        master = Master(cluster.url, checkpoint_dir=folder)
        for turn in range(options.rounds):
            for workload in options.workloads:
                foreign = {
                    kind: partial(peers, kind, folder, keep=not options.as_they_come)
                    for kind in FOREIGN
                    if kind not in options.without
                }
                traces, used = one_round(
                    turn, workload, master, cluster, plain, foreign, failed,
                    "local16" not in options.without,
                )  # fmt: skip
                losses[workload] = same(workload, traces)
                for name, value in used.items():
                    cpu[workload].setdefault(name, []).append(value)
                for name, trace in traces.items():
                    skipped = {"local16": 1, "hivemind": 1}.get(name, SKIPPED[workload])
                    found[workload].setdefault(name, []).append(figure(trace, skipped))
                print(
                    f"round {turn + 1} {workload}: "
                    + ", ".join(f"{name} {values[-1]:.1f}" for name, values in found[workload].items())
                    + "; CPU ms a step: "
                    + ", ".join(f"{name} {value:.1f}" for name, value in used.items()),
                    flush=True,
                )
                store(Path(options.output), workload, {
                    "milliseconds": found[workload], "torchord_cpu_milliseconds": cpu[workload],
                    "last_loss": losses[workload], "opponents_keep_memory": not options.as_they_come,
                    "does_not_run": failed,
                })  # fmt: skip
    show(found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
