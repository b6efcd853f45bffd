"""What each gradient codec costs in bytes, accuracy and time, on Fashion-MNIST.

    apt-get install dataset-fashion-mnist                 # Debian and Ubuntu; or --data DIR
    python -m benchmarks.bench_codecs                     # every codec, 3 epochs; CLAIMED on 3 seeds
    python -m benchmarks.bench_codecs --epochs 2 --seeds 0 --codecs none topk:0.01

Target, not reached: CLAIMED sends at least 100 times fewer gradient bytes and loses at most 0.3 points of
test accuracy. The cnn of `workloads`, 421,642 parameters, batch 256 in 4 shards, SGD with momentum 0.9,
learning rate 0.05 falling to 0 along a cosine, the same for every codec.

On what: a run of 4 shards a step simulated in one process, out of the functions that Clients and
training server call (gradient.compute, Codec.encode, Codec.decode, Accumulator, Trainer.apply), without
Redis. Bytes are those of a slot's buffer as it is stored (padding included) and of its manifest as
JSON, per shard and step. The memory of a slot is not among them, as it need not travel as long as the
slot stays with its worker; its size is a column of its own.

Bias: shards are computed one after the other and other programs may be running, so the wall-clock time
of a run says nothing about a cluster, and milliseconds inside encode and decode are upper bounds.
Accuracy is on the 10,000 test images after the last step: its standard error from so many images is
about 0.27 points, and another seed moves it as much. Differences to "none" are at the same seed, that
is, the same start and batches, and averaged over the seeds that a codec ran on: one seed proves little.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import TensorDataset

from benchmarks import RESULTS, machine
from benchmarks.workloads import cnn_model
from cache.codec import layout
from coordinator.aggregate import Accumulator
from coordinator.compression import Codec, parse
from coordinator.config import TrainingConfig
from coordinator.determinism import pinned
from coordinator.gradient import compute, evaluate
from coordinator.optimize import Trainer
from coordinator.recipe import ResolvedRecipe
from coordinator.replica import Replica
from coordinator.shards import Plan

DATA = Path("/usr/share/datasets/fashion-mnist")
CODECS = (
    "none",
    "fp16",
    "bf16",
    "int8",
    "sign",
    "topk:0.1",
    "topk:0.01",
    "topk:0.001",
    "powersgd:4",
    "powersgd:4,values=int8",
    "powersgd:2,values=int8",
    "powersgd:1,values=int8",
)
CLAIMED = ("powersgd:4,values=int8", "powersgd:2,values=int8")
LEARNING_RATE, MOMENTUM = 0.05, 0.9
SHARDS = 4
LEAST_RATIO, MOST_POINTS = 100.0, 0.3


# --- the task ------------------------------------------------------------------------------


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.argmax(1) == targets).float().mean()


def read_idx(path: Path) -> Tensor:
    """An IDX file, gzipped or not, as a uint8 tensor."""
    packed = path.with_name(path.name + ".gz")
    raw = gzip.decompress(packed.read_bytes()) if packed.exists() else path.read_bytes()
    dimensions = raw[3]
    shape = np.frombuffer(raw, ">u4", dimensions, 4).astype(int)
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions).reshape(shape).copy())


def images(folder: Path, prefix: str, examples: int | None = None) -> TensorDataset:
    pixels = read_idx(folder / f"{prefix}-images-idx3-ubyte")[:examples]
    labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte")[:examples]
    return TensorDataset((pixels.unsqueeze(1).float() / 255 - 0.286) / 0.353, labels.long())


# --- one run -------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What one run of one codec came to; bytes and milliseconds are means per shard and step."""

    codec: str
    seed: int
    accuracy: float
    test_loss: float
    train_loss: float
    payload_nbytes: float
    manifest_nbytes: float
    memory_nbytes: int
    encode_milliseconds: float
    decode_milliseconds: float
    wall_seconds: float

    @property
    def nbytes(self) -> float:
        return self.payload_nbytes + self.manifest_nbytes


def train(
    recipe: ResolvedRecipe, config: TrainingConfig, spec: str, data: TensorDataset, test: TensorDataset
) -> Outcome:
    """Train as a cluster would, one slot's memory per shard."""
    began = time.perf_counter()
    codec = parse(spec)
    trainer, replica = Trainer.build(recipe, config), Replica.build(recipe, config)
    plan = Plan(len(data), config)
    memories: list[dict[str, Tensor]] = [{} for _ in range(config.shards)]
    totals: dict[str, float] = defaultdict(float)
    losses = []
    for step in range(plan.total_steps):
        replica.load(trainer.replica.pack())
        accumulator = Accumulator(trainer.replica.buffers, plan.examples(step))
        loss = 0.0
        for shard in range(plan.shards_in(step)):
            found = compute(replica, recipe, config, data, plan.indices(step, shard), step, shard)
            loss += found.loss * found.examples / plan.examples(step)
            decoded = exchange(codec, config, found.gradients, memories, shard, totals, trainer.replica)
            accumulator.add(decoded, found.buffers, found.examples)
        mean = accumulator.result()
        trainer.apply(mean.gradients, mean.buffers, step=step, loss=loss)
        losses.append(loss)
    replica.load(trainer.replica.pack())
    _, scores = evaluate(replica, recipe, config, test, range(len(test)))
    count = totals.pop("count")
    return Outcome(
        codec=spec,
        seed=config.seed,
        accuracy=scores["accuracy"],
        test_loss=scores["loss"],
        train_loss=statistics.fmean(losses[-plan.steps_per_epoch :]),
        memory_nbytes=layout(memories[0]).nbytes,
        wall_seconds=round(time.perf_counter() - began, 1),
        **{name: total / count for name, total in totals.items()},
    )


def exchange(
    codec: Codec,
    config: TrainingConfig,
    gradients: dict[str, Tensor],
    memories: list[dict[str, Tensor]],
    shard: int,
    totals: dict[str, float],
    like: Replica,
) -> dict[str, Tensor]:
    """Encode a shard's gradients, replace the slot's memory, decode; add up bytes and milliseconds."""
    with pinned(config.threads, config.deterministic):
        started = time.perf_counter()
        encoded = codec.encode(gradients, memories[shard])
        done = time.perf_counter()
        decoded = codec.decode(encoded.payload, like.parameters)
        ended = time.perf_counter()
    memories[shard] = encoded.residual
    manifest = layout(encoded.payload)
    totals["count"] += 1
    totals["payload_nbytes"] += manifest.nbytes
    totals["manifest_nbytes"] += len(json.dumps(manifest.to_json(), separators=(",", ":")))
    totals["encode_milliseconds"] += 1e3 * (done - started)
    totals["decode_milliseconds"] += 1e3 * (ended - done)
    return decoded


# --- the table -----------------------------------------------------------------------------


def summary(outcomes: list[Outcome]) -> list[dict[str, Any]]:
    """One row a codec, means over the seeds; differences to "none" at the same seed."""
    plain = {o.seed: o for o in outcomes if o.codec == "none"}
    rows = []
    for spec in dict.fromkeys(o.codec for o in outcomes):
        runs = [o for o in outcomes if o.codec == spec]
        lost = [100 * (plain[o.seed].accuracy - o.accuracy) for o in runs if o.seed in plain]
        nbytes = statistics.fmean(o.nbytes for o in runs)
        base = statistics.fmean(o.nbytes for o in plain.values()) if plain else float("nan")
        row: dict[str, Any] = {
            "codec": spec,
            "seeds": [o.seed for o in runs],
            "bytes_per_shard": round(nbytes),
            "times_fewer_bytes": round(base / nbytes, 1),
            "memory_bytes_per_slot": runs[0].memory_nbytes,
            "accuracy_percent": round(100 * statistics.fmean(o.accuracy for o in runs), 2),
            "points_lost": round(statistics.fmean(lost), 2) if lost else None,
            "points_lost_each_seed": [round(points, 2) for points in lost],
            "encode_milliseconds": round(statistics.fmean(o.encode_milliseconds for o in runs), 2),
            "decode_milliseconds": round(statistics.fmean(o.decode_milliseconds for o in runs), 2),
        }
        reached = bool(lost) and base / nbytes >= LEAST_RATIO and statistics.fmean(lost) <= MOST_POINTS
        rows.append({**row, "target_reached": reached})
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    head = (
        "codec",
        "bytes/shard",
        "× fewer",
        "memory/slot",
        "seeds",
        "accuracy %",
        "points lost",
        "enc ms",
        "dec ms",
    )
    print("{:24} {:>11} {:>8} {:>11} {:>5} {:>10} {:>11} {:>7} {:>7}".format(*head))
    for row in rows:
        lost = "" if row["points_lost"] is None else f"{row['points_lost']:+.2f}"
        print(
            f"{row['codec']:24} {row['bytes_per_shard']:11,} {row['times_fewer_bytes']:8.1f} "
            f"{row['memory_bytes_per_slot']:11,} {len(row['seeds']):5} "
            f"{row['accuracy_percent']:10.2f} {lost:>11} "
            f"{row['encode_milliseconds']:7.2f} {row['decode_milliseconds']:7.2f}"
            + ("  <- target" if row["target_reached"] else "")
        )


def recipe(data: TensorDataset, test: TensorDataset, steps: int) -> ResolvedRecipe:
    return ResolvedRecipe(
        model=cnn_model,
        dataset=lambda: data,
        optimizer=partial(torch.optim.SGD, lr=LEARNING_RATE, momentum=MOMENTUM),
        loss=functional.cross_entropy,
        step=None,
        scheduler=partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=steps),
        evaluation=lambda: test,
        metrics={"accuracy": accuracy},
        collate=None,
        parameter_groups=None,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the four IDX files")
    parser.add_argument("--codecs", nargs="*", default=CODECS, metavar="SPEC")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument(
        "--seeds", type=int, nargs="*", default=[0, 1, 2], help="the first for every codec, all for a claim"
    )
    parser.add_argument("--examples", type=int, default=60_000, help="of the 60,000 to train on")
    parser.add_argument("--output", type=Path, default=RESULTS / "codecs.json")
    arguments = parser.parse_args()
    data = images(arguments.data, "train", arguments.examples)
    test = images(arguments.data, "t10k")
    outcomes = []
    for seed in arguments.seeds:
        config = TrainingConfig(epochs=arguments.epochs, batch_size=256, shards=SHARDS, seed=seed)
        steps = Plan(len(data), config).total_steps
        for spec in arguments.codecs:
            if seed == arguments.seeds[0] or spec in ("none", *CLAIMED):
                last = train(recipe(data, test, steps), config, spec, data, test)
                outcomes.append(last)
                percent = 100 * last.accuracy
                print(f"seed {seed} {spec}: {percent:.2f} % after {last.wall_seconds:.0f} s", flush=True)
    rows = summary(outcomes)
    show(rows)
    document = {
        "machine": machine(),
        "epochs": arguments.epochs,
        "training_examples": len(data),
        "rows": rows,
        "runs": [asdict(outcome) for outcome in outcomes],
    }
    arguments.output.parent.mkdir(exist_ok=True)
    arguments.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
