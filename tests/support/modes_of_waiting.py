"""Ways in which code of a recipe stands still: each in a function that bears its name."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable


class Task:
    """One of `KINDS`, called in a thread, until it is told to end."""

    def __init__(self, kind: str) -> None:
        self.begun = threading.Event()
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._queue: queue.Queue[None] = queue.Queue()
        self._function: Callable[[], None] = getattr(self, kind)
        self._lock.acquire()

    def __call__(self) -> None:
        self.begun.set()
        self._function()

    def end(self) -> None:
        self._over.set()
        self._queue.put(None)
        self._lock.release()

    def endless_loop(self) -> None:
        while not self._over.is_set():
            pass

    def deadlock(self) -> None:
        with self._lock:
            pass

    def sleep(self) -> None:
        while not self._over.is_set():
            time.sleep(0.01)

    def library(self) -> None:
        self._queue.get()


KINDS = ("endless_loop", "deadlock", "sleep", "library")
