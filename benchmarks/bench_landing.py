"""What it gives to add gradients up as they land, and not when all of a step are there.

    python -m benchmarks.bench_landing

Two Clients and a training server on one host, a model of 43.6 MB, eight shards a step. The two ways take
turns, `TORCHORD_OVERLAP` with `collect` and without it: with `collect` a thread of the training server looks
which slots have landed and adds them to the step's sum; without it the update adds all of them.

"Machines of their own": a shard's work is a pause of 0.1 s (and about 0.04 s of one core), as if the Clients
computed elsewhere, and the server's core is free meanwhile. "One machine": a shard's work is the gpt's, on
both of two cores, so what is added early is taken from the Clients. Shown are the median seconds of a step
over the rounds, the worst round, and how many of the eight slots were in the sum when the update was called.
Bias: on a host of its own a server would have the gradients from the network, at its cost.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from benchmarks import RESULTS, machine
from benchmarks.workloads import BATCH
from benchmarks.workloads import recipe as workload
from coordinator import LocalCluster, Master, Recipe, TrainingConfig

SHARDS = 8
WIDTH = 3300
PAUSE_SECONDS = 0.1
STEPS = 14
SKIPPED = 4
WAYS = {"collect": "upload,collect,fetch", "without": "upload,fetch"}
WORK = ("machines of their own", "one machine")


class Paused(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Ones, one example a shard; reading one takes `PAUSE_SECONDS`."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        time.sleep(PAUSE_SECONDS)
        return torch.ones(WIDTH), torch.zeros(WIDTH)


def wide_model() -> nn.Module:
    """One layer of 10.9 million parameters."""
    return nn.Linear(WIDTH, WIDTH)


def recipe(work: str) -> tuple[Recipe, int]:
    """(recipe, global batch size)."""
    if work == "one machine":
        return workload("gpt", examples=BATCH["gpt"] * STEPS), BATCH["gpt"]
    from benchmarks import bench_landing  # by the name that workers know, not as __main__

    made = Recipe(
        model=bench_landing.wide_model,
        dataset=partial(bench_landing.Paused, size=SHARDS * STEPS),
        loss=torch.nn.functional.mse_loss,
        optimizer=partial(torch.optim.SGD, lr=0.01, momentum=0.9),
    )
    return made, SHARDS


def one_run(master: Master, work: str, name: str) -> dict[str, float]:
    """Median seconds of a step, median number of slots that were added early, last loss."""
    made, batch = recipe(work)
    run = master.submit(made, TrainingConfig(batch_size=batch, shards=SHARDS), name=name)
    steps = []
    for event in run.events():
        if event.type == "step":
            steps.append(event.data)
        if len(steps) == STEPS:
            break
    history = run.wait(timeout=300).history
    return {
        "seconds": statistics.median(step["seconds"] for step in steps[SKIPPED:]),
        "early": statistics.median(step["early"] for step in steps[SKIPPED:]),
        "loss": history[-1].loss,
    }


def measure(rounds: int) -> dict[str, dict[str, Any]]:
    """Work -> way -> figures."""
    found: dict[str, dict[str, list[dict[str, float]]]] = {w: {way: [] for way in WAYS} for w in WORK}
    for number in range(rounds):
        for way in list(WAYS)[:: -1 if number % 2 else 1]:
            with (
                TemporaryDirectory() as folder,
                LocalCluster(
                    2, checkpoint_dir=folder, env={"TORCHORD_OVERLAP": WAYS[way]}, wait_ready=True
                ) as cluster,
            ):
                master = Master(cluster.url, checkpoint_dir=folder)
                for place, work in enumerate(WORK):
                    found[work][way].append(one_run(master, work, f"{place}-{number}"))
    return {
        work: {
            way: {
                "median": statistics.median(run["seconds"] for run in runs),
                "worst": max(run["seconds"] for run in runs),
                "early": statistics.median(run["early"] for run in runs),
                "loss": sorted({run["loss"] for run in runs}),
            }
            for way, runs in ways.items()
        }
        for work, ways in found.items()
    }


def main() -> int:
    """Run, print and write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    found = measure(rounds)
    print(f"{'work':<24}{'way':<10}{'ms a step':>10}{'worst':>8}{'early':>7}{'of without':>12}")
    for work, ways in found.items():
        for way, figures in ways.items():
            ratio = figures["median"] / ways["without"]["median"]
            cells = f"{figures['median'] * 1e3:>10.0f}{figures['worst'] * 1e3:>8.0f}{figures['early']:>7.0f}"
            print(f"{work:<24}{way:<10}{cells}{ratio:>12.2f}")
    losses_agree = all(
        len({*ways["collect"]["loss"], *ways["without"]["loss"]}) == 1 for ways in found.values()
    )
    print("same last loss, digit for digit:", "yes" if losses_agree else "NO")
    record = {
        "machine": machine(),
        "shards": SHARDS,
        "rounds": rounds,
        "same_loss": losses_agree,
        "work": found,
    }
    (RESULTS / "landing.json").write_text(json.dumps(record, indent=1) + "\n")
    return 0 if losses_agree else 1


if __name__ == "__main__":
    raise SystemExit(main())
