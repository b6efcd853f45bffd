"""Waiting for a condition, in place of sleeping for a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

PATIENCE_SECONDS = 90.0
"""How long a test waits for what takes a moment: it only ends a test that hangs, on whatever machine."""


def wait_until(
    predicate: Callable[[], T],
    timeout: float = PATIENCE_SECONDS,
    message: str | Callable[[], str] = "",
    interval: float = 0.01,
) -> T:
    """Call `predicate` until it returns something true, and return that.

    Args:
        predicate: called every `interval` seconds, at least once.
        timeout: seconds after which the test fails.
        message: what was waited for; a callable is asked only on failure.
        interval: seconds between calls.

    Raises:
        AssertionError: the time is up.
    """
    deadline = time.monotonic() + timeout
    while True:
        result = predicate()
        if result:
            return result
        if time.monotonic() > deadline:
            text = message() if callable(message) else message
            raise AssertionError(
                f"after {timeout:g} s still waiting for {text or predicate}; last: {result!r}"
            )
        time.sleep(interval)
