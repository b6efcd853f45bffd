"""What a worker that is ten times slower costs a run.

    python -m benchmarks.bench_straggler

Question: does a fourth Client that needs ten times as long for everything slow a run of many shards by more
than its share? A shard is a task that whoever is idle takes, so it should hardly be felt. Shown: the median
step with three equal Clients alone, and with the slow one added. Bias: the work is a pause of 40 ms a shard
(400 ms on the slow Client), so that the Clients do not compete for this machine's cores.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from functools import partial
from tempfile import TemporaryDirectory

import torch
from torch.utils.data import Dataset

from benchmarks import RESULTS, machine
from benchmarks.workloads import noop_model
from coordinator import LocalCluster, Master, Recipe, TrainingConfig

PAUSE_SECONDS = 0.04
SLOWER = "TORCHORD_BENCH_SLOWER"
STEPS = 25
_SKIPPED = 5


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


def median_step(master: Master, shards: int, name: str) -> tuple[float, int]:
    """Median seconds of a step, and how many shards the slow Client computed."""
    from benchmarks import bench_straggler  # by the name that workers know, not as __main__

    recipe = Recipe(
        model=noop_model,
        dataset=partial(bench_straggler.Paused, size=STEPS * shards),
        loss=torch.nn.functional.mse_loss,
        optimizer=partial(torch.optim.SGD, lr=0.01),
    )
    run = master.submit(recipe, TrainingConfig(batch_size=shards, shards=shards), name=name)
    trained = run.wait(timeout=300)
    slow = sum(worker.startswith("slow") for report in trained.history for worker in report.workers)
    return statistics.median(report.seconds for report in trained.history[_SKIPPED:]), slow


def main() -> int:
    """Run, print and write JSON."""
    found: dict[int, dict[str, float]] = {}
    with TemporaryDirectory() as folder, LocalCluster(3, checkpoint_dir=folder, wait_ready=True) as cluster:
        master = Master(cluster.url, checkpoint_dir=folder)
        for shards in (4, 16, 32, 64):
            found[shards] = {"alone": median_step(master, shards, f"alone-{shards}")[0]}
        cluster.add_worker("slow", env={SLOWER: "10"})
        cluster.wait_ready()
        for shards, row in found.items():
            row["with slow"], row["slow shards"] = median_step(master, shards, f"slow-{shards}")
    print(f"{'K':>3} {'3 Clients ms':>13} {'and a slow one ms':>18} {'ratio':>6} {'shards it computed':>19}")
    for shards, row in found.items():
        ratio = row["with slow"] / row["alone"]
        print(
            f"{shards:>3} {row['alone'] * 1000:>13.0f} {row['with slow'] * 1000:>18.0f} {ratio:>6.2f} "
            f"{row['slow shards']:>12.0f} of {STEPS * shards}"
        )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "straggler.json").write_text(json.dumps({"machine": machine(), "seconds": found}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
