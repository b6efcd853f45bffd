"""What a forked child must forget: locks, threads and sockets that are its parent's.

Celery's prefork pool forks workers from a process that has used its connections and threads.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class Resettable(Protocol):
    """What owns locks, threads or sockets that a forked child must not use."""

    def reset(self) -> None:
        """Forget them."""


_resettable: weakref.WeakSet[Resettable] = weakref.WeakSet()


def reset_after_fork(thing: Resettable) -> None:
    """Have `thing.reset()` called in each forked child, as long as it lives."""
    _resettable.add(thing)


def _reset_all() -> None:
    for thing in list(_resettable):
        thing.reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_all)
