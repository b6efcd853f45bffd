"""What a worker says of its own loop and threads, beat by beat."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.support import modes_of_waiting
from tests.support.control import worker
from tests.support.waiting import wait_until
from torchord.cache.errors import CacheUnreachable, RecordDamaged
from torchord.cache.ledger import workers
from torchord.cache.ledger.heartbeat import LONG_SECONDS, PERIOD_SECONDS, Heartbeat
from torchord.cache.ledger.whereabouts import place_of
from torchord.cache.ledger.workers import DEAF_SECONDS, WorkerInfo
from torchord.cache.testing.memory_plane import MemoryPlane
from torchord.cache.testing.memory_registry import MemoryRegistry


class Beats:
    """A heartbeat whose thread does not wait: it beats as often as it is told."""

    def __init__(self, **arguments: Any) -> None:
        self.registry = MemoryRegistry(MemoryPlane())
        self.heartbeat = Heartbeat(self.registry, worker("w0"), **arguments)

    def beat(self, times: int) -> WorkerInfo:
        """Let it beat, and tell what it then says."""

        class Turns(threading.Event):
            def __init__(self) -> None:
                super().__init__()
                self.left = times

            def wait(self, timeout: float | None = None) -> bool:
                self.left -= 1
                return self.left < 0

        self.heartbeat._stop = Turns()
        self.heartbeat._run()
        return self.heartbeat._said()


DEAF_BEATS = int(DEAF_SECONDS / PERIOD_SECONDS) + 1


def test_a_loop_that_does_not_turn_is_counted_in_beats() -> None:
    """Not by the clock: a process that was stopped for an hour, all threads together, is not deaf for it."""
    beats = Beats()
    assert beats.beat(DEAF_BEATS).silent == 0.0, "nothing is known of it"
    beats.heartbeat.turned()
    found = beats.beat(10)
    assert found.silent == pytest.approx(10 * PERIOD_SECONDS) and not found.deaf
    assert beats.beat(DEAF_BEATS).deaf
    beats.heartbeat.turned()
    assert not beats.beat(1).deaf


def test_who_computes_is_not_deaf() -> None:
    """The loop of a solo pool rests meanwhile."""
    beats = Beats()
    beats.heartbeat.turned()
    beats.heartbeat.doing("a long shard")
    found = beats.beat(DEAF_BEATS)
    assert found.silent > DEAF_SECONDS and not found.deaf


def test_beats_that_do_not_arrive_are_no_evidence(monkeypatch: pytest.MonkeyPatch) -> None:
    """While Redis is away the consumer waits for it, and its loop rests."""
    beats = Beats()
    beats.heartbeat.turned()

    def away(info: WorkerInfo) -> None:
        raise CacheUnreachable("away")

    with monkeypatch.context() as patch:
        patch.setattr(beats.registry, "beat", away)
        assert beats.beat(DEAF_BEATS).silent == 0.0


def test_whoever_looks_after_it_hears_each_beat_until_it_is_told_to_end() -> None:
    heard: list[WorkerInfo] = []
    beats = Beats(after=heard.append)
    beats.heartbeat.turned()
    beats.beat(3)
    assert [info.id for info in heard] == ["w0"] * 3
    beats.heartbeat.rests()
    assert beats.beat(DEAF_BEATS).silent == 0.0
    assert len(heard) == 3


@contextmanager
def held(kind: str, heartbeat: Heartbeat) -> Iterator[int]:
    """A thread that stands still in code of a recipe; its id."""
    task = modes_of_waiting.Task(kind)

    def run() -> None:
        heartbeat.doing(f"run-1: {kind}")
        task()
        heartbeat.doing("")

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    wait_until(task.begun.is_set, message="the thread to begin")
    assert thread.ident is not None
    try:
        yield thread.ident
    finally:
        task.end()
        thread.join()


@pytest.mark.parametrize("kind", modes_of_waiting.KINDS)
def test_where_a_task_is_that_takes_long(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    beats = Beats()
    now = [100.0]
    monkeypatch.setattr("torchord.cache.ledger.heartbeat.time.monotonic", lambda: now[0])
    with held(kind, beats.heartbeat) as thread:
        now[0] += LONG_SECONDS / 2
        assert beats.heartbeat._said().where == {}, "nobody looks at a short one"
        now[0] += LONG_SECONDS
        wait_until(lambda: f"in {kind}" in place_of(thread), message="the line to be reached")
        (place,) = beats.heartbeat._said().where.values()
        assert "modes_of_waiting.py:" in place and f"in {kind}" in place, place
    assert beats.heartbeat._said().where == {}


def test_of_a_thread_that_has_ended_nothing_is_said() -> None:
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join()
    assert thread.ident is not None and place_of(thread.ident) == ""


def test_a_heartbeat_says_where_in_its_json() -> None:
    beats = Beats()
    info = workers.read(
        '{"id": "w", "node": "n", "host": "h", "pid": 1, "queues": [], "where": {"task": "a.py:1 in f"}}'
    )
    assert info.where == {"task": "a.py:1 in f"}
    assert beats.heartbeat._said().where == {}
    with pytest.raises(RecordDamaged, match="field 'where' of a heartbeat is list"):
        workers.read('{"id": "w", "node": "n", "host": "h", "pid": 1, "queues": [], "where": []}')
