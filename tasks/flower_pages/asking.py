"""Asks what the pages show in threads, so that Flower's event loop never waits for Redis or a disk."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from torchord.cache.errors import TorchordError
from torchord.cache.settings import from_environment

if TYPE_CHECKING:
    from torchord.coordinator.pages.answers import Answers

_THREADS = 4
_WAITING_MOST = 64
_ANSWERS_KEPT = 128


class Busy(TorchordError):
    """More questions wait for an answer than are answered; ask again in a while."""


class Asking:
    """Asks `Answers`, which is made at the first question: it loads torch.

    Args:
        make: what to ask; None for what the environment says.
    """

    def __init__(self, make: Callable[[], Answers] | None = None) -> None:
        self._make = make or _from_environment
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="torchord-pages")
        self._slow = ThreadPoolExecutor(1, thread_name_prefix="torchord-pages-slow")
        self._lock = threading.Lock()
        self._pages: Answers | None = None
        self._waiting = 0
        self._answers: dict[tuple[Any, ...], tuple[float, Future[Any]]] = {}

    async def ask(
        self,
        question: Callable[[Answers], Any],
        *,
        key: tuple[Any, ...] = (),
        seconds: float = 0.0,
        slow: bool = False,
    ) -> Any:
        """The answer to a question, which blocks and so is put in a thread.

        Args:
            key: names the question, so that whoever asks the same shares the answer; () for nobody.
            seconds: how long an answer is good.
            slow: it takes long, so it waits for others of its kind and they for it.

        Raises:
            Busy: too many questions wait.
        """
        found = self._answers.get(key) if key else None
        if found is not None and (not found[1].done() or time.monotonic() < found[0]):
            return await asyncio.wrap_future(found[1])
        if self._waiting >= _WAITING_MOST:
            raise Busy(f"{self._waiting} questions wait for an answer; ask again in a while")
        self._waiting += 1
        future = (self._slow if slow else self._threads).submit(self._answer, question)
        if key:
            self._forget_old()
            self._answers[key] = (time.monotonic() + seconds, future)
        try:
            return await asyncio.wrap_future(future)
        finally:
            self._waiting -= 1

    def forget(self) -> None:
        """Let the next questions be asked anew: something has changed."""
        self._answers.clear()

    def _answer(self, question: Callable[[Answers], Any]) -> Any:
        with self._lock:
            if self._pages is None:
                self._pages = self._make()
        return question(self._pages)

    def _forget_old(self) -> None:
        if len(self._answers) >= _ANSWERS_KEPT:
            now = time.monotonic()
            old = [key for key, (until, future) in self._answers.items() if future.done() and until < now]
            for key in old:
                del self._answers[key]


def _from_environment() -> Answers:
    from torchord.coordinator.pages.answers import Answers

    return Answers(from_environment())
