"""Steps between hosts: transfers that run while something is computed, beside the same one after the other.

    python -m benchmarks.bench_overlap                                  all, three interleaved rounds
    python -m benchmarks.bench_overlap --workloads gpt --megabits 1000 --modes off on --rounds 1

Claim: seconds of one exact step of a real cluster whose two Clients and training server each reach Redis
through a network link of their own, with `TORCHORD_OVERLAP` off, with each of its parts, and on. A link lets
so many bits through each way, all connections of its host together, with 0.2 ms of latency one way: TCP
proxies of `benchmarks.links`, one process for all. The same-host tier is off, so every tensor crosses two
links. On what: gpt (42 MB of gradients) and cnn (1.7 MB), two shards, one thread a process.

A figure of a round is the median over its steps after the first ones; shown are the median of the rounds and
the worst. Rounds are interleaved: each takes every mode once; the clusters of the other modes are stopped
(SIGSTOP) meanwhile. Beside them, in the same run: the step with links without limit ("unlimited", overlap
off), which is what computing and copying cost here, and two anchors on paper. The *bound* is the larger of
"unlimited" and the time of the busiest link, the server's, for a gradient from each shard and, when these are
summed, a version: no order of transfers beats that. The *serial* time adds up "unlimited" and the links'
times of a gradient up, of all of them down, and of a version up and down.

Bias: Redis has no link of its own, as if it sat behind a faster port; with Redis on the server's machine, its
link would carry what is the server's here. Loopback and proxies cost processor time that a network card
would not (shown: CPU seconds of the links a step), on two cores that all processes share, so that overlap is
worth less here than between machines. Packets do not get lost.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from benchmarks import RESULTS, machine
from benchmarks.bench_ddp import cluster_processes, stopped
from benchmarks.links import Links, links
from benchmarks.workloads import BATCH, recipe
from torchord import LocalCluster, Master, TrainingConfig
from torchord.cache.settings import OVERLAPS

MODES = {"off": "off", **{part: part for part in sorted(OVERLAPS)}, "on": "on"}
MEGABITS = (1000, 200)
STEPS = {("gpt", 1000): 4, ("gpt", 200): 2, ("cnn", 1000): 20, ("cnn", 200): 12}
SKIPPED = 2  # first steps: loading, and learning which gradients there are
LATENCY = 0.0002
CLIENTS = 2
UNLIMITED = 0  # in the place of a rate


class Mode:
    """A cluster whose every worker reaches Redis over a link of its own.

    Attributes:
        cluster: its processes.
        links: the links of server and Clients.
    """

    def __init__(self, cluster: LocalCluster, between: Links, folder: str) -> None:
        self.cluster, self.links = cluster, between
        self.master = Master(cluster.url, checkpoint_dir=folder)

    def steps(self, workload: str, count: int, name: str) -> dict[str, Any]:
        """Train; seconds of each step after the first ones, CPU seconds a step, and bytes."""
        batch = BATCH[workload]
        config = TrainingConfig(
            batch_size=batch, shards=CLIENTS, epochs=count + SKIPPED, checkpoint_every=10**6
        )
        before = self._cpu()
        history = self.master.fit(recipe(workload, examples=batch), config, name=name, progress=False).history
        used = {name: (now - before[name]) / len(history) for name, now in self._cpu().items()}
        seconds = [report.seconds for report in history[SKIPPED:]]
        return {"seconds": seconds, "cpu": used, "loss": history[-1].loss, "nbytes": history[-1].nbytes}

    def _cpu(self) -> dict[str, float]:
        processes = {**cluster_processes(self.cluster), "links": psutil.Process(self.links.pid)}
        return {name: sum(process.cpu_times()[:2]) for name, process in processes.items()}


@contextmanager
def mode(overlap: str, folder: str) -> Iterator[Mode]:
    """A cluster with two Clients and a training server."""
    env = {"TORCHORD_HOST_CACHE": "off", "TORCHORD_OVERLAP": overlap}
    with (
        LocalCluster(workers=0, env=env, checkpoint_dir=folder) as cluster,
        links(cluster.broker.port, CLIENTS + 1) as between,
    ):
        urls = [cluster.url.replace(f":{cluster.broker.port}/", f":{port}/") for port in between.ports]
        cluster.add_worker("server", role="server", env={"TORCHORD_URL": urls[0]})
        for number, url in enumerate(urls[1:], start=1):
            cluster.add_worker(f"client{number}", env={"TORCHORD_URL": url})
        cluster.wait_ready()
        yield Mode(cluster, between, folder)


def anchors(unlimited: float, nbytes: int, megabits: int) -> dict[str, float]:
    """Seconds of a step on paper; `nbytes` are those of all gradients, and each is as large as a version."""
    each = nbytes / CLIENTS / (megabits * 125_000)
    return {"bound": max(unlimited, (CLIENTS + 1) * each), "serial": unlimited + (CLIENTS + 3) * each}


def store(path: Path, found: dict[str, Any]) -> None:
    """Add rounds to those that an earlier run left in the file."""
    record = json.loads(path.read_text()) if path.exists() else {"rounds": {}}
    record |= {"machine": machine(), "latency_seconds": LATENCY, "clients": CLIENTS}
    for place, modes in found.items():
        kept = record["rounds"].setdefault(place, {})
        for name, rounds in modes.items():
            kept.setdefault(name, []).extend(rounds)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def figures(rounds: dict[str, list[dict[str, Any]]], megabits: int) -> dict[str, dict[str, float]]:
    """Median and worst seconds of each mode, and the anchors."""
    found = {}
    for name, turns in rounds.items():
        medians = [statistics.median(turn["seconds"]) for turn in turns]
        found[name] = {"median": statistics.median(medians), "worst": max(medians)}
    if "unlimited" in found:
        nbytes = next(iter(rounds.values()))[0]["nbytes"]
        for name, value in anchors(found["unlimited"]["median"], nbytes, megabits).items():
            found[name] = {"median": value, "worst": value}
    return found


def show(record: dict[str, Any]) -> None:
    """The table."""
    print(f"\n{'':<18}{'':<11}{'median s':>9}{'worst s':>9}{'of off':>8}{'links CPU s':>13}{'all CPU s':>11}")
    for place, rounds in record["rounds"].items():
        workload, _, megabits = place.partition(" ")
        found = figures(rounds, int(megabits))
        for name, row in found.items():
            ratio = row["median"] / found["off"]["median"] if "off" in found else float("nan")
            turns = rounds.get(name, [])
            cpu = [turn["cpu"]["links"] for turn in turns], [sum(turn["cpu"].values()) for turn in turns]
            used = "".join(f"{statistics.median(each):>12.2f}" for each in cpu if each)
            print(
                f"{workload + ', ' + megabits + ' Mbit/s':<18} {name:<10}{row['median']:>9.3f}"
                f"{row['worst']:>9.3f}{ratio:>8.2f}{used}"
            )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workloads", nargs="+", default=["gpt", "cnn"], choices=["gpt", "cnn", "gpt-tiny"])
    parser.add_argument("--megabits", nargs="+", type=int, default=list(MEGABITS))
    parser.add_argument("--modes", nargs="+", default=[*MODES, "unlimited"])
    parser.add_argument("--afresh", action="store_true", help="forget the rounds of earlier runs")
    parser.add_argument("--output", type=Path, default=RESULTS / "overlap.json")
    options = parser.parse_args(arguments)
    if options.afresh:
        options.output.unlink(missing_ok=True)
    with TemporaryDirectory() as folder, ExitStack() as stack:
        made = {
            name: stack.enter_context(mode(MODES[name], folder)) for name in options.modes if name in MODES
        }
        if "unlimited" in options.modes:
            made["unlimited"] = made.get("off") or stack.enter_context(mode("off", folder))
        for turn in range(options.rounds):
            for place in [(w, m) for w in options.workloads for m in options.megabits]:
                for name, each in made.items():
                    rate = float("inf") if name == "unlimited" else place[1] * 125_000
                    each.links.set(rate, LATENCY)
                    with ExitStack() as others:
                        for other in {id(o): o for o in made.values() if o is not each}.values():
                            others.enter_context(stopped(other.cluster))
                        count = STEPS.get(place, 4)
                        found = each.steps(place[0], count, f"{'-'.join(map(str, place))}-{name}-{turn}")
                    store(options.output, {f"{place[0]} {place[1]}": {name: [found]}})
                    print(
                        f"round {turn + 1} {place[0]} at {place[1]} Mbit/s, {name}: "
                        f"{statistics.median(found['seconds']):.3f} s, loss {found['loss']:.6f}",
                        flush=True,
                    )
    show(json.loads(options.output.read_text()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
