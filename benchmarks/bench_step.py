"""What a step costs when there is nothing to compute.

    python -m benchmarks.bench_step                    K = 2, 4, 8; three interleaved rounds

Claim: the overhead of one global step (milliseconds from commit to commit with a no-op model), beside
the same number of messages sent by hand through redis-py by two processes (the floor: no tasks, no
tensors, no ledger). Bias: torchord's step stores and reads tensors, updates and commits; the floor
does none of that. Two Clients and one training server share the machine's cores with the server.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from tempfile import TemporaryDirectory
from typing import Any

import redis

from benchmarks import RESULTS, machine
from benchmarks.workloads import recipe
from coordinator import LocalCluster, Master, TrainingConfig

_SKIPPED = 10  # first steps, while everything is loaded


def floor_worker(url: str) -> None:
    """Answers each message with one: pop, count, and push when the step is complete."""
    client = redis.Redis.from_url(url)
    while True:
        popped: Any = client.brpop(["floor:tasks"], timeout=5)
        if popped is None or popped[1] == b"stop":
            return
        step, size = popped[1].split(b":")
        pipe = client.pipeline()
        pipe.incr(b"floor:count:" + step)
        pipe.expire(b"floor:count:" + step, 60)
        if pipe.execute()[0] == int(size):
            client.lpush("floor:done", step)


def floor(url: str, shards: int, steps: int) -> float:
    """Median milliseconds of a step made of hand-written messages, two workers."""
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=floor_worker, args=(url,), daemon=True) for _ in range(2)]
    for worker in workers:
        worker.start()
    client = redis.Redis.from_url(url)
    seconds = []
    for step in range(steps + _SKIPPED):
        began = time.perf_counter()
        client.lpush("floor:tasks", *[f"{step}:{shards}"] * shards)
        client.brpop(["floor:done"], timeout=30)
        seconds.append(time.perf_counter() - began)
    client.lpush("floor:tasks", "stop", "stop")
    for worker in workers:
        worker.join(timeout=10)
    return statistics.median(seconds[_SKIPPED:]) * 1000


def chord_step(master: Master, shards: int, steps: int, name: str) -> float:
    """Median milliseconds from commit to commit."""
    config = TrainingConfig(batch_size=shards, shards=shards, checkpoint_every=10**6)
    trained = master.fit(
        recipe("noop", examples=(steps + _SKIPPED) * shards), config, name=name, progress=False
    )
    return statistics.median(report.seconds for report in trained.history[_SKIPPED:]) * 1000


def main() -> int:
    """Run, print and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--shards", type=int, nargs="+", default=[2, 4, 8])
    options = parser.parse_args()
    found: dict[int, dict[str, list[float]]] = {k: {"torchord": [], "floor": []} for k in options.shards}
    with (
        TemporaryDirectory() as folder,
        LocalCluster(workers=2, checkpoint_dir=folder, wait_ready=True) as cluster,
    ):
        master = Master(cluster.url, checkpoint_dir=folder)
        for turn in range(options.rounds):
            for shards in options.shards:
                found[shards]["torchord"].append(
                    chord_step(master, shards, options.steps, f"step-{shards}-{turn}")
                )
                found[shards]["floor"].append(floor(cluster.url, shards, options.steps))
                print(f"round {turn + 1}  K={shards}: {found[shards]['torchord'][-1]:.2f} ms", flush=True)
    print(f"\n{'K':>3} {'torchord ms':>14} {'worst':>8} {'floor ms':>10} {'ratio':>7}")
    for shards, times in found.items():
        ours, least = statistics.median(times["torchord"]), statistics.median(times["floor"])
        print(f"{shards:>3} {ours:>14.2f} {max(times['torchord']):>8.2f} {least:>10.2f} {ours / least:>7.1f}")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "step.json").write_text(json.dumps({"machine": machine(), "milliseconds": found}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
