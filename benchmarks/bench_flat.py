"""Does anything accumulate? A no-op run of many steps; memory of Redis and of every process.

    python -m benchmarks.bench_flat                    10,000 steps of 4 shards
    python -m benchmarks.bench_flat --steps 1000

Claim: after the first steps the memory of Redis and of each process is flat. What is shown: a plot and
the slope over the second half of the run, in bytes a step. Bias: the ledger keeps up to 1,000 entries
in Redis plus those since the last checkpoint, and Celery's 90-byte mark of each chord lives for 60 s,
so the first part of a run does grow; runs shorter than that show only this.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import redis

from benchmarks import RESULTS, machine
from benchmarks.workloads import recipe
from torchord import LocalCluster, Master, TrainingConfig


def measure(steps: int, shards: int, samples: int) -> dict[str, object]:
    """Train and sample memory; returns the record that is written."""
    with (
        TemporaryDirectory() as folder,
        LocalCluster(workers=2, checkpoint_dir=folder, wait_ready=True) as cluster,
    ):
        master = Master(cluster.url, checkpoint_dir=folder)
        client = redis.Redis.from_url(cluster.url, decode_responses=True)
        config = TrainingConfig(batch_size=shards, shards=shards, checkpoint_every=250)
        run = master.submit(recipe("noop", examples=steps * shards), config, name="flat")
        processes = {name: psutil.Process(process.pid) for name, process in cluster.processes.items()}
        rows: list[dict[str, float]] = []
        began = time.monotonic()
        every = max(1, steps // samples)
        wanted = every
        for event in run.events():
            if event.type != "step" or event.data["version"] < wanted:
                continue
            wanted += every
            row = {"step": float(event.data["version"]), "seconds": time.monotonic() - began}
            row["redis"] = float(client.info("memory")["used_memory"])
            row["keys"] = float(client.dbsize())
            for name, process in processes.items():
                row[name] = float(process.memory_info().rss)
            rows.append(row)
            print(
                f"\rstep {int(row['step']):>6} of {steps}   redis {row['redis'] / 1e6:7.2f} MB   "
                f"server {row['server'] / 1e6:7.1f} MB",
                end="",
                flush=True,
            )
        print()
        audit = run.verify()
        forever = [key for key in client.scan_iter("torchord:*") if client.ttl(key) == -1]
    half = rows[len(rows) // 2 :]
    names = [name for name in rows[0] if name not in ("step", "seconds")]
    slopes = {
        name: statistics.linear_regression([r["step"] for r in half], [r[name] for r in half]).slope
        for name in names
    }
    return {
        "machine": machine(),
        "steps": steps,
        "shards": shards,
        "audit_ok": audit.ok,
        "keys_without_ttl": forever,
        "slope_bytes_a_step_second_half": slopes,
        "rows": rows,
    }


def plot(record: dict[str, object], path: Path) -> None:
    """Memory against steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = record["rows"]
    assert isinstance(rows, list)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    steps = [row["step"] for row in rows]
    left.plot(steps, [row["redis"] / 1e6 for row in rows], color="tab:red")
    left.set(title="Redis", xlabel="global step", ylabel="used memory, MB", ylim=(0, None))
    for name in rows[0]:
        if name not in ("step", "seconds", "redis", "keys"):
            right.plot(steps, [row[name] / 1e6 for row in rows], label=name)
    right.set(title="Processes", xlabel="global step", ylabel="resident memory, MB", ylim=(0, None))
    right.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    """Run, print, write JSON and plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--shards", type=int, default=4)
    options = parser.parse_args()
    record = measure(options.steps, options.shards, samples=200)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "flat.json").write_text(json.dumps(record, indent=1))
    plot(record, RESULTS / "flat.png")
    slopes = record["slope_bytes_a_step_second_half"]
    assert isinstance(slopes, dict)
    for name, slope in slopes.items():
        unit = "keys" if name == "keys" else "bytes"
        print(f"{name:>10}: {slope:+9.2f} {unit} a step over the second half")
    print(f"audit ok: {record['audit_ok']}   keys without TTL: {record['keys_without_ttl']}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
