"""What a training server reads and computes a step, with partial sums on the workers and without.

    python -m benchmarks.bench_tree                    K = 8 to 256, two interleaved rounds
    python -m benchmarks.bench_tree --shards 8 64

Claim: with a fan-in of 8 the bytes that the server takes off the network and the CPU seconds that it
spends a step hardly grow from 8 shards to 256; without a tree they grow with the shards. Bytes are
those that Redis has sent on the connections of the server's process (tensors, records, messages, what
its supervisor reads); seconds are CPU seconds of the threads that serve the run. The supervisor's and the
heartbeat's threads are left out: they cost by the second, and steps take long here (below). On what: an
MLP of 0.1 million parameters (0.4 MB a gradient), one example a shard, two Clients, the same-host tier
off, so that every tensor goes through Redis as between hosts.

Bias: the machine's cores are shared by all processes, so seconds of a step (printed, not claimed) say
nothing of a fleet: here two Clients compute up to 256 shards one after the other, and partial sums are
further work for them. What remains of O(K) on the server is small messages: it publishes K tasks and
writes K receipts into the ledger.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import redis

from benchmarks import RESULTS, machine
from benchmarks.workloads import recipe
from torchord import LocalCluster, Master, TrainingConfig

NO_TREE = 1 << 20
_SKIPPED = 2  # first steps, while everything is loaded


def sent_to(client: redis.Redis, process: psutil.Process) -> int:
    """Bytes that Redis has sent on the connections that a process holds."""
    ports = {connection.laddr.port for connection in process.net_connections("tcp") if connection.laddr}
    return sum(
        int(each["tot-net-out"])
        for each in client.client_list()
        if int(each["addr"].rpartition(":")[2]) in ports
    )


def cpu_seconds(pid: int) -> float:
    """CPU time of all threads of a process, by the scheduler's clock where there is one (it is finer)."""
    try:
        tasks = Path(f"/proc/{pid}/task").iterdir()
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9
    except (OSError, ValueError):
        times = psutil.Process(pid).cpu_times()
        return float(times.user + times.system)


def by_thread(pid: int) -> dict[str, float]:
    """CPU seconds of each thread of a process, by the scheduler's clock."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            found[task.name] = int((task / "schedstat").read_text().split()[0]) / 1e9
        except OSError:
            continue  # it has ended
    return found


def watchers(pid: int, before: dict[str, float]) -> set[str]:
    """The threads that have worked since, but for the main one: the supervisor's and the heartbeat's."""
    now = by_thread(pid)
    return {name for name in now if name != str(pid) and now[name] - before.get(name, 0.0) > 5e-4}


def measure(
    master: Master, cluster: LocalCluster, watching: set[str], shards: int, fan_in: int, steps: int, name: str
) -> dict[str, float]:
    """Train, and read the server's counters between two commits `steps` apart.

    Args:
        watching: the server's threads that are left out.
    """
    config = TrainingConfig(batch_size=shards, shards=shards, fan_in=fan_in, checkpoint_every=10**6)
    wanted = recipe("small", examples=(steps + _SKIPPED) * shards)
    client = redis.Redis.from_url(cluster.url, decode_responses=True)
    server = psutil.Process(cluster.processes["server"].pid)
    run = master.submit(wanted, config, name=name)
    begin: dict[str, float] = {}
    end: dict[str, float] = {}
    for event in run.events():
        if event.type != "step" or event.data["version"] not in (_SKIPPED, _SKIPPED + steps):
            continue
        found = begin if event.data["version"] == _SKIPPED else end
        found["cpu"] = cpu_seconds(server.pid)
        found["bytes"] = sent_to(client, server)
    history = run.wait(timeout=60).history
    audit = run.verify()
    assert audit.ok, audit.problems
    client.close()
    return {
        "server_bytes": (end["bytes"] - begin["bytes"]) / steps,
        "server_cpu_seconds": (end["cpu"] - begin["cpu"]) / steps,
        "step_seconds": statistics.median(report.seconds for report in history[_SKIPPED:]),
        "partial_sums": audit.partial_sums / audit.steps,
    }


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Bytes and seconds of the server against the number of shards."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4))
    for axis, what, title, scale in (
        (axes[0], "server_bytes", "MB that the training server reads a step", 1e-6),
        (axes[1], "server_cpu_seconds", "CPU milliseconds of the training server a step", 1e3),
    ):
        for tree, label in ((False, "no tree"), (True, "fan-in 8")):
            mine = [row for row in rows if row["tree"] == tree]
            axis.plot(
                [row["shards"] for row in mine], [row[what] * scale for row in mine], marker="o", label=label
            )
        axis.set(title=title, xlabel="shards in a step", xscale="log", ylim=(0, None))
        axis.set_xticks([row["shards"] for row in rows], [str(row["shards"]) for row in rows])
        axis.minorticks_off()
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    """Run, print, write JSON and plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    found: dict[tuple[int, bool], list[dict[str, float]]] = {}
    with (
        TemporaryDirectory() as folder,
        LocalCluster(
            workers=2, checkpoint_dir=folder, wait_ready=True, env={"TORCHORD_HOST_CACHE": "off"}
        ) as cluster,
    ):
        master = Master(cluster.url, checkpoint_dir=folder)
        measure(master, cluster, set(), 8, 8, options.steps, "warm-up")
        server = cluster.processes["server"].pid
        before = by_thread(server)
        time.sleep(1.5)
        watching = watchers(server, before)
        for turn in range(options.rounds):
            for shards in options.shards:
                for tree in (False, True):
                    name = f"tree-{shards}-{tree}-{turn}".lower()
                    fan_in = 8 if tree else NO_TREE
                    one = measure(master, cluster, watching, shards, fan_in, options.steps, name)
                    found.setdefault((shards, tree), []).append(one)
                    print(
                        f"round {turn + 1}  K={shards:<4} {'fan-in 8' if tree else 'no tree ':<9} {one}",
                        flush=True,
                    )
    rows = [
        {
            "shards": shards,
            "tree": tree,
            **{key: statistics.median(one[key] for one in ones) for key in ones[0]},
        }
        for (shards, tree), ones in sorted(found.items())
    ]
    print(f"\n{'K':>4} {'':>9} {'server MB':>10} {'CPU ms':>8} {'step s':>8} {'sums':>5}   (a step)")
    for row in rows:
        kind = "fan-in 8" if row["tree"] else "no tree"
        print(
            f"{row['shards']:>4} {kind:>9} {row['server_bytes'] / 1e6:>10.2f} "
            f"{row['server_cpu_seconds'] * 1e3:>8.1f} {row['step_seconds']:>8.3f} {row['partial_sums']:>5.0f}"
        )
    RESULTS.mkdir(exist_ok=True)
    record = {
        "machine": machine(),
        "steps": options.steps,
        "rows": rows,
        "rounds": [
            {"shards": shards, "tree": tree, "rounds": ones} for (shards, tree), ones in sorted(found.items())
        ],
    }
    (RESULTS / "tree.json").write_text(json.dumps(record, indent=1))
    plot(rows, RESULTS / "tree.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
