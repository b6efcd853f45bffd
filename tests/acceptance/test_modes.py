"""Compression, local steps, staleness, live switches and cache tiers: the same bits on any fleet."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch

from tests.support import models
from tests.support.keys import keys_without_ttl
from tests.support.waiting import PATIENCE_SECONDS, wait_until
from torchord import LocalCluster, Master, Recipe, Run, TrainingConfig
from torchord.cache.errors import InvalidInput
from torchord.cache.servers.redis_client import connect
from torchord.coordinator.local_cluster.embedded_server import EmbeddedServer
from torchord.coordinator.local_steps import diloco

HALF = {"precision": "fp16", "loss_scale": 2.0**18, "loss_scale_interval": 3}
"""A loss scale that overflows at first and again and again, so that steps are skipped."""
MODES: dict[str, dict[str, Any]] = {
    "int8": {"compression": "int8"},
    "fp16": {"compression": "fp16"},
    "topk": {"compression": "topk:0.1"},
    "powersgd": {"compression": "powersgd:2"},
    "rounded-memory": {"compression": "powersgd:1,values=int8,memory=int8"},
    "local": {"local_steps": 3},
    "stale": {"staleness": 2},
    "local-topk": {"local_steps": 2, "compression": "topk:0.1"},
    "stale-powersgd": {"staleness": 1, "compression": "powersgd:1"},
    "diloco": {"local_steps": 3, "epochs": 6},
    "half-topk": {**HALF, "compression": "topk:0.1"},
    "half-local": {**HALF, "local_steps": 3},
    "half-stale": {**HALF, "staleness": 1},
    "own": {"compression": "tests.support.codecs:EveryNth:3"},
    "deltas": {"parameter_compression": "int8"},
    "all": {
        "staleness": 1,
        "local_steps": 2,
        "compression": "powersgd:1,values=int8,least=40",
        "parameter_compression": "topk:0.2",
    },
    "half-deltas": {**HALF, "parameter_compression": "int8"},
}


def recipe(**changes: Any) -> Recipe:
    """An MLP with dropout under AdamW, whose state has to come along everywhere; codecs find enough to do."""
    model = partial(models.Mlp, hidden=200)
    return models.mlp(size=96, model=model, optimizer=partial(torch.optim.AdamW, lr=1e-2), **changes)


def recipe_of(mode: str) -> Recipe:
    """The recipe that a mode is tried on: DiLoCo has an outer optimizer with momentum."""
    return recipe(outer_optimizer=diloco) if mode == "diloco" else recipe()


def config(**fields: Any) -> TrainingConfig:
    return TrainingConfig(**{"epochs": 2, "batch_size": 8, "shards": 3, "checkpoint_every": 4, **fields})


def bits(run: Run) -> bytes:
    return b"".join(value.numpy().tobytes() for value in run.state_dict().values())


def master_of(cluster: LocalCluster) -> Master:
    return Master(cluster.url, checkpoint_dir=cluster.checkpoint_dir)


def trained(master: Master, name: str, given: Recipe, how: TrainingConfig) -> Run:
    run = master.submit(given, how, name=name)
    run.wait(timeout=PATIENCE_SECONDS)
    audit = run.verify()
    assert audit.ok, audit.problems
    return run


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    folder = tmp_path_factory.mktemp("modes")
    with LocalCluster(
        1, wait_ready=True, checkpoint_dir=folder / "checkpoints", log_dir=folder / "logs"
    ) as made:
        yield made
        assert not keys_without_ttl(made.url)


@pytest.fixture(scope="module")
def alone(fleet: LocalCluster) -> dict[str, bytes]:
    """The bits of each mode with one Client; then a second one joins."""
    master = master_of(fleet)
    found = {
        name: bits(trained(master, f"{name}-1", recipe_of(name), config(**how)))
        for name, how in MODES.items()
    }
    fleet.add_worker()
    fleet.wait_ready()
    return found


@dataclass(frozen=True)
class Ring:
    """Two Clients whose tensors all pass through three cache nodes, without replicas.

    Attributes:
        cluster: its workers share no memory.
        nodes: one of which a test may kill; the next test finds it again, empty.
        master: stores what it submits on the nodes, too.
    """

    cluster: LocalCluster
    nodes: list[EmbeddedServer]
    master: Master


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ring]:
    folder = tmp_path_factory.mktemp("ring")
    with ExitStack() as stack:
        nodes = [stack.enter_context(EmbeddedServer()) for _ in range(3)]
        urls = [node.url for node in nodes]
        made = LocalCluster(
            2,
            wait_ready=True,
            env={"TORCHORD_CACHE_URLS": ",".join(urls), "TORCHORD_HOST_CACHE": "off"},
            checkpoint_dir=folder / "checkpoints",
            log_dir=folder / "logs",
        )
        stack.enter_context(made)
        yield Ring(made, nodes, Master(made.url, checkpoint_dir=made.checkpoint_dir, cache_urls=urls))
        assert not keys_without_ttl(made.url)


@pytest.mark.parametrize("name", MODES)
def test_a_mode_has_the_same_bits_with_one_client_and_with_two(
    fleet: LocalCluster, alone: dict[str, bytes], name: str
) -> None:
    run = trained(master_of(fleet), f"{name}-2", recipe_of(name), config(**MODES[name]))
    assert bits(run) == alone[name]


def test_the_modes_are_different_runs(alone: dict[str, bytes]) -> None:
    assert len(set(alone.values())) == len(MODES)


def test_a_training_server_that_dies_restores_the_slots_states(
    fleet: LocalCluster, alone: dict[str, bytes]
) -> None:
    master = master_of(fleet)
    killed = (
        "local-topk",
        "rounded-memory",
        "stale-powersgd",
        "diloco",
        "half-topk",
        "half-local",
        "half-stale",
        "deltas",
        "all",
    )
    for name in killed:
        run = master.submit(recipe_of(name), config(**MODES[name]), name=f"{name}-killed")
        wait_until(lambda run=run: run.status().version >= 5, message="the fifth step")
        fleet.processes["server"].kill()
        fleet.restart("server")
        run.wait(timeout=PATIENCE_SECONDS)
        assert run.verify().ok
        assert bits(run) == alone[name], name


def test_overflows_are_skipped_and_computed_again_alike(fleet: LocalCluster) -> None:
    run = trained(master_of(fleet), "half-audited", recipe(), config(**HALF))
    history = run.history()
    skipped = [report.step for report in history if report.skipped]
    assert 2 <= len(skipped) < len(history) - 2
    assert run.verify(reexecute=[skipped[-1], len(history) - 1]).ok


def test_what_the_slots_of_a_skipped_step_made_is_deleted(fleet: LocalCluster) -> None:
    """Their states of the step before stay; the new ones are of no use, and not left to their TTL."""
    run = trained(master_of(fleet), "half-swept", recipe(), config(**MODES["half-topk"]))
    assert any(report.skipped for report in run.history())
    with connect(fleet.url) as client:
        assert not list(client.scan_iter(f"torchord:blob:{run.name}:slot:*", count=1000))


@pytest.mark.parametrize("name", ["topk", "rounded-memory"])
def test_a_client_that_dies_takes_no_residual_with_it(
    fleet: LocalCluster, alone: dict[str, bytes], name: str
) -> None:
    master = master_of(fleet)
    run = master.submit(recipe(), config(**MODES[name]), name=f"{name}-without-client")
    wait_until(lambda: run.status().version >= 5, message="the fifth step")
    fleet.processes["client1"].kill()
    fleet.restart("client1")
    run.wait(timeout=PATIENCE_SECONDS)
    assert bits(run) == alone[name]
    assert run.verify(reexecute=[run.status().version - 1]).ok


def test_deltas_serve_whoever_holds_the_version_before(fleet: LocalCluster, alone: dict[str, bytes]) -> None:
    """A third Client comes late, one is killed and one restarted: each starts from a whole version."""
    run = master_of(fleet).submit(recipe(), config(**MODES["deltas"]), name="deltas-3")
    wait_until(lambda: run.status().version >= 3, message="the third step")
    late = fleet.add_worker()
    fleet.processes["client1"].kill()
    fleet.restart("client1")
    run.wait(timeout=PATIENCE_SECONDS)
    late.kill()
    assert bits(run) == alone["deltas"]
    read = sources(run)
    assert read["delta"] > read["store"] + read["host"], read
    assert run.verify(reexecute=[run.status().version - 1]).ok
    assert not [key for key in leftovers(run) if ":delta:" in key]


def leftovers(run: Run) -> list[str]:
    """Blobs that the run's last version still points to."""
    return [blob.key for record in run._ledger.versions().values() for blob in record.blobs()]


def test_a_live_switch_is_recorded_and_has_the_same_bits_when_replayed(fleet: LocalCluster) -> None:
    master = master_of(fleet)
    how = config(epochs=8)
    run = master.submit(recipe(), how, name="switched")
    wait_until(lambda: run.status().version >= 3, message="the third step")
    run.pause()
    at = run.switch(shards=2, compression="topk:0.2")
    later = run.switch(shards=4)
    assert later == at, "while the run stands still, two switches meet at one step"
    run.resume()
    trained_model = run.wait(timeout=PATIENCE_SECONDS)
    shards = [len(report.workers) for report in trained_model.history]
    assert shards == [3] * at + [4] * (len(shards) - at)
    assert run.verify().ok
    [event] = [e for e in run.events() if e.type == "switched" and "compression" in e.data]
    assert event.data["step"] == at
    again = master.submit(recipe(), how, name="switched-again")
    again.pause()
    spec = run._ledger.spec()["switches"]
    head = again._ledger.head()
    if head.version < at - 2:  # the same switches at the same step, before the run gets there
        assert spec == {str(at): {"shards": 4, "compression": "topk:0.2"}}
        verdict = again._ledger.switch(
            {**again._ledger.spec(), "switches": spec},
            step=at,
            incarnation=head.incarnation,
            following=f"{head.incarnation}+1",
            total_steps=head.total_steps,
            data={},
        )
        assert verdict == "ok"
    again.resume()
    again.wait(timeout=PATIENCE_SECONDS)
    assert bits(again) == bits(run)


def test_what_cannot_be_switched_says_so(fleet: LocalCluster) -> None:
    master = master_of(fleet)
    run = trained(master, "at-rest", recipe(), config(epochs=1))
    with pytest.raises(Exception, match="shards, local_steps, staleness, compression"):
        run.switch(batch_size=4)
    with pytest.raises(Exception, match=r"too few to switch|only a live run"):
        run.switch(shards=2)


# --- tiers of the cache ----------------------------------------------------------------------------


def wide() -> Recipe:
    """A model that is large enough for the host's tier."""
    return models.mlp(size=64, model=partial(models.Mlp, hidden=20_000))


LOSING: dict[str, dict[str, Any]] = {
    "exact": {},
    "local-steps": {"local_steps": 2},
    "compressed": {"compression": "topk:0.1"},
    "stale-compressed": {"staleness": 1, "compression": "topk:0.1"},
}


def sources(run: Run) -> Counter[str]:
    return Counter(slot.fetched for entry in run._ledger.entries() for slot in entry.slots)


def test_the_hosts_tier_changes_no_bit_and_saves_reads(fleet: LocalCluster, ring: Ring) -> None:
    found = {}
    for switch, master in (("on", master_of(fleet)), ("off", ring.master)):
        run = trained(master, "wide", wide(), config(epochs=1))
        found[switch] = bits(run)
        read = sources(run)
        assert read["store"] == 0 if switch == "on" else read["host"] == 0, read
        server = [event.data["tiers"] for event in run.events() if event.type == "step"]
        assert len(server) == run.status().version
        tier, count = ("host", "hits") if switch == "on" else ("store", "reads")
        assert all(tiers[tier][count] >= 3 and tiers[tier]["nbytes"] > 0 for tiers in server), server
        assert all(tiers[tier]["seconds"] > 0 for tiers in server)
    assert found["on"] == found["off"]


@pytest.mark.parametrize("mode", LOSING)
def test_a_cache_node_that_dies_changes_no_bit(ring: Ring, mode: str) -> None:
    """Without replicas: what the node had is stored again, or the run goes back and replays."""
    how = config(epochs=3, checkpoint_every=50, **LOSING[mode])
    found = []
    for kill in (False, True):
        run = ring.master.submit(wide(), how, name=f"{mode}-{kill}")
        if kill:
            wait_until(lambda run=run: run.status().version >= 8, message="the eighth step")
            ring.nodes[1].kill()
        run.wait(timeout=PATIENCE_SECONDS)
        assert run.verify().ok
        found.append(bits(run))
    assert found[0] == found[1]
    ring.nodes[1].restart()


def test_with_a_replica_a_cache_node_that_dies_takes_nothing_with_it(
    cluster: Callable[..., LocalCluster],
) -> None:
    """Ordinary workers, told by their environment: no chunk is missed, and no step is made twice."""
    with ExitStack() as stack:
        nodes = [stack.enter_context(EmbeddedServer()) for _ in range(3)]
        urls = [node.url for node in nodes]
        told = {
            "TORCHORD_CACHE_URLS": ",".join(urls),
            "TORCHORD_CACHE_REPLICAS": "1",
            "TORCHORD_CACHE_WEIGHTS": "1,2,1",
            "TORCHORD_CACHE_CONNECTIONS": "2",
            "TORCHORD_HOST_CACHE": "off",
        }
        made = cluster(2, env=told)
        master = Master(
            made.url,
            checkpoint_dir=made.checkpoint_dir,
            cache_urls=urls,
            cache_replicas=1,
            cache_weights=[1, 2, 1],
        )
        how = config(epochs=3, checkpoint_every=50, staleness=1, compression="topk:0.1")
        found = []
        for kill in (False, True):
            run = master.submit(wide(), how, name=f"replicas-{kill}")
            if kill:
                wait_until(lambda run=run: run.status().version >= 8, message="the eighth step")
                with connect(urls[1]) as client:
                    assert client.dbsize() > 0
                nodes[1].kill()
                seen = run.status().version
                wait_until(
                    lambda run=run, seen=seen: run.status().version > seen, message="steps after the loss"
                )
            run.wait(timeout=PATIENCE_SECONDS)
            assert run.verify().ok
            types = Counter(event.type for event in run.events())
            assert not types["rollback"] and types["step"] == run.status().version, types
            found.append(bits(run))
        assert found[0] == found[1]
        logs = "".join(worker.log.read_text(errors="replace") for worker in made.processes.values())
        assert "asking the other nodes first" in logs
        assert "is on none of the cache nodes" not in logs


def test_a_process_that_was_told_other_cache_nodes_is_refused_while_workers_run(
    cluster: Callable[..., LocalCluster],
) -> None:
    with EmbeddedServer() as one, EmbeddedServer() as other:
        urls = [one.url, other.url]
        made = cluster(1, env={"TORCHORD_CACHE_URLS": ",".join(urls), "TORCHORD_CACHE_REPLICAS": "1"})
        told = {"checkpoint_dir": made.checkpoint_dir, "cache_urls": urls}
        for wrong in ({"cache_urls": urls[:1]}, {}, {"cache_replicas": 1, "cache_weights": [1, 3]}):
            master = Master(made.url, **{**told, **wrong})
            with pytest.raises(InvalidInput, match=r"the workers that run keep 2 of each chunk on redis://"):
                master.submit(wide(), config(), name="refused")
            with pytest.raises(InvalidInput, match="TORCHORD_CACHE_REPLICAS"):
                _ = master.datasets
        wrongly = made.add_worker(env={"TORCHORD_CACHE_REPLICAS": None})
        wait_until(lambda: wrongly.poll() is not None, message="the end of a worker with other settings")
        assert "this worker cannot start: this process was told to keep 1 of each" in wrongly.log.read_text()
        assert wrongly.poll() != 0
        run = Master(made.url, cache_replicas=1, **told).submit(wide(), config(epochs=1), name="agreed")
        run.wait(timeout=PATIENCE_SECONDS)


@pytest.mark.parametrize("mode", ["topk", "stale-powersgd", "local-topk", "all"])
def test_bytes_vanish_all_the_time(ring: Ring, mode: str) -> None:
    """After each commit that is seen, one chunk of anything is gone: the same bits, and a clean audit."""
    chance = random.Random(mode)
    found, lost = [], []
    with ExitStack() as stack:
        clients = [stack.enter_context(connect(node.url)) for node in ring.nodes]
        for loses in (False, True):
            name = f"vanishing-{mode}-{loses}"
            run = ring.master.submit(recipe(), config(**{"epochs": 3, **MODES[mode]}), name=name)
            while loses and run.status().state in ("pending", "running"):
                stored = sorted(
                    (key, i)
                    for i, client in enumerate(clients)
                    for key in client.scan_iter(f"torchord:blob:{name}:*")
                )
                if stored:
                    gone, node = chance.choice(stored)
                    if clients[node].delete(gone):
                        lost.append(gone)
                seen = run.status().version
                wait_until(
                    lambda run=run, seen=seen: run.status().version != seen or run.status().state == "done",
                    message=f"a commit after version {seen} without {lost[-1:]}",
                )
            run.wait(timeout=PATIENCE_SECONDS)
            audit = run.verify()
            assert audit.ok, audit
            found.append(bits(run))
    assert found[0] == found[1]
    assert len(lost) >= 3, lost
