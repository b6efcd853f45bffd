"""What keys and digests cost a step.

    python -m benchmarks.bench_security                three interleaved rounds

Claim: who has no keys pays nothing, and a local cluster's keys cost nothing that can be told from noise; what
signatures (Ed25519) and collision-resistant digests cost is in the table. On what: no-op steps and an mlp of
2.7 MB, two shards, two Clients and a training server, same-host tier on and off (without it every reader
hashes what it reads). Anchor: the same run without keys, in the same round.

Bias: loopback, where bytes are cheap and what is computed over them is a large part.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import RESULTS, machine
from benchmarks.workloads import recipe
from torchord import LocalCluster, Master, TrainingConfig
from torchord.coordinator.runtime import key_files

MODES = {  # algorithm of the keys ("" for a local cluster's own, None for none), digest
    "no keys": (None, "xxh3"),
    "a local cluster's keys": ("", "auto"),
    "ed25519": ("ed25519", "xxh3"),
    "ed25519 and blake3": ("ed25519", "blake3"),
    "ed25519 and sha256": ("ed25519", "sha256"),
}
STEPS = {"noop": 400, "mlp": 160}
SKIPPED = 40
BATCH = {"noop": 2, "mlp": 256}
EXAMPLES = {"noop": 800, "mlp": 8192}


def measure(workload: str, mode: str, host_cache: str) -> float:
    """Mean milliseconds of a step of one run."""
    algorithm, digest = MODES[mode]
    with TemporaryDirectory() as folder:
        if algorithm:
            key_files.new(Path(folder) / "keys", algorithm)
        paths = {"submit": f"{folder}/keys/submit.json", "fleet": f"{folder}/keys/fleet.json"}
        keys = {
            name: path if algorithm else "off" if algorithm is None else "" for name, path in paths.items()
        }
        os.environ["TORCHORD_KEYS"] = keys["submit"]
        environment = {"TORCHORD_KEYS": keys["fleet"], "TORCHORD_HOST_CACHE": host_cache}
        with LocalCluster(workers=2, env=environment, keys=algorithm == "") as cluster:
            cluster.wait_ready()
            steps = STEPS[workload] + SKIPPED
            config = TrainingConfig(
                batch_size=BATCH[workload],
                shards=2,
                checkpoint_every=10**6,
                epochs=-(-steps * BATCH[workload] // EXAMPLES[workload]),
                audit_fraction=0.0,
                digest=digest,
            )
            master = Master(cluster.url, checkpoint_dir=folder)
            run = master.submit(recipe(workload, examples=EXAMPLES[workload]), config, name="sealed")
            run.wait(timeout=300)
            return statistics.fmean(report.seconds for report in run.history()[SKIPPED:]) * 1000


def main() -> int:
    """Measure and print; the figures go to `results/security.json`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    found: dict[str, dict[str, list[float]]] = {}
    for _ in range(options.rounds):
        for workload, host_cache in (("noop", "on"), ("mlp", "on"), ("mlp", "off")):
            case = workload if workload == "noop" else f"{workload}, same-host tier {host_cache}"
            for mode in MODES:
                one = measure(workload, mode, host_cache)
                found.setdefault(case, {}).setdefault(mode, []).append(round(one, 3))
                print(f"{case:<24} {mode:<24} {one:6.2f} ms", flush=True)
    record: dict[str, Any] = {"machine": machine(), "milliseconds": found}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "security.json").write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
