"""A second thread for the checksums of a large blob: it begins at the end, the sender at the front.

A sender hands its bytes to the kernel as fast as the server takes them, on one core, and the checksums of
what it sent would add a third to that core's work. The server's core has time left: a thread that computes
from the last chunk on, until it meets the sender, fills it. The work in total is the same.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import xxhash

from torchord.cache.servers.fork import reset_after_fork

WORTH_IT_CHUNKS = 16
"""From 8 MiB on, in chunks of the usual size; below, handing the work over takes longer than doing it."""


class Checker:
    """One thread, started when it is first needed.

    Threads may share a checker; what cannot start at once because the thread is busy is left to the
    sender. A forked child starts without the thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: ThreadPoolExecutor | None = None
        reset_after_fork(self)

    @contextlib.contextmanager
    def beside(self, parts: Sequence[memoryview], sums: list[str]) -> Iterator[None]:
        """Fill in checksums from the last chunk on while the body of the `with` fills them in from the first.

        Args:
            parts: the chunks; not touched any more when the body has been left.
            sums: of the same length, "" where there is no checksum yet.
        """
        if len(parts) < WORTH_IT_CHUNKS:
            yield
            return
        left = threading.Event()

        def check() -> None:
            for i in reversed(range(len(parts))):
                if left.is_set():
                    return
                if not sums[i]:
                    sums[i] = xxhash.xxh3_64_hexdigest(parts[i])

        job = self._pool().submit(check)
        try:
            yield
        finally:
            left.set()
            if not job.cancel():
                job.result()

    def close(self) -> None:
        """End the thread; the checker may be used again."""
        with self._lock:
            thread, self._thread = self._thread, None
        if thread is not None:
            thread.shutdown()

    def reset(self) -> None:
        """Start afresh in a forked child, which has none of the parent's threads."""
        self._lock = threading.Lock()
        self._thread = None

    def _pool(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, "torchord-checksums", initializer=_let_others_first)
            return self._thread


def _let_others_first() -> None:
    """Have the scheduler treat this thread as a batch job: it gets its share, and pushes nobody aside.

    Not as an idle one: a thread that waits for a core while it holds the interpreter's lock stops all others.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
