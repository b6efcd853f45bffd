"""The table of keys: in the code, on the page, and in a database after every operation."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.control import SPEC, entry, record, slot, worker
from torchord.cache import keys
from torchord.cache.ledger.records import Head
from torchord.cache.ledger.rounds import Seat
from torchord.cache.testing.memory_ledger import MemoryLedger
from torchord.cache.testing.memory_plane import MemoryPlane
from torchord.cache.testing.memory_registry import MemoryRegistry

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "redis-keys.md").read_text()
SECONDS = {"s": 1, "minute": 60, "hour": 3600, "day": 86400}


def rows(text: str, prefix: str) -> dict[str, list[str]]:
    """First cell -> the others, of the table rows whose first cell starts with `prefix`."""
    lines = [line for line in text.splitlines() if line.replace("`", "").startswith(f"| {prefix}")]
    cells = [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]
    return {first: rest for first, *rest in cells}


TABLE = rows(keys.__doc__ or "", "torchord:")
SHOWN = rows(PAGE, "torchord:")


def pattern(key: str) -> re.Pattern[str]:
    """What a documented name stands for: words in capitals are any text, ... any parts."""
    text = re.escape(key).replace(re.escape("..."), ".+")
    return re.compile(re.sub(r"\b(RUN|ID|STEP|VERSION|NAME|ADDRESS|KIND|CHUNK)\b", "[^{}]+", text))


def test_the_page_lists_the_keys_of_the_code() -> None:
    assert list(SHOWN) == list(TABLE)
    assert len(TABLE) > 20


@pytest.mark.parametrize("key", TABLE)
def test_the_page_says_of_a_key_what_the_code_says(key: str) -> None:
    kind, owner, life = TABLE[key]
    shown_kind, shown_owner, ttl, _ = SHOWN[key]
    assert re.split(r"[ ,:]", kind)[0] == re.split(r"[ ,:]", shown_kind)[0]
    assert owner == shown_owner
    named = re.findall(r"[A-Z]+(?:_[A-Z]+)+", life)
    assert set(named) == set(re.findall(r"[A-Z]+(?:_[A-Z]+)+", ttl))


def test_the_page_gives_each_constant_its_value() -> None:
    found = re.findall(r"([A-Z]+(?:_[A-Z]+)+) \(([\d.]+)(?: (day|hour|minute|s)s?)?\)", PAGE)
    assert {name for name, _, _ in found} >= {
        "RUN_TTL",
        "RESULT_TTL",
        "WORK_TTL",
        "WORKER_LEASE",
        "EVENTS_KEPT",
    }
    for name, number, unit in found:
        name = {"GRACE_TTL": "DATASET_GRACE", "RENEWAL_SECONDS": "DATASET_RENEWAL_SECONDS"}.get(name, name)
        constant = next(c for c in (f"{name}_SECONDS", f"{name}_MS", name) if hasattr(keys, c))
        value = getattr(keys, constant)
        assert value == float(number) * SECONDS.get(unit, 1) * (1000 if constant.endswith("_MS") else 1), name


def test_the_page_explains_every_field_of_the_head() -> None:
    section = PAGE.partition("## Fields of the head")[2]
    explained = set(
        re.findall(
            r"`(\w+)`", "".join(line.split("|")[1] for line in section.splitlines() if line[:1] == "|")
        )
    )
    private = {"called", "changed", "changed_from", "corrected_at", "memory", "shard_seconds", "toolchain"}
    assert explained == set(Head.__slots__) | private


def test_every_name_that_the_code_makes_is_in_the_table() -> None:
    of = keys.RunKeys("run-1")
    made = [
        *(keys.RUNS, keys.ACTIVE, keys.WORKERS, keys.SUPERVISOR, keys.DATASETS, keys.worker("celery@a/1-2")),
        *(keys.dataset("d"), keys.dataset_renewed("d"), f"{keys.chunk('a1')}:0", *of.lasting()),
        *(of.slots(1), of.leases(1), of.parts(1), of.predict("q"), of.wake("celery@a/1-2")),
        *(
            f"{blob}:0"
            for blob in (of.parameters_blob(1, "n"), of.state_blob(1, "n"), of.gradient_blob(1, 0, "n"))
        ),
        f"{of.predict_blob('q', 0, 'inputs')}:0",
    ]
    for name in made:
        assert any(pattern(key).fullmatch(name) for key in TABLE), name


def test_every_key_that_a_run_leaves_is_in_the_table() -> None:
    plane = MemoryPlane()
    ledger, registry = MemoryLedger(plane, "run-1"), MemoryRegistry(plane)
    registry.beat(worker("w0", placement="all chunks on one node"))
    registry.beat(worker("w1"))
    registry.elect("w0")
    ledger.create(SPEC, incarnation="life")
    _, token = ledger.acquire(worker="w0", node="n", queue="q")
    assert isinstance(token, int)
    ledger.initialise(
        token=token, manifest={}, record=record(0), dataset_size=8, evaluation_size=8, total_steps=3
    )
    ledger.begin(0, 0, worker="w0", delivery="d")
    ledger.finish_slot(0, slot(0, 0))
    made = entry(1, [slot(0, 0)])
    ledger.commit(step=0, token=token, shards=1, entry=made, record=record(1, made.chain), event={})
    ledger.begin(1, 0, worker="w0", delivery="d")
    ledger.finish_slot(1, slot(1, 0))
    ledger.open_round(1, 2, token=token)
    taken = Seat("w1", "", token, 1, "life", 3)
    assert ledger.turn(taken, 1, shards=2).verdict == "compute"
    assert ledger.turn(Seat("w0", "", token, 1, "life", 3), 1, shards=2).verdict == "wait"
    ledger.turn(taken, 1, shards=2, slot=slot(1, 1))
    ledger.rollback(token=token, version=0, chain=record(0).chain)
    ledger.launch_evaluation(1, 2, pin_seconds=9)
    ledger.write_part(1, 0, {}, parts=2)
    ledger.record_evaluation(0, {})
    ledger.write_output("q", 0, {})
    names = plane.names()
    assert {name.partition("}:")[2].partition(":")[0] for name in names} >= {
        "slots",
        "leases",
        "parts",
        "pins",
        "round",
        "wake",
    }
    for name in names:
        assert any(pattern(key).fullmatch(name) for key in TABLE), name
        assert plane.ttl(name) is not None, name
