"""Callbacks of a run: called with what its events say, in order, whatever one of them does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support import hearing
from tests.support.control import record, worker
from tests.support.hearing import Failing, Held, Noted, Unmakeable, noted
from tests.support.waiting import wait_until
from torchord.cache.errors import InvalidInput, RecipeError
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.settings import Settings
from torchord.cache.testing.memory_ledger import MemoryLedger
from torchord.cache.testing.memory_plane import MemoryPlane
from torchord.cache.testing.memory_registry import MemoryRegistry
from torchord.coordinator.server import callbacks as room
from torchord.coordinator.server.callbacks import FAILURES_MOST, Callbacks
from torchord.coordinator.spec.callback_entries import described


class Server:
    """A training server with one run, whose events a test tells."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.plane = MemoryPlane()
        MemoryRegistry(self.plane).beat(worker("s0"))
        self.settings = Settings(allowed_modules=("tests",), checkpoint_dir=str(folder / "checkpoints"))
        self.ledger: Ledger = MemoryLedger(self.plane, "run-1")
        self.spec: dict[str, Any] = {"recipe": {}, "config": {"epochs": 3}}
        self.callbacks = Callbacks(self, "s0")  # type: ignore[arg-type]

    def serve(self, *entries: Any) -> None:
        self.spec["callbacks"] = described(entries)
        self.ledger.create(self.spec, incarnation="life")
        self.acquire("s0")
        self.follow()

    def acquire(self, id: str) -> int:
        _, token = self.ledger.acquire(worker=id, node=f"celery@{id}", queue="q")
        assert isinstance(token, int)
        if self.ledger.head().total_steps is None:
            self.ledger.initialise(
                token=token, manifest={}, record=record(0), dataset_size=8, evaluation_size=8, total_steps=9
            )
        return token

    def follow(self) -> None:
        self.callbacks.follow(self.ledger, self.spec, self.ledger.head().token)

    def step(self, version: int) -> None:
        figures = {"loss": 1 / version, "grad_norm": 1.0, "examples": 8, "seconds": 0.1, "nbytes": 64}
        self.ledger.emit(
            "step", {"step": version - 1, "version": version, **figures, "lr": [0.1], "skipped": False}
        )

    def end(self) -> None:
        """The run is done, and its callbacks have heard it all."""
        self.ledger.transition("done", allowed=("running",), event="done", data={"version": 9})
        for listener in self.callbacks._listeners.values():
            listener.join(30)
            assert not listener.alive

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event.data for event in self.ledger.read_events() if event.type == kind]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(room, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(room.Listener, "_tensors", lambda listener, version: {"weight": version})
    made = Server(tmp_path)
    hearing.HELD.clear()
    yield made
    hearing.HELD.set()
    made.callbacks.stop()


def test_it_is_called_with_everything_in_order(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "noted"
    server.serve(partial(Noted, str(path)))
    server.step(1)
    server.ledger.record_evaluation(1, {"loss": 0.5})
    server.ledger.emit("checkpoint", {"version": 1, "path": "/somewhere"})
    server.step(2)
    server.ledger.emit("told", {"id": "x"})
    server.end()
    found = [each for each in noted(path) if each[0] != "version"]
    assert found == [
        ("begin", ["run-1", 3, str(tmp_path / "checkpoints" / "run-1" / "callbacks")]),
        ("step", [1, 1.0]),
        ("evaluation", [1, {"loss": 0.5}]),
        ("checkpoint", 1),
        ("step", [2, 0.5]),
        ("close", None),
    ]


def test_the_next_server_goes_on_where_the_one_before_was(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "noted"
    server.serve(partial(Noted, str(path)))
    server.step(1)
    wait_until(lambda: ("step", [1, 1.0]) in noted(path), message="the first step")
    wait_until(lambda: server.ledger.heard(), message="that it is noted")
    server.callbacks.stop()
    server.step(2)
    other = Callbacks(server, "s0")  # type: ignore[arg-type]
    other.follow(server.ledger, server.spec, 2)
    server.ledger.transition("done", allowed=("running",), event="done")
    wait_until(lambda: noted(path)[-1][0] == "close" and noted(path).count(("close", None)) == 2)
    assert [value[0] for what, value in noted(path) if what == "step"] == [1, 2]


def test_what_one_raises_is_told_and_stops_neither_the_run_nor_the_others(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad, good = tmp_path / "bad", tmp_path / "good"
    server.serve(partial(Failing, str(bad)), partial(Noted, str(good)))
    for version in (1, 2):
        server.step(version)
    server.ledger.record_evaluation(2, {"loss": 0.5})
    server.end()
    assert [what for what, _ in noted(good)].count("step") == 2
    assert noted(bad) == [("evaluation", [2, {"loss": 0.5}])], "it is called again"
    told = server.events("callback failed")
    assert told[0] == {
        "callback": "tests.support.hearing:Failing",
        "in": "on_step",
        "message": "ValueError: step 0 is not to my taste",
    }
    assert "hearing.py" in caplog.text, "with the frames of its own code"
    assert server.ledger.head().status == "done"


def test_one_that_would_end_the_process_ends_nothing(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "bad"
    server.serve(partial(Failing, str(path), error="exit"))
    server.step(1)
    server.ledger.record_evaluation(1, {})
    server.end()
    assert noted(path) == [("evaluation", [1, {}])]
    assert "sys.exit()" in server.events("callback failed")[0]["message"]


def test_one_that_never_returns_holds_up_nobody(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "good"
    server.serve(Held, partial(Noted, str(path)))
    server.step(1)
    wait_until(lambda: ("step", [1, 1.0]) in noted(path), message="the other's first step")


def test_one_that_fails_time_after_time_is_called_no_more_until_the_run_is_taken_up(
    server: Server, tmp_path: Path
) -> None:
    path = tmp_path / "bad"
    server.serve(partial(Failing, str(path)))
    (listener,) = server.callbacks._listeners.values()
    for version in range(1, FAILURES_MOST + 3):
        server.step(version)
    listener.join(30)
    assert not listener.alive
    assert len(server.events("callback failed")) == 5, "the log has the others"
    server.follow()
    assert list(server.callbacks._listeners.values()) == [listener]
    server.callbacks.follow(server.ledger, server.spec, listener.token + 1)
    assert list(server.callbacks._listeners.values()) != [listener]


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (Unmakeable, "RuntimeError: no such luck"),
        ("os:system", "NotAllowed"),
        ("tests.support.hearing:Nobody", "RecipeError"),
        ("torch:save", "NotAllowed"),
        ("torchord.coordinator.callbacks:_place", "NotAllowed"),
    ],
)
def test_what_cannot_be_made_is_told_once(server: Server, entry: Any, said: str) -> None:
    server.serve(entry)
    (listener,) = server.callbacks._listeners.values()
    listener.join(30)
    for _ in range(3):
        server.follow()
    (told,) = server.events("callback failed")
    assert told["in"] == "its making"
    assert said in told["message"]
    assert server.ledger.head().status == "running"


@pytest.mark.parametrize(
    "entries", [3, "x", {}, [3], [None], [{"target": 3}], [{"target": "a:b", "args": 3}], [{}] * 99]
)
def test_a_spec_that_somebody_else_wrote_costs_its_callbacks_alone(server: Server, entries: Any) -> None:
    server.serve()
    server.spec["callbacks"] = entries
    server.follow()
    assert len(server.callbacks._listeners) <= 8
    for listener in server.callbacks._listeners.values():
        listener.join(30)
        assert listener.failed


@pytest.mark.parametrize("data", [{}, {"step": "x"}, {"version": 1, "metrics": 3}])
def test_an_event_that_is_none_is_passed_over(server: Server, tmp_path: Path, data: dict[str, Any]) -> None:
    path = tmp_path / "noted"
    server.serve(partial(Noted, str(path)))
    for kind in ("step", "evaluation", "checkpoint"):
        server.ledger.emit(kind, data)
    server.step(1)
    server.end()
    assert [each for each in noted(path) if each[0] != "version"][1:-1] == [("step", [1, 1.0])]


def test_another_servers_run_is_not_followed(server: Server, tmp_path: Path) -> None:
    server.serve(partial(Noted, str(tmp_path / "noted")))
    (listener,) = server.callbacks._listeners.values()
    server.ledger.release(server.ledger.head().token)
    server.acquire("s1")
    listener.join(30)
    assert not listener.alive and not listener.failed


def not_importable() -> Callable[..., Any]:
    return lambda: None


@pytest.mark.parametrize(
    ("entries", "error"),
    [
        ("tests.support.hearing:Held", InvalidInput),
        ([Held] * 9, InvalidInput),
        ([Held()], RecipeError),
        (["no colon"], RecipeError),
        ([not_importable()], RecipeError),
    ],
)
def test_what_is_no_list_of_callbacks_is_refused_at_once(entries: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        described(entries)
