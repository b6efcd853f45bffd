"""What a worker process keeps beside its tasks: services, heartbeat, private queue, supervisor."""

from __future__ import annotations

import gc
import importlib
import logging
import os
import sys
import threading
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from billiard.process import current_process
from celery import bootsteps, current_app, signals
from celery.utils.nodenames import gethostname

from torchord.cache.errors import CacheError, InvalidInput
from torchord.cache.keyring import ROLES
from torchord.cache.ledger.heartbeat import Heartbeat
from torchord.cache.ledger.workers import WorkerInfo, new_info
from torchord.cache.servers.redis_client import WORKER_PATIENCE_SECONDS
from torchord.coordinator.messages.broker import add
from torchord.coordinator.messages.sender import Sender
from torchord.coordinator.messages.task_names import UPDATES, is_ours, private_queue
from torchord.coordinator.runtime import faults
from torchord.coordinator.runtime.last_lines import keep as keep_last_lines
from torchord.tasks.allocator import keep_memory
from torchord.tasks.celery_app import app, settings
from torchord.tasks.log_lines import shorten
from torchord.tasks.memory_limit import MemoryLimit, beyond, end_after_task
from torchord.tasks.namesakes import warn_of_namesakes
from torchord.tasks.renewal import Renewal, start_anew
from torchord.tasks.start import announce, import_from_working_directory, introduce

# What needs torch is imported where it is used: Flower and the `celery` commands load this module too.
if TYPE_CHECKING:
    from torchord.coordinator.runtime.services import Services
    from torchord.coordinator.server.supervisor.supervisor import Supervisor

log = logging.getLogger(__name__)


class Process:
    """The parts of one process that runs tasks. A forked child makes its own.

    Args:
        node: name of the Celery node, as in `celery@host`.
        queues: what the node consumes.
    """

    def __init__(self, node: str, queues: tuple[str, ...]) -> None:
        from torchord.coordinator.client.client import Client
        from torchord.coordinator.runtime.context import Contexts
        from torchord.coordinator.runtime.services import Services
        from torchord.coordinator.server.server import TrainingServer

        self.pid = os.getpid()
        self.services = Services(settings, patience_seconds=WORKER_PATIENCE_SECONDS)
        fault = faults.hook(settings.faults)
        self.fault = fault
        self.sender = Sender(app, fault=fault if settings.faults else None)
        self.heartbeat = _heartbeat(self.services, node, queues, forks=False)
        self.contexts = Contexts(self.services)
        self.client = Client(self.contexts, self.heartbeat, self.sender, fault=fault)
        self.server = TrainingServer(self.contexts, self.heartbeat, self.sender, fault=fault)
        self.supervisor: Supervisor | None = None
        keep_last_lines(self.heartbeat.info.id)
        self.heartbeat.start()

    def supervise(self) -> None:
        """Stand for election as the supervisor."""
        from torchord.coordinator.server.supervisor.supervisor import Supervisor

        self.supervisor = Supervisor(
            self.services,
            self.heartbeat.info.id,
            self.sender,
            fault=self.fault,
            report=self.heartbeat.discarded,
        )
        self.supervisor.start()

    def stop(self) -> None:
        """Hand runs over and end the lease."""
        if self.supervisor is not None:
            self.supervisor.stop()
        self.server.leave()
        self.heartbeat.stop()
        self.contexts.close()
        self.services.close()


def _heartbeat(services: Services, node: str, queues: tuple[str, ...], *, forks: bool) -> Heartbeat:
    """The heartbeat of this process, not started yet.

    Args:
        forks: whether this is the parent of a prefork pool.

    Raises:
        InvalidInput: the workers that run store chunks elsewhere; or the memory that it may have is too
            little.
    """
    try:
        services.registry.require_placement(services.placement, claim=True)
    except CacheError as error:  # gone again; the heartbeat will say so, too
        log.warning("placement: %s", error)
    from torchord.coordinator.runtime.cache_report import counted

    signs = [role for role in ROLES if services.keyring.signs(role)]
    info = new_info(node, queues, placement=services.placement, signs=signs)
    if not _forked:
        warn_of_namesakes(services.registry, info)

    def again(said: WorkerInfo, why: str) -> None:
        start_anew(lambda: services.registry.leave(said), why, forks=forks, forked=_forked)

    renewal = Renewal(
        lambda run: services.ledger(run).head().status,
        lambda run, version: services.ledger(run).pinned(version),
        again,
    )
    memory = MemoryLimit(0 if _forked else settings.memory_limit_bytes, end_after_task)

    def after(said: WorkerInfo) -> None:
        if not memory.look():
            renewal(said)

    return Heartbeat(services.registry, info, after=after, counters=partial(counted, services))


_QUEUES_SETTING = "torchord_queues"
_TURN_SECONDS = 1.0
_node = gethostname()
_queues: tuple[str, ...] = ()
_process: Process | None = None
_forked = False  # whether this is a process of a prefork pool
_lock = threading.Lock()


def process() -> Process:
    """This process's parts, made at the first task (or when the worker is ready).

    Raises:
        InvalidInput: it may not compute: see `torchord.coordinator.runtime.alike.kernels`.
    """
    global _process
    with _lock:
        if _process is None or _process.pid != os.getpid():
            _test_kernels()
            _process = Process(_node, _queues)
            _process.heartbeat.doing("", environment=_environment())
        return _process


def _test_kernels() -> None:
    from torchord.coordinator.runtime.alike import kernels

    kernels()


def _environment() -> str:
    from torchord.coordinator.runtime.environment import environment

    return environment()


def _stop_process() -> None:
    global _process
    with _lock:
        if _process is not None and _process.pid == os.getpid():
            _process.stop()
            _process = None


class TorchordStep(bootsteps.StartStopStep):
    """Makes the process ready when the consumer is: private queue, heartbeat, supervisor.

    In a prefork worker the parent runs no task and must not touch CUDA: it consumes the queues,
    supervises, and each child makes its own parts.
    """

    requires: ClassVar[set[str]] = {"celery.worker.consumer.tasks:Tasks"}

    def __init__(self, parent: Any, **kwargs: Any) -> None:
        super().__init__(parent, **kwargs)

    def start(self, parent: Any) -> None:
        """Called at start and again after each reconnection."""
        global _node, _queues
        consumed = tuple(sorted(queue.name for queue in parent.task_consumer.queues))
        if not _serves(parent.app, consumed):
            return
        _node = parent.hostname
        if UPDATES in consumed:
            own = private_queue(_node)
            if own not in consumed:
                parent.task_consumer.add_queue(add(parent.app, own))
                parent.task_consumer.consume()
                consumed = (*consumed, own)
        _queues = consumed
        _look_at_prefetching(parent)
        try:
            if _forks(parent):
                _test_kernels()
                self._tick(parent, _supervise_from_parent())
                return
            parts = process()
        except InvalidInput as error:
            log.critical("this worker cannot start: %s", error)
            raise SystemExit(1) from None
        self._tick(parent, parts.heartbeat)
        if UPDATES in consumed and parts.supervisor is None:
            parts.supervise()

    def _tick(self, parent: Any, heartbeat: Heartbeat) -> None:
        """Have the event loop that takes messages tell the heartbeat that it turns."""
        if parent.hub is not None:
            heartbeat.turned()
            parent.hub.call_repeatedly(_TURN_SECONDS, heartbeat.turned)

    def stop(self, parent: Any) -> None:
        """Called before each reconnection, and at the end: then what is at work goes to others at once."""
        if parent.blueprint.state in (bootsteps.CLOSE, bootsteps.TERMINATE):
            _hand_back()


def _serves(of: Any, queues: Iterable[str]) -> bool:
    """Whether a worker works for torchord: an app that torchord is installed in has others, too."""
    return of is app or any(map(is_ours, queues))


def _look_at_prefetching(parent: Any) -> None:
    """Warn where messages are taken long before they are begun; an app of somebody else decides that."""
    multiplier = parent.controller.prefetch_multiplier
    if multiplier != 1 and not parent.app.conf.worker_disable_prefetch:
        log.warning(
            "worker_prefetch_multiplier is %s: this worker takes messages of torchord long before it begins "
            "them, while others wait for them and the supervisor sends them again; set it to 1",
            multiplier,
        )


def _forks(parent: Any) -> bool:
    return "prefork" in type(parent.pool).__module__


_parent_supervisor: Supervisor | None = None
_parent_heartbeat: Heartbeat | None = None
_parent_services: Services | None = None


def _supervise_from_parent() -> Heartbeat:
    """The parent of a prefork pool speaks for the node: heartbeat with its queues, supervisor."""
    from torchord.coordinator.runtime.services import Services
    from torchord.coordinator.server.supervisor.supervisor import Supervisor

    global _parent_supervisor, _parent_heartbeat, _parent_services
    if _parent_heartbeat is not None:
        return _parent_heartbeat
    services = _parent_services = Services(settings, patience_seconds=WORKER_PATIENCE_SECONDS)
    _parent_heartbeat = _heartbeat(services, _node, _queues, forks=True)
    _parent_heartbeat.start()
    if UPDATES in _queues:
        _parent_supervisor = Supervisor(
            services, _parent_heartbeat.info.id, Sender(app), report=_parent_heartbeat.discarded
        )
        _parent_supervisor.start()
    return _parent_heartbeat


app.steps["consumer"].add(TorchordStep)


@signals.celeryd_after_setup.connect
def _named(sender: str, instance: Any, **_: Any) -> None:
    """Know the node's name and queues before a prefork pool starts: its children inherit them.

    Those that are spawned and not forked inherit nothing but the app's settings.
    """
    global _node, _queues
    queues = tuple(sorted(instance.app.amqp.queues.consume_from))
    if not _serves(instance.app, queues):
        return
    _node, _queues = sender, queues
    instance.app.conf[_QUEUES_SETTING] = queues
    if not instance.quiet:
        introduce(settings, sender, queues, forks="prefork" in instance.pool_cls.__module__)
        announce(settings)


@signals.after_setup_logger.connect
def _quiet(**_: Any) -> None:
    """Keep the log short; in an app of somebody else's its own tasks' lines stay, whatever was asked for."""
    shorten(receipts=settings.task_log if current_app == app else settings.task_log or None)


@signals.worker_init.connect
def _preload(sender: Any, **_: Any) -> None:
    """Import torch before the pool starts: children share its pages, the first task does not wait.

    What is imported stays: no garbage collection looks at it, neither while it comes (a quarter of the time)
    nor later.
    """
    queues = tuple(sender.app.amqp.queues.consume_from)
    if not _serves(sender.app, queues):
        return
    import_from_working_directory()
    _restartable()
    if settings.keep_memory:
        keep_memory()  # before torch has threads; children inherit it
    modules = ["torchord.coordinator.client.client", "torchord.coordinator.server.server"]
    if UPDATES in queues:
        modules.append("torch._dynamo")  # a process's first optimizer imports it, for a second
    gc.disable()
    try:
        for module in modules:
            importlib.import_module(module)
    finally:
        gc.freeze()
        gc.enable()
    from torchord.coordinator.runtime.environment import set_device

    set_device(settings.device)


def _restartable() -> None:
    """Have a SIGHUP restart a worker that was started as `python -m celery`, too.

    Celery runs the program anew by the words of its command line, whose first one is then the path of a
    module that cannot be run as a file.
    """
    if Path(sys.argv[0]).parts[-2:] == ("celery", "__main__.py"):
        sys.argv[:1] = ["-m", "celery"]


@signals.worker_process_init.connect
def _child_started(sender: str = "", **_: Any) -> None:
    """In a prefork child: it belongs to its parent's node, and child i takes device i.

    A solo pool sends this signal, too, from the worker itself.
    """
    global _node, _queues, _forked
    _forked = current_process().name != "MainProcess"
    _queues = _queues or tuple(current_app.conf.get(_QUEUES_SETTING) or ())
    if not _queues:
        return
    _node = sender or _node
    index = getattr(current_process(), "index", 0)
    if settings.device in ("auto", "cuda"):
        import torch

        from torchord.coordinator.runtime.environment import set_device

        if torch.cuda.is_available():
            set_device(f"cuda:{index % torch.cuda.device_count()}")


@signals.worker_process_shutdown.connect
def _child_stopped(**_: Any) -> None:
    if _forked and (why := beyond(settings.memory_limit_bytes)):
        log.critical("this process of the pool ends, and another takes its place: %s", why)
    _stop_process()


@signals.worker_shutdown.connect
def _stopped(**_: Any) -> None:
    if _parent_supervisor is not None:
        _parent_supervisor.stop()
    if _parent_heartbeat is not None:
        _parent_heartbeat.stop()
    _stop_process()


@signals.worker_shutting_down.connect
def _stopping(**_: Any) -> None:
    """At the first sign of a shutdown: what is at work goes to others without waiting for this worker.

    From a thread, since this runs inside a signal handler. (`celery control shutdown` sends no signal;
    see `TorchordStep.stop`.)
    """
    threading.Thread(target=_hand_back, name="torchord-hand-back", daemon=True).start()


def _hand_back() -> None:
    """What this process is at, or as the parent of a pool, what its children are at."""
    parts = _process
    if _parent_heartbeat is not None:
        _parent_heartbeat.rests()
    if parts is not None and parts.pid == os.getpid():
        parts.heartbeat.rests()
        parts.client.lease.hand_back()
    elif _parent_services is not None:
        from torchord.coordinator.client.slot_lease import hand_back_node

        try:
            hand_back_node(_parent_services, _node)
        except CacheError as error:
            log.warning("what the pool is at was not handed back: %s", error)
