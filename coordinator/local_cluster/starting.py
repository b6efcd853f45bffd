"""Which workers this program has started itself and that do not take tasks yet.

A `LocalCluster` registers its workers here, and who waits for a run asks here before it says that nobody
works: importing torch takes a worker a second or a minute, as the machine is. Imports nothing heavy.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import Protocol

from torchord.cache.errors import NoWorker


class StartedWorker(Protocol):
    """A worker as its cluster knows it."""

    @property
    def name(self) -> str:
        """Its name in the cluster."""
        ...

    def serves(self, queue: str) -> bool:
        """Whether it takes tasks from a queue once it is ready."""
        ...

    def ready(self) -> bool:
        """Whether it takes tasks."""
        ...

    def failure(self) -> str | None:
        """What there is to say of a worker that ended before it was ready, and by itself; None otherwise."""
        ...


_lock = threading.Lock()
_started: dict[StartedWorker, str] = {}  # worker -> URL; those that were found ready are taken out


def register(worker: StartedWorker, url: str) -> None:
    """A worker for the server at `url` was started."""
    with _lock:
        _started[worker] = url


def forget(workers: Iterable[StartedWorker]) -> None:
    """These are not to be waited for any more."""
    with _lock:
        for worker in workers:
            _started.pop(worker, None)


def starting(url: str) -> list[StartedWorker]:
    """The workers that this program has started for `url` and that are not ready.

    To be asked before the registry of living workers: a worker is in there before it is ready.
    """
    with _lock:
        here = [worker for worker, place in _started.items() if place == url]
        for worker in [worker for worker in here if worker.ready()]:
            here.remove(worker)
            del _started[worker]
    return here


def coming(workers: Sequence[StartedWorker], queues: Sequence[str]) -> list[str]:
    """Names of those workers that will serve one of `queues`.

    Args:
        workers: from `starting`.
        queues: queues that a run needs and nobody consumes.

    Raises:
        NoWorker: one that was to serve such a queue ended before it was ready, and no other one that will is
            starting; with its command and the end of its log.
    """
    failures = [(worker, worker.failure()) for worker in workers]
    for queue in queues:
        serving = [failure for worker, failure in failures if worker.serves(queue)]
        if serving and None not in serving:
            raise NoWorker(str(serving[0]))
    alive = [worker for worker, failure in failures if failure is None]
    return [worker.name for worker in alive if any(worker.serves(queue) for queue in queues)]


def waiting_line(names: Sequence[str]) -> str:
    """What a program that waits for its own cluster shows."""
    return f"waiting for the cluster's workers to start: {', '.join(names)}"
