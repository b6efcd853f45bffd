"""Time and bytes to 90 % on Fashion-MNIST: local steps and exact sync beside DDP; DiLoCo beside sync.

    apt-get install dataset-fashion-mnist             # Debian and Ubuntu; or --data DIR, the four IDX files
    python -m benchmarks accuracy                     # all but the search, one part after the other
    python -m benchmarks.bench_accuracy time report   # seconds a batch anew; nothing else should run
    python -m benchmarks.bench_accuracy tune          # look for better rates; sees no test image

Targets: with local steps, 0.7 of the seconds that DDP over gloo takes to 90 % test accuracy; DiLoCo at
H = 50 within 0.5 points of exact sync. The cnn of `workloads`, 421,642 parameters, two shards or ranks, one
thread a process. Contestants (`WAYS`): SGD with momentum 0.9 under DDP, in exact sync and with local steps
that are averaged, and DiLoCo with AdamW inside and the paper's Nesterov 0.7 and 0.9 outside; a rate that
falls linearly to 0 over two or three epochs.

How: training is deterministic here, so it can be taken apart into what no noise can touch and what noise can.
`curve` trains each contestant in one process, out of the pure functions that Clients and training server
call (as `bench_codecs` does), for each seed, until the 10,000 test images say 90 %; they are asked every
4,096 examples once 30,000 were seen. `time` measures seconds a batch in pieces of 160 batches whose first
third is not counted, all contestants in turn, round after round: two Clients and a training server, and two
processes under DistributedDataParallel, with torchord's processes stopped meanwhile. Seconds to 90 % are the
product: the median over seeds times the median over rounds; as "worst" the slowest seed times the slowest
round. DDP's curve is taken to be exact sync's: both step along the mean gradient of the same batches.

`whole` asks whether that is so: each side's best train for real, one after the other, seed after seed, DDP
from the same initial weights on the same batches; the clock runs from the 16th batch to the one after
which the test images say 90 %, and stands while they are asked. torchord's batch is the curve's, and the
version that the run has there is looked at.

Rates and epochs come from `tune`, which trains on the first 50,000 training images and scores on the other
10,000: what it found is in the results. It had about as many tries for DDP's side (exact sync; SGD and AdamW)
as for local steps and DiLoCo, nearly all with one seed. Since a smaller batch takes fewer examples in more
steps, what counts is each side's best over the batch sizes, DDP's too.

DiLoCo: AdamW at 0.001 inside, Nesterov 0.7 and 0.9 outside (the paper's), batch 256, beside AdamW in exact
sync over the same epochs, with the test images after the last step.

Bytes are what crosses between processes. torchord: each slot's gradient as it is stored, each version once
a Client, and with local steps what a slot keeps (the momentum). DDP: what a ring of two sends, one
gradient each way a batch.

Bias: start-up is in no figure (DDP's two processes start faster than a cluster), nor is testing. One
machine, loopback: a network makes bytes dear and helps local steps. torchord's server and Redis share the
two cores with the Clients. DDP's processes keep the memory that they free, as Clients do.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from benchmarks import RESULTS, machine
from benchmarks.bench_ddp import stopped
from benchmarks.fashion_mnist import DATA, section
from benchmarks.workloads import cnn_model
from torchord import LocalCluster, Master, Recipe, TrainingConfig
from torchord.coordinator.compute.replica import Replica
from torchord.coordinator.compute.shard import work
from torchord.coordinator.compute.sums import Accumulator
from torchord.coordinator.compute.trainer import Trainer
from torchord.coordinator.local_cluster.embedded_server import free_port
from torchord.coordinator.local_steps import averaging, diloco
from torchord.coordinator.spec.plan import Plan
from torchord.coordinator.spec.resolving import resolve
from torchord.tasks.allocator import keep_memory

SHARDS, LOCAL, TARGET = 2, 16, 0.90
ASKED_EVERY, ASKED_FROM = 4_096, 30_000  # examples
TUNED_SEEDS = (10, 11, 12)
UNCOUNTED = LOCAL  # first batches of a whole run
PIECE = 160  # batches of a piece that is timed; the first third is not counted
DILOCO = {"local_steps": 50, "epochs": 4, "rate": 1e-3, "batch": 256}


@dataclass(frozen=True)
class Way:
    """How a contestant trains.

    Attributes:
        local_steps: batches between two exchanges.
        batch: the global batch.
        rate: learning rate at the start.
        epochs: over which it falls to 0.
        optimizer: of `OPTIMIZERS`.
        outer: of `OUTERS`.
    """

    local_steps: int
    batch: int
    rate: float
    epochs: int
    optimizer: str = "sgd"
    outer: str = "averaging"

    @property
    def kind(self) -> str:
        """What it is called, without its batch."""
        return "diloco" if self.outer == "diloco" else "local" if self.local_steps > 1 else "sync"


OPTIMIZERS: dict[str, Any] = {
    "sgd": partial(torch.optim.SGD, momentum=0.9),
    "adamw": torch.optim.AdamW,
    "fused adamw": partial(torch.optim.AdamW, fused=True),
}
OUTERS = {"averaging": averaging, "diloco": diloco}
KINDS = ("ddp", "sync", "local", "diloco")


WAYS = {
    "sync 256": Way(1, 256, 0.1, 3),
    "sync 128": Way(1, 128, 0.05, 2),
    "sync 64": Way(1, 64, 0.05, 2),
    "sync 32": Way(1, 32, 0.03, 2),
    "local 256": Way(LOCAL, 256, 0.1, 3),
    "local 64": Way(LOCAL, 64, 0.05, 2),
    "local 32": Way(LOCAL, 32, 0.03, 2),
    "diloco 64": Way(LOCAL, 64, 1e-3, 2, "fused adamw", "diloco"),
    "diloco 32": Way(2 * LOCAL, 32, 1e-3, 2, "fused adamw", "diloco"),
}
"""The same for both sides; "ddp N" trains as "sync N" does."""
WHOLE = ("ddp 64", "local 64", "diloco 64")
"""Who trains for real in `whole_runs`."""
SEARCHED = [
    *(Way(1, 32, rate, 2) for rate in (0.03, 0.05)),
    *(Way(1, 64, rate, 2) for rate in (0.03, 0.05, 0.1)),
    Way(1, 64, 0.05, 3),
    *(Way(1, 128, rate, 2) for rate in (0.03, 0.05, 0.1)),
    *(Way(1, 64, rate, 2, "fused adamw") for rate in (5e-4, 1e-3, 2e-3)),
    *(Way(LOCAL, 64, rate, 2) for rate in (0.05, 0.1)),
    Way(LOCAL, 32, 0.03, 2),
    *(Way(LOCAL, 32, rate, 2, "fused adamw", "diloco") for rate in (5e-4, 1e-3)),
    *(Way(LOCAL, 64, rate, 2, "fused adamw", "diloco") for rate in (5e-4, 7e-4, 1e-3, 1.5e-3, 2e-3)),
    *(Way(LOCAL, 64, rate, 2, "sgd", "diloco") for rate in (0.01, 0.02)),
    *(Way(LOCAL, 128, rate, 2, "fused adamw", "diloco") for rate in (1e-3, 2e-3)),
    *(Way(32, batch, 1e-3, 2, "fused adamw", "diloco") for batch in (32, 64, 128)),
]
"""What `tune` tries. Where it was stopped by hand, the rest is missing in the results."""


# --- what is trained --------------------------------------------------------------------------


def config(way: Way, seed: int = 0) -> TrainingConfig:
    """Global batches over two shards."""
    return TrainingConfig(
        epochs=way.epochs, batch_size=way.batch, shards=SHARDS, local_steps=way.local_steps, seed=seed,
        checkpoint_every=10**6,
    )  # fmt: skip


def recipe(way: Way, data: partial[TensorDataset], size: int) -> Recipe:
    """The cnn under a way's optimizers."""
    steps = Plan(size, config(way)).total_steps
    return Recipe(
        model=cnn_model,
        dataset=data,
        loss=nn.functional.cross_entropy,
        optimizer=partial(OPTIMIZERS[way.optimizer], lr=way.rate),
        scheduler=partial(torch.optim.lr_scheduler.PolynomialLR, total_iters=steps, power=1.0),
        outer_optimizer=OUTERS[way.outer],
    )


def simulate(given: Recipe, how: TrainingConfig, data: TensorDataset) -> Iterator[tuple[int, nn.Module]]:
    """Train in this process as a fleet would; yields (batches so far, model) after each global step."""
    made = resolve(given.to_spec(), allowed=("*",))
    trainer, replica = Trainer.build(made, how), Replica.build(made, how, computing=True)
    plan, states, batches = Plan(len(data), how), dict[int, Any](), 0
    for step in range(plan.total_steps):
        replica.load(trainer.replica.pack())
        done = [
            work(replica, made, plan, data, step, shard, states.get(shard))
            for shard in range(plan.shards_in(step))
        ]
        states.update({shard: each.state for shard, each in enumerate(done) if each.state is not None})
        total = Accumulator(trainer.replica.held(), plan.examples(step))
        for each in done:
            total.add(each.payload, each.buffers, each.examples)
        loss = sum(each.loss * each.examples for each in done) / plan.examples(step)
        mean = total.result()
        trainer.apply(mean.gradients, mean.buffers, step=step, loss=loss)
        batches += len(plan.batch_sizes(step))
        yield batches, trainer.replica.model


@torch.no_grad()
def accuracy(model: nn.Module, data: TensorDataset) -> float:
    """Share of right answers."""
    model.eval()
    inputs, targets = data.tensors
    outputs = torch.cat([model(each) for each in inputs.split(500)])
    return float((outputs.argmax(1) == targets).float().mean())


def curve(way: Way, seed: int, train: TensorDataset, test: TensorDataset) -> list[tuple[int, float]]:
    """(batches, accuracy) every 4,096 examples from 30,000 on, until the target is reached."""
    given = recipe(way, partial(section, "", "train"), len(train))
    found, due = [(0, 0.1)], ASKED_FROM
    for batches, model in simulate(given, config(way, seed), train):
        if batches * way.batch >= due:
            found.append((batches, accuracy(model, test)))
            due += ASKED_EVERY
            if found[-1][1] >= TARGET:
                break
    return found


def reached(points: Sequence[Sequence[float]]) -> int | None:
    """Batches to the target, None if it was not reached."""
    return int(points[-1][0]) if points[-1][1] >= TARGET else None


# --- seconds a batch --------------------------------------------------------------------------


def join(rank: int, port: int) -> None:
    """Make this process one of the two ranks."""
    import torch.distributed as dist

    keep_memory()  # as Clients do; a step takes some 7 % longer without
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=SHARDS)


def ddp_batch(model: nn.Module, optimizer: Any, data: TensorDataset, indices: Any) -> None:
    """One batch of the usual loop."""
    chosen = torch.from_numpy(indices.copy())
    inputs, targets = (tensor[chosen] for tensor in data.tensors)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(inputs), targets).backward()
    optimizer.step()


def ddp_rank(rank: int, port: int, folder: str, ways: list[Way], pipe: Any) -> None:
    """One of two ranks: trains a piece for each way; sends the counted seconds a batch of each."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    join(rank, port)
    found = []
    for way in ways:
        data = section(folder, "train", PIECE * way.batch)
        plan = Plan(len(data), config(way))
        model = DistributedDataParallel(cnn_model())
        optimizer = torch.optim.SGD(model.parameters(), lr=way.rate, momentum=0.9)
        dist.barrier()
        stamps = []
        for step in range(PIECE):
            ddp_batch(model, optimizer, data, plan.indices(step, rank))
            stamps.append(time.perf_counter())
        found.append((stamps[-1] - stamps[PIECE // 3 - 1]) / (PIECE - PIECE // 3))
    dist.barrier()
    if rank == 0:
        pipe.send(found)
    dist.destroy_process_group()


def in_two_processes(target: Any, *arguments: Any) -> Any:
    """What rank 0 of two fresh processes sends; both are called with rank, port, the arguments and a pipe."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    port = free_port()
    ranks = [
        context.Process(target=target, args=(rank, port, *arguments, sender), daemon=True)
        for rank in range(SHARDS)
    ]
    for each in ranks:
        each.start()
    if not receiver.poll(240):
        raise RuntimeError("DDP did not answer within 240 s")
    found = receiver.recv()
    for each in ranks:
        each.join(timeout=30)
    return found


def our_piece(master: Master, folder: Path, way: Way, name: str) -> tuple[float, float]:
    """(seconds, bytes) a batch of one piece on the cluster."""
    size = PIECE * way.batch
    once = replace(way, epochs=1)
    given = recipe(once, partial(section, str(folder), "train", last=size), size)
    trained = master.fit(given, config(once), name=name, progress=False)
    counted = trained.history[-(-len(trained.history) // 3) :]
    seconds = sum(report.seconds for report in counted) / (len(counted) * way.local_steps)
    version = sum(tensor.nbytes for tensor in trained.module.state_dict().values())
    kept = (1 if way.optimizer == "sgd" else 2) if way.local_steps > 1 else 0  # moments, in the slot's state
    moved = SHARDS * version * (1 + kept)
    return seconds, (statistics.mean(report.nbytes for report in counted) + moved) / way.local_steps


def timed(folder: Path, rounds: int) -> None:
    """Seconds and bytes a batch of every contestant, in turn, `rounds` times; kept after each round."""
    plain = {name.replace("sync", "ddp"): way for name, way in WAYS.items() if way.local_steps == 1}
    seconds: dict[str, list[float]] = {name: [] for name in (*plain, *WAYS)}
    gradient = sum(p.numel() * 4 for p in cnn_model().parameters())
    nbytes: dict[str, float] = dict.fromkeys(plain, SHARDS * gradient)
    with TemporaryDirectory() as where, LocalCluster(SHARDS, checkpoint_dir=where, wait_ready=True) as made:
        master = Master(made.url, checkpoint_dir=where)
        for turn in range(rounds):
            with stopped(made):
                found: list[float] = in_two_processes(ddp_rank, str(folder), list(plain.values()))
                for name, each in zip(plain, found, strict=True):
                    seconds[name].append(each)
            for name, way in WAYS.items():
                each, nbytes[name] = our_piece(master, folder, way, f"{name.replace(' ', '-')}-{turn}")
                seconds[name].append(each)
            line = ", ".join(f"{name} {times[-1] * 1000:.1f}" for name, times in seconds.items())
            print(f"round {turn + 1}, ms a batch: {line}", flush=True)
            store(time={"seconds": seconds, "nbytes": nbytes})


# --- whole runs -------------------------------------------------------------------------------


def ddp_whole(rank: int, port: int, folder: str, way: Way, seed: int, pipe: Any) -> None:
    """One of two ranks: trains from our initial weights until the test images say 90 %; sends a row.

    Asking takes place outside of the time that is counted, and at the same examples as in `curve`.
    """
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    join(rank, port)
    train, test = section(folder, "train"), section(folder, "test")
    how, due = config(way, seed), ASKED_FROM
    plan = Plan(len(train), how)
    made = resolve(recipe(way, partial(section, folder, "train"), len(train)).to_spec(), allowed=("*",))
    model = DistributedDataParallel(Replica.build(made, how).model)
    optimizer = made.optimizer(model.parameters())
    assert made.scheduler is not None
    scheduler, seconds, found = made.scheduler(optimizer), 0.0, 0.0
    dist.barrier()
    began = time.perf_counter()
    for step in range(plan.total_steps):
        ddp_batch(model, optimizer, train, plan.indices(step, rank))
        scheduler.step()
        if step + 1 == UNCOUNTED:
            began = time.perf_counter()
        if (step + 1) * way.batch < due:
            continue
        seconds, due = seconds + time.perf_counter() - began, due + ASKED_EVERY
        found = accuracy(model.module, test)
        model.train()
        dist.barrier()
        if found >= TARGET:
            break
        began = time.perf_counter()
    if rank == 0:
        pipe.send({"batches": step + 1, "seconds": seconds, "accuracy": found})
    dist.destroy_process_group()


def our_whole(
    master: Master, folder: Path, way: Way, seed: int, batches: int, name: str, test: TensorDataset
) -> dict[str, float]:
    """The same on the cluster: where its curve says 90 %, the version is looked at."""
    size = len(section(str(folder), "train"))
    plan = Plan(size, config(way, seed))
    done, last, uncounted = 0, 0, 0
    while done < batches:
        done += len(plan.batch_sizes(last))
        last += 1
        uncounted += done <= UNCOUNTED
    how = replace(config(way, seed), checkpoint_every=last)
    run = master.submit(recipe(way, partial(section, str(folder), "train"), size), how, name=name)
    for event in run.events():
        if event.type == "failed":
            run.wait()  # raises
        if event.type == "checkpoint":
            break
    reports = run.history()[uncounted:last]
    run.cancel()
    seconds = sum(report.seconds for report in reports)
    return {"batches": done, "seconds": seconds, "accuracy": accuracy(run.model(version=last), test)}


def whole_runs(options: argparse.Namespace) -> None:
    """Train for real until 90 %, everybody in turn, seed after seed; goes on where it was stopped."""
    test, found = section(str(options.data), "test"), stored().get("curves", {})
    with TemporaryDirectory() as where, LocalCluster(SHARDS, checkpoint_dir=where, wait_ready=True) as made:
        master = Master(made.url, checkpoint_dir=where)
        for seed in options.seeds:
            for name in options.only or WHOLE:
                rows = stored().get("whole", {})
                if str(seed) in rows.get(name, {}):
                    continue
                if name.startswith("ddp"):
                    with stopped(made):
                        arguments = (str(options.data), WAYS[name.replace("ddp", "sync")], seed)
                        row = in_two_processes(ddp_whole, *arguments)
                else:
                    points = found.get(name, {}).get(str(seed))
                    batches = reached(points) if points else None
                    if batches is None:
                        print(f"{name}, seed {seed}: no curve that reaches {TARGET:.0%}")
                        continue
                    label = f"{name.replace(' ', '-')}-{seed}"
                    row = our_whole(master, options.data, WAYS[name], seed, batches, label, test)
                print(f"{name}, seed {seed}: {row}", flush=True)
                store(whole={**rows, name: {**rows.get(name, {}), str(seed): row}})


# --- DiLoCo ------------------------------------------------------------------------------------


def final_accuracy(local_steps: int, seed: int, train: TensorDataset, test: TensorDataset) -> float:
    """Of AdamW in exact sync (1 local step) or of DiLoCo, after the same examples."""
    batch, epochs = int(DILOCO["batch"]), int(DILOCO["epochs"])
    way = Way(local_steps, batch, DILOCO["rate"], epochs, "adamw", "diloco")
    given = recipe(way, partial(section, "", "train"), len(train))
    *_, (_, model) = simulate(given, config(way, seed), train)
    return accuracy(model, test)


# --- results -----------------------------------------------------------------------------------


def stored() -> dict[str, Any]:
    """What was written so far."""
    path = RESULTS / "accuracy.json"
    return json.loads(path.read_text()) if path.exists() else {}


def store(**parts: Any) -> None:
    """Add to the results."""
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({**stored(), "machine": machine(), **parts}, indent=1)
    (RESULTS / "accuracy.json").write_text(text + "\n")


def table(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Contestant -> what it took to the target; those that never reached it are left out."""
    rows = {}
    for name, seconds in found["time"]["seconds"].items():
        points = found["curves"].get(name.replace("ddp", "sync"))
        if not points:
            print(f"{name}: no curve yet")
            continue
        batches = [reached(each) for each in points.values()]
        known = [each for each in batches if each is not None]
        if not known or len(known) < len(batches):
            print(f"{name}: {len(batches) - len(known)} of {len(batches)} seeds did not reach {TARGET:.0%}")
            continue
        middle = statistics.median_high(known)
        rows[name] = {
            "batches": middle, "milliseconds": statistics.median(seconds) * 1000,
            "seconds": middle * statistics.median(seconds), "worst_seconds": max(known) * max(seconds),
            "megabytes": middle * found["time"]["nbytes"][name] / 1e6,
        }  # fmt: skip
    return rows


def report(found: dict[str, Any]) -> None:
    """Print the tables, write the plot."""
    rows = table(found) if "time" in found and "curves" in found else {}
    if rows:
        print(f"\n{'':<11}{'batches':>8}{'ms/batch':>10}{'s to 90 %':>11}{'worst':>8}{'MB to 90 %':>12}")
    for name, row in rows.items():
        print(
            f"{name:<11}{row['batches']:>8.0f}{row['milliseconds']:>10.1f}{row['seconds']:>11.1f}"
            f"{row['worst_seconds']:>8.1f}{row['megabytes']:>12.1f}"
        )
    best = {
        kind: min((name for name in rows if name.startswith(kind)), key=lambda name: rows[name]["seconds"])
        for kind in KINDS
        if any(name.startswith(kind) for name in rows)
    }
    ratios = {}
    if "ddp" in best:
        pairs = [(name, f"ddp {name.split()[1]}") for name in rows] + [(best[k], best["ddp"]) for k in best]
        for ours, theirs in dict.fromkeys(pairs):
            if not ours.startswith("ddp") and theirs in rows:
                ratio = ratios[f"{ours} / {theirs}"] = rows[ours]["seconds"] / rows[theirs]["seconds"]
                print(f"{ours}: {ratio:.2f} of the seconds of {theirs}")
        print(f"each at its best: {', '.join(best.values())}")
        store(to_target=rows, best=best, ratios=ratios)
        plot(found, best)
    for name, each in found.get("whole", {}).items():
        took = [row["seconds"] for row in each.values()]
        print(f"{name}, whole runs: {statistics.median(took):.1f} s ({', '.join(f'{t:.1f}' for t in took)})")
    if found.get("diloco"):
        off = [100 * (row["diloco"] - row["sync"]) for row in found["diloco"].values() if len(row) == 2]
        print(f"DiLoCo at H = 50 less sync, points: {', '.join(f'{each:+.2f}' for each in off)}")


def plot(found: dict[str, Any], best: dict[str, str]) -> None:
    """Accuracy against seconds and against bytes: the first seed of each side's best, and of batch 256."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), dpi=130, layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2, sharey=True)
    for name in dict.fromkeys([*(f"{kind} 256" for kind in best), *best.values()]):
        seeds = found["curves"].get(name.replace("ddp", "sync"))
        if not seeds:
            continue
        points = next(iter(seeds.values()))[1:]  # without the start
        pace = statistics.median(found["time"]["seconds"][name])
        style = dict(zip(KINDS, ("--", ":", "-", "-."), strict=True))[name.split()[0]]
        shown = [100 * p[1] for p in points]
        left.plot([p[0] * pace for p in points], shown, style, marker=".", label=name)
        megabytes = found["time"]["nbytes"][name] / 1e6
        right.plot([p[0] * megabytes for p in points], shown, style, marker=".", label=name)
    for axes, label in ((left, "seconds"), (right, "MB between processes (log)")):
        axes.axhline(100 * TARGET, color="grey", linewidth=0.8)
        axes.set_xlabel(label)
        axes.grid(alpha=0.2)
    right.set_xscale("log")
    left.set_ylim(82, 91)
    left.set_ylabel("test accuracy (%)")
    left.legend(frameon=False)
    figure.suptitle("Fashion-MNIST cnn, two processes; the number is the global batch", fontsize=10)
    figure.savefig(RESULTS / "accuracy.png")


# --- parts -------------------------------------------------------------------------------------


def tune(options: argparse.Namespace) -> None:
    """Examples to 90 % of the validation images for everything on the grid; goes on where it was stopped."""
    train, test = section(str(options.data), "fit"), section(str(options.data), "validation")
    for seed in TUNED_SEEDS[: options.tuned_seeds]:
        for way in SEARCHED:
            name = f"{way.kind} {way.batch}"
            if options.only and name not in options.only:
                continue
            key = f"{name}, H = {way.local_steps}, {way.optimizer} {way.rate:g}, {way.epochs} epochs"
            mine = stored().get("tuned", {}).get(key, {})
            if str(seed) in mine:
                continue
            points = curve(way, seed, train, test)
            batches, best = reached(points), max(each for _, each in points)
            examples = batches and batches * way.batch
            print(f"{key}, seed {seed}: 90 % after {examples} examples, best {best:.4f}", flush=True)
            tuned = stored().get("tuned", {})
            store(tuned={**tuned, key: {**tuned.get(key, {}), str(seed): examples}})


def curves(options: argparse.Namespace) -> None:
    """The curve of each contestant and seed; goes on where it was stopped."""
    train, test = section(str(options.data), "train"), section(str(options.data), "test")
    for seed in options.seeds:
        for name in WAYS:
            if options.only and name not in options.only:
                continue
            found = stored().get("curves", {})
            ways = stored().get("ways", {})
            mine = found.get(name, {}) if ways.get(name) == asdict(WAYS[name]) else {}
            if str(seed) in mine:
                continue
            points = curve(WAYS[name], seed, train, test)
            print(f"{name}, seed {seed}: 90 % at {reached(points)}, last {points[-1]}", flush=True)
            store(
                curves={**found, name: {**mine, str(seed): points}}, ways={**ways, name: asdict(WAYS[name])}
            )


def diloco_beside_sync(options: argparse.Namespace) -> None:
    """Both, for each seed; goes on where it was stopped."""
    train, test = section(str(options.data), "train"), section(str(options.data), "test")
    for seed in options.seeds:
        for name, local_steps in (("diloco", int(DILOCO["local_steps"])), ("sync", 1)):
            found = stored()
            rows = found.get("diloco", {}) if found.get("diloco_settings") == DILOCO else {}
            row = rows.get(str(seed), {})
            if name not in row:
                row[name] = final_accuracy(local_steps, seed, train, test)
                print(f"{name}, seed {seed}: {row[name]:.4f}", flush=True)
                store(diloco={**rows, str(seed): row}, diloco_settings=DILOCO)


def main() -> int:
    """The parts that are named, or all but `tune`."""
    every = ("curve", "time", "whole", "diloco", "report")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"tune or of {', '.join(every)} (default: those)"
    )
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the four IDX files")
    parser.add_argument("--only", nargs="+", help="of tune, curve and whole")
    parser.add_argument("--tuned-seeds", type=int, default=1, help="of tune (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    options = parser.parse_args()
    if unknown := set(options.parts) - {*every, "tune"}:
        parser.error(f"no part {unknown.pop()!r}")
    known = {*WAYS, *(f"{way.kind} {way.batch}" for way in SEARCHED)}
    known |= {name.replace("sync", "ddp") for name in WAYS}
    if strange := set(options.only or ()) - known:
        parser.error(f"no contestant {strange.pop()!r}; there are {', '.join(sorted(known))}")
    if not options.data.is_dir():
        print(f"no {options.data}: see the head of this file for where Fashion-MNIST is", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    for each in options.parts or every:
        if each == "tune":
            tune(options)
        elif each == "curve":
            curves(options)
        elif each == "time":
            timed(options.data, options.rounds)
        elif each == "whole":
            whole_runs(options)
        elif each == "diloco":
            diloco_beside_sync(options)
        else:
            report(stored())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
