"""What `torchord watch` shows on a terminal: a curve that grows, and what happened last."""

from __future__ import annotations

from collections import deque
from types import TracebackType
from typing import Any, Self

from torchord.cache.ledger.answers import Event
from torchord.coordinator.drawing.characters import characters
from torchord.coordinator.drawing.chart import Chart, Line
from torchord.coordinator.drawing.sampling import sampled

_POINTS = 400
_EVENTS, _ROWS = 6, 10


class Screen:
    """Shows one run.

    Args:
        console: of rich, on a terminal.
        name: of the run.
    """

    def __init__(self, console: Any, name: str) -> None:
        from rich.live import Live

        self._console, self._name = console, name
        self._versions: list[int] = []
        self._losses: list[float] = []
        self._measured: dict[int, float] = {}
        self._said: deque[str] = deque(maxlen=_EVENTS)
        self._step = self._waits = ""
        self._live = Live(console=console, refresh_per_second=4, get_renderable=self._text)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def event(self, event: Event, worded: str) -> None:
        """Take one event in.

        Args:
            worded: it for people.
        """
        data = event.data
        if event.type == "step":
            self._step = worded
            self._versions.append(data["version"])
            self._losses.append(data["loss"])
            return
        if event.type == "rollback":
            kept = sum(version <= data["version"] for version in self._versions)
            del self._versions[kept:], self._losses[kept:]
        if event.type == "evaluation" and isinstance(loss := data["metrics"].get("loss"), float):
            self._measured[data["version"]] = loss
        self._said.append(worded)

    def quiet(self, said: str) -> None:
        """See `torchord.coordinator.master.waiting.Shown`."""
        self._waits = said

    def say(self, said: str) -> None:
        """See `torchord.coordinator.master.waiting.Shown`."""
        self._said.append(said)

    def lines(self, width: int) -> list[str]:
        """What is shown, in lines of at most `width` columns."""
        rows = sampled(self._losses, _POINTS)
        curve = Line("training", [self._versions[row] for row in rows], [self._losses[row] for row in rows])
        measured = sorted(self._measured.items())
        held = Line("evaluation", [version for version, _ in measured], [loss for _, loss in measured])
        ascii_only = not (self._console.encoding or "").lower().startswith("utf")
        chart = Chart(f"{self._name}: loss", (curve, held) if measured else (curve,))
        drawn = characters(chart, width=width, height=_ROWS, ascii_only=ascii_only)
        told = [self._step, *([self._waits] if self._waits else []), *self._said]
        return [*drawn, *(line[:width] for line in told)]

    def _text(self) -> Any:
        from rich.text import Text

        return Text("\n".join(self.lines(self._console.width)), no_wrap=True)
