"""Finding the processes that a test's program started, dead parents or not."""

from __future__ import annotations

import psutil

MARK = "TORCHORD_TEST_MARK"


def marked(mark: str) -> list[psutil.Process]:
    """Living processes whose environment holds MARK=`mark`, or whose directory has `mark` in its path.

    Every descendant inherits the environment; servers that set their process title overwrite theirs.
    """
    found = []
    for process in psutil.process_iter():
        try:
            ours = process.environ().get(MARK) == mark or mark in process.cwd()
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def describe(processes: list[psutil.Process]) -> str:
    """One line a process, for a failure message."""
    lines = []
    for process in processes:
        try:
            lines.append(f"{process.pid} {process.status()} {' '.join(process.cmdline())}")
        except psutil.NoSuchProcess:
            continue
    return "\n".join(lines)
