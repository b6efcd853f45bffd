"""The worker's pool: which tasks run in its thread, and which where they were received."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tasks import threads
from tasks.threads import Briefness, TaskPool, kind_of

BRIEF, LONG = threads.BRIEF_SECONDS / 2, threads.BRIEF_SECONDS * 2


def message(task: str = "gradient", run: str = "a", *, encode: bool = True) -> tuple[Any, ...]:
    """What Celery's tracer is called with."""
    body = json.dumps([[], {"run": run, "step": 3}, {"chord": None}])
    return (task, "id", {}, body.encode() if encode else body, "application/json", "utf-8")


class Clock:
    """A clock that a task moves on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(threads.time, "perf_counter", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def pool() -> Iterator[TaskPool]:
    made = TaskPool(limit=1)
    made.start()
    yield made
    made.stop()


def run(pool: TaskPool, clock: Clock, seconds: float, args: tuple[Any, ...] | None = None) -> bool:
    """Whether a task that takes so long ran in the caller's thread."""
    where: list[int] = []
    answers: list[str] = []

    def task(*_: Any) -> str:
        where.append(threading.get_ident())
        clock.now += seconds
        return "done"

    result = pool.apply_async(task, args or message(), callback=answers.append)
    if result is not None:
        result.get()
    assert answers == ["done"]
    return where == [threading.get_ident()]


def test_a_run_of_brief_tasks_needs_no_thread(pool: TaskPool, clock: Clock) -> None:
    assert [run(pool, clock, BRIEF) for _ in range(10)] == [False] * 8 + [True] * 2


def test_a_longer_task_sends_the_next_ones_to_the_thread(pool: TaskPool, clock: Clock) -> None:
    for _ in range(8):
        run(pool, clock, BRIEF)
    assert run(pool, clock, LONG)
    assert [run(pool, clock, BRIEF) for _ in range(9)] == [False] * 8 + [True]


def test_runs_and_tasks_are_told_apart(pool: TaskPool, clock: Clock) -> None:
    for _ in range(8):
        run(pool, clock, BRIEF)
    assert not run(pool, clock, BRIEF, message(run="b"))
    assert not run(pool, clock, BRIEF, message(task="update"))
    assert run(pool, clock, BRIEF)


def test_nothing_runs_here_while_the_thread_is_at_work(pool: TaskPool, clock: Clock) -> None:
    for _ in range(8):
        run(pool, clock, BRIEF)
    begun, end = threading.Event(), threading.Event()

    def held(*_: Any) -> None:
        begun.set()
        assert end.wait(10)

    other = pool.apply_async(held, message(run="b"), callback=lambda _: None)
    assert other is not None
    assert begun.wait(10)
    second = pool.apply_async(lambda *_: threading.get_ident(), message(), callback=lambda _: None)
    assert second is not None  # queued behind it
    end.set()
    other.get()
    second.get()
    assert run(pool, clock, BRIEF)


def test_several_threads_keep_all_tasks(clock: Clock) -> None:
    pool = TaskPool(limit=2)
    try:
        assert not any(run(pool, clock, BRIEF) for _ in range(10))
    finally:
        pool.stop()


def test_an_error_passes_and_counts(pool: TaskPool, clock: Clock) -> None:
    for _ in range(8):
        run(pool, clock, BRIEF)

    def failing(*_: Any) -> None:
        clock.now += LONG
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError):
        pool.apply_async(failing, message(), callback=lambda _: None)
    assert not run(pool, clock, BRIEF)


@pytest.mark.parametrize("encode", [True, False])
def test_the_kind_is_the_task_and_its_run(encode: bool) -> None:
    assert kind_of(message("update", "digits-01", encode=encode)) == ("update", b"digits-01")


def test_a_body_may_be_a_view() -> None:
    args = message()
    assert kind_of((*args[:3], memoryview(args[3]), *args[4:])) == kind_of(args)


def test_a_message_without_a_run() -> None:
    assert kind_of(("other", "id", {}, b"[[], {}, {}]")) == ("other", b"")
    assert kind_of(()) == ("", b"")


def test_kinds_are_forgotten() -> None:
    brief = Briefness()
    for number in range(100):
        for _ in range(8):
            brief.took(("task", str(number).encode()), BRIEF)
    assert not brief.expected(("task", b"0"))
    assert brief.expected(("task", b"99"))
