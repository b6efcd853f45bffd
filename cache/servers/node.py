"""One cache node: a pool of connections and the four things that a chunk store asks of a server."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import TypeVar

import xxhash

from torchord.cache.errors import FULL, CacheError, CacheUnreachable
from torchord.cache.servers.address import Address
from torchord.cache.servers.connection import (
    Connection,
    Reply,
    ServerRefused,
    command,
    get_command,
    set_command,
)
from torchord.cache.servers.fork import reset_after_fork
from torchord.cache.tensors.pieces import Cut, Parts

_SENT_AT_ONCE_NBYTES = 2 << 20
_TOLD_AT_ONCE_NBYTES = 1 << 19
_PIECE_NBYTES = 1 << 17  # received at once: still in the processor's nearest cache when it is checked
_WHOLE_NBYTES = 1 << 20  # a blob of so much is in the next one anyhow: each chunk is received whole
_UNANSWERED_NBYTES = 4 << 20  # beyond a connection's window; the rest lies in buffers of the two kernels
_MOST_IDLE_CONNECTIONS = 8
_KEYS_AT_ONCE = 512

_CLUSTER = "; it is part of a Redis Cluster: name it as redis+cluster://HOST:PORT"
_HINTS = {
    "OOM": f"; {FULL}",
    "READONLY": "; it is a replica: name the primary in the URL",
    "MOVED": _CLUSTER,
    "ASK": _CLUSTER,
    "CROSSSLOT": _CLUSTER,
    "CLUSTERDOWN": _CLUSTER,
    "NOAUTH": "; it wants a password: redis://USER:PASSWORD@HOST",
    "WRONGPASS": "; it does not accept the user name and password of the URL",
    "NOPERM": "; the URL's user lacks a right: torchord needs SET, GET, UNLINK, EXPIRE, EXISTS on its keys",
    "LOADING": "; it is still reading its data after a start: try again",
    "MASTERDOWN": "; it is a replica that lost its primary: name the primary in the URL",
    "MISCONF": "; it cannot persist and refuses writes: look at its log and its disk",
}
_REFERRALS = ("MOVED", "ASK")
_ASKING = command("ASKING")
_PASSING = ("LOADING", "TRYAGAIN", "CLUSTERDOWN", "MASTERDOWN")

T = TypeVar("T")


class Problem(Enum):
    """Why a key's memory was not filled: no value, or another value than was written."""

    MISSING = "missing"
    CORRUPT = "corrupt"


@dataclass(slots=True)
class Referrals:
    """How a member of a Redis Cluster is asked: what it refers elsewhere is noted and is no error.

    Attributes:
        asking: say before each command that the node is asked though it does not own the slot yet.
        noting: False for a server outside of a cluster, which has nobody to refer to.
        found: index of the key -> the node's reply, "MOVED 3999 10.0.0.2:6379" or the like.
    """

    asking: bool = False
    noting: bool = True
    found: dict[int, str] = field(default_factory=dict)

    def noted(self, index: int, refusal: ServerRefused) -> bool:
        """Note a referral; False if the refusal is none."""
        if not self.noting or str(refusal).partition(" ")[0] not in _REFERRALS:
            return False
        self.found[index] = str(refusal)
        return True


_NOBODY = Referrals(noting=False)


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
        self._idle: list[Connection] = []  # popped and appended atomically, hence no lock
        reset_after_fork(self)

    @property
    def label(self) -> str:
        """The node's URL without credentials."""
        return self.address.label

    def store(
        self,
        items: Sequence[tuple[bytes, memoryview]],
        ttl_seconds: int,
        sent: Callable[[int, int], None] | None = None,
        referrals: Referrals = _NOBODY,
    ) -> None:
        """Set each key to its value, from the value's own memory.

        Args:
            items: key and value.
            ttl_seconds: lifetime of the keys.
            sent: called with a range of items of about a MiB, in order, while the server has enough to
                do; from the first item again if a broken connection made the operation start anew.
            referrals: for a member of a Redis Cluster.

        Raises:
            CacheUnreachable: the node does not answer.
            CacheError: the node refuses, for a reason that the message tells.
        """
        operation = partial(_store, items=items, ttl_seconds=ttl_seconds, sent=sent, referrals=referrals)
        self._run("write", items[0][0], operation)

    def load(
        self,
        keys: Sequence[bytes],
        parts: Parts,
        sums: Sequence[str],
        referrals: Referrals = _NOBODY,
    ) -> dict[int, Problem]:
        """Read each key into its memory and check it.

        Args:
            keys: of equally long values; only the last one may be shorter.
            parts: for each key memory of exactly the value's length.
            sums: for each key the expected xxh3_64, 16 hexadecimal digits.
            referrals: for a member of a Redis Cluster.

        Returns:
            Index -> what is wrong, for the keys whose memory was not filled as expected.

        Raises:
            CacheUnreachable: the node does not answer.
            CacheError: the node refuses.
        """
        return self._run(
            "read", keys[0], partial(_load, keys=keys, parts=parts, sums=sums, referrals=referrals)
        )

    def delete(self, keys: Sequence[bytes], referrals: Referrals = _NOBODY) -> None:
        """Delete keys; absent ones are no error.

        Args:
            referrals: for a member of a Redis Cluster.

        Raises:
            CacheUnreachable: the node does not answer.
            CacheError: the node refuses.
        """
        operation = partial(_each, requests=[command("UNLINK", key) for key in keys], referrals=referrals)
        self._run("delete", keys[0], operation)

    def expire(
        self,
        keys: Sequence[bytes],
        ttl_seconds: int,
        *,
        extend: bool = False,
        referrals: Referrals = _NOBODY,
    ) -> list[bool]:
        """Set the remaining life of keys; tells of each whether it exists.

        With `extend`, a life that is longer already stays; the server must then be Valkey, or Redis
        7 or newer.

        Raises:
            CacheUnreachable: the node does not answer.
            CacheError: the node refuses.
        """
        found: list[bool] = []
        for first in range(0, len(keys), _KEYS_AT_ONCE):
            group = keys[first : first + _KEYS_AT_ONCE]
            operation = partial(
                _expire, keys=group, ttl_seconds=ttl_seconds, extend=extend, first=first, referrals=referrals
            )
            found += self._run("touch", group[0], operation)
        return found

    def close(self) -> None:
        """Close the idle connections; the node may be used again."""
        idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def reset(self) -> None:
        """Start afresh in a forked child: the sockets belong to the parent."""
        self.close()

    def _run(self, verb: str, key: bytes, operation: Callable[[Connection], T]) -> T:
        kind: type[CacheError] = CacheUnreachable
        cause: Exception
        try:
            return self._repeat_if_stale(operation)
        except ServerRefused as refusal:
            code = str(refusal).partition(" ")[0]
            kind = CacheUnreachable if code in _PASSING else CacheError
            what = f"it answered '{refusal}'{_HINTS.get(code, '')}"
            cause = refusal
        except OSError as error:
            what = f"{str(error) or type(error).__name__}; is it running, and reachable from here?"
            cause = error
        name = key.decode(errors="replace")
        raise kind(f"cannot {verb} {name} on cache node {self.label}: {what}") from cause

    def _repeat_if_stale(self, operation: Callable[[Connection], T]) -> T:
        """Operate on an idle connection, or a new one; on a new one, too, if the idle one was broken."""
        try:
            connection = self._idle.pop()
        except IndexError:
            return self._operate(self._open(), operation)
        try:
            return self._operate(connection, operation)
        except OSError as error:
            if isinstance(error, TimeoutError) and error.errno is None:
                raise  # connected, but silent for too long
        self.close()  # what else is idle is as old, and as broken
        return self._operate(self._open(), operation)

    def _operate(self, connection: Connection, operation: Callable[[Connection], T]) -> T:
        """Operate, and keep the connection if it is still in step."""
        in_step = False
        try:
            result = operation(connection)
            in_step = True
            return result
        except ServerRefused as refusal:
            if self.address.sentinels and str(refusal).startswith("READONLY"):
                raise ConnectionError("the sentinels have elected another primary") from refusal
            in_step = True
            raise
        finally:
            if in_step and len(self._idle) < _MOST_IDLE_CONNECTIONS:
                self._idle.append(connection)
            else:
                connection.close()

    def _open(self) -> Connection:
        return Connection(self.address, self._connect_timeout_seconds, self._timeout_seconds)


def _store(
    connection: Connection,
    items: Sequence[tuple[bytes, memoryview]],
    ttl_seconds: int,
    sent: Callable[[int, int], None] | None,
    referrals: Referrals,
) -> None:
    window_nbytes = connection.window_nbytes + _UNANSWERED_NBYTES
    waiting_nbytes = 0
    answered = 0
    told = stop = 0
    before = [_ASKING] if referrals.asking else []

    def tell() -> bool:
        nonlocal told
        first, nbytes = told, 0
        while told < stop and nbytes < _TOLD_AT_ONCE_NBYTES:
            nbytes += len(items[told][1])
            told += 1
        if sent is not None and told > first:
            sent(first, told)
        return told > first

    for first, stop in _groups(items):
        buffers: list[bytes | memoryview] = []
        for key, value in items[first:stop]:
            buffers += before
            buffers += set_command(key, value, ttl_seconds)
            waiting_nbytes += len(value)
        connection.send(buffers, tell)
        while waiting_nbytes > window_nbytes:
            waiting_nbytes -= len(items[answered][1])
            _reply(connection, answered, stop, referrals)
            answered += 1
    while tell():
        pass
    for i in range(answered, len(items)):
        _reply(connection, i, len(items), referrals)


def _reply(connection: Connection, index: int, stop: int, referrals: Referrals) -> Reply:
    """Read the reply to one of the commands that were sent, up to `stop`.

    If it is a refusal, also those behind it, so that the connection stays in step; if it is a referral,
    note it.
    """
    if referrals.asking:
        _skip(connection)
    try:
        return connection.reply()
    except ServerRefused as refusal:
        if referrals.noted(index, refusal):
            return None
        for _ in range((1 + referrals.asking) * (stop - index - 1)):
            _skip(connection)
        raise


def _skip(connection: Connection) -> None:
    with contextlib.suppress(ServerRefused):
        connection.reply()


def _each(connection: Connection, requests: Sequence[bytes], referrals: Referrals) -> None:
    """Send small commands, some hundreds at a time, and read their replies."""
    before = _ASKING if referrals.asking else b""
    for first in range(0, len(requests), _KEYS_AT_ONCE):
        group = requests[first : first + _KEYS_AT_ONCE]
        connection.send([b"".join(before + request for request in group)])
        for i in range(first, first + len(group)):
            _reply(connection, i, first + len(group), referrals)


def _groups(items: Sequence[tuple[bytes, memoryview]]) -> Iterator[tuple[int, int]]:
    """Cut items into runs of about so many bytes as are sent at once."""
    first = nbytes = 0
    for i, (_, value) in enumerate(items, start=1):
        nbytes += len(value)
        if nbytes >= _SENT_AT_ONCE_NBYTES or i == len(items):
            yield first, i
            first, nbytes = i, 0


def _load(
    connection: Connection,
    keys: Sequence[bytes],
    parts: Parts,
    sums: Sequence[str],
    referrals: Referrals,
) -> dict[int, Problem]:
    nbytes_each = parts.nbytes if isinstance(parts, Cut) else len(parts[0])
    asked = max(1, connection.window_nbytes // max(1, nbytes_each))
    before = _ASKING if referrals.asking else b""
    connection.ask(b"".join([before + get_command(key) for key in keys[:asked]]))
    problems: dict[int, Problem] = {}
    piece_nbytes = _PIECE_NBYTES if nbytes_each * len(keys) > _WHOLE_NBYTES else nbytes_each
    for i in range(len(keys)):
        part = parts[i]
        digest = xxhash.xxh3_64()
        nbytes = None
        if referrals.asking:
            _skip(connection)
        try:
            nbytes = connection.reply_into(part, digest.update, piece_nbytes)
        except ServerRefused as refusal:
            if not referrals.noted(i, refusal):
                for later in range(i + 1, min(asked, len(keys))):
                    if referrals.asking:
                        _skip(connection)
                    with contextlib.suppress(ServerRefused):
                        connection.reply_into(parts[later])
                raise
        if asked < len(keys):
            connection.ask(before + get_command(keys[asked]))
            asked += 1
        if nbytes is None:
            problems[i] = Problem.MISSING
        elif nbytes != len(part) or digest.hexdigest() != sums[i]:
            problems[i] = Problem.CORRUPT
    return problems


def _expire(
    connection: Connection,
    keys: Sequence[bytes],
    ttl_seconds: int,
    extend: bool,
    first: int,
    referrals: Referrals,
) -> list[bool]:
    """Set lives; `first` is the index of the first key among all, for referrals."""
    seconds = str(ttl_seconds)
    before = _ASKING if referrals.asking else b""
    if extend:  # EXPIRE ... GT answers 0 for a longer life, too, so it does not tell whether the key exists
        connection.send([b"".join(before + command("EXPIRE", key, seconds, "GT") for key in keys)])
        for i in range(len(keys)):
            _reply(connection, first + i, first + len(keys), referrals)
        requests = [command("EXISTS", key) for key in keys]
    else:
        requests = [command("EXPIRE", key, seconds) for key in keys]
    connection.send([b"".join(before + request for request in requests)])
    return [_reply(connection, first + i, first + len(keys), referrals) == 1 for i in range(len(keys))]
