"""The progress bar of `Run.wait`, and its lines where there is no terminal; events in words."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from types import TracebackType
from typing import Any

from torchord.cache.ledger.answers import Event
from torchord.cache.ledger.records import Head
from torchord.cache.ledger.step_metrics import METRICS
from torchord.coordinator.local_cluster.starting import waiting_line
from torchord.coordinator.messages.waits import duration

log = logging.getLogger(__name__)

_TOLD = ("rollback", "failed", "paused", "resumed", "evaluation lost", "discarded", "probe", "stopped")


_RECENT = 8  # of the last steps, by which the time left is told, as on the pages about runs
_METRICS_SHOWN = 2  # of a step, beside its loss
_LINE_SECONDS, _LINE_PART = 30.0, 0.05


class Progress:
    """Shows step, loss, metric, examples/s and time left; nothing at all when not enabled.

    Where there is no terminal, a line every 30 s, or every 5 % of the steps where that is sooner by a second.

    Args:
        name: of the run.
        enabled: False makes every method a no-op.
        clock: seconds that only grow, replaced in tests.
    """

    def __init__(self, name: str, *, enabled: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self.name = name
        self.enabled = enabled
        self._clock = clock
        self._lines: Any = None  # the console, where it is no terminal
        self._said_at, self._said_step = float("-inf"), 0
        self._at = self._head = self._total = 0
        self._seconds: deque[float] = deque(maxlen=_RECENT)
        self._bar: Any = None
        self._task: Any = None
        self._rate = 0.0
        self._waited = self._quiet = False
        self._loss = self._metric = ""

    def __enter__(self) -> Progress:
        if self.enabled:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                TextColumn,
            )
            from rich.progress import Progress as Bar
            from rich.table import Column

            console = Console()
            if not (console.is_terminal or console.is_jupyter):
                self._lines = console
                return self
            if console.is_jupyter:
                self._in_notebook()
                return self
            wide = console.width >= 100  # below that only the name gives way, the figures do not
            self._bar = Bar(
                TextColumn(
                    "[bold]{task.description}",
                    table_column=Column(no_wrap=True, overflow="ellipsis", ratio=None if wide else 1),
                ),
                BarColumn(bar_width=None if wide else 8, table_column=Column(ratio=1) if wide else None),
                MofNCompleteColumn(table_column=Column(no_wrap=True)),
                TextColumn("{task.fields[note]}", table_column=Column(no_wrap=True)),
                console=console,
                expand=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(self.name, total=None, note="waiting for a training server")
        return self

    def _in_notebook(self) -> None:
        """HTML that stays; lines where there is no IPython after all."""
        from rich.console import Console

        from torchord.coordinator.master.notebook import NotebookBar

        try:
            self._bar = NotebookBar(clock=self._clock)
        except ImportError:
            self._lines = Console(force_jupyter=False)
            return
        self._bar.start()
        self._bar.add_task(self.name, total=None, note="waiting for a training server")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def head(self, head: Head) -> None:
        """Show where the run stands."""
        self._total, self._head = head.total_steps or 0, head.version
        if self._bar is not None:
            self._bar.update(self._task, total=head.total_steps, completed=head.version)
            if head.status == "paused":
                self._bar.update(self._task, note="paused")

    def waiting(self, names: Sequence[str], *, overdue: bool) -> None:
        """Say once that this program's own cluster is starting; without a bar, only if it takes long."""
        shown = self._bar is not None or self._lines is not None
        if self._waited or not (shown or overdue):
            return
        self._waited = True
        if shown:
            self._print(waiting_line(names))
        else:
            log.warning("run %r: %s", self.name, waiting_line(names))

    def quiet(self, said: str) -> None:
        """Show beside the bar what the run waits for; "" once it goes on. Lines say it by `say`."""
        if self._bar is not None and (said or self._quiet):
            self._bar.update(self._task, note=said or self._note())
        self._quiet = bool(said)

    def say(self, said: str) -> None:
        """Say something of the run once: above the bar, else in the log."""
        if self._bar is not None or self._lines is not None:
            self._print(f"run {self.name!r} {said}")
        else:
            log.warning("run %r %s", self.name, said)

    def event(self, event: Event) -> None:
        """Show one event."""
        if self._bar is None and self._lines is None:
            return
        data = event.data
        if event.type == "step":
            if data["seconds"] > 0:
                rate = data["examples"] / data["seconds"]
                self._rate = rate if self._rate == 0 else 0.9 * self._rate + 0.1 * rate
            shown = list(data.get(METRICS, {}).items())[:_METRICS_SHOWN]
            self._loss = "  ".join(
                [f"loss {data['loss']:.4f}", *(f"{name} {value:.4f}" for name, value in shown)]
            )
            self._at = data["version"]
            self._seconds.append(data["seconds"])
            if self._bar is not None:
                self._bar.update(self._task, completed=self._at)
            else:
                self._line()
        elif event.type == "evaluation":
            self._metric = "  ".join(
                f"{name} {value:.4f}" for name, value in data["metrics"].items() if name != "loss"
            )
        elif event.type in _TOLD:
            self._print(worded(event.type, data))
        elif event.type == "done" and self._lines is not None:
            self._print(f"{self.name}: done  {self._note()}")
        if self._bar is not None:
            self._bar.update(self._task, note=self._note())

    def _note(self) -> str:
        speed = f"{self._rate:,.0f} ex/s" if self._rate else ""
        to_come = self._total - self._at
        left = f"{duration(to_come * median(self._seconds))} left" if to_come > 0 and self._seconds else ""
        return "  ".join(part for part in (self._loss, self._metric, speed, left) if part)

    def _line(self) -> None:
        """Where there is no terminal: print the step, if it is due and of now."""
        now, part = self._clock(), self._at - self._said_step
        if self._head - self._at > max(2, _LINE_PART * self._total):
            return
        due = now - self._said_at >= _LINE_SECONDS or self._at == self._total
        if due or (part >= _LINE_PART * self._total and now - self._said_at >= 1):
            self._said_at, self._said_step = now, self._at
            self._print(f"{self.name}: step {self._at} of {self._total or '?'}  {self._note()}")

    def _print(self, text: str) -> None:
        console = self._lines if self._bar is None else self._bar.console
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def worded(kind: str, data: dict[str, Any]) -> str:
    """One event in a line for people."""
    if kind == "step":
        said = "".join(f", {name} {value:.6g}" for name, value in data.get(METRICS, {}).items())
        return (
            f"step {data['step']}: loss {data['loss']:.6g}{said}, {data['examples']} examples in "
            f"{data['seconds']:.2f} s"
        )
    if kind == "stopped":
        return f"stopped at version {data['version']}: {data['reason']}"
    if data.keys() == {"message"}:
        return f"{kind}: {data['message']}"
    return f"{kind}: {', '.join(_pairs(data))}" if data else kind


def _pairs(data: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in data.items():
        if isinstance(value, dict):
            yield from _pairs(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name} {value:.6g}" if isinstance(value, float) else f"{prefix}{name} {value}"
