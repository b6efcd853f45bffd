"""What the cache needs at a size that was not measured: nodes, bandwidth, seconds a step. On paper.

    python -m benchmarks.scale_cache                                   # 1,000 workers, a model of 10 GB
    python -m benchmarks.scale_cache --workers 64 --gigabytes 0.4 --per-host 4 --nodes 4 --link 3.1

Claim: none but arithmetic; docs/scale-cache.md explains each term. Nothing here was run at that size. The
constants are processor seconds for each GB on one core of the machine of results/cache.json; a
reader's own go in as options. Bias: perfect overlap within each phase and none between phases, equal
load on all nodes, no stragglers, no latency; compute is left out.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass


@dataclass(frozen=True)
class Costs:
    """Seconds of one core for each GB moved; a link's rate in GB/s.

    Attributes:
        node_in, node_out: of a node, receiving and sending.
        put, get: of a worker, sending and receiving, with checksums.
        add: of adding one gradient into a sum, one thread.
        threads: that share the adding.
        link: network of each host and each node, each way.
    """

    node_in: float = 0.17
    node_out: float = 0.22
    put: float = 0.30
    get: float = 0.20
    add: float = 0.42
    threads: int = 8
    link: float = 3.1


@dataclass(frozen=True)
class Fleet:
    """What is to be moved, and between whom.

    Attributes:
        workers: Clients; each computes one shard of a step.
        per_host: Clients on one host.
        model: GB of one version, and of one gradient before its codec.
        ratio: how many times smaller the codec makes a gradient.
        fan_in: tensors that one task adds; 0 for no tree.
        host_tier: whether the processes of a host share one download.
        nodes: cache nodes.
    """

    workers: int
    per_host: int
    model: float
    ratio: float = 1.0
    fan_in: int = 8
    host_tier: bool = True
    nodes: int = 32


def levels(shards: int, fan_in: int) -> list[int]:
    """How many partial sums each level of the tree has; the server reads the last level."""
    found = []
    while fan_in and shards > fan_in:
        shards = -(-shards // fan_in)
        found.append(shards)
    return found


def phases(fleet: Fleet, costs: Costs) -> dict[str, float]:
    """Seconds of each phase of a step, one after the other."""
    rate_out = fleet.nodes * min(costs.link, 1 / costs.node_out)
    rate_in = fleet.nodes * min(costs.link, 1 / costs.node_in)
    put, get = max(costs.put, 1 / costs.link), max(costs.get, 1 / costs.link)
    hosts = -(-fleet.workers // fleet.per_host)
    model, small = fleet.model, fleet.model / fleet.ratio
    copies = hosts if fleet.host_tier else fleet.workers
    each = 1 if fleet.host_tier else fleet.per_host
    found = {
        "fetch the version": max(copies * model / rate_out, each * model / costs.link, model * get),
        "store the gradients": max(
            fleet.workers * small / rate_in, fleet.per_host * small / costs.link, small * put
        ),
    }
    tree = levels(fleet.workers, fleet.fan_in)
    inputs, size = fleet.workers, small
    total = 0.0
    for sums in tree:
        busiest = -(-sums // hosts)  # sums on one host, whose link they share
        most = -(-inputs // sums)
        read = max(inputs * size / rate_out, busiest * most * size / costs.link, most * size * get)
        write = max(sums * model / rate_in, busiest * model / costs.link, model * put)
        total += read + most * model * costs.add / costs.threads + write
        inputs, size = sums, model
    found["partial sums"] = total
    found["the server's sum"] = inputs * size * get + inputs * model * costs.add / costs.threads
    found["publish the version"] = model * put
    return found


def traffic(fleet: Fleet) -> tuple[float, float]:
    """GB a step (into, out of) all nodes together."""
    hosts = -(-fleet.workers // fleet.per_host)
    model, small = fleet.model, fleet.model / fleet.ratio
    sums = sum(levels(fleet.workers, fleet.fan_in))
    read = (hosts if fleet.host_tier else fleet.workers) * model
    return fleet.workers * small + (sums + 1) * model, read + fleet.workers * small + sums * model


def memory(fleet: Fleet) -> float:
    """GB in all nodes at once: two versions, the gradients of a step, its partial sums."""
    sums = sum(levels(fleet.workers, fleet.fan_in))
    return (2 + sums) * fleet.model + fleet.workers * fleet.model / fleet.ratio


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--per-host", type=int, default=8)
    parser.add_argument("--gigabytes", type=float, default=10.0, help="of one version")
    parser.add_argument("--nodes", type=int, default=32)
    for name in ("node_in", "node_out", "put", "get", "add", "link"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=getattr(Costs, name))
    parser.add_argument("--threads", type=int, default=Costs.threads)
    given = parser.parse_args()
    costs = Costs(given.node_in, given.node_out, given.put, given.get, given.add, given.threads, given.link)
    print("| tier, tree, codec | GB in | out | held | fetch | store | sums | server | publish | s a step |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for tier, fan_in, ratio in (
        (False, 0, 1), (True, 0, 1), (True, 8, 1), (True, 8, 4), (True, 8, 100), (True, 0, 100),
    ):  # fmt: skip
        fleet = Fleet(given.workers, given.per_host, given.gigabytes, ratio, fan_in, tier, given.nodes)
        seconds = phases(fleet, costs)
        into, out = traffic(fleet)
        name = (
            f"{'host' if tier else 'no host'} tier, {f'tree of {fan_in}' if fan_in else 'no tree'}, 1:{ratio}"
        )
        row = [into, out, memory(fleet), *seconds.values(), sum(seconds.values())]
        print(
            f"| {name} | "
            + " | ".join(f"{value:,.0f}" if value >= 9.95 else f"{value:.1f}" for value in row)
            + " |"
        )


if __name__ == "__main__":
    main()
