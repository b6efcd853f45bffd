"""What a step moves of a model that is mostly frozen: adapters beside a version that is stored whole.

    python -m benchmarks.bench_rest                    with the same-host tier and without

Claim: frozen parameters and constant buffers are stored and fetched once, so that a step of adapters (LoRA)
moves what is trained. Bytes are those that the server of broker and cache has taken in and sent out, a step,
from the eighth on, once both Clients have computed: versions, gradients, optimizer states, records,
messages. On what: twelve linear layers of 512 x 512, each with adapters of rank 1, AdamW, two Clients, four
shards. The anchor is the same run with versions that are stored whole, and has to end with the same chain.

Bias: what rests is stored and fetched before the count begins.
"""

from __future__ import annotations

import json
import time
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import redis
import torch

from benchmarks import RESULTS, machine
from benchmarks.adapters import adapters, points
from torchord import LocalCluster, Master, Recipe, Run, TrainingConfig

_SKIPPED = 8  # first steps, while everything is loaded


def working(run: Run) -> set[str]:
    """The Clients that have computed a shard."""
    return {worker for report in run.history() for worker in report.workers}


def measure(host_cache: str, whole: bool) -> dict[str, Any]:
    """Bytes a step of one run."""
    recipe = Recipe(
        model=partial(adapters, whole=whole) if whole else adapters,
        dataset=points,
        loss=torch.nn.functional.cross_entropy,
        optimizer=partial(torch.optim.AdamW, lr=1e-3),
    )
    config = TrainingConfig(epochs=8, batch_size=16, shards=4, seed=1)
    environment = {"TORCHORD_HOST_CACHE": host_cache}
    with TemporaryDirectory() as folder, LocalCluster(workers=2, env=environment) as cluster:
        cluster.wait_ready()
        client = redis.Redis.from_url(cluster.url)
        run = Master(cluster.url, checkpoint_dir=folder).submit(recipe, config, name="rest")
        while run.status().version < _SKIPPED or len(working(run)) < 2:
            time.sleep(0.01)
        first, before = run.status().version, client.info("stats")
        run.wait(timeout=300)
        steps, after = run.status().version - first, client.info("stats")
        moved = {
            way: round((after[f"total_net_{way}_bytes"] - before[f"total_net_{way}_bytes"]) / steps)
            for way in ("input", "output")
        }
        return {**moved, "steps": steps, "chain": run._ledger.head().chain}


def main() -> int:
    """Measure and print; the figures go to `results/rest.json`."""
    found: dict[str, Any] = {"machine": machine(), "bytes_a_step": {}}
    model = adapters()
    sizes = [sum(p.nbytes for p in model.parameters() if p.requires_grad or all) for all in (0, 1)]
    print(f"{sizes[1] / 1e6:.2f} MB, of which {sizes[0] / 1e6:.3f} MB are trained")
    chains = set()
    for host_cache in ("off", "on"):
        for whole in (False, True):
            one = measure(host_cache, whole)
            chains.add(one.pop("chain"))
            stored = "stored whole" if whole else "what moves"
            found["bytes_a_step"][f"same-host tier {host_cache}, {stored}"] = one
            print(
                f"same-host tier {host_cache:>3}, {stored:>12}: {one['input'] / 1e6:.3f} MB in, "
                f"{one['output'] / 1e6:.3f} MB out a step, {one['steps']} steps",
                flush=True,
            )
    assert len(chains) == 1, chains
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "rest.json").write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
