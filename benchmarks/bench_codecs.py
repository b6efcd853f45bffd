"""What each gradient codec costs in bytes, accuracy and time, on Fashion-MNIST.

    apt-get install dataset-fashion-mnist                 # Debian and Ubuntu; or --data DIR
    python -m benchmarks.bench_codecs                     # what the table shows; goes on where it was stopped
    python -m benchmarks.bench_codecs --variants none topk:0.01 int8/sign --seeds 0 --epochs 2
    python -m benchmarks.bench_codecs --validate          # for choosing a codec: never sees the test images
    python -m benchmarks.bench_codecs --cluster none SPEC # real processes: the same bits and bytes?

Target: CLAIMED sends at least 100 times fewer gradient bytes and loses at most 0.3 points of test
accuracy. A variant is a gradient codec, or "GRADIENTS/PARAMETERS" with a codec for the parameters' way
back, too. The cnn of `workloads`, 421,642 parameters, batch 256 in 4 shards, SGD with momentum 0.9, learning
rate rising to 0.05 over the first 100 steps and falling to 0 along a cosine, the same for every variant; 5
epochs, 3 seeds (ONE_SEED: one).

On what: a run of 4 shards a step simulated in one process, out of the pure functions that Clients and
training server call (`shard_work.work`, `shard_work.decoded`, `Accumulator`, `Trainer.apply`), without
Redis. Bytes are those of the buffers as they are stored (padding included) and of their manifests as
JSON: of a shard's gradient, of what its slot keeps for the next step, and of the parameters that a
Client fetches for one step. `--cluster` trains 40 steps on LocalCluster, compares the parameters' bits and
the stored bytes with the simulation's, and asks Redis how many bytes passed it.

How the claimed codec was chosen: with --validate, that is trained on the first 50,000 training images and
scored on the other 10,000, with seed 10 and 3 epochs, among the variants that docs/compression.md
lists. The test images served only for the final table, and for that of an earlier state (3 epochs, one
seed), which had suggested that the small layers want a higher rank. The warm-up was chosen with --validate,
too, at seeds 11 and 12 and 2 epochs: without it what a codec holds back in the first, steep steps comes late
and throws the training back (docs/compression.md has the figures).

Bias: accuracy is on the 10,000 test images after the last step: its standard error from so many images is
about 0.27 points, and another seed moves it as much; so the seeds' standard deviation stands beside each
mean, and differences to "none" are at the same seed, that is, the same start and batches. Milliseconds are
medians of 20 repetitions on one thread, on the gradients of the last step, while other programs may be
running: upper bounds.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import TensorDataset

from benchmarks import RESULTS, machine
from benchmarks.fashion_mnist import DATA, accuracy, images
from benchmarks.workloads import cnn_model
from torchord.cache.tensors import tree
from torchord.cache.tensors.codec import layout
from torchord.coordinator.compute.determinism import pinned
from torchord.coordinator.compute.gradient import compute
from torchord.coordinator.compute.inference import evaluate
from torchord.coordinator.compute.replica import Replica
from torchord.coordinator.compute.shard import decoded, work
from torchord.coordinator.compute.sums import Accumulator
from torchord.coordinator.compute.trainer import Trainer
from torchord.coordinator.spec.config import TrainingConfig
from torchord.coordinator.spec.plan import Plan
from torchord.coordinator.spec.resolving import ResolvedRecipe

CLAIMED = "powersgd:2,values=int8,least=6000"
VARIANTS = (
    "none",
    CLAIMED,
    f"{CLAIMED},memory=bf16",
    f"{CLAIMED},memory=int8",
    f"{CLAIMED},memory=int4",
    "powersgd:2,values=int8",
    f"{CLAIMED}/int8",
    "topk:0.01,values=int8",
    "int8",
    "bf16",
    "sign",
)
ONE_SEED = (f"{CLAIMED},memory=int4", "topk:0.01,values=int8", "int8", "bf16", "sign")
"""Codecs that are shown for comparison, on the first seed alone."""
LEARNING_RATE, MOMENTUM, WARM_UP = 0.05, 0.9, 100
SHARDS = 4
LEAST_RATIO, MOST_POINTS = 100.0, 0.3
REPETITIONS = 20
HELD_OUT = 10_000


# --- what is trained ------------------------------------------------------------------------


def resolved_recipe(data: TensorDataset, test: TensorDataset, steps: int) -> ResolvedRecipe:
    """What every variant trains, with data that are loaded already."""
    return ResolvedRecipe(
        model=cnn_model,
        dataset=lambda: data,
        optimizer=partial(torch.optim.SGD, lr=LEARNING_RATE, momentum=MOMENTUM),
        loss=functional.cross_entropy,
        step=None,
        scheduler=partial(schedule, steps=steps),
        evaluation=lambda: test,
        metrics={"accuracy": accuracy},
        collate=None,
        parameter_groups=None,
    )


def schedule(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """Linear from 0 over the first WARM_UP steps, then along a cosine to 0."""

    def factor(step: int) -> float:
        if step < WARM_UP:
            return (step + 1) / WARM_UP
        return 0.5 * (1 + math.cos(math.pi * (step - WARM_UP) / max(1, steps - WARM_UP)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def config_of(variant: str, **fields: Any) -> TrainingConfig:
    """The config of a variant, "GRADIENTS" or "GRADIENTS/PARAMETERS"."""
    gradients, _, parameters = variant.partition("/")
    how = {"compression": gradients, "parameter_compression": parameters or "none"}
    return TrainingConfig(batch_size=256, shards=SHARDS, **how, **fields)


# --- one run -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What one run of one variant came to.

    Attributes:
        accuracy, test_loss: on the images that it is scored on, after the last step.
        train_loss: mean over the last epoch.
        gradient_nbytes: what a shard sends in a step, mean, manifest included.
        state_nbytes: what a slot keeps for its next step.
        parameter_nbytes: what a Client that holds the version before fetches for a step, mean.
        encode_milliseconds, decode_milliseconds: of one shard's gradients.
    """

    variant: str
    seed: int
    epochs: int
    examples: int
    accuracy: float
    test_loss: float
    train_loss: float
    gradient_nbytes: float
    state_nbytes: int
    parameter_nbytes: float
    encode_milliseconds: float
    decode_milliseconds: float
    wall_seconds: float


def travelling(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of tensors as they are stored: padded, and their manifest as JSON."""
    manifest = layout(tensors)
    return manifest.nbytes + len(json.dumps(manifest.to_json(), separators=(",", ":")))


class Simulation:
    """A run of all shards in one process, step by step."""

    def __init__(self, recipe: ResolvedRecipe, config: TrainingConfig, data: TensorDataset) -> None:
        self.recipe, self.config, self.data = recipe, config, data
        self.plan = Plan(len(data), config)
        self.trainer = Trainer.build(recipe, config)
        self.replica = Replica.build(recipe, config)
        self.states: dict[int, Any] = {}
        self.losses: list[float] = []
        self.payload_nbytes: list[int] = []  # a step's, without manifests
        self.gradient_nbytes: list[int] = []  # a shard's, with its manifest
        self.parameter_nbytes: list[int] = []

    def step(self) -> None:
        """Take the next step as a cluster would."""
        step, plan, trainer = len(self.losses), self.plan, self.trainer
        self.replica.load(trainer.replica.pack())
        accumulator = Accumulator(trainer.replica.buffers, plan.examples(step))
        loss, nbytes = 0.0, 0
        for shard in range(plan.shards_in(step)):
            state = self.states.get(shard)
            done = work(self.replica, self.recipe, plan, self.data, step, shard, state)
            if done.state is not None:
                self.states[shard] = done.state
            gradients = decoded(done.payload, trainer.replica, self.recipe.codec(self.config.compression))
            accumulator.add(gradients, done.buffers, done.examples)
            loss += done.loss * done.examples
            nbytes += layout({**done.payload, **done.buffers}).nbytes
            self.gradient_nbytes.append(travelling(done.payload))
        mean = accumulator.result()
        loss /= plan.examples(step)
        trainer.apply(mean.gradients, mean.buffers, step=step, loss=loss)
        self.losses.append(loss)
        self.payload_nbytes.append(nbytes)
        delta = trainer.delta
        whole = trainer.replica.state_tensors()
        self.parameter_nbytes.append(travelling(whole if delta is None else delta.tensors()))

    def state_nbytes(self) -> int:
        """Bytes of what a slot keeps."""
        return travelling(tree.flatten(self.states[0])[1]) if self.states else 0

    def codec_milliseconds(self) -> tuple[float, float]:
        """Median time to encode and to decode a shard's gradients, as they were at the last step."""
        codec = self.recipe.codec(self.config.compression)
        step = len(self.losses) - 1
        indices = self.plan.indices(step, 0)
        found = compute(self.replica, self.recipe, self.config, self.data, indices, step, 0).gradients
        memory = self.states.get(0, {}).get("residual", {})
        with pinned(self.config.threads, self.config.deterministic):
            payload = codec.encode(found, memory).payload
            encode = _median(lambda: codec.encode(found, memory))
            decode = _median(lambda: codec.decode(payload, self.replica.parameters))
        return encode, decode


def _median(what: Callable[[], object]) -> float:
    """Median milliseconds of some repetitions."""
    taken = []
    for _ in range(REPETITIONS):
        began = time.perf_counter()
        what()
        taken.append(1e3 * (time.perf_counter() - began))
    return statistics.median(taken)


def train(variant: str, seed: int, epochs: int, data: TensorDataset, test: TensorDataset) -> Outcome:
    """Train one variant to the end and score it."""
    began = time.perf_counter()
    config = config_of(variant, epochs=epochs, seed=seed)
    recipe = resolved_recipe(data, test, Plan(len(data), config).total_steps)
    run = Simulation(recipe, config, data)
    while len(run.losses) < run.plan.total_steps:
        run.step()
    encode, decode = run.codec_milliseconds()
    run.replica.load(run.trainer.replica.pack())
    scores = evaluate(run.replica, recipe, config, test, range(len(test))).means
    return Outcome(
        variant=variant,
        seed=seed,
        epochs=epochs,
        examples=len(data),
        accuracy=scores["accuracy"],
        test_loss=scores["loss"],
        train_loss=statistics.fmean(run.losses[-run.plan.steps_per_epoch :]),
        gradient_nbytes=statistics.fmean(run.gradient_nbytes),
        state_nbytes=run.state_nbytes(),
        parameter_nbytes=statistics.fmean(run.parameter_nbytes),
        encode_milliseconds=encode,
        decode_milliseconds=decode,
        wall_seconds=round(time.perf_counter() - began, 1),
    )


# --- the table -----------------------------------------------------------------------------


def summary(outcomes: list[Outcome]) -> list[dict[str, Any]]:
    """One row a variant, means over the seeds; differences to "none" at the same seed."""
    plain = {o.seed: o for o in outcomes if o.variant == "none"}
    rows = []
    for variant in dict.fromkeys(o.variant for o in outcomes):
        runs = [o for o in outcomes if o.variant == variant]
        lost = [100 * (plain[o.seed].accuracy - o.accuracy) for o in runs if o.seed in plain]
        percents = [100 * o.accuracy for o in runs]
        nbytes = statistics.fmean(o.gradient_nbytes for o in runs)
        base = statistics.fmean(o.gradient_nbytes for o in plain.values()) if plain else float("nan")
        row: dict[str, Any] = {
            "variant": variant,
            "seeds": [o.seed for o in runs],
            "gradient_bytes_per_shard": round(nbytes),
            "times_fewer_bytes": round(base / nbytes, 1),
            "state_bytes_per_slot": runs[0].state_nbytes,
            "parameter_bytes_per_fetch": round(statistics.fmean(o.parameter_nbytes for o in runs)),
            "accuracy_percent": round(statistics.fmean(percents), 2),
            "accuracy_deviation": round(statistics.stdev(percents), 2) if len(runs) > 1 else None,
            "test_loss": round(statistics.fmean(o.test_loss for o in runs), 4),
            "points_lost": round(statistics.fmean(lost), 2) if lost else None,
            "points_lost_each_seed": [round(points, 2) for points in lost],
            "encode_milliseconds": round(statistics.median(o.encode_milliseconds for o in runs), 2),
            "decode_milliseconds": round(statistics.median(o.decode_milliseconds for o in runs), 2),
        }
        reached = bool(lost) and base / nbytes >= LEAST_RATIO and statistics.fmean(lost) <= MOST_POINTS
        rows.append({**row, "target_reached": reached})
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    head = ("variant", "bytes/shard", "× fewer", "state/slot", "parameters", "seeds", "accuracy, %", "lost")
    print("{:44} {:>11} {:>8} {:>11} {:>11} {:>5} {:>14} {:>6} {:>14}".format(*head, "enc/dec ms"))
    for row in rows:
        lost = "" if row["points_lost"] is None else f"{row['points_lost']:+.2f}"
        spread = "" if row["accuracy_deviation"] is None else f"± {row['accuracy_deviation']:.2f}"
        print(
            f"{row['variant']:44} {row['gradient_bytes_per_shard']:11,} {row['times_fewer_bytes']:8.1f} "
            f"{row['state_bytes_per_slot']:11,} {row['parameter_bytes_per_fetch']:11,} {len(row['seeds']):5} "
            f"{row['accuracy_percent']:7.2f} {spread:6} {lost:>6} "
            f"{row['encode_milliseconds']:7.2f}{row['decode_milliseconds']:7.2f}"
            + ("  <- target" if row["target_reached"] else "")
        )


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Points lost against the factor by which gradients shrink."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5))
    for row in rows:
        lost = row["points_lost_each_seed"]
        if row["variant"] == "none" or not lost:
            continue
        mean = statistics.fmean(lost)
        spread = [[mean - min(lost)], [max(lost) - mean]]
        label = f"{row['variant']}, {len(lost)} seed{'s' * (len(lost) > 1)}"
        axes.errorbar(row["times_fewer_bytes"], mean, yerr=spread, fmt="o", capsize=3, label=label)
    axes.axhline(MOST_POINTS, color="tab:green", linestyle=":")
    axes.axvline(LEAST_RATIO, color="tab:green", linestyle=":")
    axes.set(
        xscale="log",
        xlabel="times fewer gradient bytes",
        ylabel="points of accuracy lost (mean, least and most)",
        title="Fashion-MNIST cnn; target: right of and below the dotted lines",
    )
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def written(path: Path, outcomes: list[Outcome]) -> list[dict[str, Any]]:
    """Write the table and the runs that it is made of; returns its rows."""
    before = json.loads(path.read_text()) if path.exists() else {}
    rows = summary(outcomes)
    runs = [asdict(outcome) for outcome in outcomes]
    document = {"machine": machine(), "rows": rows, "cluster": before.get("cluster"), "runs": runs}
    path.parent.mkdir(exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(document, indent=1) + "\n")
    part.replace(path)
    return rows


def found_before(path: Path, epochs: int, examples: int) -> list[Outcome]:
    """The runs of an earlier start that belong into a table of these epochs and examples."""
    if not path.exists():
        return []
    runs = [Outcome(**run) for run in json.loads(path.read_text())["runs"]]
    return [run for run in runs if (run.epochs, run.examples) == (epochs, examples)]


# --- the same on real processes ------------------------------------------------------------


def on_cluster(variant: str, folder: Path, steps: int) -> dict[str, Any]:
    """Train some steps on a LocalCluster of 2 Clients and in the simulation; compare bits and bytes.

    The Clients share no memory, as if each were on a host of its own. Redis counts all that passes it,
    gradients, slots' memories, parameters, messages and the end of the run.
    """
    from redis import Redis

    from torchord import LocalCluster, Master, Recipe

    examples = 256 * steps
    config = config_of(variant, epochs=1, seed=0)
    data = images(folder, "train", examples)
    simulated = Simulation(resolved_recipe(data, data, steps), config, data)
    for _ in range(steps):
        simulated.step()
    recipe = Recipe(
        model=cnn_model,
        dataset=partial(images, folder=str(folder), prefix="train", last=examples),
        loss=functional.cross_entropy,
        optimizer=partial(torch.optim.SGD, lr=LEARNING_RATE, momentum=MOMENTUM),
        scheduler=partial(schedule, steps=steps),
    )
    with LocalCluster(2, env={"TORCHORD_HOST_CACHE": "off"}, wait_ready=True) as cluster:
        redis = Redis.from_url(cluster.url)
        before = redis.info("stats")
        run = Master(cluster.url, checkpoint_dir=cluster.checkpoint_dir).submit(recipe, config, name="codecs")
        run.wait(timeout=240)
        audit, got = run.verify(), run.state_dict()
        sent = [report.nbytes for report in run.history()]
        after = redis.info("stats")
    expected = simulated.trainer.replica.model.state_dict()
    return {
        "variant": variant,
        "steps": steps,
        "audit_ok": audit.ok,
        "same_bits_as_simulated": all(torch.equal(got[name], value) for name, value in expected.items()),
        "payload_bytes_per_step": statistics.fmean(sent),
        "payload_bytes_per_step_simulated": statistics.fmean(simulated.payload_nbytes),
        **{
            f"redis_{way}_bytes_per_step": (
                after[f"total_net_{way}_bytes"] - before[f"total_net_{way}_bytes"]
            )
            // steps
            for way in ("input", "output")
        },
    }


def main() -> None:
    """Run what is missing of the table; write it after each run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the four IDX files")
    parser.add_argument("--variants", nargs="*", default=VARIANTS, metavar="GRADIENTS[/PARAMETERS]")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--validate", action="store_true", help="score on held-out training images")
    parser.add_argument("--limit", type=int, help="end after so many runs; the next start goes on")
    parser.add_argument("--cluster", nargs="+", metavar="VARIANT", help="compare with real processes instead")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    output = arguments.output or RESULTS / ("codecs-validation.json" if arguments.validate else "codecs.json")
    if arguments.cluster:
        document = json.loads(output.read_text()) if output.exists() else {"rows": [], "runs": []}
        document["cluster"] = [on_cluster(each, arguments.data, steps=40) for each in arguments.cluster]
        print(json.dumps(document["cluster"], indent=1))
        output.write_text(json.dumps(document, indent=1) + "\n")
        return
    data = test = images(arguments.data, "train")
    if arguments.validate:
        data = TensorDataset(*(tensor[:-HELD_OUT] for tensor in data.tensors))
        test = TensorDataset(*(tensor[-HELD_OUT:] for tensor in test.tensors))
    else:
        test = images(arguments.data, "t10k")
    outcomes = found_before(output, arguments.epochs, len(data))
    known = {(outcome.variant, outcome.seed) for outcome in outcomes}
    wanted = [
        (variant, seed)
        for seed in arguments.seeds
        for variant in arguments.variants
        if seed == arguments.seeds[0] or variant not in ONE_SEED
    ]
    for variant, seed in [each for each in wanted if each not in known][: arguments.limit]:
        last = train(variant, seed, arguments.epochs, data, test)
        outcomes.append(last)
        written(output, outcomes)
        print(f"seed {seed} {variant}: {100 * last.accuracy:.2f} % in {last.wall_seconds:.0f} s", flush=True)
    rows = written(output, outcomes)
    show(rows)
    plot(rows, output.with_suffix(".png"))


if __name__ == "__main__":
    main()
