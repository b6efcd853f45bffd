"""The progress bar of `Run.wait`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from torchord.cache.ledger.answers import Event
from torchord.cache.ledger.records import Head
from torchord.coordinator.local_cluster.starting import waiting_line

log = logging.getLogger(__name__)

_TOLD = ("rollback", "failed", "paused", "resumed", "evaluation lost", "discarded", "probe")


class Progress:
    """Shows step, loss, metric, samples/s and time left; nothing at all when not enabled.

    Args:
        name: of the run.
        enabled: False makes every method a no-op.
    """

    def __init__(self, name: str, *, enabled: bool) -> None:
        self.name = name
        self.enabled = enabled
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
                TimeRemainingColumn,
            )
            from rich.progress import Progress as Bar
            from rich.table import Column

            console = Console()
            wide = console.width >= 100  # below that only the name gives way, the figures do not
            self._bar = Bar(
                TextColumn(
                    "[bold]{task.description}",
                    table_column=Column(no_wrap=True, overflow="ellipsis", ratio=None if wide else 1),
                ),
                BarColumn(bar_width=None if wide else 8, table_column=Column(ratio=1) if wide else None),
                MofNCompleteColumn(table_column=Column(no_wrap=True)),
                TextColumn("{task.fields[note]}", table_column=Column(no_wrap=True)),
                TimeRemainingColumn(
                    compact=True, elapsed_when_finished=True, table_column=Column(no_wrap=True)
                ),
                console=console,
                expand=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(self.name, total=None, note="waiting for a training server")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def head(self, head: Head) -> None:
        """Show where the run stands."""
        if self._bar is not None:
            self._bar.update(self._task, total=head.total_steps, completed=head.version)
            if head.status == "paused":
                self._bar.update(self._task, note="paused")

    def waiting(self, names: Sequence[str], *, overdue: bool) -> None:
        """Say once that this program's own cluster is starting; without a bar, only if it takes long."""
        if self._waited or (self._bar is None and not overdue):
            return
        self._waited = True
        if self._bar is not None:
            self._bar.console.print(waiting_line(names))
        else:
            log.warning("run %r: %s", self.name, waiting_line(names))

    def quiet(self, said: str) -> None:
        """Show beside the bar what the run waits for; "" once it goes on."""
        if self._bar is not None and (said or self._quiet):
            self._bar.update(self._task, note=said or self._note())
        self._quiet = bool(said)

    def say(self, said: str) -> None:
        """Say something of the run once: above the bar, else in the log."""
        if self._bar is not None:
            self._bar.console.print(f"run {self.name!r} {said}", markup=False, highlight=False)
        else:
            log.warning("run %r %s", self.name, said)

    def event(self, event: Event) -> None:
        """Show one event."""
        if self._bar is None:
            return
        data = event.data
        if event.type == "step":
            if data["seconds"] > 0:
                rate = data["examples"] / data["seconds"]
                self._rate = rate if self._rate == 0 else 0.9 * self._rate + 0.1 * rate
            self._loss = f"loss {data['loss']:.4f}"
            self._bar.update(self._task, completed=data["version"])
        elif event.type == "evaluation":
            self._metric = "  ".join(
                f"{name} {value:.4f}" for name, value in data["metrics"].items() if name != "loss"
            )
        elif event.type in _TOLD:
            self._bar.console.print(f"{event.type}: {data}")
        self._bar.update(self._task, note=self._note())

    def _note(self) -> str:
        speed = f"{self._rate:,.0f}/s" if self._rate else ""
        return "  ".join(part for part in (self._loss, self._metric, speed) if part)
