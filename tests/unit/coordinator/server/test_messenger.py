"""The messenger on the in-memory control plane: what is told, by whom, and what becomes of the rest."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.control import record, worker
from tests.support.waiting import wait_until
from torchord.cache import keys
from torchord.cache.errors import CacheUnreachable, NotTold
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.settings import Settings
from torchord.cache.testing.memory_ledger import MemoryLedger
from torchord.cache.testing.memory_plane import MemoryPlane
from torchord.cache.testing.memory_registry import MemoryRegistry
from torchord.coordinator.server.supervisor.messenger import LEASE_SECONDS, TRIES, Messenger

URL = "https://shop.example/hook"


class Office:
    """A process of training servers, whose messenger calls nobody in truth."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.plane = MemoryPlane(clock=lambda: self.now)
        self.registry = MemoryRegistry(self.plane)
        self.settings = Settings(
            tell_tasks=("shop.*",), tell_urls=("https://shop.example",), tell_key="k", tell_queue="shop"
        )
        self.tasks: list[tuple[str, dict[str, Any], str]] = []
        self.calls: list[dict[str, Any]] = []
        self.answer: Callable[[dict[str, Any]], None] = lambda notice: None
        self.messenger = self.hire("s0")

    def hire(self, id: str) -> Messenger:
        self.registry.beat(worker(id))
        return Messenger(self, id, self, post=self._post, chance=lambda: 1.0)  # type: ignore[arg-type]

    def ledger(self, run: str) -> Ledger:
        return MemoryLedger(self.plane, run)

    def tell(self, task: str, notice: dict[str, Any], *, queue: str) -> None:
        self.tasks.append((task, notice, queue))

    def _post(self, url: str, notice: dict[str, Any], *, key: str, private: bool) -> None:
        assert (url, key, private) == (URL, "k", True)
        self.calls.append(notice)
        self.answer(notice)

    def run(self, on: Any, name: str = "run-1") -> Ledger:
        ledger = self.ledger(name)
        ledger.create({"recipe": {}, "config": {}, "on": on}, incarnation="life.2+1")
        _, token = ledger.acquire(worker="s0", node="n", queue="q")
        assert isinstance(token, int)
        ledger.initialise(
            token=token, manifest={}, record=record(0), dataset_size=8, evaluation_size=8, total_steps=3
        )
        return ledger

    def look(self, messenger: Messenger | None = None) -> None:
        """A round, and the end of what it began."""
        messenger = messenger or self.messenger
        messenger.look(self.registry)
        messenger.join(30)

    def later(self, seconds: float) -> None:
        self.now += seconds
        self.registry.beat(worker("s0"))


@pytest.fixture
def office() -> Office:
    return Office()


def away(notice: dict[str, Any]) -> None:
    raise NotTold("answered 503")


def test_each_addressee_is_told_once(office: Office) -> None:
    run = office.run({"evaluated": ["shop.look", URL]})
    run.record_evaluation(7, {"loss": 0.5})
    for _ in range(4):
        office.look()
    (task, notice, queue), *more = office.tasks
    assert (task, queue, more) == ("shop.look", "shop", [])
    assert notice == {
        "id": "run-1/life/evaluated-7.0",
        "run": "run-1",
        "event": "evaluated",
        "at": office.now,
        "version": 7,
        "metrics": {"loss": 0.5},
        "kind": "",
        "message": "",
    }
    assert office.calls == [{**notice, "id": "run-1/life/evaluated-7.1"}]
    assert run.outbox() == []
    told = [event.data for event in run.read_events() if event.type == "told"]
    assert {each["to"] for each in told} == {"shop.look", "https://shop.example/…"}
    assert office.registry.telling_runs() == []


def test_what_fails_is_tried_again_later_each_time_and_given_up_at_last(office: Office) -> None:
    run = office.run({"evaluated": [URL]})
    office.answer = away
    run.record_evaluation(0, {})
    waits = []
    for tried in range(1, TRIES):
        office.look()
        (waiting,) = run.outbox()
        assert (waiting.tries, waiting.error, waiting.dead) == (tried, "answered 503", False)
        waits.append(waiting.due - office.now)
        office.later(waits[-1] * 0.9)
        office.look()
        assert len(office.calls) == tried, "not before it is due"
        office.later(waits[-1] * 0.2)
    office.look()
    assert waits[:4] == pytest.approx([2.0, 4.0, 8.0, 16.0])
    assert waits[-1] == pytest.approx(3600.0)
    (dead,) = run.outbox()
    assert (dead.tries, dead.dead) == (TRIES, True)
    office.later(1e5)
    office.look()
    assert len(office.calls) == TRIES
    assert office.registry.telling_runs() == []
    office.answer = lambda notice: None
    assert run.tell_again() == 1
    office.look()
    assert run.outbox() == []
    assert len({notice["id"] for notice in office.calls}) == 1


def test_whoever_did_not_answer_hides_no_other_run(office: Office) -> None:
    silent = threading.Event()
    office.answer = lambda notice: None if notice["run"] == "other" else bool(silent.wait(30)) and None
    try:
        for name in ("run-1", "other"):
            office.run({"evaluated": [URL]}, name).record_evaluation(0, {})
        office.messenger.look(office.registry)
        wait_until(lambda: not office.ledger("other").outbox(), message="the other run to be told of")
        office.messenger.look(office.registry)
        assert [notice["run"] for notice in office.calls].count("run-1") == 1, "one delivery a run at a time"
    finally:
        silent.set()
        office.messenger.join(30)


def test_a_dead_messengers_entry_is_the_next_ones(office: Office) -> None:
    run = office.run({"evaluated": [URL]})
    run.record_evaluation(0, {})
    assert run.claim_telling("gone", seconds=LEASE_SECONDS) is not None
    other = office.hire("s1")
    office.look(other)
    assert [notice["id"] for notice in office.calls] == ["run-1/life/evaluated-0.0"]
    assert run.outbox() == []


def test_a_messenger_that_lives_keeps_its_entry(office: Office) -> None:
    run = office.run({"evaluated": [URL]})
    run.record_evaluation(0, {})
    assert run.claim_telling("s0", seconds=LEASE_SECONDS) is not None
    office.look(office.hire("s1"))
    assert office.calls == []
    office.now += LEASE_SECONDS + 1
    office.registry.beat(worker("s0"))
    office.look(office.hire("s1"))
    assert len(office.calls) == 1, "but not for ever"


@pytest.mark.parametrize(
    ("on", "said"),
    [
        ({"evaluated": ["mail.send"]}, "TORCHORD_TELL_TASKS"),
        ({"evaluated": ["torchord.advance"]}, "not for that"),
        ({"evaluated": ["https://elsewhere.example/"]}, "TORCHORD_TELL_URLS"),
        ({"evaluated": ["file:///etc/passwd"]}, "no address"),
        ({"evaluated": [["a"]]}, "neither a task"),
        ({"evaluated": [None]}, "TORCHORD_TELL_TASKS"),
    ],
)
def test_who_may_not_be_called_is_not_and_that_is_said(office: Office, on: Any, said: str) -> None:
    """Whatever the spec's writer let pass: it is this process that calls."""
    run = office.run(on)
    run.record_evaluation(0, {})
    office.look()
    assert (office.calls, office.tasks) == ([], [])
    assert said in run.outbox()[0].error


def test_a_spec_that_names_nobody_is_said(office: Office) -> None:
    run = office.run({"evaluated": [URL, URL]})
    run.record_evaluation(0, {})
    office.plane.put(run.keys.spec, '{"recipe": {}, "config": {}, "on": {"evaluated": 3}}', 60)
    office.look()
    assert office.calls == []
    assert "names nobody" in run.outbox()[0].error + run.outbox()[1].error


def test_a_store_that_is_away_costs_no_try(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    run = office.run({"evaluated": [URL]})
    run.record_evaluation(0, {})

    def lost() -> Any:
        raise CacheUnreachable("away")

    monkeypatch.setattr(MemoryLedger, "spec", lambda ledger: lost())
    office.look()
    (waiting,) = run.outbox()
    assert (waiting.error, waiting.dead) == ("", False)
    assert waiting.due == office.now + LEASE_SECONDS


def test_a_broker_that_takes_no_task_is_said(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    run = office.run({"evaluated": ["shop.look"]})
    run.record_evaluation(0, {})

    def denied(*words: Any, **more: Any) -> None:
        raise CacheUnreachable("no permissions to access a key")

    monkeypatch.setattr(office, "tell", denied)
    office.look()
    assert "no permissions" in run.outbox()[0].error


def test_a_run_that_is_gone_leaves_the_list(office: Office) -> None:
    run = office.run({"evaluated": [URL]})
    run.record_evaluation(0, {})
    office.plane.delete(*run.keys.lasting())
    office.look()
    assert office.plane.get(keys.TELLING) is None
