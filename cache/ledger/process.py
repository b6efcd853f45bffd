"""Whether a process of this machine has ended: a surer and quicker sign than a lease that runs out.

A lease tells of a death on any machine, after seconds. Of a process beside this one the kernel knows at
once. Only Linux's /proc is asked; elsewhere nothing is known, and the lease decides alone.
"""

from __future__ import annotations

import os
import socket
from functools import cache
from pathlib import Path

_PROC = Path("/proc")


@cache
def place() -> str:
    """Where this process's id means something: host, boot and process namespace; "" if unknown.

    Two containers of one host are two places, even where they share the host's name.
    """
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink(_PROC / 'self/ns/pid')}"
    except OSError:
        return ""


def started(pid: int) -> int:
    """When a process began, in clock ticks since the boot; 0 if that is not known."""
    try:
        return int(_status(pid)[19])
    except (OSError, IndexError, ValueError):
        return 0


def ended(where: str, pid: int, since: int) -> bool:
    """Whether a process is known to have ended; False where that cannot be told from here.

    Args:
        where: its `place`.
        pid: its id there.
        since: when it `started`: by now another process may have its id.
    """
    if not since or not where or where != place():
        return False
    try:
        status = _status(pid)
        return status[0] in "ZX" or int(status[19]) != since
    except (FileNotFoundError, ProcessLookupError):
        return _absent(pid)
    except (OSError, IndexError, ValueError):
        return False


def _status(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on."""
    # The command's name, in parentheses, may itself hold spaces and parentheses.
    return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()


def _absent(pid: int) -> bool:
    """Whether there is no process with this id; a mount option may hide those of other users."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False
