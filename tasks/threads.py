"""The worker's pool: a thread, and for tasks that are over at once the thread that received them.

Handing a task to a thread takes a wake-up there, one for the way back and a pass of the interpreter's lock
each, about 0.2 ms in all: a twentieth of a step that computes next to nothing, and nothing that anybody
notices in a longer one.
"""

from __future__ import annotations

import re
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from celery.concurrency.base import apply_target
from celery.concurrency.thread import ApplyResult
from celery.concurrency.thread import TaskPool as ThreadPool

BRIEF_SECONDS = 0.02
"""A worker may be deaf to pings and signals for so long."""

_IN_A_ROW = 8  # so many brief tasks make the next one's briefness likely
_MOST_KINDS = 64  # (task, run)
_RUN = re.compile(rb'"run": ?"([^"]*)"')

Kind = tuple[str, bytes]


class Briefness:
    """Which kinds of task have been brief lately."""

    def __init__(self) -> None:
        self._in_a_row: OrderedDict[Kind, int] = OrderedDict()

    def expected(self, kind: Kind) -> bool:
        """Whether the next task of a kind is probably brief."""
        return self._in_a_row.get(kind, 0) >= _IN_A_ROW

    def took(self, kind: Kind, seconds: float) -> None:
        """Note what a task has taken."""
        self._in_a_row[kind] = self._in_a_row.get(kind, 0) + 1 if seconds < BRIEF_SECONDS else 0
        self._in_a_row.move_to_end(kind)
        if len(self._in_a_row) > _MOST_KINDS:
            self._in_a_row.popitem(last=False)


def kind_of(args: Sequence[Any]) -> Kind:
    """A task's name and, as far as its message tells, its run.

    Args:
        args: of Celery's tracer: name, id, request, body, …; of anything else that runs in a pool.
    """
    name, body = args[0] if args else "", args[3] if len(args) > 3 else b""
    found = _RUN.search(body.encode() if isinstance(body, str) else body)
    return str(name), b"" if found is None else bytes(found[1])


class TaskPool(ThreadPool):
    """Celery's pool of threads; with one thread, brief tasks run where their messages are received.

    A run's first tasks go to the thread, and again the first ones after one that took longer. So the worker
    answers while it computes, but for the time of one task that took longer than those before it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._brief = Briefness()
        self._handed = self._ended = 0  # tasks of the thread: the one counts here, the other there

    def on_apply(
        self,
        target: Callable[..., Any],
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        callback: Callable[..., Any] | None = None,
        accept_callback: Callable[..., Any] | None = None,
        **_: Any,
    ) -> ApplyResult | None:
        """See Celery."""
        kind = kind_of(args or ())
        call = (target, args, kwargs, callback, accept_callback)
        if self.limit == 1 and self._handed == self._ended and self._brief.expected(kind):
            self._run(kind, call)
            return None
        self._handed += 1
        return ApplyResult(self.executor.submit(self._run_there, kind, call))

    def _run(self, kind: Kind, call: tuple[Any, ...]) -> None:
        started = time.perf_counter()
        try:
            apply_target(*call)
        finally:
            self._brief.took(kind, time.perf_counter() - started)

    def _run_there(self, kind: Kind, call: tuple[Any, ...]) -> None:
        try:
            self._run(kind, call)
        finally:
            self._ended += 1
