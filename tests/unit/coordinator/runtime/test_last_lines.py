"""What a failure says of a worker's log: its newest lines, few, short and without a password."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from torchord.coordinator.runtime.last_lines import KEPT, MOST, LastLines, keep, of_worker


@pytest.fixture
def kept() -> Iterator[logging.Logger]:
    """A logger of a worker "w1", whose parent process was "w0"."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.INFO)
    keep("w0")
    keep("w1")
    yield logging.getLogger("shop")
    root.setLevel(level)
    for handler in [each for each in root.handlers if isinstance(each, LastLines)]:
        root.removeHandler(handler)


def test_the_newest_lines_are_kept_and_none_is_long(kept: logging.Logger) -> None:
    for number in range(3 * KEPT):
        kept.info("line %d %s", number, "x" * 2 * MOST)
    kept.debug("nobody asked for this")
    lines = of_worker("w1")
    assert len(lines) == KEPT and "line 59" in lines[-1] and max(map(len, lines)) == MOST


def test_other_workers_have_none_here(kept: logging.Logger) -> None:
    kept.info("something")
    assert of_worker("w0") == of_worker(None) == [] and len(of_worker("w1")) == 1


def test_a_password_in_a_url_is_not_told(kept: logging.Logger) -> None:
    kept.info("lost redis://user:se:cret@host:1/0 and redis://:other@h")
    [line] = of_worker("w1")
    assert "cret" not in line and "other" not in line and "redis://user:***@host:1/0" in line


def test_what_is_no_message_is_kept_as_it_is(kept: logging.Logger) -> None:
    [handler] = (each for each in logging.getLogger().handlers if isinstance(each, LastLines))
    handler.emit(logging.LogRecord("a", logging.INFO, "f", 1, "%d", ("x",), None))
    assert of_worker("w1") == ["%d"]
