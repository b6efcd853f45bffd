"""A process that imports torch and then forks one worker after another (`warm_workers` says why).

Run as a script with the descriptor of a socket that listens. Each connection asks for one worker, with a JSON
object and the descriptor of its log; it is told the worker's process id, and later how it ended. The worker
ends when the connection is closed, or the standard input of this process.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import resource
import runpy
import select
import signal
import socket
import sys
from typing import Any

PRELOADED = ("torch", "torch._dynamo", "numpy.random", "safetensors.torch", "redis", "kombu.transport.redis")
PR_SET_PDEATHSIG = 1


def receive(line: socket.socket) -> tuple[dict[str, Any], int]:
    """A request and the descriptor that came with it."""
    data, descriptors, _, _ = socket.recv_fds(line, 1 << 16, 1)
    while not data.endswith(b"\n"):
        more = line.recv(1 << 16)
        if not more:
            raise ConnectionError("whoever asked has ended")
        data += more
    return json.loads(data), descriptors[0]


def serve(listener: socket.socket) -> dict[str, Any]:
    """Fork a worker for each connection until the input ends; returns in a worker alone, with its request."""
    wake, awake = os.pipe()
    for end in (wake, awake):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(awake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    lines: dict[int, socket.socket] = {}
    while True:
        readable, _, _ = select.select([0, wake, listener, *lines.values()], [], [])
        if 0 in readable:
            sys.exit(0)  # the kernel ends the workers
        with contextlib.suppress(BlockingIOError):
            os.read(wake, 4096)
        for pid, line in list(lines.items()):
            if line in readable:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
            ended, status = os.waitpid(pid, 0 if line in readable else os.WNOHANG)
            if ended:
                with contextlib.suppress(OSError):
                    line.send(b"%d\n" % os.waitstatus_to_exitcode(status))
                lines.pop(pid).close()
        if listener in readable:
            line, _ = listener.accept()
            try:
                request, log = receive(line)
            except (ConnectionError, IndexError):
                line.close()
                continue
            mine = os.getpid()
            if not (pid := os.fork()):
                signal.set_wakeup_fd(-1)
                become(request, log, parent=mine)
                for descriptor in (wake, awake):
                    os.close(descriptor)
                for one in (listener, line, *lines.values()):
                    one.close()
                return request
            os.close(log)
            lines[pid] = line
            with contextlib.suppress(OSError):
                line.send(b"%d\n" % pid)


def become(request: dict[str, Any], log: int, *, parent: int) -> None:
    """Make of a fork what the guardian and the interpreter make of a process that they start."""
    os.setsid()
    for number in (signal.SIGINT, signal.SIGCHLD):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, standard in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(descriptor, standard)
    os.close(nothing)
    os.close(log)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(write_through=True)  # type: ignore[union-attr]
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.path[:0] = [path for path in request["env"].get("PYTHONPATH", "").split(os.pathsep) if path]
    import numpy as np

    np.random.seed()  # the generator that a process seeds when it starts


if __name__ == "__main__":
    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()
    os.write(1, b"ready\n")
    os.dup2(2, 1)  # whoever started this reads to the end
    asked = serve(socket.socket(fileno=int(sys.argv[1])))
    sys.orig_argv = [sys.executable, *asked["argv"]]
    sys.argv = ["-m", *asked["argv"][asked["argv"].index("celery") + 1 :]]
    runpy._run_module_as_main("celery")  # type: ignore[attr-defined]
