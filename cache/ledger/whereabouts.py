"""Which line of code a thread of this process is at: read from outside, at no cost to the thread."""

from __future__ import annotations

import os
import sys
import sysconfig
from types import FrameType

_LIBRARIES = tuple(
    {os.path.join(sysconfig.get_path(name), "") for name in ("stdlib", "platstdlib", "purelib", "platlib")}
)


def place_of(thread: int) -> str:
    """Where a thread is now: the innermost line, and by which line outside of libraries it came there.

    Args:
        thread: as `threading.get_ident()` names it.

    Returns:
        As in "model.py:12 in forward", or "linear.py:125 in forward, called at model.py:12 in forward"; ""
        if there is no such thread.
    """
    innermost = frame = sys._current_frames().get(thread)
    if innermost is None:
        return ""
    while frame is not None and not _written_here(frame):
        frame = frame.f_back
    if frame is None or frame is innermost:
        return _said(innermost)
    return f"{_said(innermost)}, called at {_said(frame)}"


def _said(frame: FrameType) -> str:
    code = frame.f_code
    return f"{os.path.basename(code.co_filename)}:{frame.f_lineno} in {code.co_name}"


def _written_here(frame: FrameType) -> bool:
    """Whether this is code of a recipe, or torchord's, and not of a library."""
    if str(frame.f_globals.get("__name__")).partition(".")[0] == "torchord":
        return True
    path = frame.f_code.co_filename
    return not path.startswith(_LIBRARIES) and not path.startswith("<")
