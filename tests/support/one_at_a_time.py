"""Threads of which one runs at a time, in a seeded order: an interleaving that can be had again."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from typing import Any


class OneAtATime:
    """Runs several acts in threads of their own; one waits wherever it calls `pause`, until it is drawn.

    Args:
        draw: of who is next.
    """

    def __init__(self, draw: random.Random) -> None:
        self._draw = draw
        self._turn = threading.Condition()
        self._ready: set[int] = set()
        self._running = -1

    @property
    def inside(self) -> bool:
        """Whether the caller is one of them."""
        return bool(self._ready) and threading.current_thread().name.isdecimal()

    def run(self, acts: Sequence[Callable[[], Any]]) -> None:
        """Run them all, until each has ended or is `gone`; they end by themselves."""
        self._ready = set(range(len(acts)))
        threads = [
            threading.Thread(target=self._act, args=(number, act), name=str(number), daemon=True)
            for number, act in enumerate(acts)
        ]
        with self._turn:
            self._next()
        for thread in threads:
            thread.start()
        with self._turn:
            assert self._turn.wait_for(lambda: not self._ready, 60.0), "somebody hangs"

    def pause(self) -> None:
        """Let another go on, or the caller; outside of `run`, go on."""
        if not self.inside:
            return
        number = int(threading.current_thread().name)
        with self._turn:
            self._next()
            self._turn.wait_for(lambda: self._running == number)

    def gone(self) -> None:
        """The caller is not to be drawn any more, nor to be waited for."""
        with self._turn:
            self._ready.discard(self._running)
            self._next()

    def _act(self, number: int, act: Callable[[], Any]) -> None:
        with self._turn:
            self._turn.wait_for(lambda: self._running == number)
        try:
            act()
        except SystemExit:  # as a process ends
            pass
        finally:
            if number in self._ready:
                self.gone()

    def _next(self) -> None:
        self._running = self._draw.choice(sorted(self._ready)) if self._ready else -1
        self._turn.notify_all()
