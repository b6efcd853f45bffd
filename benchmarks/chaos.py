"""Kill anything, any time: one run under a hail of SIGKILL and SIGSTOP ends with the undisturbed bits.

    python -m benchmarks.chaos --kills 100 --seed 1
    python -m benchmarks.chaos --kills 30 --seed 2 --apart
    python -m benchmarks.chaos --kills 30 --seed 3 --faults

Claim: real processes (three Clients, a training server, a standby, Redis with `appendfsync always`) are
killed in the middle of one run, at random moments: Clients, the training server, the holder of the
supervisor's lease, Redis itself; now and then one is only stopped and goes on later. Each is started
again at once, as an init system would. The run ends by itself, with the same bits as a run that
nothing disturbed, and a clean audit. With `--faults` what operators do comes on top: workers get SIGTERM or
SIGHUP, and Redis is full, read-only or slow for some seconds.

Figures: *recovery* is the time from a kill to the next commit, less the undisturbed median step.
*Stall* is stricter: the longest wait between two commits from a kill to the next one, less the same; a
commit that was under way at the kill does not shorten it. Both are given for all kills, and apart for
those at which no spare process of the kind was ready (then a Python process that imports torch has to
start first, which takes seconds). With `--apart` no process sees another's end, as if each ran on a machine
of its own, and leases alone tell of a death. Bias: all processes share one machine's cores, so each restart
slows the others; the model is small, so little work is lost with a worker; the network is loopback.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import redis
import torch
from torch import nn
from torch.utils.data import TensorDataset

from benchmarks import RESULTS, machine
from torchord import LocalCluster, Master, Recipe, Run, TrainingConfig
from torchord.cache import keys
from torchord.cache.errors import CacheError
from torchord.coordinator.local_cluster.cluster import WorkerProcess
from torchord.coordinator.local_cluster.embedded_server import EmbeddedServer
from torchord.coordinator.spec.targets import Target

BATCH = 48
EXTRA_STEPS = 30  # for each kill, beside those between two: what is done while one recovers, and in pauses
CALM_STEPS = 30
VICTIMS = {"client": 50, "server": 22, "supervisor": 14, "redis": 14}
"""How often each kind is struck, in relation."""
PAUSE_SHARE = 0.2
FAULT_SHARE = 0.4  # of what is no kill, with --faults
FAULTS = {"TERM": signal.SIGTERM, "HUP": signal.SIGHUP}
TROUBLES: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    "FULL": (("CONFIG", "SET", "maxmemory", 1), ("CONFIG", "SET", "maxmemory", 0)),
    "READONLY": (("REPLICAOF", "127.0.0.1", 9), ("REPLICAOF", "NO", "ONE")),
    "SLOW": (("DEBUG", "SLEEP", 2), ("PING",)),
}
"""How Redis gets into trouble, and out of it."""
PATIENCE_SECONDS = 180.0


def model() -> nn.Module:
    """Two layers with dropout: some 20 ms for a shard, and random numbers that must come out the same."""
    return nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Dropout(0.1), nn.Linear(512, 10))


def data(size: int) -> TensorDataset:
    """Random vectors of ten classes, fixed."""
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randn(size, 256, generator=generator), torch.randint(0, 10, (size,), generator=generator)
    )


@dataclass
class Strike:
    """One kill or pause.

    Attributes:
        kind: what was meant: client, server, supervisor or redis.
        victim: name of the process.
        signal: "KILL" or "STOP"; with faults also "TERM", "HUP", or what Redis is (`TROUBLES`).
        at: Unix time (s).
        step: the head's version then.
        spare: whether another process of the kind was ready to go on.
        pause_seconds: until SIGCONT, for "STOP"; until Redis is well again.
        recovery_seconds: until the next commit, less the undisturbed median step.
        stall_seconds: longest wait between commits until the next strike, less the same.
    """

    kind: str
    victim: str
    signal: str
    at: float
    step: int
    spare: bool
    pause_seconds: float = 0.0
    recovery_seconds: float = 0.0
    stall_seconds: float = 0.0


class Storm:
    """Strikes the processes of a cluster while it trains one run.

    Args:
        cluster: with at least one standby.
        server: its Redis.
        master: of the cluster.
        run: under way.
        median: seconds of an undisturbed step.
        calm: most commits between two strikes.
        chance: source of all decisions.
        faults: whether it also does what operators do.
        say: prints a line of progress.
    """

    def __init__(
        self,
        cluster: LocalCluster,
        server: EmbeddedServer,
        master: Master,
        run: Run,
        median: float,
        calm: int,
        chance: random.Random,
        say: Callable[[str], None],
        *,
        faults: bool = False,
    ) -> None:
        self.faults = faults
        self.cluster = cluster
        self.server = server
        self.master = master
        self.run = run
        self.median = median
        self.calm = calm
        self.chance = chance
        self.say = say
        self.strikes: list[Strike] = []

    def rage(self, kills: int) -> list[Strike]:
        """Strike until `kills` processes were killed, or the run is over."""
        done = 0
        while done < kills and self._calm():
            strike = self._strike()
            self.strikes.append(strike)
            done += strike.signal == "KILL"
            waited = self._await_commit(strike.at)
            strike.recovery_seconds = max(0.0, waited - self.median)
            self.say(
                f"[{done:3}/{kills}] step {strike.step:5}  {strike.signal:<8} {strike.kind:<10} "
                f"({strike.victim}{'' if strike.spare else ', no spare'})  next commit after {waited:.2f} s"
            )
        return self.strikes

    # --- one strike -----------------------------------------------------------------------------

    def _calm(self) -> bool:
        """Let some commits pass, and a part of a step; False once the run is over."""
        target = self._version() + self.chance.randint(0, self.calm)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self._version() < target:
            self._revive()
            if self._over():
                return False
            if time.monotonic() > deadline:
                raise SystemExit(f"the run is stuck at version {self._version()}: {self.run.status()}")
            time.sleep(0.02)
        time.sleep(self.chance.random() * 0.2)
        return not self._over()

    def _strike(self) -> Strike:
        kind = self.chance.choices(list(VICTIMS), list(VICTIMS.values()))[0]
        version = self._version()
        if kind == "redis":
            return self._strike_redis(version)
        worker = self._victim(kind)
        role = worker.role
        others = [w for w in self.cluster.processes.values() if w.role == role and w.name != worker.name]
        spare = any(other.poll() is None and other.ready() for other in others)
        if self.faults and self.chance.random() < FAULT_SHARE:
            name = self.chance.choice(list(FAULTS))
            strike = Strike(kind, worker.name, name, time.time(), version, spare)
            os.kill(worker.pid, FAULTS[name])
            return strike
        if self.chance.random() < PAUSE_SHARE:
            pause = self.chance.uniform(0.3, 4.0)
            strike = Strike(kind, worker.name, "STOP", time.time(), version, spare, pause)
            worker.pause()
            self._later(pause, worker.cont)
            return strike
        strike = Strike(kind, worker.name, "KILL", time.time(), version, spare)
        worker.kill()
        self._revive()
        return strike

    def _strike_redis(self, version: int) -> Strike:
        if self.faults and self.chance.random() < FAULT_SHARE:
            name, pause = self.chance.choice(list(TROUBLES)), self.chance.uniform(0.3, 4.0)
            strike = Strike("redis", "redis", name, time.time(), version, False, pause)
            with redis.Redis.from_url(self.server.url) as client:
                client.execute_command(*TROUBLES[name][0])
                time.sleep(pause)
                client.execute_command(*TROUBLES[name][1])
            return strike
        if self.chance.random() < PAUSE_SHARE:
            pause = self.chance.uniform(0.3, 3.0)
            strike = Strike("redis", "redis", "STOP", time.time(), version, False, pause)
            self.server.pause()
            time.sleep(pause)
            self.server.cont()
            return strike
        strike = Strike("redis", "redis", "KILL", time.time(), version, False)
        self.server.kill()
        self.server.restart()
        return strike

    def _later(self, seconds: float, act: Callable[[], None]) -> None:
        """Wait with the fleet one process short, then `act`."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._revive()
            time.sleep(0.02)
        act()

    def _victim(self, kind: str) -> WorkerProcess:
        """The process of this kind: any Client; the run's training server; the supervisor's lease holder."""
        workers = [worker for worker in self.cluster.processes.values() if worker.poll() is None]
        if kind == "client":
            return self.chance.choice([worker for worker in workers if worker.role == "client"])
        servers = [worker for worker in workers if worker.role == "server"]
        registry = self.master._services.registry
        try:
            if kind == "supervisor":
                holder = str(registry.client.get(keys.SUPERVISOR) or "")
            else:
                holder = self.run._ledger.head().owner
        except (CacheError, redis.RedisError):
            holder = ""
        named = [worker for worker in servers if f"/{worker.pid}-" in holder]
        return (named or servers)[0]

    def _revive(self) -> None:
        for name, worker in list(self.cluster.processes.items()):
            if worker.poll() is not None:
                self.cluster.restart(name)

    # --- what the run does ------------------------------------------------------------------------

    def _await_commit(self, since: float) -> float:
        """Seconds from `since` to the first commit after it."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            self._revive()
            try:
                head = self.run._ledger.head()
                if head.committed_at > since:
                    return head.committed_at - since
                if head.status != "running":
                    return 0.0
            except CacheError:
                pass
            if time.monotonic() > deadline:
                raise SystemExit(f"no commit for {PATIENCE_SECONDS:g} s: {self.run.status()}")
            time.sleep(0.01)

    def _version(self) -> int:
        while True:
            try:
                return self.run._ledger.head().version
            except CacheError:
                time.sleep(0.05)

    def _over(self) -> bool:
        try:
            return self.run.status().state not in ("pending", "running")
        except CacheError:
            return False


def storm(
    kills: int,
    seed: int,
    folder: Path,
    say: Callable[[str], None],
    *,
    clients: int = 3,
    standby: int = 1,
    calm: int = 10,
    apart: bool = False,
    faults: bool = False,
    rounds: bool = False,
) -> dict[str, Any]:
    """Train undisturbed, train under strikes, compare.

    Args:
        kills: SIGKILLs to deal out; pauses come on top.
        seed: of every decision (the moments also depend on the machine).
        folder: for logs, checkpoints and Redis's data.
        say: prints a line of progress.
        clients, standby: size of the fleet.
        calm: most commits between two strikes.
        apart: no process sees another's end, as on different machines.
        rounds: whether the Clients take steps by themselves, as many as take a second.
        faults: workers are also told to end or to start anew, and Redis is full, read-only or slow.

    Returns:
        Figures and verdicts: see the module.
    """
    steps = kills * (calm + EXTRA_STEPS) + CALM_STEPS
    config = TrainingConfig(
        epochs=-(-steps // 20),
        batch_size=BATCH,
        shards=3,
        checkpoint_every=25,
        seed=7,
        round_steps="auto" if rounds else 1,
    )
    recipe = Recipe(
        model="benchmarks.chaos:model",
        dataset=Target("benchmarks.chaos:data", kwargs={"size": 20 * BATCH}),
        loss=torch.nn.functional.cross_entropy,
        optimizer=partial(torch.optim.AdamW, lr=1e-3),
    )
    checkpoints = str(folder / "checkpoints")
    durable = {"appendfsync": "always", "enable-debug-command": "local"}
    with (
        EmbeddedServer(persistence_dir=folder / "redis", options=durable, log=folder / "redis.log") as server,
        LocalCluster(
            clients,
            url=server.url,
            standby=standby,
            checkpoint_dir=checkpoints,
            log_dir=folder / "logs",
            wait_ready=True,
            app="benchmarks.apart" if apart else "torchord",
            env={"TORCHORD_ALLOWED_MODULES": "benchmarks,torch"},
        ) as cluster,
    ):
        master = Master(cluster.url, checkpoint_dir=checkpoints)
        with _timed() as smooth:
            undisturbed = master.submit(recipe, config, name="undisturbed")
            undisturbed.wait(timeout=3600)
        median = statistics.median(report.seconds for report in undisturbed.history()[5:])
        total = len(undisturbed.history())
        say(f"undisturbed: {total} steps in {smooth[0]:.0f} s, {median * 1000:.0f} ms a step (median)")
        with _timed() as rough:
            run = master.submit(recipe, config, name="disturbed")
            raging = Storm(
                cluster, server, master, run, median, calm, random.Random(seed), say, faults=faults
            )
            strikes = raging.rage(kills)
            say("no more strikes; the rest of the run is left alone")
            while not raging._over():
                raging._revive()
                time.sleep(0.1)
        audit = run.verify()
        entries = run._entries(run._ledger.head())
        _measure_stalls(strikes, commit_times(run), median)
        tokens = [entry.token for entry in entries]
        return {
            "machine": machine(),
            "seed": seed,
            "apart": apart,
            "steps": total,
            "median_step_seconds": median,
            "undisturbed_seconds": smooth[0],
            "disturbed_seconds": rough[0],
            "kills": dict(Counter(s.kind for s in strikes if s.signal == "KILL")),
            "pauses": dict(Counter(s.kind for s in strikes if s.signal == "STOP")),
            "faults": dict(Counter(s.signal for s in strikes if s.signal not in ("KILL", "STOP"))),
            "state": run.status().state,
            "bits_equal": run.status().state == "done" and digest(run) == digest(undisturbed),
            "audit_clean": audit.ok and not audit.divergent,
            "audit": str(audit),
            "servers_in_order": tokens == sorted(tokens),
            "training_servers": len(set(tokens)),
            "seconds": _figures([s for s in strikes if s.signal == "KILL"]),
            "strikes": [asdict(strike) for strike in strikes],
        }


@contextmanager
def _timed() -> Iterator[list[float]]:
    began, seconds = time.monotonic(), [0.0]
    yield seconds
    seconds[0] = time.monotonic() - began


def digest(run: Run) -> str:
    """SHA-256 over every tensor of the run's newest version."""
    found = hashlib.sha256()
    for name, tensor in sorted(run.state_dict().items()):
        found.update(name.encode() + tensor.numpy().tobytes())
    return found.hexdigest()


def commit_times(run: Run) -> list[float]:
    """Unix time (s) of every commit, those that a replay repeated included, by the server's clock."""
    found, after = [], "0-0"
    while events := run._ledger.read_events(after):
        after = events[-1].id
        found += [int(event.id.partition("-")[0]) / 1000 for event in events if event.type == "step"]
    return found


def _measure_stalls(strikes: list[Strike], commits: list[float], median: float) -> None:
    """Fill in the longest wait between two commits from each strike to the next."""
    for number, strike in enumerate(strikes):
        end = strikes[number + 1].at if number + 1 < len(strikes) else commits[-1] + 1.0
        start = max((at for at in commits if at <= strike.at), default=strike.at)
        window = [start, *(at for at in commits if strike.at < at < end)]
        gaps = [late - early for early, late in pairwise(window)]
        strike.stall_seconds = max(0.0, max(gaps, default=strike.recovery_seconds + median) - median)


def _figures(strikes: list[Strike]) -> dict[str, dict[str, dict[str, float]]]:
    """Median, 99th percentile and maximum by kind."""
    groups: dict[str, list[Strike]] = {"all": strikes}
    for strike in strikes:
        groups.setdefault(strike.kind, []).append(strike)
        if strike.kind != "redis":
            groups.setdefault("spare ready" if strike.spare else "no spare", []).append(strike)
    return {
        name: {
            "recovery": _quantiles([strike.recovery_seconds for strike in group]),
            "stall": _quantiles([strike.stall_seconds for strike in group]),
        }
        for name, group in groups.items()
        if group
    }


def _quantiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return {
        "n": len(ordered),
        "median": round(statistics.median(ordered), 3),
        "p99": round(p99, 3),
        "max": round(ordered[-1], 3),
    }


def report(found: dict[str, Any]) -> str:
    """The figures as text."""
    lines = [
        f"kills: {sum(found['kills'].values())} {found['kills']}, pauses: {found['pauses']}, "
        f"faults: {found['faults']}; "
        f"{found['training_servers']} training servers took turns",
        f"{found['steps']} steps: undisturbed {found['undisturbed_seconds']:.0f} s "
        f"({found['median_step_seconds'] * 1000:.0f} ms a step), disturbed "
        f"{found['disturbed_seconds']:.0f} s",
        f"{'seconds':<14}{'n':>5}{'recovery median':>17}{'p99':>8}{'max':>8}"
        f"{'stall median':>15}{'p99':>8}{'max':>8}",
    ]
    for name, group in found["seconds"].items():
        recovery, stall = group["recovery"], group["stall"]
        lines.append(
            f"{name:<14}{recovery['n']:>5}{recovery['median']:>17.2f}{recovery['p99']:>8.2f}{recovery['max']:>8.2f}"
            f"{stall['median']:>15.2f}{stall['p99']:>8.2f}{stall['max']:>8.2f}"
        )
    lines.append(f"bits equal: {found['bits_equal']}; {found['audit']}")
    return "\n".join(lines)


def main() -> int:
    """Run, print and write JSON; 1 if bits or audit are wrong, or the run was over before all kills."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="SIGKILLs to deal out (default 100)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--logs", type=Path, help="keep the logs in this directory")
    parser.add_argument("--apart", action="store_true", help="as if each process had its own machine")
    parser.add_argument("--faults", action="store_true", help="SIGTERM, SIGHUP and a troubled Redis as well")
    parser.add_argument("--rounds", action="store_true", help="the Clients take steps by themselves")
    options = parser.parse_args()
    with TemporaryDirectory(prefix="torchord-chaos-") as scratch:
        folder = options.logs or Path(scratch)
        found = storm(
            options.kills,
            options.seed,
            folder,
            partial(print, flush=True),
            apart=options.apart,
            faults=options.faults,
            rounds=options.rounds,
        )
    RESULTS.mkdir(exist_ok=True)
    chosen = [name for name in ("apart", "faults", "rounds") if getattr(options, name)]
    (RESULTS / f"{'-'.join(['chaos', *chosen])}.json").write_text(json.dumps(found, indent=1) + "\n")
    print(report(found))
    if sum(found["kills"].values()) < options.kills:
        print(f"the run was over before {options.kills} kills", file=sys.stderr)
        return 1
    return 0 if found["bits_equal"] and found["audit_clean"] and found["servers_in_order"] else 1


if __name__ == "__main__":
    sys.exit(main())
