"""Fault injection: die, stop, stall or fail at a named point of the protocol.

Off unless TORCHORD_FAULTS is set; then each point of `POINTS` calls the plan. A plan is a list
of faults, `POINT:COUNT:ACTION` joined by `;`:

    server.after_commit:2:kill;client.after_put:3:sleep=2.5

COUNT is the pass at which the fault fires, counted by each process. ACTION is one of

    kill       SIGKILL to the process itself
    stop       SIGSTOP to it: a hang, or a partition that keeps its connections
    term, hup  SIGTERM or SIGHUP to it: it is told to end, or to start anew
    raise      an error of the store, as when Redis goes away in the middle
    sleep=S    S seconds of doing nothing

`TORCHORD_FAULTS=@FILE` reads the plan from a file, again whenever it changes, so that one cluster
serves many experiments; each of its faults then fires once in all processes together, and leaves
FILE.N.fired (N: its place in the plan, from 0) as a proof. With the plan in the variable itself,
each process fires each fault once.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torchord.cache.errors import CacheUnreachable, ConfigError

log = logging.getLogger(__name__)

POINTS = (
    "server.before_acquire",  # about to take a run over
    "server.after_acquire",  # fencing token taken, nothing restored
    "server.before_initialise",  # first version stored, run not started
    "server.after_initialise",  # run started, nothing launched
    "server.before_rollback",  # older state loaded, head not moved back
    "server.after_rollback",  # head moved back
    "server.before_apply",  # step complete, nothing computed
    "server.after_apply",  # model stepped, new version not stored
    "server.after_publish",  # new version stored, not committed
    "server.after_commit",  # committed, nothing cleaned up
    "server.before_launch",  # about to publish the next step
    "server.after_launch",  # next step published, not recorded
    "server.before_checkpoint",
    "server.mid_checkpoint",  # the tensors are written, the marker is not
    "server.after_checkpoint",
    "server.before_state",  # about to publish the optimizer state
    "server.after_state",
    "server.before_stop",  # a rule ends the run, not recorded
    "server.after_stop",  # recorded, nothing evaluated or written
    "server.before_finish",  # last checkpoint written, run not ended
    "server.after_finish",
    "sender.mid_launch",  # part of a chord is published
    "client.before_begin",  # task taken from the queue, no lease
    "client.after_begin",  # lease taken
    "client.before_put",  # gradient computed, not stored
    "client.after_put",  # stored, slot not written
    "client.after_slot",  # slot written, task not acknowledged
    "adder.before_begin",  # partial sum taken from the queue, no lease
    "adder.after_begin",  # lease taken
    "adder.before_put",  # inputs added up, nothing stored
    "adder.after_put",  # stored, slot not written
    "adder.after_slot",  # slot written, inputs not deleted
    "adder.after_delete",  # inputs deleted, task not acknowledged
    "writer.before_send",  # last input of a partial sum written, the sum not sent
    "client.before_part",  # part of an evaluation computed, not written
    "client.after_part",
    "client.after_evaluation",  # its figures recorded, the training server not called
    "server.after_open",  # round opened, its seats not published
    "server.before_adopt",  # round over, its version not taken over
    "server.after_adopt",  # taken over, nothing launched
    "round.before_turn",  # told what is next
    "round.after_slot",  # slot written, next shard claimed maybe
    "round.before_update",  # step complete, nothing changed
    "round.after_update",  # model stepped, not reported
    "round.after_report",  # reported, and committed maybe
    "round.before_store",  # the round's end, to be stored here
    "round.before_publish",  # stored, not recorded
    "round.after_publish",  # recorded, the training server not called
    "messenger.before_send",  # an entry of the outbox taken, nobody told
    "messenger.after_send",  # told, not recorded
    "supervisor.before_look",  # elected, about to look
)
_SIGNALS = {"kill": "SIGKILL", "stop": "SIGSTOP", "term": "SIGTERM", "hup": "SIGHUP"}
ACTIONS = (*_SIGNALS, "raise", "sleep")

Hook = Callable[[str], None]


def nothing(point: str) -> None:
    """The hook of a process without faults."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault: at which pass of which point, what.

    Attributes:
        point: one of `POINTS`.
        count: the pass at which it fires, from 1.
        action: one of `ACTIONS`.
        seconds: for "sleep".
    """

    point: str
    count: int
    action: str
    seconds: float = 0.0


def parse(text: str) -> tuple[Fault, ...]:
    """Read a plan.

    Raises:
        ConfigError: a part cannot be read; with the part, and what there is to choose from.

    Example:
        >>> parse("server.after_commit:2:kill")
        (Fault(point='server.after_commit', count=2, action='kill', seconds=0.0),)
    """
    faults = []
    for part in filter(None, (part.strip() for part in text.split(";"))):
        point, _, rest = part.partition(":")
        count, _, verb = rest.partition(":")
        action, _, seconds = verb.partition("=")
        if point not in POINTS or not count.isdecimal() or int(count) < 1 or action not in ACTIONS:
            raise ConfigError(
                f"TORCHORD_FAULTS: {part!r} cannot be read as POINT:COUNT:ACTION; points are "
                f"{', '.join(POINTS)}; actions are {', '.join(ACTIONS)} (sleep=SECONDS)"
            )
        try:
            faults.append(Fault(point, int(count), action, float(seconds or 0)))
        except ValueError:
            raise ConfigError(f"TORCHORD_FAULTS: {part!r} has no number of seconds after '='") from None
    return tuple(faults)


def hook(text: str) -> Hook:
    """The hook that a process calls at each point: does nothing for an empty `text`.

    Args:
        text: value of TORCHORD_FAULTS: a plan, or "@FILE".

    Raises:
        ConfigError: the plan cannot be read.
    """
    if not text:
        return nothing
    return Injector(Path(text[1:]) if text.startswith("@") else None, parse("" if text[0] == "@" else text))


class Injector:
    """Counts the passes of each point in this process and fires what is due.

    Args:
        file: plan that is read again whenever it changes; None for a fixed plan.
        faults: the fixed plan.
    """

    def __init__(self, file: Path | None, faults: tuple[Fault, ...] = ()) -> None:
        self._file = file
        self._faults = faults
        self._stamp: tuple[int, int] | None = None
        self._passes: dict[str, int] = {}
        self._lock = threading.Lock()

    def __call__(self, point: str) -> None:
        """Report that `point` was reached; does not return, or late, or raises, if a fault is due."""
        with self._lock:
            self._reload()
            self._passes[point] = self._passes.get(point, 0) + 1
            due = [
                (number, fault)
                for number, fault in enumerate(self._faults)
                if fault.point == point and fault.count == self._passes[point]
            ]
        for number, fault in due:
            if self._claim(number, fault):
                log.warning("injected fault: %s at pass %d of %s", fault.action, fault.count, point)
                _act(fault)

    def names(self, *points: str) -> bool:
        """Whether the plan has a fault at one of some points."""
        with self._lock:
            self._reload()
            return any(fault.point in points for fault in self._faults)

    def _reload(self) -> None:
        if self._file is None:
            return
        try:
            status = self._file.stat()
            stamp = (status.st_mtime_ns, status.st_ino)
            if stamp != self._stamp:
                self._faults = parse(self._file.read_text())
                self._stamp = stamp
                self._passes.clear()
        except FileNotFoundError:
            self._faults = ()

    def _claim(self, number: int, fault: Fault) -> bool:
        """Leave the proof that the fault fired; False if it fired before, in whatever process."""
        if self._file is None:
            return True
        try:
            marker = os.open(fired(self._file, number), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        except FileExistsError:
            return False
        with os.fdopen(marker, "w") as file:
            file.write(f"{os.getpid()} {time.time()} {fault.point}:{fault.count}:{fault.action}\n")
        return True


def fired(file: Path, number: int = 0) -> Path:
    """The proof that fault `number` of the plan in `file` fired: it exists if and only if it did."""
    return file.with_name(f"{file.name}.{number}.fired")


def _act(fault: Fault) -> None:
    if fault.action == "sleep":
        time.sleep(fault.seconds)
    elif fault.action == "raise":
        raise CacheUnreachable(f"injected fault at {fault.point}: the store is away")
    else:
        os.kill(os.getpid(), getattr(signal, _SIGNALS[fault.action]))
