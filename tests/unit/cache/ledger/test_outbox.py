"""The outbox: what is written with an event, who delivers it, and what becomes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.control import Plane, record, worker
from torchord.cache import keys
from torchord.cache.errors import RecordDamaged
from torchord.cache.keyring import Keyring
from torchord.cache.ledger import outbox
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.ledger.outbox import TOLD, Telling, entry_text, subscribed
from torchord.cache.ledger.workers import Registry
from torchord.cache.servers.redis_client import connect
from torchord.cache.testing.memory_ledger import MemoryLedger
from torchord.coordinator.runtime import key_files

BOTH = ["shop.tasks.look", "https://shop.example/look"]
SPEC: dict[str, Any] = {
    "recipe": {},
    "config": {},
    "on": {"done": BOTH[:1], "failed": BOTH, "evaluated": BOTH[1:]},
}


@pytest.fixture
def run(plane: Plane) -> Ledger:
    """A run at version 0 whose server is w0."""
    ledger = plane.ledger()
    ledger.create(SPEC, incarnation="life")
    for id in ("w0", "w1"):
        plane.registry.beat(worker(id))
    _, token = ledger.acquire(worker="w0", node="n", queue="q")
    assert isinstance(token, int)
    ledger.initialise(
        token=token, manifest={}, record=record(0), dataset_size=8, evaluation_size=8, total_steps=3
    )
    return ledger


def fail(run: Ledger, message: str = "no memory") -> None:
    run.transition(
        "failed",
        allowed=("running",),
        event="failed",
        data={"message": message},
        error={"message": message, "kind": "Poison", "traceback": "t" * 9999},
    )


def write(run: Ledger, key: str, field: str, text: str) -> None:
    """Anybody writes anything."""
    if isinstance(run, MemoryLedger):
        run.plane.hset(key, {field: text}, 60)
    else:
        run.client.hset(key, field, text)
        run.client.expire(key, 60)


def told(run: Ledger) -> list[tuple[str, dict[str, Any]]]:
    return [(e.type, e.data) for e in run.read_events() if e.type in ("told", "not told")]


def test_an_event_and_its_entries_are_written_at_once(plane: Plane, run: Ledger) -> None:
    assert plane.registry.telling_runs() == [] == run.outbox()
    run.record_evaluation(0, {"loss": 0.5})
    run.record_evaluation(0, {"loss": 0.6})
    fail(run)
    evaluated, *failed = run.outbox()
    assert (evaluated.id, evaluated.event, evaluated.data) == (
        "evaluated-0.0",
        "evaluated",
        {"version": 0, "metrics": {"loss": 0.5}},
    )
    assert [each.place for each in failed] == [0, 1]
    assert {each.event for each in failed} == {"failed"}
    assert failed[0].data == failed[1].data == {"kind": "Poison", "message": "no memory"}, "and no traceback"
    assert len({each.id for each in failed}) == 2
    assert plane.registry.telling_runs() == ["run-1"]


def test_what_nobody_asked_for_leaves_no_entry(plane: Plane, run: Ledger) -> None:
    run.transition("paused", allowed=("running",), event="paused")
    assert (run.outbox(), plane.registry.telling_runs()) == ([], [])


def test_a_run_that_fails_twice_tells_it_twice_and_its_end_has_one_name(run: Ledger) -> None:
    fail(run)
    run.transition("running", allowed=("failed",), event="resumed", error=None)
    fail(run)
    run.transition("running", allowed=("failed",), event="resumed", error=None)
    run.transition("done", allowed=("running",), event="done", data={"version": 3})
    found = run.outbox()
    assert len(found) == len({each.id for each in found}) == 5
    assert found[-1].id == "done-3.0"


def test_an_entry_is_one_deliverers_until_its_lease_ends(plane: Plane, run: Ledger) -> None:
    run.record_evaluation(0, {})
    taken = run.claim_telling("w0", seconds=60)
    assert taken is not None
    assert (taken.id, taken.tries) == ("evaluated-0.0", 1)
    assert run.claim_telling("w1", seconds=60) is None
    plane.registry.leave(worker("w0"))
    again = run.claim_telling("w1", seconds=60)
    assert again is not None
    assert (again.id, again.tries) == ("evaluated-0.0", 2)
    plane.registry.beat(worker("w0"))
    run.settle_telling(taken, "w0", "again", seconds=0, error="late")
    assert run.claim_telling("w0", seconds=60) is None, "who has lost the lease changes nothing"
    run.settle_telling(taken, "w0", "told", to="it")
    assert run.outbox() == [], "but told is told"
    run.settle_telling(again, "w1", "told", to="it")
    assert told(run) == [("told", {"id": "evaluated-0.0", "event": "evaluated", "to": "it", "tries": 1})]


def test_a_lease_that_ends_gives_its_entry_to_the_next(run: Ledger) -> None:
    run.record_evaluation(0, {})
    assert run.claim_telling("w0", seconds=-1) is not None
    assert run.claim_telling("w1", seconds=60) is not None


def test_what_failed_waits_and_others_go_first(run: Ledger) -> None:
    run.record_evaluation(0, {})
    first = run.claim_telling("w0", seconds=60)
    assert first is not None
    run.settle_telling(first, "w0", "again", seconds=60, error="answered 503")
    run.record_evaluation(1, {})
    second = run.claim_telling("w0", seconds=60)
    assert second is not None
    assert second.id == "evaluated-1.0"
    waiting = run.outbox()[0]
    assert (waiting.id, waiting.tries, waiting.error, waiting.dead) == (first.id, 1, "answered 503", False)


def test_what_nobody_could_be_told_stays_and_may_be_tried_again(plane: Plane, run: Ledger) -> None:
    run.record_evaluation(0, {})
    taken = run.claim_telling("w0", seconds=60)
    assert taken is not None
    run.settle_telling(taken, "w0", "dead", error="answered 404", to="https://shop.example")
    assert run.claim_telling("w0", seconds=60) is None
    assert plane.registry.telling_runs() == [], "nobody looks at it any more"
    assert [(each.dead, each.error) for each in run.outbox()] == [(True, "answered 404")]
    assert told(run)[0][1]["message"] == "answered 404"
    assert run.tell_again() == 1
    assert plane.registry.telling_runs() == ["run-1"]
    again = run.claim_telling("w0", seconds=60)
    assert again is not None
    assert (again.id, again.tries) == (taken.id, 1)


def test_an_outbox_is_bounded_and_keeps_room_for_the_end(
    run: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "_MOST_EVALUATED", 2)
    monkeypatch.setattr(outbox, "_MOST_ENTRIES", 3)
    for version in range(4):
        run.record_evaluation(version, {})
    fail(run)
    assert [each.event for each in run.outbox()] == ["evaluated", "evaluated", "failed"]
    assert [data["event"] for _, data in told(run)] == ["evaluated", "evaluated", "failed"]
    assert "full" in told(run)[0][1]["message"]


def test_with_keys_an_entry_is_nobodys_who_has_none(redis_url: str, tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    key_files.new(tmp_path, "ed25519")
    client = connect(redis_url)
    submit, server = (
        Ledger(client, redis_url, "run-1", keyring=Keyring(tmp_path / f"{role}.json"))
        for role in ("submit", "server")
    )
    submit.create(SPEC, incarnation="life")
    Registry(client, redis_url).beat(worker("w0"))
    write(submit, submit.keys.outbox, "done-3.0", entry_text("done", 1.0, {"version": 3}))
    submit.record_evaluation(0, {})
    client.hset(submit.keys.outbox, "evaluated-1.0", str(client.hget(submit.keys.outbox, "evaluated-0.0")))
    taken = [server.claim_telling("w0", seconds=60) for _ in range(3)]
    assert [each.id for each in taken if each is not None] == ["evaluated-0.0"]
    assert [each.id for each in server.outbox()] == ["evaluated-0.0"], "neither what was forged nor a copy"
    client.close()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"event": "done"}',
        '{"event": "shell", "at": 1, "data": {}}',
        '{"event":1,"at":1,"data":[]}',
    ],
)
def test_what_is_no_entry_is_told_to_nobody_and_hides_no_other(run: Ledger, text: str) -> None:
    if isinstance(run, MemoryLedger):
        with pytest.raises(RecordDamaged):
            Telling.of("x.0", text)
        return
    write(run, run.keys.outbox, "0.0", text)
    run.record_evaluation(0, {})
    found = [run.claim_telling("w0", seconds=60) for _ in range(2)]
    assert [each.id for each in found if each is not None] == ["evaluated-0.0"]
    assert [each.id for each in run.outbox()] == ["evaluated-0.0"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        "3",
        "null",
        '{"due": [], "tries": {}, "holder": 3}',
        '{"tries": "x", "error": {}}',
        '{"nonce": 1}',
    ],
)
def test_a_standing_that_is_none_costs_no_entry(run: Ledger, text: str) -> None:
    if isinstance(run, MemoryLedger):
        return
    run.record_evaluation(0, {})
    write(run, run.keys.telling, "evaluated-0.0", text)
    assert [each.id for each in run.outbox()] == ["evaluated-0.0"]
    taken = run.claim_telling("w0", seconds=60)
    assert taken is not None
    assert taken.tries == 1
    run.settle_telling(taken, "w0", "told")
    assert run.outbox() == []


def test_the_subscription_says_how_many_and_never_more_than_four() -> None:
    assert subscribed({}) == subscribed({"on": {}}) == subscribed({"on": []}) == ""
    assert subscribed({"on": {"done": BOTH, "failed": ["a"] * 9, "shell": BOTH, "paused": []}}) == (
        ",done=2,failed=4,"
    )


def test_an_entry_is_small() -> None:
    text = entry_text(
        "failed",
        1.0,
        {"message": "m" * 10**6, "kind": "k", "traceback": "secret"},
        {"metrics": {str(n): 0.1 for n in range(10**4)}},
    )
    assert len(text) < 5000
    assert "secret" not in text


def test_a_run_at_rest_keeps_its_outbox_as_long_as_it_can_be_asked_about(run: Ledger) -> None:
    fail(run)
    run.retire()
    assert len(run.outbox()) == 2
    if isinstance(run, MemoryLedger):
        assert run.plane.ttl(run.keys.outbox) == pytest.approx(keys.RESULT_TTL_SECONDS, abs=60)


def test_every_event_that_is_told_is_an_event_of_the_ledger() -> None:
    assert set(TOLD) == {"done", "failed", "cancelled", "paused", "resumed", "evaluated"}
