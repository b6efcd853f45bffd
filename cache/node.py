"""One cache node: a pool of connections and the four things that a chunk store asks of a server."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from enum import Enum
from functools import partial
from typing import Protocol, TypeVar

from cache.errors import CacheError, CacheUnreachable
from cache.wire import Address, Connection, ServerRefused, command, set_command

LEAST_IN_FLIGHT_NBYTES = 2 << 20
MOST_IN_FLIGHT_NBYTES = 32 << 20
"""Bounds of what is asked for and not yet received, or sent and not yet acknowledged. In between it is
what a 10 Gbit/s link holds: enough to hide the round trip, and no more for the server to buffer."""
_LINK_NBYTES_PER_SECOND = 1.25e9
_SENT_AT_ONCE_NBYTES = 2 << 20
_MOST_IDLE_CONNECTIONS = 8
_KEYS_AT_ONCE = 512

_CLUSTER = (
    "it is part of a Redis Cluster: list plain nodes in TORCHORD_CACHE_URLS, torchord spreads the chunks"
)
_HINTS = {
    "OOM": "it is full: raise its maxmemory, or let finished runs expire",
    "READONLY": "it is a replica: name the primary in the URL",
    "MOVED": _CLUSTER,
    "ASK": _CLUSTER,
    "CROSSSLOT": _CLUSTER,
    "CLUSTERDOWN": _CLUSTER,
    "NOAUTH": "it wants a password: redis://USER:PASSWORD@HOST",
    "WRONGPASS": "it does not accept the user name and password of the URL",
    "NOPERM": "the user of the URL lacks a right: torchord needs SET, GET, UNLINK and EXPIRE on its keys",
    "LOADING": "it is still reading its data after a start: try again",
    "MASTERDOWN": "it is a replica that lost its primary: name the primary in the URL",
    "MISCONF": "it cannot persist and refuses writes: look at its log and its disk",
}
_PASSING = ("LOADING", "TRYAGAIN", "CLUSTERDOWN", "MASTERDOWN")

T = TypeVar("T")


class Resettable(Protocol):
    """What owns locks, threads or sockets that a forked child must not use."""

    def reset(self) -> None:
        """Forget them."""


_resettable: weakref.WeakSet[Resettable] = weakref.WeakSet()


def reset_after_fork(thing: Resettable) -> None:
    """Have `thing.reset()` called in each forked child, as long as it lives."""
    _resettable.add(thing)


def _reset_all() -> None:
    for thing in list(_resettable):
        thing.reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_all)


class Found(Enum):
    """What became of one key: its value, none, or a value of another length."""

    YES = "yes"
    NO = "no"
    OTHER = "other"


class Node:
    """One server.

    Threads may share a node, each operation has a connection of its own. A forked child starts
    without connections. An operation on a connection that was idle and turns out to be broken is
    repeated once on a new one; all four operations may be repeated without harm.

    Args:
        address: where, from `Address.parse`.
        connect_timeout_seconds: longest wait for a connection.
        timeout_seconds: longest wait without a byte moving.
    """

    def __init__(self, address: Address, *, connect_timeout_seconds: float, timeout_seconds: float) -> None:
        self.address = address
        self._connect_timeout_seconds = connect_timeout_seconds
        self._timeout_seconds = timeout_seconds
        self._lock = threading.Lock()
        self._idle: list[Connection] = []
        reset_after_fork(self)

    @property
    def label(self) -> str:
        """The node's URL without credentials."""
        return self.address.label

    def store(
        self,
        items: Sequence[tuple[bytes, memoryview]],
        ttl_seconds: int,
        meanwhile: Callable[[], None] | None = None,
    ) -> None:
        """Set each key to its value, from the value's own memory.

        Args:
            items: key and value.
            ttl_seconds: lifetime of the keys.
            meanwhile: called once all is sent, while the server is still at work; again if a
                broken connection made the operation start anew.

        Raises:
            CacheUnreachable: the node does not answer.
            CacheError: the node refuses, for a reason that the message tells.
        """
        self._run(
            "write", items[0][0], partial(_store, items=items, ttl_seconds=ttl_seconds, meanwhile=meanwhile)
        )

    def load(self, items: Sequence[tuple[bytes, memoryview]], received: Callable[[int, Found], None]) -> None:
        """Read each key into its memory.

        Args:
            items: key and memory of exactly the value's length.
            received: called after each item, in order, with its index and what was found; the
                memory is filled for `Found.YES` only. Called again from the first item if a
                broken connection made the operation start anew.

        Raises:
            CacheUnreachable: the node does not answer.
            CacheError: the node refuses.
        """
        self._run("read", items[0][0], partial(_load, items=items, received=received))

    def delete(self, keys: Sequence[bytes]) -> None:
        """Delete keys; absent ones are no error.

        Raises:
            CacheUnreachable: the node does not answer.
            CacheError: the node refuses.
        """
        for first in range(0, len(keys), _KEYS_AT_ONCE):
            group = keys[first : first + _KEYS_AT_ONCE]
            self._run("delete", group[0], partial(_unlink, keys=group))

    def expire(self, keys: Sequence[bytes], ttl_seconds: int) -> list[bool]:
        """Set the remaining life of keys; tells of each whether it exists.

        Raises:
            CacheUnreachable: the node does not answer.
            CacheError: the node refuses.
        """
        found: list[bool] = []
        for first in range(0, len(keys), _KEYS_AT_ONCE):
            group = keys[first : first + _KEYS_AT_ONCE]
            found += self._run("touch", group[0], partial(_expire, keys=group, ttl_seconds=ttl_seconds))
        return found

    def close(self) -> None:
        """Close the idle connections; the node may be used again."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _run(self, verb: str, key: bytes, operation: Callable[[Connection], T]) -> T:
        what = f"cannot {verb} {key.decode(errors='replace')} on cache node {self.label}"
        try:
            connection, used = self._take()
            try:
                return self._keep(connection, operation)
            except OSError as error:
                stalled = isinstance(error, TimeoutError) and error.errno is None
                if stalled or not used:
                    raise
            self.close()  # what else is idle is as old, and as broken
            return self._keep(self._open(), operation)
        except ServerRefused as refusal:
            code = str(refusal).partition(" ")[0]
            hint = f"; {_HINTS[code]}" if code in _HINTS else ""
            kind = CacheUnreachable if code in _PASSING else CacheError
            raise kind(f"{what}: it answered '{refusal}'{hint}") from refusal
        except OSError as error:
            reason = str(error) or type(error).__name__
            raise CacheUnreachable(f"{what}: {reason}; is it running, and reachable from here?") from error

    def _keep(self, connection: Connection, operation: Callable[[Connection], T]) -> T:
        """Run the operation, and keep the connection if it is still in step."""
        try:
            result = operation(connection)
        except ServerRefused:
            self._give(connection)
            raise
        except BaseException:
            connection.close()
            raise
        self._give(connection)
        return result

    def _take(self) -> tuple[Connection, bool]:
        with self._lock:
            if self._idle:
                return self._idle.pop(), True
        return self._open(), False

    def _open(self) -> Connection:
        return Connection(self.address, self._connect_timeout_seconds, self._timeout_seconds)

    def _give(self, connection: Connection) -> None:
        with self._lock:
            if connection.pid == os.getpid() and len(self._idle) < _MOST_IDLE_CONNECTIONS:
                self._idle.append(connection)
                return
        connection.close()

    def reset(self) -> None:
        """Start afresh in a forked child: the lock may be held by a thread that is not here, and
        the sockets belong to the parent.
        """
        self._lock = threading.Lock()
        idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()


def _in_flight_nbytes(connection: Connection) -> int:
    held = int(connection.round_trip_seconds * _LINK_NBYTES_PER_SECOND)
    return max(LEAST_IN_FLIGHT_NBYTES, min(held, MOST_IN_FLIGHT_NBYTES))


def _store(
    connection: Connection,
    items: Sequence[tuple[bytes, memoryview]],
    ttl_seconds: int,
    meanwhile: Callable[[], None] | None,
) -> None:
    most_nbytes = _in_flight_nbytes(connection)
    unanswered: list[int] = []
    waiting_nbytes = 0
    buffers: list[bytes | memoryview] = []
    buffered_nbytes = 0

    def flush() -> None:
        nonlocal buffers, buffered_nbytes
        connection.send(buffers)
        buffers, buffered_nbytes = [], 0

    def acknowledge(at_most_nbytes: int) -> None:
        """Read replies until at most so many bytes wait for theirs; all of them after a refusal."""
        nonlocal waiting_nbytes
        refusal: ServerRefused | None = None
        while unanswered and (refusal is not None or waiting_nbytes > at_most_nbytes):
            waiting_nbytes -= unanswered.pop(0)
            try:
                connection.reply()
            except ServerRefused as error:
                refusal = refusal or error
        if refusal is not None:
            raise refusal

    for key, value in items:
        buffers += set_command(key, value, ttl_seconds)
        unanswered.append(len(value))
        buffered_nbytes += len(value)
        waiting_nbytes += len(value)
        if buffered_nbytes >= _SENT_AT_ONCE_NBYTES:
            flush()
            acknowledge(most_nbytes)
    if buffers:
        flush()
    if meanwhile is not None:
        meanwhile()
    acknowledge(-1)


def _load(
    connection: Connection, items: Sequence[tuple[bytes, memoryview]], received: Callable[[int, Found], None]
) -> None:
    most_nbytes = _in_flight_nbytes(connection)
    asked = 0
    in_flight_nbytes = 0
    for i, (_, part) in enumerate(items):
        requests = []
        while asked < len(items) and (asked <= i or in_flight_nbytes < most_nbytes):
            requests.append(command("GET", items[asked][0]))
            in_flight_nbytes += len(items[asked][1])
            asked += 1
        if requests:
            connection.send([b"".join(requests)])
        try:
            nbytes = connection.reply_into(part)
        except ServerRefused:
            for _, later in items[i + 1 : asked]:
                with contextlib.suppress(ServerRefused):
                    connection.reply_into(later)
            raise
        in_flight_nbytes -= len(part)
        received(i, Found.NO if nbytes is None else Found.YES if nbytes == len(part) else Found.OTHER)


def _unlink(connection: Connection, keys: Sequence[bytes]) -> None:
    connection.send([command("UNLINK", *keys)])
    connection.reply()


def _expire(connection: Connection, keys: Sequence[bytes], ttl_seconds: int) -> list[bool]:
    connection.send([b"".join(command("EXPIRE", key, str(ttl_seconds)) for key in keys)])
    replies: list[bool] = []
    refusal: ServerRefused | None = None
    for _ in keys:
        try:
            replies.append(connection.reply() == 1)
        except ServerRefused as error:
            refusal = refusal or error
    if refusal is not None:
        raise refusal
    return replies
