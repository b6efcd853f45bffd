"""Transfers that run while something is computed, between hosts: the same bits as without them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.faults.laboratory import Laboratory
from tests.support import hooked, models, reference
from tests.support.fleet import Fleet, finished, fleet
from tests.support.keys import keys_without_ttl
from tests.support.waiting import wait_until
from torchord import LocalCluster, Recipe, TrainingConfig
from torchord.cache.keys import WORK_TTL_SECONDS
from torchord.cache.servers.redis_client import connect

APART = {"TORCHORD_HOST_CACHE": "off"}
"""No two processes share memory: all tensors pass through the chunk store."""
_SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
_WIDE = 50_000  # 2.4 MB of gradients, five chunks


def config(**changes: Any) -> TrainingConfig:
    return TrainingConfig(**{"epochs": 2, "batch_size": 8, "shards": 3, "seed": 3, **changes})


def wide(**changes: Any) -> Recipe:
    entries = {
        "model": partial(models.Mlp, hidden=_WIDE),
        "optimizer": _SGD,
        "evaluation": None,
        "metrics": None,
    }
    return models.mlp(size=24, **{**entries, **changes})


CASES: dict[str, tuple[Recipe, TrainingConfig]] = {
    "plain": (wide(), config()),
    "clipped, stale": (wide(), config(clip_norm=0.1, staleness=1)),
    "fp16": (wide(), config(precision="fp16", loss_scale_interval=2)),
    "a NaN": (wide(dataset=partial(models.poisoned, at=11, size=24)), config(nonfinite="skip")),
    "two backwards in a shard": (wide(step=hooked.accumulating_step, loss=None), config(shards=2)),
    "partial sums": (wide(), config(shards=8, fan_in=3)),
    "halves": (wide(), config(compression="fp16")),
    "local steps": (wide(), config(local_steps=2)),
}  # fmt: skip


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with fleet(tmp_path_factory.mktemp("apart"), workers=2, env=APART) as one:
        yield one


@pytest.fixture(scope="module")
def one_after_the_other(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with fleet(tmp_path_factory.mktemp("off"), workers=2, env={**APART, "TORCHORD_OVERLAP": "off"}) as one:
        yield one


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laboratory]:
    """With a standby, and faults when a test says so."""
    laboratory = Laboratory(tmp_path_factory.mktemp("failing"), env=APART)
    try:
        yield laboratory
        forever = keys_without_ttl(laboratory.cluster.url)
        assert not forever, f"keys without a TTL: {forever[:20]}"
    finally:
        laboratory.close()


@pytest.mark.parametrize("case", CASES)
def test_the_same_ledger_with_overlap_and_without(
    apart: Fleet, one_after_the_other: Fleet, case: str
) -> None:
    recipe, how = CASES[case]
    name = f"case-{list(CASES).index(case)}"
    ran = [each.train(recipe, how, name) for each in (apart, one_after_the_other)]
    bits = [reference.bits(run.state_dict()) for run, _ in ran]
    assert bits[0] == bits[1]
    digests = [[[slot.digest for slot in entry.slots] for entry in run._ledger.entries()] for run, _ in ran]
    assert digests[0] == digests[1]


def test_it_was_sent_ahead(apart: Fleet, one_after_the_other: Fleet) -> None:
    """And the bits are those of a plain loop in one process."""
    recipe, how = wide(), config(epochs=4)
    plain = reference.average(recipe, how)
    for each in (apart, one_after_the_other):
        _, trained = each.train(recipe, how, "ahead")
        assert reference.bits(trained.module) == plain.bits
    assert sent_ahead(apart) and not sent_ahead(one_after_the_other)
    assert read_ahead(apart, "ahead") and not read_ahead(one_after_the_other, "ahead")


@pytest.mark.parametrize("action", ["kill", "raise"])
def test_a_client_that_ends_in_the_middle_of_its_upload(failing: Laboratory, action: str) -> None:
    """The shard is computed again with the same bits; what was sent is deleted, or has a TTL."""
    recipe, how = wide(), config(epochs=4)
    name = f"interrupted-{action}"
    with failing.faults(f"client.before_put:4:{action}"):
        trained = finished(failing.master.submit(recipe, how, name=name))
        assert reference.bits(trained.module) == reference.average(recipe, how).bits
        if action == "raise":
            gone = lambda: not gradient_chunks(failing.cluster, name)  # noqa: E731
            wait_until(gone, message="the chunks of the failed attempt to go")
        else:
            left = gradient_chunks(failing.cluster, name)
            assert len({key.rpartition(":")[0] for key in left}) <= 1, "of one attempt at most"
            assert all(0 < seconds <= WORK_TTL_SECONDS for seconds in left.values())


@pytest.mark.parametrize("point", ["server.before_apply", "server.after_publish"])
def test_a_training_server_that_dies_with_what_was_read_ahead(failing: Laboratory, point: str) -> None:
    """Gradients that only it has read, or a version that only Clients have read: nobody misses them."""
    recipe, how = wide(), config(epochs=6)
    with failing.faults(f"{point}:5:kill;client.before_put:20:kill"):
        trained = finished(failing.master.submit(recipe, how, name=f"taken-over-{point}"))
        assert reference.bits(trained.module) == reference.average(recipe, how).bits


def test_two_clients_on_one_host_and_the_training_server_on_another(tmp_path: Path) -> None:
    recipe, how = wide(), config(epochs=4)
    with fleet(tmp_path, workers=0) as one:
        one.cluster.add_worker("server", role="server", env=APART)
        one.resize(2)
        one.cluster.wait_ready()
        run, trained = one.train(recipe, how, "two-hosts")
        assert reference.bits(trained.module) == reference.average(recipe, how).bits
        assert sent_ahead(one) and read_ahead(one, "two-hosts")
        assert {slot.fetched for entry in run._ledger.entries() for slot in entry.slots} >= {"host"}


def gradient_chunks(cluster: LocalCluster, run: str) -> dict[str, int]:
    """Chunks of a run's gradients in the store, with the seconds that they have to live."""
    with connect(cluster.url) as client:
        found = list(client.scan_iter(f"torchord:blob:{run}:gradient:*", count=1000))
        return {str(key): int(client.ttl(key)) for key in found}


def sent_ahead(each: Fleet) -> list[str]:
    """What the Clients' receipts say of chunks that went ahead."""
    return [
        found
        for name in each.clients
        for found in re.findall(r"\d+ of \d+ chunks sent ahead", each.log(name))
    ]


def read_ahead(each: Fleet, name: str) -> int:
    """Bytes of gradients that the training server had read before their update began."""
    told = [event.data.get("tiers", {}) for event in each.master.run(name).events()]
    return sum(int(tiers.get("store", {}).get("ahead_nbytes", 0)) for tiers in told)
