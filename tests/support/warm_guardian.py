"""The guardian of a test's cluster, whose workers are forks of the processes of `warm_start`.

Run as a script in place of `guardian.py`, with the same arguments. A worker that is no child of this process
is asked after at the other end of its connection; all else is the guardian's own.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import os
import select
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

SOCKETS = "WARM_START_SOCKETS"
ROOT = Path(__file__).absolute().parents[2]
CELERY = ["-P", "-m", "celery"]
SAFE = ("TORCHORD_", "CELERY_", "PYTHONPATH", "PYTHONUNBUFFERED", "C_FAKEFORK")
"""What is read by nothing that `warm_start` has imported or set up before it knows it."""


def load() -> Any:
    """The module of the guardian, from its file: this script finds no packages."""
    spec = importlib.util.spec_from_file_location(
        "guardian", ROOT / "coordinator" / "local_cluster" / "guardian.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["guardian"] = module
    spec.loader.exec_module(module)
    return module


guardian = load()


class WarmWatch(guardian._Watch):  # type: ignore[misc, name-defined]
    """What the guardian knows, with workers that another process has forked."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.lines: dict[int, socket.socket] = {}
        self.sockets = itertools.cycle(os.environ.pop(SOCKETS).split(os.pathsep))

    def op_spawn(self, command: dict[str, Any]) -> dict[str, Any]:
        if command["argv"][1:4] != CELERY or not all(name.startswith(SAFE) for name in command["env"]):
            reply: dict[str, Any] = super().op_spawn(command)
            return reply
        env = {**os.environ, **command["env"]}
        request = {
            "argv": command["argv"][1:],
            "cwd": command["cwd"],
            "env": {name: value for name, value in env.items() if value is not None},
        }
        line = socket.socket(socket.AF_UNIX)
        log = guardian._open_log(command["log"])
        try:
            line.connect(next(self.sockets))
            data = json.dumps(request).encode() + b"\n"
            sent = socket.send_fds(line, [data], [log])
            line.sendall(data[sent:])
        finally:
            os.close(log)
        pid = int(line.recv(32))
        self.exit_codes.pop(pid, None)
        self.running[pid] = False
        self.lines[pid] = line
        return {"pid": pid}

    def reap(self) -> None:
        ended, _, _ = select.select(self.lines.values(), [], [], 0)
        for pid in [pid for pid, line in self.lines.items() if line in ended]:
            with self.lines.pop(pid) as line:
                told = line.recv(32)
            self.exit_codes[pid] = int(told) if told else -int(signal.SIGKILL)
            del self.running[pid]
            self.leftovers[pid] = time.monotonic() + guardian.LEFTOVER_SECONDS
        theirs = {pid: self.running.pop(pid) for pid in self.lines}
        super().reap()
        self.running.update(theirs)


if __name__ == "__main__":
    guardian._Watch = WarmWatch
    with contextlib.suppress(KeyboardInterrupt):
        guardian.main(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]))
