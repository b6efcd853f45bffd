"""`celery -A torchord flower` shows each task: what it worked on, and what came of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from ast import literal_eval
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlencode, urlsplit
from urllib.request import urlopen

import pytest

from examples import digits
from tests.support.waiting import PATIENCE_SECONDS, wait_until
from torchord import Master, TrainingConfig
from torchord.coordinator.local_cluster.cluster import LocalCluster
from torchord.coordinator.local_cluster.embedded_server import free_port
from torchord.coordinator.spec.plan import Plan

Start = Callable[..., LocalCluster]


@pytest.fixture
def trained(cluster: Start) -> LocalCluster:
    """A cluster whose workers are ready, started as always: without -E."""
    started = cluster(1)
    assert not any("-E" in worker.command.split() for worker in started.processes.values())
    return started


@pytest.fixture
def flower(trained: LocalCluster, tmp_path: Path) -> Iterator[str]:
    """Flower beside the cluster, with an API that needs no password; its address."""
    port = free_port()
    with (tmp_path / "flower.log").open("wb") as log:
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name("celery")), "-A", "torchord", "flower", f"--port={port}"],
            cwd=tmp_path,  # where nothing of torchord's lies
            env=flower_environment(trained.url),
            stdout=log,
            stderr=log,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        wait_until(
            lambda: process.poll() is not None or answers(f"{address}/healthcheck"),
            PATIENCE_SECONDS,
            "Flower",
            0.1,
        )
        assert process.poll() is None, (tmp_path / "flower.log").read_text()
        yield address
    finally:
        process.terminate()
        process.wait(PATIENCE_SECONDS)


def flower_environment(url: str) -> dict[str, str]:
    return {**os.environ, "TORCHORD_URL": url, "FLOWER_UNAUTHENTICATED_API": "true"}


def answers(address: str) -> bool:
    try:
        with urlopen(address, timeout=5) as reply:
            return bool(reply.status == 200)
    except URLError:
        return False


def ask(address: str, **query: Any) -> Any:
    with urlopen(f"{address}?{urlencode(query)}", timeout=PATIENCE_SECONDS) as reply:
        return json.load(reply)


def finished(flower: str) -> list[dict[str, Any]]:
    """The tasks of which Flower has seen the whole life."""
    tasks = ask(f"{flower}/api/tasks", limit=1000).values()
    return [task for task in tasks if task["received"] and task["succeeded"]]


@pytest.mark.slow
def test_flower_shows_every_task_in_words(trained: LocalCluster, flower: str) -> None:
    # Flower tells the workers to send events; what they do before that, it cannot show.
    for worker in trained.processes.values():
        wait_until(
            lambda log=worker.log: b"enabled by remote" in log.read_bytes(), message="events", interval=0.1
        )
    config = TrainingConfig(epochs=1, batch_size=256, shards=2)
    run = Master(trained.url).submit(digits.recipe(epochs=1), config, name="shown")
    run.wait(timeout=PATIENCE_SECONDS)
    steps = len(run.history())

    def seen() -> Counter[str]:
        return Counter(task["name"] for task in finished(flower))

    wait_until(lambda: seen()["torchord.apply_update"] >= steps, message=seen, interval=0.2)
    tasks = finished(flower)

    gradients = [task for task in tasks if task["name"] == "torchord.compute_gradient"]
    arguments = [literal_eval(task["kwargs"]) for task in gradients]
    plan = Plan(sum(report.examples for report in run.history()), config)
    assert {(given["step"], given["shard"]) for given in arguments} == {
        (step, slot) for step in range(steps) for slot in plan.fan_in(step).gradients
    }
    assert all(given["run"] == "shown" and given["version"] == given["step"] for given in arguments)
    for task in gradients:
        receipt, given = literal_eval(task["result"]), literal_eval(task["kwargs"])
        assert ("check of" in receipt) == (given["shard"] >= 2)
        assert receipt["loss"] > 0 and receipt["grad_norm"] > 0 and receipt["examples"] > 0
        assert receipt["nbytes"] > 0 and receipt["worker"].startswith("client1@")
        process = receipt["tiers"]["process"]
        assert process.get("hits", 0) + process.get("misses", 0) == 1
        assert task["state"] == "SUCCESS" and task["worker"].startswith("client1@")

    updates = [literal_eval(task["result"]) for task in tasks if task["name"] == "torchord.apply_update"]
    committed = {receipt["version"]: receipt["loss"] for receipt in updates if "loss" in receipt}
    moved = [receipt["tiers"] for receipt in updates if receipt.get("status") == "committed"]
    assert moved and all("store" in tiers or "host" in tiers for tiers in moved)
    assert committed == {report.version: report.loss for report in run.history()}
    assert any(task["name"] == "torchord.evaluate" for task in tasks)

    table = rows_of_the_page(flower)
    shown = {(row["kwargs"], row["result"].split(",")[0]) for row in table}
    assert ("step 0, shard 1, version 0, run shown", "written") in shown
    assert ("step 0, run shown", "committed") in shown
    assert all("{" not in row["result"] for row in table)
    shown_of = next(row["uuid"] for row in table if row["kwargs"] == "step 0, run shown")
    with urlopen(f"{flower}/task/{shown_of}", timeout=PATIENCE_SECONDS) as reply:
        assert 'href="/run/shown"' in reply.read().decode()

    password = urlsplit(trained.url).password
    assert password is not None
    for page in ("broker", "workers", f"worker/{tasks[0]['worker']}", "api/workers", "api/tasks", "metrics"):
        with urlopen(f"{flower}/{page}", timeout=PATIENCE_SECONDS) as reply:
            assert password not in reply.read().decode(), page


def rows_of_the_page(flower: str) -> list[dict[str, Any]]:
    """What the page /tasks fetches for its table: columns and words are torchord's."""
    with urlopen(f"{flower}/tasks", timeout=PATIENCE_SECONDS) as reply:
        page = reply.read().decode()
    assert 'data-column="kwargs"' in page and 'data-column="result"' in page
    query = {"draw": 1, "start": 0, "length": 100, "search[value]": "", "order[0][column]": 0}
    more = {"order[0][dir]": "asc", "columns[0][data]": "name"}
    rows: list[dict[str, Any]] = ask(f"{flower}/tasks/datatable", **query, **more)["data"]
    return rows
