"""How one broker and one training server carry a growing fleet, and what gives out first.

    python -m benchmarks.bench_scale                   2 to 256 simulated Clients, one shard each
    python -m benchmarks.bench_scale --paper           the model's figures for larger fleets, from the JSON

Claim: what a global step of N shards on N Clients costs the training server and Redis in CPU seconds,
bytes and commands is linear in N beyond the fan-in; from that follows how large a fleet one training
server and one Redis carry. On what: no-op gradients, a real training server, real messages,
acknowledgements, ledger calls, heartbeats and chords; the Clients are simulated in one process
(`benchmarks.fleet`), so 256 of them fit a machine with two cores.

Bias: the steps/s that are measured are those of this machine, whose cores the simulation shares with the
server and Redis: the simulating process, not the system, is what is full here. So the claim rests on CPU
seconds of each process, which other processes' load hardly changes, and the model says what they would
allow if every Client had its own core. Gradients are a few bytes: what tensors cost is a separate term
of the model (docs/scale.md). Loopback has no latency.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import redis

from benchmarks import RESULTS, machine
from benchmarks.bench_tree import cpu_seconds
from benchmarks.fleet import serve
from benchmarks.workloads import recipe
from coordinator import LocalCluster, Master, TrainingConfig
from coordinator.fan_in import FanIn

_SKIPPED = 3  # first steps, while everything is loaded
FAN_IN = 8


def counters(client: redis.Redis, pids: dict[str, int]) -> dict[str, float]:
    """What has been used up to now: CPU seconds by process, bytes and commands of Redis."""
    found = {f"{name}_cpu": cpu_seconds(pid) for name, pid in pids.items()}
    stats = client.info("stats")
    found["redis_in_bytes"] = float(stats["total_net_input_bytes"])
    found["redis_out_bytes"] = float(stats["total_net_output_bytes"])
    found["commands"] = float(stats["total_commands_processed"])
    found["seconds"] = time.perf_counter()
    return found


def measure(
    master: Master, client: redis.Redis, pids: dict[str, int], size: int, steps: int
) -> dict[str, float]:
    """Train with `size` shards a step; what one step costs."""
    config = TrainingConfig(batch_size=size, shards=size, fan_in=FAN_IN, checkpoint_every=10**6)
    run = master.submit(recipe("noop", examples=(steps + _SKIPPED) * size), config, name=f"scale-{size}")
    begin: dict[str, float] = {}
    end: dict[str, float] = {}
    for event in run.events():
        if event.type == "step" and event.data["version"] == _SKIPPED:
            begin = counters(client, pids)
        elif event.type == "step" and event.data["version"] == _SKIPPED + steps:
            end = counters(client, pids)
    run.wait(timeout=30)
    audit = run.verify()
    assert audit.ok, audit.problems
    found = {name: (end[name] - begin[name]) / steps for name in end}
    return {"workers": size, "steps": steps, "duplicates": audit.duplicates_ignored, **found}


def fit(rows: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Each cost of a step as a + b N, by least squares of the relative error over all sizes."""
    model = {}
    for name in ("server_cpu", "redis_cpu", "clients_cpu", "redis_in_bytes", "redis_out_bytes", "commands"):
        weights = [1 / row[name] ** 2 for row in rows]
        total = sum(weights)
        sizes, costs = [row["workers"] for row in rows], [row[name] for row in rows]
        mean_n = sum(w * n for w, n in zip(weights, sizes, strict=True)) / total
        mean_c = sum(w * c for w, c in zip(weights, costs, strict=True)) / total
        slope = sum(
            w * (n - mean_n) * (c - mean_c) for w, n, c in zip(weights, sizes, costs, strict=True)
        ) / sum(w * (n - mean_n) ** 2 for w, n in zip(weights, sizes, strict=True))
        model[name] = {"fixed": mean_c - slope * mean_n, "each": slope}
    return model


def cost(model: dict[str, dict[str, float]], name: str, size: int) -> float:
    """What a step of `size` Clients costs by the model."""
    return model[name]["fixed"] + model[name]["each"] * size


def paper(record: dict[str, Any], seconds: tuple[float, ...] = (0.1, 1.0, 10.0)) -> None:
    """Print what the model says of larger fleets."""
    model = record["model"]
    print("a step of N Clients costs   (fixed + N times each)")
    for name, line in model.items():
        scale, unit = (1e3, "ms") if name.endswith("cpu") else (1e-3, "kB") if "bytes" in name else (1, "")
        print(f"{name:>16}: {line['fixed'] * scale:9.3f} + N x {line['each'] * scale:8.4f} {unit}")
    print("\nlargest N that one process carries, by compute time of a step")
    for name in ("server_cpu", "redis_cpu"):
        line = model[name]
        limits = [f"{t:g} s: {max(0.0, (t - line['fixed']) / line['each']):,.0f}" for t in seconds]
        print(f"{name:>16}: {'   '.join(limits)}")
    print(
        f"\n{'N':>7} {'server s':>9} {'redis s':>9} {'sums':>6} {'levels':>7} {'control MB':>11}   (a step)"
    )
    for size in (256, 1000, 10_000):
        tree = FanIn(size, FAN_IN)
        levels, width = 0, size
        while width > FAN_IN:
            width, levels = -(-width // FAN_IN), levels + 1
        moved = cost(model, "redis_in_bytes", size) + cost(model, "redis_out_bytes", size)
        print(
            f"{size:>7} {cost(model, 'server_cpu', size):>9.3f} {cost(model, 'redis_cpu', size):>9.3f} "
            f"{len(tree.partials):>6} {levels:>7} {moved / 1e6:>8.1f}"
        )


def plot(record: dict[str, Any], path: Path) -> None:
    """Steps a second, CPU and bytes of a step, with the model behind them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows, model = record["rows"], record["model"]
    sizes = [row["workers"] for row in rows]
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(15, 4.2))
    left.plot(sizes, [1 / row["seconds"] for row in rows], "ko-", label="measured (all on this machine)")
    for name, color in (("server_cpu", "tab:blue"), ("redis_cpu", "tab:red")):
        label = name.removesuffix("_cpu")
        left.plot(
            sizes, [1 / cost(model, name, n) for n in sizes], color=color, ls="--", label=f"{label} full"
        )
        middle.plot(sizes, [row[name] * 1e3 for row in rows], "o", color=color, label=label)
        middle.plot(sizes, [cost(model, name, n) * 1e3 for n in sizes], color=color, ls="--")
    left.set(title="Steps a second", xlabel="Clients (= shards)", xscale="log", yscale="log")
    middle.set(title="CPU ms a step", xlabel="Clients (= shards)", xscale="log", yscale="log")
    for name, color in (("redis_in_bytes", "tab:green"), ("redis_out_bytes", "tab:purple")):
        right.plot(sizes, [row[name] / 1e3 for row in rows], "o", color=color, label=name.split("_")[1])
        right.plot(sizes, [cost(model, name, n) / 1e3 for n in sizes], color=color, ls="--")
    right.set(title="kB a step through Redis", xlabel="Clients (= shards)", xscale="log", yscale="log")
    for axis in (left, middle, right):
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    """Run, print, write JSON and plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 4, 8, 16, 32, 64, 128, 256])
    parser.add_argument("--tasks", type=int, default=1500, help="gradients to compute for each size")
    parser.add_argument("--paper", action="store_true", help="print the model of the last results")
    options = parser.parse_args()
    target = RESULTS / "scale.json"
    if options.paper:
        paper(json.loads(target.read_text()))
        return 0
    with TemporaryDirectory() as folder, LocalCluster(workers=0, checkpoint_dir=folder) as cluster:
        os.environ["TORCHORD_URL"] = cluster.url  # for the Celery app of the simulating process
        server = cluster.add_worker(role="server", env={"TORCHORD_HOST_CACHE": "off"})
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(target=serve, args=(cluster.url, theirs))
        process.start()
        master = Master(cluster.url, checkpoint_dir=folder)
        client = redis.Redis.from_url(cluster.url, decode_responses=True)
        assert process.pid and cluster.broker.pid
        pids = {"server": server.pid, "redis": cluster.broker.pid, "clients": process.pid}
        rows = []
        for size in options.workers:
            ours.send(size)
            ours.recv()
            rows.append(measure(master, client, pids, size, max(6, min(150, options.tasks // size))))
            ours.send("enough")
            rows[-1]["tasks"] = ours.recv()
            print({name: round(value, 5) for name, value in rows[-1].items()}, flush=True)
        ours.send(None)
        process.join(timeout=10)
    record = {"machine": machine(), "fan_in": FAN_IN, "rows": rows, "model": fit(rows)}
    RESULTS.mkdir(exist_ok=True)
    target.write_text(json.dumps(record, indent=1))
    plot(record, RESULTS / "scale.png")
    paper(record)
    share = statistics.median(row["clients_cpu"] / row["seconds"] for row in rows)
    print(
        f"\nthe simulated Clients were {share:.0%} busy (one core): that is what limits the steps/s measured"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
