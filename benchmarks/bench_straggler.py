"""What a worker that is ten times slower costs a run.

    python -m benchmarks.bench_straggler

Question: does a Client that needs ten times as long for everything slow a run by more than its share? A
shard is a task that whoever is idle takes, so a slow one should hardly be felt; what it holds at the end of
a step, an idle one computes as well (a *backup*).

Its share: the fleet of three Clients and the slow one has 3.1 Clients' strength. *Ideal* is the shortest
time in which three Clients of 40 ms a shard and one of 400 ms can do K shards, if all is known beforehand
and messages take no time; for few shards that is the three Clients' time, since any shard on the slow one
takes longer. It is given for three equal Clients, too: measured less ideal is then what the system itself
costs a step, slow Client or not. So the ratio "slow / 3 equal" must not exceed 1 for the slow one to cost
nothing, and "slow / 4 equal" is what the run loses when one of four Clients becomes slow: its share of that
is 4/3.1 = 1.29 for many shards, more where K is not a multiple of the Clients.

Backups are counted on the even fleets, too: there each is a waste. Bias: the work is a pause of 40 ms a
shard (400 ms on the slow Client), so that the Clients do not compete for this machine's cores, and only the
number of pauses that overlap counts. Each figure is the median of the step times of `STEPS` steps without
the first `SKIPPED`, in `ROUNDS` runs for each fleet and K; the worst run's median is given beside it. The
fleets take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.utils.data import Dataset

from benchmarks import RESULTS, machine
from benchmarks.workloads import noop_model
from torchord import LocalCluster, Master, Recipe, TrainingConfig

PAUSE_SECONDS = 0.04
SLOWNESS = 10
SLOWER = "TORCHORD_BENCH_SLOWER"
SHARDS = (4, 16, 32, 64)
STEPS = 25
SKIPPED = 5
ROUNDS = 2
FLEETS = {"3 equal": 3, "3 and a slow": 4, "4 equal": 4}


class Paused(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Zeros, one example a shard; reading one takes `PAUSE_SECONDS`, longer in a slow process."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.seconds = PAUSE_SECONDS * float(os.environ.get(SLOWER, "1"))

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        time.sleep(self.seconds)
        return torch.zeros(2), torch.zeros(1)


def ideal(shards: int, clients: int, *, slow: bool) -> float:
    """Seconds of a step if all is known beforehand; the best number of shards for the slow one is tried."""
    counts = range(shards + 1) if slow else (0,)
    times = (max(n * SLOWNESS, -(-(shards - n) // clients)) for n in counts)
    return PAUSE_SECONDS * min(times)


def one_run(master: Master, shards: int, name: str) -> dict[str, float]:
    """Median seconds of a step, backups, and shards whose gradient the slow Client gave."""
    from benchmarks import bench_straggler  # by the name that workers know, not as __main__

    recipe = Recipe(
        model=noop_model,
        dataset=partial(bench_straggler.Paused, size=STEPS * shards),
        loss=torch.nn.functional.mse_loss,
        optimizer=partial(torch.optim.SGD, lr=0.01),
    )
    run = master.submit(recipe, TrainingConfig(batch_size=shards, shards=shards), name=name)
    history = run.wait(timeout=300).history
    return {
        "seconds": statistics.median(report.seconds for report in history[SKIPPED:]),
        "backups": run._ledger.head().backups,
        "slow shards": sum(worker.startswith("slow") for report in history for worker in report.workers),
    }


def measure(rounds: int) -> dict[int, dict[str, dict[str, Any]]]:
    """K -> fleet -> figures."""
    found: dict[int, dict[str, list[dict[str, float]]]] = {k: {f: [] for f in FLEETS} for k in SHARDS}
    with TemporaryDirectory() as folder, LocalCluster(3, checkpoint_dir=folder, wait_ready=True) as cluster:
        master = Master(cluster.url, checkpoint_dir=folder)
        cluster.add_worker("slow", env={SLOWER: str(SLOWNESS)})
        cluster.add_worker("fourth")
        cluster.wait_ready()
        fourths = {"3 and a slow": "slow", "4 equal": "fourth"}
        for number in range(rounds):
            for fleet in FLEETS:
                # A stopped worker takes nothing; the others have been told that it is there no more.
                for kind, name in fourths.items():
                    worker = cluster.processes[name]
                    worker.cont() if kind == fleet else worker.pause()
                time.sleep(3.0)
                for shards in SHARDS:
                    name = f"{fleet.replace(' ', '-')}-{shards}-{number}"
                    found[shards][fleet].append(one_run(master, shards, name))
    return {
        shards: {
            fleet: {
                "median": statistics.median(run["seconds"] for run in runs),
                "worst": max(run["seconds"] for run in runs),
                "ideal": ideal(shards, 4 if fleet == "4 equal" else 3, slow=fleet == "3 and a slow"),
                "backups": sum(run["backups"] for run in runs),
                "slow shards": sum(run["slow shards"] for run in runs),
                "shards": len(runs) * STEPS * shards,
            }
            for fleet, runs in by_fleet.items()
        }
        for shards, by_fleet in found.items()
    }


def main() -> int:
    """Run, print and write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    found = measure(parser.parse_args().rounds)
    print(
        f"{'K':>3} {'fleet':<14}{'ms a step':>10}{'worst':>7}{'ideal':>7}{'/ 3 equal':>11}{'/ 4 equal':>11}"
        f"{'backups':>9}{'by the slow':>13}"
    )
    for shards, row in found.items():
        for fleet, figures in row.items():
            seconds = figures["median"]
            print(
                f"{shards:>3} {fleet:<14}{seconds * 1000:>10.0f}{figures['worst'] * 1000:>7.0f}"
                f"{figures['ideal'] * 1000:>7.0f}{seconds / row['3 equal']['median']:>11.2f}"
                f"{seconds / row['4 equal']['median']:>11.2f}{figures['backups']:>9.0f}"
                f"{figures['slow shards']:>6.0f} of {figures['shards']}"
            )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "straggler.json").write_text(json.dumps({"machine": machine(), "steps": found}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
