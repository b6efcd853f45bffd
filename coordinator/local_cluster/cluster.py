"""A whole cluster on this machine: an embedded server, a training server and Clients.

Every process is what one would start by hand: `celery -A torchord worker -Q ...`. A guardian process
starts them, so that none is left behind when this process ends, however it ends.

    this process ──pipe──▶ guardian ──▶ valkey-server
                                    ├─▶ celery -A torchord worker -Q torchord.updates   -n server@%h
                                    ├─▶ celery -A torchord worker -Q torchord.gradients -n client1@%h
                                    └─▶ ...
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Literal, Self

from torchord.cache.errors import InvalidInput, NoWorker
from torchord.cache.keyring import local_path, write_local
from torchord.cache.settings import HARDWARE, PORTABLE_KERNELS, from_environment, located
from torchord.coordinator.local_cluster.embedded_server import EmbeddedServer, tail
from torchord.coordinator.local_cluster.guardian import GRACE_SECONDS, Child, Guardian, GuardianLost
from torchord.coordinator.local_cluster.import_path import allow_list, for_workers
from torchord.coordinator.local_cluster.starting import forget, register

READY_SECONDS = 60.0
READY_MARK = b" ready."
QUEUES: Mapping[str, str] = MappingProxyType({"server": "torchord.updates", "client": "torchord.gradients"})
# What would make a child talk to another broker than this cluster's, or load another app.
FOREIGN = (
    "CELERY_BROKER_URL",
    "CELERY_BROKER_READ_URL",
    "CELERY_BROKER_WRITE_URL",
    "CELERY_RESULT_BACKEND",
    "CELERY_CONFIG_MODULE",
    "CELERY_LOADER",
    "C_FAKEFORK",
)

Role = Literal["server", "client", "single"]
Layout = Literal["split", "single"]
STEMS: Mapping[Role, str] = MappingProxyType({"client": "client", "server": "standby", "single": "worker"})


@dataclass(frozen=True, slots=True)
class _Launch:
    """How a worker is started, so that it can be started again."""

    argv: tuple[str, ...]
    queues: frozenset[str] | None  # None: all
    env: Mapping[str, str | None]
    cwd: Path
    log: Path


@dataclass(slots=True, eq=False)
class WorkerProcess:
    """One Celery worker of a `LocalCluster`.

    Attributes:
        name: its name in the cluster; it begins the name of its Celery node.
        role: "server" (the training server and its standbys), "client", or "single" (all queues).
        log: file with its stdout and stderr, over all its restarts.
    """

    name: str
    role: Role
    log: Path
    _launch: _Launch = field(repr=False)
    _child: Child
    _log_start: int = field(repr=False)
    _told_to_end: bool = field(default=False, repr=False)

    @property
    def pid(self) -> int:
        """Process id; another one after `LocalCluster.restart`."""
        return self._child.pid

    @property
    def command(self) -> str:
        """The command line, as one would type it."""
        return shlex.join(self._launch.argv)

    def poll(self) -> int | None:
        """Exit code (negative: the signal that ended it), or None while it runs."""
        return self._child.poll()

    def wait(self, timeout_seconds: float | None = None) -> int:
        """Exit code, once it has ended.

        Raises:
            TimeoutError: it still runs after `timeout_seconds`.
        """
        return self._child.wait(timeout_seconds)

    def kill(self) -> None:
        """SIGKILL, to pool processes too: a crash. It has ended when `wait()` returns."""
        self._told_to_end = True
        self._child.kill()

    def terminate(self) -> None:
        """SIGTERM: Celery's warm shutdown, which finishes the current task first."""
        self._told_to_end = True
        self._child.terminate()

    def pause(self) -> None:
        """SIGSTOP: a worker that hangs or that a partition hides; its connections stay open."""
        self._child.pause()

    def cont(self) -> None:
        """SIGCONT, after `pause`."""
        self._child.cont()

    def ready(self) -> bool:
        """Whether this start of the worker has come so far that it takes tasks."""
        try:
            with self.log.open("rb") as log:
                log.seek(self._log_start)
                return READY_MARK in log.read()
        except FileNotFoundError:
            return False

    def serves(self, queue: str) -> bool:
        """Whether it takes tasks from a queue once it is ready."""
        return self._launch.queues is None or queue in self._launch.queues

    def failure(self) -> str | None:
        """What there is to say of it if it ended before it was ready, and nobody told it to; else None.

        With its command and the end of its log.
        """
        code = self.poll()
        if code is None or self._told_to_end or self.ready():
            return None
        return _report(self, f"ended with exit code {code} before it was ready")

    def tail(self, lines: int = 15) -> str:
        """The last lines of its log, indented."""
        return tail(self.log, lines)


class LocalCluster:
    """A server, a training server and Clients on this machine, for as long as the `with` block lasts.

    Leaving the block ends everything: the workers get SIGTERM and, after a grace, SIGKILL; then the
    server goes. The same happens when this process is interrupted or killed.

    Args:
        workers: number of Clients. 0 starts the embedded server alone.
        url: use this Redis-compatible server; None starts one on 127.0.0.1 (see
            `torchord.coordinator.local_cluster.embedded_server` for which program that is).
        layout: "split": one worker serves `updates`, the Clients serve `gradients`. "single": one
            worker serves every queue, as `celery -A torchord worker` does; `workers` is then ignored
            unless it is 0.
        pool: Celery pool of each worker ("threads", "solo", "prefork"); None leaves the app's own.
        concurrency: tasks that one Client runs at a time; None is 1, and the app's own when single.
        standby: further training servers, which take over when the first one dies.
        queues: queues by role ("server", "client"), where they differ from `QUEUES`; several are separated by
            commas.
        env: changes to the workers' environment; None as a value removes a variable.
        log_dir: directory for one log a process, kept afterwards; None keeps logs until `stop`.
        checkpoint_dir: TORCHORD_CHECKPOINT_DIR of the workers; None leaves theirs.
        persistence_dir: directory for the server's append-only file; None keeps it in memory.
        wait_ready: whether `start` also waits until every worker takes tasks.
        grace_seconds: time that workers have between SIGTERM and SIGKILL.
        app: Celery application of the workers, as for `celery -A`.
        keys: whether its server gets keys of its own, by which forged records are told (docs/keys.md); with
            `url` the keys are that server's.
        hardware: "portable" for workers with the kernels of docs/portable.md, as runs with that `hardware`
            need; "native" for this machine's fastest; None: what this process's environment says.

    Raises:
        InvalidInput: an argument is out of range.

    Example:
        >>> with LocalCluster(workers=2) as cluster:                      # doctest: +SKIP
        ...     run = Master(cluster.url).submit(recipe, TrainingConfig(epochs=5))
        ...     run.wait()
    """

    def __init__(
        self,
        workers: int = 2,
        *,
        url: str | None = None,
        layout: Layout = "split",
        pool: str | None = None,
        concurrency: int | None = None,
        standby: int = 0,
        queues: Mapping[str, str] | None = None,
        env: Mapping[str, str | None] | None = None,
        log_dir: str | Path | None = None,
        checkpoint_dir: str | Path | None = None,
        persistence_dir: str | Path | None = None,
        wait_ready: bool = False,
        grace_seconds: float = GRACE_SECONDS,
        app: str = "torchord",
        keys: bool = False,
        hardware: str | None = None,
    ) -> None:
        if workers < 0 or standby < 0 or (concurrency is not None and concurrency < 1):
            raise InvalidInput("workers and standby must be 0 or more, concurrency 1 or more")
        if layout not in ("split", "single"):
            raise InvalidInput(f'layout is "split" or "single", not {layout!r}')
        if hardware not in (None, *HARDWARE):
            raise InvalidInput(f"hardware must be {' or '.join(HARDWARE)}, not {hardware!r}")
        if url is not None and persistence_dir is not None:
            raise InvalidInput("A server given by `url` keeps its own data; leave persistence_dir out")
        self._workers = workers
        self._url = url
        self._layout = layout
        self._pool = pool
        self._concurrency = concurrency
        self._standby = standby
        self._queues = {**QUEUES, **(queues or {})}
        self._env = {**_kernels(hardware), **(env or {})}
        self._log_dir = None if log_dir is None else Path(located(log_dir))
        self._checkpoint_dir = None if checkpoint_dir is None else located(checkpoint_dir)
        self._persistence_dir = persistence_dir
        self._wait_ready = wait_ready
        self._grace_seconds = grace_seconds
        self._app = app
        self._owner: int | None = None
        self._guardian: Guardian | None = None
        self._broker: EmbeddedServer | None = None
        self._scratch: Path | None = None
        self._sealed = keys and url is None
        self._keys: Path | None = None  # what seals the records of the runs on its server
        self._processes: dict[str, WorkerProcess] = {}

    def __repr__(self) -> str:
        names = ", ".join(self._processes) or "no worker"
        return f"<{type(self).__name__} {'not started' if self._broker is None else self._broker!r}: {names}>"

    # --- life -------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start everything; nothing happens if it is started. Returns when the server answers.

        The workers come up in the background (importing torch takes them a second or two); their
        tasks wait in the queue. `wait_ready()` waits for them.

        Raises:
            ServerNotFound: no server could be started.
            CacheUnreachable: the server given by `url` does not accept connections.
            NoWorker: with wait_ready=True, a worker ended or took longer than 60 s.
        """
        if self._guardian is not None:
            return
        self._owner = os.getpid()
        try:
            self._scratch = Path(tempfile.mkdtemp(prefix="torchord-cluster-"))
            self._guardian = Guardian(scratch=self._scratch, grace_seconds=self._grace_seconds)
            self._start_server(self._guardian, self._logs())
            for name, role in self._plan():
                self.add_worker(name, role=role)
            if self._wait_ready:
                self.wait_ready()
        except BaseException:
            self.stop()
            raise

    def _logs(self) -> Path:
        assert self._scratch is not None
        if self._log_dir is None:
            return self._scratch
        self._log_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        return self._log_dir

    def _start_server(self, guardian: Guardian, logs: Path) -> None:
        self._broker = EmbeddedServer(
            self._url,
            persistence_dir=self._persistence_dir,
            log=None if self._url else logs / "redis.log",
            guardian=guardian,
        )
        self._broker.start()
        if self._sealed and (place := local_path(self._broker.url)) is not None:
            self._keys = place
            lasting = self._persistence_dir
            write_local(place, None if lasting is None else Path(located(lasting)) / "keys.json")

    def _plan(self) -> list[tuple[str, Role]]:
        if self._workers == 0:
            return []
        if self._layout == "single":
            return [("worker", "single")]
        servers: list[tuple[str, Role]] = [("server", "server")]
        servers += [(f"standby{i + 1}", "server") for i in range(self._standby)]
        return servers + [(f"client{i + 1}", "client") for i in range(self._workers)]

    def stop(self) -> None:
        """End the workers, then the server, and remove temporary logs. Idempotent."""
        if self._owner != os.getpid():  # a fork of the process that started the cluster
            return
        forget(self._processes.values())
        guardian, self._guardian = self._guardian, None
        if guardian is not None:
            guardian.close(self._grace_seconds)
        if self._broker is not None:
            self._broker.stop()
        if self._keys is not None:
            self._keys.unlink(missing_ok=True)
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
        self._scratch = self._broker = None
        self._processes.clear()

    # --- what there is ----------------------------------------------------------------

    @property
    def checkpoint_dir(self) -> str | None:
        """Where the workers keep checkpoints, for `Master(url, checkpoint_dir=...)`; None: the default."""
        return self._checkpoint_dir

    @property
    def url(self) -> str:
        """URL of the server, with its password: what `Master(...)` and TORCHORD_URL take.

        Raises:
            NoWorker: the cluster is not started.
        """
        return self.broker.url

    @property
    def broker(self) -> EmbeddedServer:
        """The server, for `pid`, `kill()`, `restart()`, `pause()` and `cont()`.

        Raises:
            NoWorker: the cluster is not started.
        """
        if self._broker is None:
            raise NoWorker("The cluster is not running; use it in a `with` block or call start()")
        return self._broker

    @property
    def processes(self) -> Mapping[str, WorkerProcess]:
        """The workers by name: "server", "standby1", ..., "client1", ...; or "worker" when single."""
        return MappingProxyType(self._processes)

    def wait_ready(self, timeout_seconds: float = READY_SECONDS) -> None:
        """Wait until every worker takes tasks.

        Raises:
            NoWorker: a worker ended, or is not ready in time; with its command and the end of its log.
        """
        deadline = time.monotonic() + timeout_seconds
        waiting = list(self._processes.values())
        while waiting := [worker for worker in waiting if not worker.ready()]:
            for worker in waiting:
                code = worker.poll()
                if code is not None:
                    raise NoWorker(
                        worker.failure() or _report(worker, f"was told to end ({code}) before it was ready")
                    )
            if time.monotonic() > deadline:
                raise NoWorker(_report(waiting[0], f"was not ready after {timeout_seconds:g} s"))
            time.sleep(0.02)

    # --- more or other workers --------------------------------------------------------

    def add_worker(
        self,
        name: str | None = None,
        *,
        role: Role = "client",
        queues: str | None = None,
        env: Mapping[str, str | None] | None = None,
    ) -> WorkerProcess:
        """Start one more worker; it takes part from its first task on.

        Args:
            name: name in `processes` and of the Celery node; None takes the next "clientN".
            role: "client", "server" (a standby training server) or "single" (every queue).
            queues: queues to serve, separated by commas; None is what the role serves.
            env: changes to its environment, after the cluster's own.

        Raises:
            InvalidInput: a worker of that name runs already.
            NoWorker: the cluster is not running.
        """
        name = name or self._free_name(STEMS[role])
        if name in self._processes and self._processes[name].poll() is None:
            raise InvalidInput(f"A worker {name!r} runs already; choose another name")
        url = self.url
        queues = queues or (None if role == "single" else self._queues[role])
        launch = _Launch(
            argv=self._argv(name, role, queues),
            queues=None if queues is None else frozenset(queues.split(",")),
            env={**self._environment(url), **self._env, **(env or {})},
            cwd=Path.cwd(),
            log=self._logs() / f"{name}.log",
        )
        return self._spawn(name, role, launch)

    def restart(self, name: str) -> WorkerProcess:
        """Start a worker again with the same command; one that still runs gets SIGTERM and a grace first.

        Raises:
            InvalidInput: there never was a worker of that name.
            NoWorker: the cluster is not running.
        """
        worker = self._processes.get(name)
        if worker is None:
            raise InvalidInput(f"No worker {name!r}; there are: {', '.join(self._processes) or 'none'}")
        forget([worker])
        worker._child.stop(self._grace_seconds)
        return self._spawn(name, worker.role, worker._launch)

    def _environment(self, url: str) -> dict[str, str | None]:
        """Changes to the environment that make a worker serve this cluster and import what we can import."""
        changes: dict[str, str | None] = dict.fromkeys(FOREIGN)
        changes |= {
            "TORCHORD_URL": url,
            "PYTHONPATH": os.pathsep.join(map(str, for_workers())),
            "PYTHONUNBUFFERED": "1",
        }
        if from_environment().task_log is None:  # its logs are read by whoever started it, and do not last
            changes["TORCHORD_TASK_LOG"] = "on"
        if self._url is None and from_environment().allowed_modules is None:
            # Nobody but this program's user submits to its server.
            changes["TORCHORD_ALLOWED_MODULES"] = ",".join(allow_list(Path.cwd()))
        if self._checkpoint_dir is not None:
            changes["TORCHORD_CHECKPOINT_DIR"] = self._checkpoint_dir
        return changes

    def _free_name(self, stem: str) -> str:
        return next(name for i in range(1, 1 << 30) if (name := f"{stem}{i}") not in self._processes)

    def _node(self, name: str) -> str:
        # On a server that others use too, another cluster of this host may have a "client1".
        return f"{name}@%h" if self._url is None else f"{name}-{self._owner}@%h"

    def _argv(self, name: str, role: Role, queues: str | None) -> tuple[str, ...]:
        # -P: the directory that we run in stands where PYTHONPATH has it, and not before all else.
        argv = [sys.executable, "-P", "-m", "celery", "-A", self._app, "worker", "-n", self._node(name)]
        concurrency = self._concurrency if role != "server" else 1
        if concurrency is None and role == "client":
            concurrency = 1
        argv += [] if queues is None else ["-Q", queues]
        argv += [] if concurrency is None else ["-c", str(concurrency)]
        argv += [] if self._pool is None else ["--pool", self._pool]
        # Mingle waits a second at each start; gossip only tells workers of one another.
        return (*argv, "--loglevel", "INFO", "--without-mingle", "--without-gossip")

    def _spawn(self, name: str, role: Role, launch: _Launch) -> WorkerProcess:
        if self._guardian is None:
            raise NoWorker("The cluster is not running; use it in a `with` block or call start()")
        log_start = launch.log.stat().st_size if launch.log.exists() else 0
        try:
            child = self._guardian.spawn(launch.argv, env=launch.env, cwd=launch.cwd, log=launch.log)
        except GuardianLost as error:
            raise NoWorker(
                "The cluster's guardian was killed, and its workers too; stop() and start()"
            ) from error
        except OSError as error:
            raise NoWorker(f"Worker {name!r} could not be started: {error}") from error
        worker = WorkerProcess(name, role, launch.log, launch, child, log_start)
        self._processes[name] = worker
        register(worker, self.url)
        return worker


def _report(worker: WorkerProcess, what: str) -> str:
    log = f"The end of its log ({worker.log}):\n{worker.tail()}"
    return f"Worker {worker.name!r} {what}.\n  Command: {worker.command}\n  {log}"


def _kernels(hardware: str | None) -> dict[str, str | None]:
    """Changes to the environment of workers that are to have portable kernels, or are not to."""
    if hardware is None:
        return {}
    if hardware == "portable":
        return {"TORCHORD_HARDWARE": hardware, **PORTABLE_KERNELS}
    inherited = dict.fromkeys(PORTABLE_KERNELS) if from_environment().hardware == "portable" else {}
    return {"TORCHORD_HARDWARE": hardware, **inherited}
