"""`torchord doctor` finds what is wrong, says what to do, and fits 80 columns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from torchord.cache.ledger.store_facts import StoreFacts, store_facts
from torchord.cache.ledger.workers import Registry, WorkerInfo, new_info
from torchord.cache.servers.redis_client import connect
from torchord.coordinator import doctor
from torchord.coordinator.doctor import Finding
from torchord.coordinator.messages.task_names import QUEUES

FACTS = StoreFacts("Valkey 9.0", 0.001, 0.0, "append-only file", dict.fromkeys(QUEUES, 0))
WORKER = replace(new_info("all@here", QUEUES), environment="torch 2, cpu")


def states(found: Iterator[Finding]) -> dict[str, str]:
    """What was looked at -> the worst that was found."""
    worst: dict[str, str] = {}
    for each in found:
        rank = ("ok", "look", "wrong").index
        worst[each.about] = max(worst.get(each.about, "ok"), each.state, key=rank)
        assert bool(each.do) == (each.state != "ok"), each
    return worst


@pytest.mark.parametrize(
    ("facts", "about", "state"),
    [
        (FACTS, "persistence", "ok"),
        (replace(FACTS, persists=""), "persistence", "look"),
        (replace(FACTS, clock=-60.0), "clock", "look"),
        (replace(FACTS, seconds=0.2), "broker", "look"),
    ],
)
def test_a_server_is_looked_at(facts: StoreFacts, about: str, state: str) -> None:
    assert states(doctor._of_the_server(facts))[about] == state


@pytest.mark.parametrize(
    ("used", "limit", "policy", "state"),
    [
        (5, 0, "noeviction", "ok"),
        (5, 10, "noeviction", "ok"),
        (9, 10, "noeviction", "look"),
        (10, 10, "noeviction", "wrong"),
        (5, 10, "allkeys-lru", "wrong"),
    ],
)
def test_its_memory_is_looked_at(used: int, limit: int, policy: str, state: str) -> None:
    assert states(doctor._of_its_memory(used, limit, policy)) == {"memory": state}


@pytest.mark.parametrize(
    ("workers", "expected"),
    [
        ([WORKER], {"workers": "ok", "devices": "ok"}),
        ([], {"workers": "wrong"}),
        ([replace(WORKER, silent=99.0)], {"workers": "wrong", "devices": "ok"}),
        ([replace(WORKER, refuses={"a": "another torch"})], {"workers": "look", "devices": "ok"}),
        ([replace(WORKER, discarded={"q": "lost"})], {"workers": "ok", "queues": "wrong", "devices": "ok"}),
        (
            [WORKER, replace(WORKER, id="b", environment="torch 3, cuda")],
            {"workers": "ok", "devices": "look"},
        ),
    ],
    ids=["well", "none", "deaf", "refuses", "others", "differ"],
)
def test_workers_are_looked_at(workers: list[WorkerInfo], expected: dict[str, str]) -> None:
    assert states(doctor._of_workers({info.id: info for info in workers}, FACTS.lengths)) == expected


def test_a_machine_and_its_environment_are_looked_at(tmp_path: Path) -> None:
    assert states(doctor._of_here(str(tmp_path / "to-be-made"), host_cache=False))["checkpoints"] in (
        "ok",
        "look",
    )
    assert doctor._allowed(None).state == "ok" and doctor._allowed(("*",)).state == "look"


def test_a_server_says_what_it_is(redis_url: str) -> None:
    with connect(redis_url) as client:
        client.lpush(QUEUES[0], "x")
        facts = store_facts(client, redis_url, QUEUES)
        client.delete(QUEUES[0])
    assert facts.release.split()[0] in ("Valkey", "Redis") and facts.lengths[QUEUES[0]] == 1


def told(*words: str, url: str) -> subprocess.CompletedProcess[str]:
    """The command in a fresh interpreter that may not load torch."""
    code = (
        "import sys; sys.modules['torch'] = None; from torchord.coordinator.cli import main; sys.exit(main())"
    )
    command = [sys.executable, "-c", code, "doctor", *words]
    return subprocess.run(command, env={**os.environ, "TORCHORD_URL": url}, capture_output=True, text=True)


def test_a_person_and_a_script_are_told(redis_url: str) -> None:
    nobody = told(url=redis_url)
    assert nobody.returncode == 1 and nobody.stderr == ""
    assert "-> start one: celery -A torchord worker -Q gradients -c 1" in nobody.stdout
    assert max(map(len, nobody.stdout.splitlines())) <= 80
    with connect(redis_url) as client:
        Registry(client, redis_url).beat(WORKER)
        found = json.loads(told("--json", url=redis_url).stdout)
    assert {each["about"] for each in found} >= {"broker", "memory", "workers", "clock", "allow-list"}
    away = told(url="redis://127.0.0.1:1/0")
    assert away.returncode == 4 and away.stderr.startswith("error: ") and "no Redis answers" in away.stderr
