"""How several runs, and predictions, share a fleet.

    python -m benchmarks share

Question: do two runs have workers by their weights, and how long does a prediction wait beside a large run?

Shares: two runs of `SHARDS` shards a step, with weights 1 and 1, 2 and 1, 3 and 1, on two Clients, at the
same time. A run's share is what its shards took of all workers' time, by the ledger, between the moment when
both have committed `WARM` steps and the moment when the first ends. The claim: within 10 % of the weights.

Predictions: one example at a time, from a run that rests, on two Clients, alone and beside a run of `LARGE`
shards a step; seconds from the call to its answer, p50 and p99 of `ASKED`. In the order of arrival it would
wait for most of a step's shards. The claim: it waits for the shards that are at work, and for no other.

Bias: the work is a pause of 40 ms a shard, so that the Clients do not compete for this machine's cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from functools import partial
from tempfile import TemporaryDirectory

import torch

from benchmarks import RESULTS, machine
from benchmarks.workloads import noop_data, noop_model
from torchord import LocalCluster, Master, Recipe, Run, TrainingConfig

SHARDS = 16
LARGE = 64
STEPS = 30
WARM = 3
ASKED = 200
WEIGHTS = ((1, 1), (2, 1), (3, 1))


def submitted(master: Master, name: str, *, shards: int, steps: int, weight: float = 1.0) -> Run:
    """A run whose shards are pauses."""
    from benchmarks import bench_straggler  # by the name that workers know

    recipe = Recipe(
        model=noop_model,
        dataset=partial(bench_straggler.Paused, size=steps * shards),
        loss=torch.nn.functional.mse_loss,
        optimizer=partial(torch.optim.SGD, lr=0.01),
    )
    config = TrainingConfig(batch_size=shards, shards=shards, fan_in=64, weight=weight)
    return master.submit(recipe, config, name=name)


def share(master: Master, weights: tuple[int, int]) -> float:
    """What the first of two runs had of the workers."""
    heavy, light = weights
    runs = [
        submitted(
            master, f"{side}-{heavy}-{light}", shards=SHARDS, steps=STEPS * weight // light, weight=weight
        )
        for side, weight in (("heavy", heavy), ("light", light))
    ]
    entries = []
    for run in runs:
        run.wait(timeout=600)
        entries.append(run._ledger.entries())
    begin = max(each[WARM - 1].committed_at for each in entries)
    end = min(each[-1].committed_at for each in entries)
    worked = [
        sum(slot.seconds for entry in each if begin < entry.committed_at <= end for slot in entry.slots)
        for each in entries
    ]
    return worked[0] / sum(worked)


def waits(run: Run, asked: int) -> list[float]:
    """Seconds that each of so many predictions took, asked one after the other with pauses between."""
    found = []
    for _ in range(asked):
        began = time.perf_counter()
        run.predict(torch.zeros(1, 2))
        found.append(time.perf_counter() - began)
        time.sleep(0.013)
    return sorted(found)


def main() -> int:
    """Run, print and write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--asked", type=int, default=ASKED)
    asked = parser.parse_args().asked
    with TemporaryDirectory() as folder, LocalCluster(2, checkpoint_dir=folder, wait_ready=True) as cluster:
        master = Master(cluster.url, checkpoint_dir=folder)
        shares = {f"{heavy}:{light}": share(master, (heavy, light)) for heavy, light in WEIGHTS}
        print(f"{'weights':<10}{'share':>8}{'by weight':>11}")
        for (heavy, light), found in zip(WEIGHTS, shares.values(), strict=True):
            print(f"{heavy}:{light:<8}{found:>8.3f}{heavy / (heavy + light):>11.3f}")
        small = master.fit(
            Recipe(
                model=noop_model,
                dataset=partial(noop_data, size=4),
                loss=torch.nn.functional.mse_loss,
                optimizer=partial(torch.optim.SGD, lr=0.01),
            ),
            TrainingConfig(batch_size=4, shards=1),
            name="answering",
        )
        assert small.version == 1
        answering = master.run("answering")
        waits(answering, 5)
        alone = waits(answering, asked)
        large = submitted(master, "large", shards=LARGE, steps=10_000)
        while large.status().version < WARM:
            time.sleep(0.1)
        beside = waits(answering, asked)
        large.cancel()
    print(f"{'a prediction':<20}{'p50 ms':>8}{'p99 ms':>8}")
    predictions = {}
    for name, found in (("alone", alone), (f"beside {LARGE} shards", beside)):
        predictions[name] = {"p50": statistics.median(found), "p99": found[len(found) * 99 // 100]}
        print(f"{name:<20}{predictions[name]['p50'] * 1000:>8.0f}{predictions[name]['p99'] * 1000:>8.0f}")
    RESULTS.mkdir(exist_ok=True)
    figures = {"machine": machine(), "shares": shares, "predictions": predictions}
    (RESULTS / "share.json").write_text(json.dumps(figures, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
