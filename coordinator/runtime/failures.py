"""What is said of an error: where it was raised, and what was being done."""

from __future__ import annotations

import os
import traceback

_FRAMES_SHOWN = 4


def short_traceback(error: BaseException) -> str:
    """The last frames of an error, innermost last, one line each: enough to find the place."""
    frames = traceback.extract_tb(error.__traceback__)[-_FRAMES_SHOWN:]
    lines = [
        f"{os.path.basename(f.filename)}:{f.lineno} in {f.name}: {f.line or ''}".rstrip() for f in frames
    ]
    return "\n".join(lines)


def noted(error: BaseException) -> str:
    """What was being done when the error was raised, from its notes (PEP 678)."""
    notes = [note.removeprefix("torchord: ") for note in getattr(error, "__notes__", ())]
    return f" ({'; '.join(notes)})" if notes else ""
