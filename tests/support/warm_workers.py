"""Workers of tests' clusters that need not import torch, since they are forks of a process that has.

A worker's start takes two seconds of a core, most of them for torch, and the suite starts hundreds. A fork of
a process that has imported torch and computed nothing is a process of its own as any other worker is: with
its own session, environment, directory and log, killed and stopped alike, and ended with its cluster. There
are several such processes, each of which seeds its strings' hashes by itself, and they take turns: workers
differ in that as they do elsewhere.

A test whose matter is how a worker starts has no use for this: its file says `COLD = True`. And where a
worker's environment changes what torch or the interpreter read when they start, it is started as always.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from torchord.coordinator.local_cluster import guardian

SOCKETS = "WARM_START_SOCKETS"
"""The environment variable that tells `warm_guardian` where they listen."""
PROCESSES = 3
SCRIPTS = Path(__file__).absolute().parent


class WarmWorkers:
    """The warm processes of a test session, started when the first module asks for them."""

    def __init__(self, folder: Path) -> None:
        self.cold = False
        self._folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []

    def guardian(self, **arguments: Any) -> guardian.Guardian:
        """The guardian of a cluster, whose workers are their forks but in a cold file."""
        if self.cold or not sys.platform.startswith("linux"):
            return guardian.Guardian(**arguments)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(SOCKETS, self._sockets())
            patch.setattr(guardian, "__file__", str(SCRIPTS / "warm_guardian.py"))
            return guardian.Guardian(**arguments)

    def _sockets(self) -> str:
        paths = [self._folder / f"warm{i}" for i in range(PROCESSES)]
        for path in paths[len(self._processes) :]:
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(str(path))
                listener.listen(64)
                argv = [sys.executable, "-P", str(SCRIPTS / "warm_start.py"), str(listener.fileno())]
                pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
                self._processes.append(subprocess.Popen(argv, pass_fds=[listener.fileno()], **pipes))
        for process in self._processes:
            assert process.stdout is not None
            assert process.stdout.closed or process.stdout.read() == b"ready\n"
            process.stdout.close()
        return os.pathsep.join(map(str, paths))

    def close(self) -> None:
        """End them, with whatever worker still runs."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
            process.wait()
