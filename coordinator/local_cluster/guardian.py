"""A small process that owns a cluster's subprocesses, and the handle on it.

A parent that is killed with SIGKILL cannot clean up after itself, so it lets another process
start its children. The guardian reads commands as JSON lines on its standard input and answers
each with one JSON line on its standard output. When its input ends, however the parent went, it
ends every child and then itself.

    {"id": 1, "op": "spawn", "argv": [...], "env": {...}, "cwd": ..., "log": ..., "last": false}
    {"id": 2, "op": "poll" | "signal", "pid": 42, ...}       {"id": 3, "op": "grace", "seconds": 5.0}

The invariant: no child outlives the parent by more than the grace and a second.

- The parent ends or is killed: end of input, or, where a forked process still holds the pipe
  open, a changed parent id, looked at each second.
- The guardian itself is killed: on Linux the kernel then kills its children
  (PR_SET_PDEATHSIG). macOS has no such call; there `Guardian.close` kills them.
- Grandchildren: every child leads a session and process group of its own; what is left in the
  group a moment after its leader has ended is killed.

A child leaves no core dump: its memory holds the server's password.

The file is run as a script (`python -I -S guardian.py PARENT_PID SCRATCH GRACE`) and imports the
standard library alone, so it starts in about 30 ms. It stays single-threaded: PR_SET_PDEATHSIG
follows the thread that forked.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

GRACE_SECONDS = 5.0
REPLY_SECONDS = 10.0
LEFTOVER_SECONDS = 2.0
PARENT_CHECK_SECONDS = 1.0
PR_SET_PDEATHSIG = 1


class GuardianLost(ConnectionError):
    """The guardian process has ended or does not answer, and its children ended with it; start a new one."""


# --- the process ----------------------------------------------------------------------


class _Watch:
    """What the guardian process knows: its children, their exit codes, and the groups to sweep."""

    def __init__(self, parent: int, grace_seconds: float) -> None:
        self.parent = parent
        self.grace_seconds = grace_seconds
        self.running: dict[int, bool] = {}
        self.exit_codes: dict[int, int] = {}
        self.leftovers: dict[int, float] = {}
        self.prepare = _parent_death_signal()
        self.stopping = False

    def answer(self, line: bytes) -> bytes:
        """One command line -> one reply line."""
        reply: dict[str, Any] = {}
        try:
            command = json.loads(line)
            reply["id"] = command["id"]
            reply.update(getattr(self, f"op_{command['op']}")(command))
        except Exception as error:  # noqa: BLE001 - the parent is told; the guardian itself must go on
            reply["error"] = f"{type(error).__name__}: {error}"
        return json.dumps(reply).encode() + b"\n"

    def op_spawn(self, command: dict[str, Any]) -> dict[str, Any]:
        log = _open_log(command["log"])
        changes: dict[str, str | None] = command["env"]
        mine, prepare = os.getpid(), self.prepare

        def in_child() -> None:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
            for name, value in changes.items():
                os.unsetenv(name) if value is None else os.putenv(name, value)
            resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
            prepare(mine)

        try:
            child = subprocess.Popen(
                command["argv"],
                cwd=command["cwd"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=in_child,
                umask=0o077 if command["last"] else -1,  # the server: what it writes is its owner's
            )
        finally:
            os.close(log)
        child.returncode = 0  # reaped below by pid, never by Popen
        self.exit_codes.pop(child.pid, None)
        self.running[child.pid] = bool(command["last"])
        return {"pid": child.pid}

    def op_poll(self, command: dict[str, Any]) -> dict[str, Any]:
        self.reap()
        return {"code": self.exit_codes.get(command["pid"])}

    def op_signal(self, command: dict[str, Any]) -> dict[str, Any]:
        self.reap()
        pid, number = command["pid"], command["signal"]
        if pid in self.running:
            with contextlib.suppress(ProcessLookupError):
                (os.killpg if command["group"] else os.kill)(pid, number)
        return {"sent": pid in self.running}

    def op_grace(self, command: dict[str, Any]) -> dict[str, Any]:
        self.grace_seconds = float(command["seconds"])
        return {}

    def reap(self) -> None:
        """Collect exit codes, and kill what stays in a group whose leader has ended."""
        for pid in list(self.running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self.exit_codes[pid] = os.waitstatus_to_exitcode(status)
                del self.running[pid]
                self.leftovers[pid] = time.monotonic() + LEFTOVER_SECONDS
        for pid, deadline in list(self.leftovers.items()):
            late = self.stopping or time.monotonic() > deadline
            try:
                os.killpg(pid, signal.SIGKILL if late else 0)
            except (ProcessLookupError, PermissionError):
                late = True  # the group is empty
            if late:
                del self.leftovers[pid]

    def orphaned(self) -> bool:
        return os.getppid() != self.parent

    def end(self) -> None:
        """SIGTERM to every child, SIGKILL to the groups after the grace; `last` children after the others."""
        for last in (False, True):
            group = [pid for pid, is_last in self.running.items() if is_last is last]
            self._signal(group, signal.SIGCONT, os.killpg)
            self._signal(group, signal.SIGTERM)
            self._await(group, self.grace_seconds)
            self._signal(group, signal.SIGKILL, os.killpg)
            self._await(group, LEFTOVER_SECONDS)
        self.stopping = True
        self.reap()

    def _await(self, group: list[int], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while True:
            self.reap()
            if time.monotonic() > deadline or not any(pid in self.running for pid in group):
                return
            time.sleep(0.01)

    def _signal(self, group: list[int], number: int, send: Callable[[int, int], None] = os.kill) -> None:
        for pid in group:
            if pid in self.running:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    send(pid, number)


def _open_log(path: str | None) -> int:
    """A log to append to: this user's own file and no link, which another user could have laid there."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK
    if path is None:
        return os.open(os.devnull, os.O_WRONLY)
    log = os.open(path, flags, 0o600)
    found = os.fstat(log)
    if stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid():
        return log
    os.close(log)
    raise PermissionError(f"the log {path} is not a file of this user")


def _parent_death_signal() -> Callable[[int], None]:
    """For the forked child: the kernel shall kill it when the guardian (its pid) ends. Linux only."""
    if not sys.platform.startswith("linux"):
        return lambda _guardian: None
    import ctypes

    prctl = ctypes.CDLL(None).prctl

    def prepare(guardian: int) -> None:
        prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != guardian:  # it ended before the call above
            os._exit(1)

    return prepare


def main(parent: int, scratch: str, grace_seconds: float) -> None:
    """Serve commands until the input ends, then end every child and remove the scratch directory.

    Args:
        parent: process id that the guardian was started by.
        scratch: directory to remove at the end; "" for none.
        grace_seconds: time between SIGTERM and SIGKILL when the input ends.
    """
    watch = _Watch(parent, grace_seconds)
    wake_read, wake_write = os.pipe()
    for end in (wake_read, wake_write):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    asked_to_stop = False

    def on_stop(_number: int, _frame: FrameType | None) -> None:
        nonlocal asked_to_stop
        asked_to_stop = True

    signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
    signal.signal(signal.SIGTERM, on_stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)

    pending = b""
    while not (asked_to_stop or watch.orphaned()):
        timeout = 0.1 if watch.leftovers else PARENT_CHECK_SECONDS
        readable, _, _ = select.select([0, wake_read], [], [], timeout)
        if wake_read in readable:
            with contextlib.suppress(BlockingIOError):
                os.read(wake_read, 4096)
        if 0 in readable:
            data = os.read(0, 65536)
            if not data:
                break
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                with contextlib.suppress(BrokenPipeError):
                    os.write(1, watch.answer(line))
        watch.reap()
    watch.end()
    if scratch:
        import shutil

        shutil.rmtree(scratch, ignore_errors=True)


# --- the handle -----------------------------------------------------------------------


class Child:
    """A process that a guardian started. Signals pass through the guardian, so a reused pid is never hit."""

    def __init__(self, guardian: Guardian, pid: int) -> None:
        self._guardian = guardian
        self._code: int | None = None
        self.pid = pid

    def __repr__(self) -> str:
        return f"{type(self).__name__}(pid={self.pid}, exit_code={self._code})"

    def poll(self) -> int | None:
        """Exit code (negative: the signal that ended it), or None while it runs."""
        if self._code is None:
            try:
                self._code = self._guardian.call("poll", pid=self.pid)["code"]
            except GuardianLost:
                self._code = -int(signal.SIGKILL)
        return self._code

    def wait(self, timeout_seconds: float | None = None) -> int:
        """Exit code, once it has ended.

        Raises:
            TimeoutError: it still runs after `timeout_seconds`.
        """
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError(f"process {self.pid} still runs after {timeout_seconds} s")
            time.sleep(0.01)
        return code

    def send_signal(self, number: int, *, group: bool = False) -> None:
        """Signal the process, or its whole process group; nothing happens once it has ended."""
        if self._code is None:
            with contextlib.suppress(GuardianLost):
                self._guardian.call("signal", pid=self.pid, signal=int(number), group=group)

    def terminate(self) -> None:
        """SIGTERM: a Celery worker finishes its current task and ends."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to the whole group, pool processes included."""
        self.send_signal(signal.SIGKILL, group=True)

    def pause(self) -> None:
        """SIGSTOP to the whole group: the process is alive, silent and keeps its connections."""
        self.send_signal(signal.SIGSTOP, group=True)

    def cont(self) -> None:
        """SIGCONT to the whole group, after `pause`."""
        self.send_signal(signal.SIGCONT, group=True)

    def stop(self, grace_seconds: float = GRACE_SECONDS) -> int:
        """SIGTERM, SIGKILL after `grace_seconds`; returns the exit code."""
        self.cont()
        self.terminate()
        try:
            return self.wait(grace_seconds)
        except TimeoutError:
            self.kill()
            return self.wait(grace_seconds)


class Guardian:
    """Starts a guardian process and speaks to it. Belongs to the process that made it: a fork cannot use it.

    Args:
        scratch: directory that the guardian removes when all has ended; None for none.
        grace_seconds: time between SIGTERM and SIGKILL when this process ends.

    Example:
        >>> guardian = Guardian()
        >>> child = guardian.spawn(["sleep", "60"])
        >>> guardian.close()                    # `sleep` has ended
    """

    def __init__(self, *, scratch: Path | None = None, grace_seconds: float = GRACE_SECONDS) -> None:
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self.scratch = scratch
        self._grace_seconds = grace_seconds
        self._buffer = b""
        self._number = 0
        self._children: list[int] = []
        arguments = [str(self._owner), str(scratch or ""), str(grace_seconds)]
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        """Process id of the guardian."""
        return self._process.pid

    def spawn(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str | None] | None = None,
        cwd: Path | None = None,
        log: Path | None = None,
        last: bool = False,
    ) -> Child:
        """Start a process.

        Args:
            argv: program and arguments.
            env: changes to this process's environment as it was when the guardian started; None
                removes a variable.
            cwd: working directory; None for this process's.
            log: file that stdout and stderr are appended to; None discards them.
            last: ended after all others when this process ends (a server that others talk to).

        Raises:
            OSError: the program could not be started.
            GuardianLost: the guardian has ended.
        """
        fields = {"argv": list(argv), "env": dict(env or {}), "last": last}
        reply = self.call("spawn", **fields, cwd=str(cwd or Path.cwd()), log=str(log) if log else None)
        if "error" in reply:
            raise OSError(f"could not start {argv[0]}: {reply['error']}")
        self._children.append(reply["pid"])
        return Child(self, reply["pid"])

    def call(self, op: str, **fields: Any) -> dict[str, Any]:
        """Send one command and return its reply.

        Raises:
            GuardianLost: the guardian has ended, or did not answer in 10 s.
        """
        with self._lock:
            if os.getpid() != self._owner or self._process.stdin is None or self._process.stdin.closed:
                raise GuardianLost
            self._number += 1
            line = json.dumps({"id": self._number, "op": op, **fields})
            try:
                self._process.stdin.write(line.encode() + b"\n")
                return self._reply(self._number)
            except OSError as error:
                raise GuardianLost from error

    def _reply(self, number: int) -> dict[str, Any]:
        assert self._process.stdout is not None
        deadline = time.monotonic() + REPLY_SECONDS
        poll = select.poll()  # `select` takes no number of a file above 1023, and its program may have more
        poll.register(self._process.stdout, select.POLLIN)
        while True:
            while b"\n" in self._buffer:
                line, self._buffer = self._buffer.split(b"\n", 1)
                reply: dict[str, Any] = json.loads(line)
                if reply.get("id") == number:  # others answer calls that were interrupted
                    return reply
            ready = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
            data = os.read(self._process.stdout.fileno(), 65536) if ready else b""
            if not data:
                raise GuardianLost
            self._buffer += data

    def close(self, grace_seconds: float | None = None) -> None:
        """End every child (SIGTERM, SIGKILL after the grace), then the guardian. Idempotent.

        Args:
            grace_seconds: None for the constructor's.
        """
        if os.getpid() != self._owner or self._process.stdin is None or self._process.stdout is None:
            return
        if grace_seconds is not None and not self._process.stdin.closed:
            with contextlib.suppress(GuardianLost):
                self.call("grace", seconds=grace_seconds)
                self._grace_seconds = grace_seconds
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(2 * self._grace_seconds + 4 * LEFTOVER_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        if self._process.returncode != 0:
            self._sweep()

    def _sweep(self) -> None:
        """After a killed guardian: its scratch directory and, where the kernel did not end them, children."""
        if not sys.platform.startswith("linux"):
            for pid in self._children:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(pid, signal.SIGKILL)
        if self.scratch is not None:
            import shutil

            shutil.rmtree(self.scratch, ignore_errors=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]))
