"""A worker that holds too much memory is told to end, once."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from torchord.cache.errors import InvalidInput
from torchord.tasks import memory_limit
from torchord.tasks.memory_limit import MemoryLimit, resident


def test_it_is_told_once_with_what_it_holds_and_may_have() -> None:
    told: list[str] = []
    held = 100 << 20
    limit = MemoryLimit(300 << 20, told.append, held=lambda: held)
    assert not limit.look()
    held = 299 << 20
    assert not limit.look() and not told
    held = 301 << 20
    assert limit.look() and not limit.look()
    assert told == ["it holds 301 MiB, and may have 300 (TORCHORD_MEMORY_LIMIT_BYTES)"]


def test_without_a_limit_nobody_looks() -> None:
    assert not MemoryLimit(0, pytest.fail, held=lambda: pytest.fail("looked")).look()


def test_what_a_worker_holds_at_its_start_is_no_limit() -> None:
    with pytest.raises(
        InvalidInput, match=r"holds 400 MiB before its first task, and may have 300 .*give it"
    ):
        MemoryLimit(300 << 20, pytest.fail, held=lambda: 400 << 20)


def test_resident_memory_grows_with_what_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    before = resident()
    held = b"x" * (256 << 20)  # far more than what else the process may let go meanwhile
    assert resident() - before > 128 << 20, len(held)

    def nowhere(*_: object) -> Path:
        raise FileNotFoundError

    monkeypatch.setattr(memory_limit, "Path", nowhere)
    assert resident() == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
