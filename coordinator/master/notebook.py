"""The progress bar of a notebook: HTML that stays in the page, and needs no widgets."""

from __future__ import annotations

import time
from collections.abc import Callable
from html import escape
from typing import Any

_PAUSE_SECONDS = 0.5  # between two updates: each goes to the browser and into the notebook's file


class NotebookBar:
    """Has the methods of `rich.progress.Progress` that `torchord.coordinator.master.progress.Progress` calls.

    Args:
        clock: seconds that only grow, replaced in tests.

    Raises:
        ImportError: there is no IPython.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        from IPython.display import HTML, display

        self._html, self._display = HTML, display
        self._clock = clock
        self._handle: Any = None
        self._shown_at = float("-inf")
        self._name = self._note = ""
        self._said: list[str] = []
        self._completed = 0
        self._total: int | None = None
        self.console = self

    def start(self) -> None:
        """Begin to show."""
        self._handle = self._display(self._html(self._text()), display_id=True)

    def add_task(self, name: str, **fields: Any) -> None:
        """What the bar is of."""
        self._name = name
        self.update(None, **fields)

    def update(self, task: object, **fields: Any) -> None:
        """Change `note`, `completed` and `total`; the page is told twice a second at the most."""
        self._note = fields.get("note", self._note)
        self._completed = fields.get("completed", self._completed)
        self._total = fields.get("total", self._total)
        if self._clock() - self._shown_at >= _PAUSE_SECONDS:
            self._show()

    def print(self, text: str, **style: Any) -> None:
        """Say something once, in a line that stays below the bar."""
        self._said.append(text)
        self._show()

    def stop(self) -> None:
        """Show how it ended."""
        self._show()

    def _show(self) -> None:
        self._shown_at = self._clock()
        if self._handle is not None:
            self._handle.update(self._html(self._text()))

    def _text(self) -> str:
        total = f' max="{self._total}"' if self._total else ""
        value = f' value="{self._completed}"' if self._total else ""
        steps = f"{self._completed}/{self._total or '?'}"
        lines = "".join(f"<br>{escape(line)}" for line in self._said)
        return (
            f"<div><b>{escape(self._name)}</b> <progress{value}{total}></progress> {steps} "
            f"{escape(self._note)}{lines}</div>"
        )
