"""A scrape: what it tells, that it stays bounded, and that no record of others' costs it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import redis

from tests.support.control import SPEC, entry, slot, worker
from torchord.cache import keys
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.ledger.records import GENESIS, LedgerEntry
from torchord.cache.ledger.workers import Registry
from torchord.cache.servers.redis_client import connect
from torchord.cache.settings import Settings
from torchord.coordinator.cli import main
from torchord.coordinator.messages.task_names import GRADIENTS, UPDATES
from torchord.coordinator.metrics import collector, families
from torchord.coordinator.metrics.collector import Collector
from torchord.coordinator.metrics.families import FAMILIES, Samples
from torchord.coordinator.runtime.control_plane import ControlPlane

Scrape = dict[tuple[str, tuple[tuple[str, str], ...]], float]
_LINE = re.compile(r'(\w+)(?:\{((?:\w+="(?:[^"\\\n]|\\.)*",?)*)\})? (\S+)')


def scraped(text: str) -> Scrape:
    """The samples of a scrape; every line is a sample of a family that was introduced just before."""
    found: Scrape = {}
    kinds: dict[str, str] = {}
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kinds[name] = line.split()
        elif not line.startswith("# HELP "):
            match = _LINE.fullmatch(line)
            assert match, line
            assert match[1] in kinds, line
            key = match[1], tuple(re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', match[2] or ""))
            assert key not in found, line
            found[key] = float(match[3])
    return found


def value(scrape: Scrape, family: families.Family, *labels: str) -> float | None:
    return scrape.get((family.name, tuple(zip(family.labels, labels, strict=True))))


class Fleet:
    """A store in which a test writes what workers and runs would."""

    def __init__(self, url: str) -> None:
        self.url, self.client = url, connect(url)
        self.raw = redis.Redis.from_url(url)
        self.now = 1000.0
        plane = ControlPlane(Settings(url=url))
        self.registry = Registry(self.client, url)
        self.collector = Collector(plane, clock=lambda: self.now)
        self.chain: dict[str, str] = {}

    def run(self, name: str = "digits", **head: Any) -> Ledger:
        ledger = Ledger(self.client, self.url, name)
        ledger.create(SPEC, incarnation="life")
        self.raw.hset(ledger.keys.head, mapping={"status": "running", "committed_at": 990.0, **head})
        return ledger

    def commit(self, ledger: Ledger, version: int, **changes: Any) -> LedgerEntry:
        slots = changes.pop("slots", [slot(version - 1, 0), slot(version - 1, 1)])
        made = entry(version, slots, self.chain.get(ledger.run, GENESIS), **changes)
        self.chain[ledger.run] = made.chain
        self.raw.hset(ledger.keys.ledger, str(version), made.to_json())
        self.raw.expire(ledger.keys.ledger, 60)
        self.raw.hset(ledger.keys.head, "version", version)
        return made

    def scrape(self) -> Scrape:
        return scraped(self.collector.text())


@pytest.fixture
def fleet(redis_url: str) -> Iterator[Fleet]:
    made = Fleet(redis_url)
    yield made
    made.client.close()
    made.raw.close()


def test_workers_come_and_go_by_role(fleet: Fleet) -> None:
    first = fleet.scrape()
    assert value(first, families.UP) == 1
    assert [value(first, families.WORKERS, role) for role in ("client", "server")] == [0, 0]
    assert value(first, families.SUPERVISOR) == 0
    both, client = worker("w0", queues=(GRADIENTS, UPDATES)), worker("w1", queues=(GRADIENTS,), task="at it")
    fleet.registry.beat(both)
    fleet.registry.beat(client)
    fleet.registry.elect("w0")
    then = fleet.scrape()
    assert [value(then, families.WORKERS, role) for role in ("client", "server")] == [2, 1]
    assert [value(then, families.BUSY, role) for role in ("client", "server")] == [1, 0]
    assert value(then, families.SUPERVISOR) == 1
    fleet.registry.leave(client)
    assert value(fleet.scrape(), families.WORKERS, "client") == 1


def test_a_runs_steps_are_counted_once_each(fleet: Fleet) -> None:
    run = fleet.run(total_steps=9, duplicates=3, backups=2)
    fleet.commit(run, 1)
    fleet.commit(run, 2, loss=0.25)
    first = fleet.scrape()
    assert value(first, families.STATE, "digits", "running") == 1
    assert (value(first, families.STEPS, "digits"), value(first, families.PLANNED, "digits")) == (2, 9)
    assert value(first, families.LOSS, "digits") == 0.25
    assert value(first, families.LAG, "digits") == 10
    assert value(first, families.EXAMPLES, "digits") == 16
    assert value(first, families.RATE, "digits") == pytest.approx(80)
    assert value(first, families.STEP, "digits", "whole") == pytest.approx(0.1)
    assert value(first, families.STEP, "digits", "compute") == pytest.approx(0.01)
    assert value(first, families.STEP, "digits", "other") == pytest.approx(0.09)
    assert (value(first, families.DUPLICATES, "digits"), value(first, families.BACKUPS, "digits")) == (3, 2)
    assert value(first, families.RETRIES, "digits") == value(first, families.RECOVERIES, "digits") == 0
    fleet.commit(run, 3, slots=[slot(2, 0, attempt=3), slot(2, 1)], seconds=4.0)
    fleet.commit(run, 4, token=2, seconds=2.5)
    for _ in range(2):
        then = fleet.scrape()
        assert value(then, families.EXAMPLES, "digits") == 32
        assert value(then, families.RETRIES, "digits") == 2
        assert value(then, families.RECOVERIES, "digits") == 2, "another try, and another server"
        assert value(then, families.RECOVERY, "digits") == 6.5


def test_a_rollback_and_another_life_are_followed(fleet: Fleet) -> None:
    run = fleet.run()
    for version in range(1, 5):
        fleet.commit(run, version)
    assert value(fleet.scrape(), families.EXAMPLES, "digits") == 32
    fleet.raw.hset(run.keys.head, "version", 2)
    assert value(fleet.scrape(), families.STEPS, "digits") == 2
    fleet.commit(run, 3)
    assert value(fleet.scrape(), families.EXAMPLES, "digits") == 40
    fleet.raw.hset(run.keys.head, mapping={"incarnation": "another", "version": 0})
    assert value(fleet.scrape(), families.EXAMPLES, "digits") == 0


def test_the_cache_is_summed_over_workers_and_never_falls(fleet: Fleet) -> None:
    said = {"host.hits": 3.0, "host.misses": 1.0, "store.reads": 2.0, "store.nbytes": 100.0, "other": 9.0}
    one, two = worker("w0", cache=said), worker("w1", cache=said)
    for each in (one, two):
        fleet.registry.beat(each)
    first = fleet.scrape()
    assert value(first, families.LOOKUPS, "host", "yes") == 6
    assert value(first, families.LOOKUPS, "host", "no") == value(first, families.LOOKUPS, "store", "yes") / 2
    assert value(first, families.BYTES, "store", "read") == 200
    fleet.registry.leave(two)
    fleet.registry.beat(replace(one, cache={**said, "host.hits": 5.0}))
    assert value(fleet.scrape(), families.LOOKUPS, "host", "yes") == 8
    fleet.registry.beat(worker("w2", cache={"host.hits": 1.0}))
    assert value(fleet.scrape(), families.LOOKUPS, "host", "yes") == 9


def test_what_nobody_was_told_is_told_here(fleet: Fleet) -> None:
    run = Ledger(fleet.client, fleet.url, "digits")
    run.create(SPEC, incarnation="life")
    run.record_evaluation(0, {})
    taken = run.claim_telling("w0", seconds=60)
    assert taken is not None
    run.settle_telling(taken, "w0", "dead", error="answered 404")
    found = fleet.scrape()
    assert [value(found, families.UNTOLD, "digits", state) for state in ("waiting", "dead")] == [1, 1]


def test_runs_are_bounded_and_those_that_move_come_first(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collector, "MOST_RUNS", 3)
    for number in range(6):
        run = fleet.run(f"run-{number}")
        if number:
            run.transition("done", allowed=("running",), event="done")
    shown = {labels[0][1] for name, labels in fleet.scrape() if name == families.STEPS.name}
    assert shown == {"run-0", "run-4", "run-5"}


def test_a_step_far_ahead_costs_bounded_reading(fleet: Fleet) -> None:
    """Whoever can write a head can write any version."""
    run = fleet.run()
    fleet.commit(run, 1)
    fleet.scrape()
    fleet.raw.hset(run.keys.head, "version", 10**15)
    assert value(fleet.scrape(), families.STEPS, "digits") == 10**15


@pytest.mark.parametrize(
    "damage",
    [
        lambda fleet, run: fleet.raw.hset(run.keys.head, "version", "x"),
        lambda fleet, run: fleet.raw.hset(run.keys.head, "status", 'x"}\n1'),
        lambda fleet, run: fleet.raw.hset(run.keys.ledger, "1", "{"),
        lambda fleet, run: (fleet.raw.delete(run.keys.head), fleet.raw.zadd(run.keys.head, {"x": 1})),
    ],
)
def test_a_run_that_cannot_be_read_hides_no_other(fleet: Fleet, damage: Any) -> None:
    bad, good = fleet.run("bad"), fleet.run("good")
    for run in (bad, good):
        fleet.commit(run, 1)
    damage(fleet, bad)
    fleet.raw.expire(bad.keys.head, 60)
    found = fleet.scrape()
    assert value(found, families.STATE, "bad", "unreadable") == 1
    assert value(found, families.STEPS, "good") == 1
    assert value(found, families.UP) == 1


def test_a_number_beyond_python_s_costs_no_scrape(fleet: Fleet) -> None:
    fleet.raw.set(keys.QUARANTINED, "9" * 5000, ex=60)
    assert set(fleet.scrape()) == {(families.UP.name, ()), (families.SECONDS.name, ())}


def test_a_store_that_is_away_is_told() -> None:
    plane = ControlPlane(Settings(url="redis://127.0.0.1:1/0"), patience_seconds=0.0)
    assert value(scraped(Collector(plane).text()), families.UP) == 0


def test_figures_and_labels_are_written_as_prometheus_reads_them() -> None:
    samples = Samples()
    samples.add(families.LOSS, float("nan"), 'a"b\\c\nd')
    samples.add(families.LOSS, float("-inf"), "e")
    samples.add(families.LOSS, 1.5e-9, "f")
    samples.add(families.LOSS, 12345678901.0, "g")
    assert samples.text().splitlines()[1:] == [
        "# TYPE torchord_run_loss gauge",
        'torchord_run_loss{run="a\\"b\\\\c\\nd"} NaN',
        'torchord_run_loss{run="e"} -Inf',
        'torchord_run_loss{run="f"} 1.5e-09',
        'torchord_run_loss{run="g"} 12345678901',
    ]
    with pytest.raises(ValueError, match="has labels"):
        samples.add(families.LOSS, 1.0)


def test_every_family_has_a_name_that_prometheus_takes() -> None:
    assert len({family.name for family in FAMILIES}) == len(FAMILIES) > 30
    for family in FAMILIES:
        assert re.fullmatch(r"torchord_[a-z_]+", family.name)
        assert family.name.endswith("_total") == (family.kind == "counter")


def test_the_command_prints_them(fleet: Fleet, capsys: pytest.CaptureFixture[str]) -> None:
    fleet.run("from-a-shell")
    assert main(["metrics", "--url", fleet.url]) == 0
    found = scraped(capsys.readouterr().out)
    assert value(found, families.STATE, "from-a-shell", "running") == 1
    assert main(["metrics", "--json", "--url", fleet.url]) == 0
    (state,) = [each for each in json.loads(capsys.readouterr().out) if each["name"] == families.STATE.name]
    assert state["labels"] == {"run": "from-a-shell", "state": "running"} and state["value"] == 1
    assert main(["metrics", "--url", "redis://127.0.0.1:1/0"]) == 4
