"""How one broker and one training server carry a growing fleet, and what gives out first.

    python -m benchmarks.bench_scale                   2 to 256 simulated Clients, one shard each
    python -m benchmarks.bench_scale --paper           the model's figures for larger fleets, from the JSON

Claim: what a global step of N shards on N Clients costs the training server and Redis in CPU seconds,
bytes and commands is linear in N, as is what each second costs besides (heartbeats, asking for work, the
supervisor's looks); from that follows how large a fleet one training server and one Redis carry. The
second part is measured while nobody computes and taken off the first. On what: no-op gradients, a real
training server, real messages, acknowledgements, ledger calls, heartbeats and chords; the Clients are
simulated in one process (`benchmarks.fleet`), so 256 of them fit a machine with two cores.

Bias: the steps/s that are measured are those of this machine, whose cores the simulation shares with the
server and Redis: the simulating process, not the system, is what is full here. So the claim rests on CPU
seconds of each process, which other processes' load hardly changes, and the model says what they would
allow if every Client had its own core. Gradients are a few bytes: what tensors cost is a separate term
of the model (docs/scale.md). Loopback has no latency.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import redis

from benchmarks import RESULTS, machine
from benchmarks.bench_tree import by_thread, cpu_seconds, watchers
from benchmarks.fleet import serve
from benchmarks.workloads import recipe
from torchord import LocalCluster, Master, TrainingConfig
from torchord.coordinator.spec.sum_tree import FanIn

_SKIPPED = 3  # first steps, while everything is loaded
FAN_IN = 8
COSTS = ("server_cpu", "redis_cpu", "clients_cpu", "redis_in_bytes", "redis_out_bytes", "commands")


def counters(client: redis.Redis, pids: dict[str, int]) -> dict[str, float]:
    """What has been used up to now: CPU seconds by process, bytes and commands of Redis."""
    found = {f"{name}_cpu": cpu_seconds(pid) for name, pid in pids.items()}
    stats = client.info("stats")
    found["redis_in_bytes"] = float(stats["total_net_input_bytes"])
    found["redis_out_bytes"] = float(stats["total_net_output_bytes"])
    found["commands"] = float(stats["total_commands_processed"])
    found["seconds"] = time.perf_counter()
    return found


def spent(client: redis.Redis, pids: dict[str, int], seconds: float) -> dict[str, float]:
    """What is used in a second, over so many seconds in which nothing else is asked of anybody."""
    before = counters(client, pids)
    time.sleep(seconds)
    after = counters(client, pids)
    return {name: (after[name] - before[name]) / (after["seconds"] - before["seconds"]) for name in after}


def measure(
    master: Master, client: redis.Redis, pids: dict[str, int], fleet: Connection, size: int, steps: int
) -> dict[str, Any]:
    """Train with `size` shards a step: what a step costs, and a second in which nothing is done."""
    fields = {"batch_size": size, "shards": size, "fan_in": FAN_IN, "checkpoint_every": 10**6}
    config = TrainingConfig(**fields, audit_fraction=0)  # nothing is computed here that could be checked
    run = master.submit(recipe("noop", examples=(steps + _SKIPPED) * size), config, name=f"scale-{size}")
    while run._ledger.head().launched is None:
        time.sleep(0.02)
    spent(client, pids, 0.3)  # what follows a launch
    before = by_thread(pids["server"])
    watching = spent(client, pids, 0.8)  # a step is under way: the supervisor looks at it
    watching_threads = watchers(pids["server"], before)
    fleet.send(size)
    fleet.recv()
    begin: dict[str, float] = {}
    end: dict[str, float] = {}
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    for event in run.events():
        if event.type == "step" and event.data["version"] == _SKIPPED:
            begin, first = counters(client, pids), by_thread(pids["server"])
        elif event.type == "step" and event.data["version"] == _SKIPPED + steps:
            end, last = counters(client, pids), by_thread(pids["server"])
    run.wait(timeout=30)
    audit = run.verify()
    assert audit.ok, audit.problems
    waiting = spent(client, pids, 2.0)  # heartbeats, and everybody asks for work
    fleet.send("enough")
    standing = {name: watching[name] + waiting[name] for name in COSTS}
    seconds = (end["seconds"] - begin["seconds"]) / steps
    step = {name: max(0.0, (end[name] - begin[name]) / steps - standing[name] * seconds) for name in COSTS}
    # The server's own: what its watching threads did is known, and need not be estimated.
    used = {name: last[name] - first.get(name, 0.0) for name in last}
    watched = sum(used[name] for name in watching_threads if name in used)
    standing["server_cpu"] = watched / (seconds * steps)
    step["server_cpu"] = (sum(used.values()) - watched) / steps
    return {
        "workers": size,
        "steps": steps,
        "seconds": seconds,
        "tasks": fleet.recv(),
        "duplicates": audit.duplicates_ignored,
        "step": step,
        "second": standing,
    }


def line(sizes: list[int], costs: list[float]) -> dict[str, float]:
    """Costs as fixed + each x N, by least squares of the relative error."""
    weights = [1 / max(value, 1e-9) ** 2 for value in costs]
    total = sum(weights)
    mean_n = sum(w * n for w, n in zip(weights, sizes, strict=True)) / total
    mean_c = sum(w * c for w, c in zip(weights, costs, strict=True)) / total
    above = sum(w * (n - mean_n) * (c - mean_c) for w, n, c in zip(weights, sizes, costs, strict=True))
    slope = above / sum(w * (n - mean_n) ** 2 for w, n in zip(weights, sizes, strict=True))
    return {"fixed": mean_c - slope * mean_n, "each": slope}


def fit(rows: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """The model: what a step costs, and what a second costs, each as fixed + each x N."""
    sizes = [row["workers"] for row in rows]
    return {
        kind: {name: line(sizes, [row[kind][name] for row in rows]) for name in COSTS}
        for kind in ("step", "second")
    }


def cost(model: dict[str, Any], name: str, size: int, seconds: float) -> float:
    """What a step of so many seconds costs with so many Clients."""
    step, second = model["step"][name], model["second"][name]
    return float(step["fixed"] + step["each"] * size + (second["fixed"] + second["each"] * size) * seconds)


def shortest(model: dict[str, Any], name: str, size: int) -> float:
    """The seconds of a step at which one core is full, what those seconds themselves cost included.

    inf: the core is full without any step.
    """
    step, second = model["step"][name], model["second"][name]
    left = 1 - (second["fixed"] + second["each"] * size)
    return float((step["fixed"] + step["each"] * size) / left) if left > 0 else math.inf


def largest(model: dict[str, Any], name: str, seconds: float) -> float:
    """The number of Clients at which one core is full with steps of so many seconds."""
    step, second = model["step"][name], model["second"][name]
    fixed = step["fixed"] + second["fixed"] * seconds
    return max(0.0, (seconds - fixed) / (step["each"] + second["each"] * seconds))


def paper(record: dict[str, Any], seconds: tuple[float, ...] = (0.1, 1.0, 10.0, 60.0)) -> None:
    """Print what the model says of larger fleets."""
    model = record["model"]
    print("cost            of a step: fixed + N x each       of a second: fixed + N x each")
    for name in COSTS:
        scale, unit = (1e3, "ms") if name.endswith("cpu") else (1e-3, "kB") if "bytes" in name else (1.0, "")
        step, second = model["step"][name], model["second"][name]
        print(
            f"{name:>16} {step['fixed'] * scale:9.3f} + N x {step['each'] * scale:8.4f} {unit:<3}"
            f" {second['fixed'] * scale:9.3f} + N x {second['each'] * scale:8.4f} {unit}"
        )
    print("\nClients at which one core is full, by seconds of a step")
    for name in ("server_cpu", "redis_cpu"):
        print(f"{name:>16}  " + "   ".join(f"{t:g} s: {largest(model, name, t):,.0f}" for t in seconds))
    print(
        f"\n{'N':>7} {'shortest step: server':>22} {'Redis':>8} {'sums':>6} {'levels':>7} {'MB a step':>10}"
    )
    for size in (256, 1000, 10_000):
        tree, levels, width = FanIn(size, FAN_IN), 0, size
        while width > FAN_IN:
            width, levels = -(-width // FAN_IN), levels + 1
        moved = sum(cost(model, name, size, 1.0) for name in ("redis_in_bytes", "redis_out_bytes"))
        server, store = (shortest(model, name, size) for name in ("server_cpu", "redis_cpu"))
        print(
            f"{size:>7} {server:>20.2f} s {store:>6.2f} s {len(tree.partials):>6} {levels:>7} "
            f"{moved / 1e6:>10.1f}"
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
        label = {"server_cpu": "training server", "redis_cpu": "Redis"}[name]
        ceiling = [1 / shortest(model, name, n) for n in sizes]
        left.plot(sizes, ceiling, color=color, ls="--", label=f"{label}: one core full (model)")
        middle.plot(sizes, [row["step"][name] * 1e3 for row in rows], "o", color=color, label=label)
        middle.plot(sizes, [cost(model, name, n, 0) * 1e3 for n in sizes], color=color, ls="--")
    left.set(title="Steps a second", xlabel="Clients (= shards)", xscale="log", yscale="log")
    middle.set(title="CPU ms a step", xlabel="Clients (= shards)", xscale="log", yscale="log")
    for name, color in (("redis_in_bytes", "tab:green"), ("redis_out_bytes", "tab:purple")):
        label = {"redis_in_bytes": "into Redis", "redis_out_bytes": "out of Redis"}[name]
        right.plot(sizes, [row["step"][name] / 1e3 for row in rows], "o", color=color, label=label)
        right.plot(sizes, [cost(model, name, n, 0) / 1e3 for n in sizes], color=color, ls="--")
    right.set(title="kB a step", xlabel="Clients (= shards)", xscale="log", yscale="log")
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
            steps = max(6, min(150, options.tasks // size))
            rows.append(measure(master, client, pids, ours, size, steps))
            step = {name: round(value, 5) for name, value in rows[-1]["step"].items()}
            print(f"N={size:<4} {rows[-1]['seconds'] * 1e3:8.1f} ms a step   {step}", flush=True)
        ours.send(None)
        process.join(timeout=10)
    record = {"machine": machine(), "fan_in": FAN_IN, "rows": rows, "model": fit(rows)}
    RESULTS.mkdir(exist_ok=True)
    target.write_text(json.dumps(record, indent=1))
    plot(record, RESULTS / "scale.png")
    paper(record)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
