"""What a step costs when there is nothing to compute.

    python -m benchmarks.bench_step                    K = 2, 4, 8; three interleaved rounds

Claim: the overhead of one global step (milliseconds from commit to commit with a no-op model), beside
the same number of messages sent by hand through redis-py by two processes (the floor: no tasks, no
tensors, no ledger); and the same in rounds, where the Clients take the steps by themselves. Beside the time
stand what other work on the machine does not change, or changes less: processor milliseconds a step of each
process, commands and reads of the server a step (a read is a request,
or several in one packet: a round trip). benchmarks/overhead.md says where they go and what was tried.

Bias: torchord's step computes, stores and reads tensors, updates and commits; the floor does none of that.
Two Clients, one training server, the process that waits for the run and the server share the machine's
cores. The model is so small that its tensors travel inside the records of the ledger (up to 4 KiB). The
workers leave out Celery's log line at the start and end of each task (TORCHORD_TASK_LOG=off), as a worker
without `--loglevel INFO` does; with it a task costs about a tenth more.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import secrets
import statistics
import time
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import redis

from benchmarks import RESULTS, machine
from benchmarks.workloads import recipe
from torchord import LocalCluster, Master, TrainingConfig

_SKIPPED = 10  # first steps, while everything is loaded
_PATIENCE = 60  # seconds; redis-py's own 5 are too few for a process that starts on a busy machine


def floor_worker(url: str) -> None:
    """Answers each message with one: pop, count, and push when the step is complete."""
    client = redis.Redis.from_url(url, socket_timeout=_PATIENCE)
    while True:
        popped: Any = client.brpop(["floor:tasks"], timeout=_PATIENCE / 2)
        if popped is None or popped[1] == b"stop":
            return
        step, size = popped[1].split(b":")
        pipe = client.pipeline()
        pipe.incr(b"floor:count:" + step)
        pipe.expire(b"floor:count:" + step, 60)
        if pipe.execute()[0] == int(size):
            client.lpush("floor:done", step)


def floor(url: str, shards: int, steps: int) -> float:
    """Median milliseconds of a step made of hand-written messages, two workers."""
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=floor_worker, args=(url,), daemon=True) for _ in range(2)]
    for worker in workers:
        worker.start()
    client = redis.Redis.from_url(url, socket_timeout=_PATIENCE)
    seconds = []
    token = secrets.token_hex(4)  # counts of a call before this one may still be there
    for step in range(steps + _SKIPPED):
        began = time.perf_counter()
        client.lpush("floor:tasks", *[f"{token}.{step}:{shards}"] * shards)
        client.brpop(["floor:done"], timeout=_PATIENCE / 2)
        seconds.append(time.perf_counter() - began)
    client.lpush("floor:tasks", "stop", "stop")
    for worker in workers:
        worker.join(timeout=10)
    return statistics.median(seconds[_SKIPPED:]) * 1000


def processor_seconds(process: psutil.Process) -> float:
    """User and system time of a process so far."""
    times = process.cpu_times()
    return float(times.user + times.system)


class Meter:
    """What processes and the server have done so far.

    Args:
        cluster: whose workers and server it reads.
    """

    def __init__(self, cluster: LocalCluster) -> None:
        self._server = redis.Redis.from_url(cluster.url)
        pids = {name: process.pid for name, process in cluster.processes.items()}
        pids["redis"] = int(self._info("server")["process_id"])
        self._processes = {name: psutil.Process(pid) for name, pid in pids.items()}

    def _info(self, section: str) -> dict[str, Any]:
        found: Any = self._server.info(section)
        return dict(found)

    def read(self) -> dict[str, float]:
        """Name -> processor milliseconds, "commands" and "reads" of the server."""
        found = {name: processor_seconds(process) * 1000 for name, process in self._processes.items()}
        stats = self._info("stats")
        return {
            **found,
            "commands": stats["total_commands_processed"],
            "reads": stats["total_reads_processed"],
        }


def measured(
    master: Master, meter: Meter, shards: int, steps: int, name: str, *, rounds: bool = False
) -> dict[str, float]:
    """Median milliseconds from commit to commit, and what a step takes of everything else.

    Args:
        rounds: whether the Clients take steps by themselves; else each step is a chord.
    """
    length = "auto" if rounds else 1
    config = TrainingConfig(batch_size=shards, shards=shards, checkpoint_every=10**6, round_steps=length)
    before = meter.read()
    trained = master.fit(
        recipe("noop", examples=(steps + _SKIPPED) * shards), config, name=name, progress=False
    )
    taken = {name: (value - before[name]) / (steps + _SKIPPED) for name, value in meter.read().items()}
    seconds = sorted(report.seconds for report in trained.history[_SKIPPED:])
    return {
        "median": statistics.median(seconds) * 1000,
        "fastest": seconds[len(seconds) // 10] * 1000,
        **taken,
    }


def table(found: dict[int, dict[str, Any]]) -> None:
    """Print times, then what a step takes."""
    print(
        f"\n{'K':>3} {'torchord ms':>12} {'worst':>7} {'10 %':>7} {'floor ms':>9} {'ratio':>6}"
        f" {'rounds ms':>10} {'worst':>7} {'of chords':>10}"
    )
    medians = {}
    for shards, of in found.items():
        times = [turn["median"] for turn in of["torchord"]]
        medians[shards], least = statistics.median(times), statistics.median(of["floor"])
        fastest = statistics.median(turn["fastest"] for turn in of["torchord"])
        inside = [turn["median"] for turn in of["rounds"]]
        print(
            f"{shards:>3} {medians[shards]:>12.2f} {max(times):>7.2f} {fastest:>7.2f} {least:>9.2f} "
            f"{medians[shards] / least:>6.1f} {statistics.median(inside):>10.2f} {max(inside):>7.2f} "
            f"{statistics.median(inside) / medians[shards]:>10.2f}"
        )
    few, many = min(medians), max(medians)
    if few < many:
        each = (medians[many] - medians[few]) / (many - few)
        print(f"each further task: {each:.2f} ms (K={few} to {many})")
    print("\na step takes (processor ms by process; the server's reads and commands):")
    for shards, of in found.items():
        names = [name for name in of["torchord"][0] if name not in ("median", "fastest")]
        for way in ("torchord", "rounds"):
            values = {name: statistics.median(turn[name] for turn in of[way]) for name in names}
            said = ", ".join(f"{name} {value:.2f}" for name, value in values.items())
            print(f"K={shards}{', in rounds' if way == 'rounds' else ''}: {said}")


def main() -> int:
    """Run, print and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--shards", type=int, nargs="+", default=[2, 4, 8])
    options = parser.parse_args()
    found: dict[int, dict[str, Any]] = {
        k: {"torchord": [], "rounds": [], "floor": []} for k in options.shards
    }
    with (
        TemporaryDirectory() as folder,
        LocalCluster(
            workers=2, checkpoint_dir=folder, wait_ready=True, env={"TORCHORD_TASK_LOG": "off"}
        ) as cluster,
    ):
        master, meter = Master(cluster.url, checkpoint_dir=folder), Meter(cluster)
        for rounds in (False, True):
            measured(master, meter, 2, 20, f"warm-{rounds}", rounds=rounds)
        for turn in range(options.rounds):
            for shards in options.shards:
                for way, rounds in (("torchord", False), ("rounds", True)):
                    name = f"{way}-{shards}-{turn}"
                    found[shards][way].append(
                        measured(master, meter, shards, options.steps, name, rounds=rounds)
                    )
                found[shards]["floor"].append(floor(cluster.url, shards, options.steps))
                latest = [found[shards][way][-1]["median"] for way in ("torchord", "rounds")]
                print(f"round {turn + 1}  K={shards}: {latest[0]:.2f} ms, {latest[1]:.2f}", flush=True)
    table(found)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "step.json").write_text(json.dumps({"machine": machine(), "milliseconds": found}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
