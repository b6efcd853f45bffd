"""A short way to the control plane: pipelined commands over a lean connection of its own.

redis-py looks at each connection before it uses it, wraps each command in a policy of retries and
observers and builds each request in Python: about 0.15 ms of processor time a command. A step makes a
dozen of them. Here a request is packed and its reply parsed by hiredis, and that is all. Whatever is out
of the ordinary (no connection, a server that restarts, an error reply, a failover) is left to redis-py:
the lane only says that it does not know, and the caller sends the same again the long way.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from typing import Any

import hiredis

from torchord.cache.errors import CacheError
from torchord.cache.scripts import source
from torchord.cache.servers.address import Address
from torchord.cache.servers.connection import Connection, ServerRefused
from torchord.cache.servers.fork import reset_after_fork

Command = tuple[str | int | float | bytes, ...]

pack_command: Any = hiredis.pack_command  # its stub knows tuples of one word only

_MOST_IDLE_CONNECTIONS = 8
_READ_AT_ONCE_NBYTES = 1 << 16


UNREADABLE = "backslashreplace"
"""What becomes of bytes that are no UTF-8: signs that no JSON has, so that their record is none."""


class LaneClosed(Exception):
    """The lane could not bring an answer; the command may or may not have been executed."""


class _Line:
    """One connection with a parser of its own."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.parser = hiredis.Reader(encoding="utf-8", errors=UNREADABLE)

    def replies(self, count: int) -> list[Any]:
        found: list[Any] = []
        while True:
            reply = self.parser.gets()
            while reply is not False:
                found.append(reply)
                if len(found) == count:
                    return found
                reply = self.parser.gets()
            self.parser.feed(self.connection.receive(_READ_AT_ONCE_NBYTES))


class Lane:
    """Commands that may be sent twice, by the short way.

    Threads may share a lane; each call has a connection of its own. A forked child starts without
    connections.

    Args:
        url: redis://, rediss://, unix:// or Sentinel URL, as for
        `torchord.cache.servers.redis_client.connect`.
        connect_timeout_seconds: longest wait for a connection.
        timeout_seconds: longest wait for a reply.
    """

    def __init__(
        self, url: str, *, connect_timeout_seconds: float = 2.0, timeout_seconds: float = 5.0
    ) -> None:
        try:
            self._address: Address | None = Address.parse(url)
        except CacheError:  # the long way says what is wrong with it
            self._address = None
        self._connect_timeout_seconds = connect_timeout_seconds
        self._timeout_seconds = timeout_seconds
        self._idle: list[_Line] = []  # popped and appended atomically, hence no lock
        reset_after_fork(self)

    def call(self, *commands: Command) -> list[Any]:
        """Send commands in one round trip and return their replies, text decoded as UTF-8.

        A script that the server does not know (any more) is loaded, and all is sent again.

        Raises:
            LaneClosed: there is no connection, it broke, or a reply was an error.
        """
        replies = self._exchange(commands)
        if any(_unknown(reply) for reply in replies):
            loads: list[Command] = [("SCRIPT", "LOAD", source(name)) for name in _known.values()]
            replies = self._exchange([*loads, *commands])[len(loads) :]
        for reply in replies:
            if isinstance(reply, hiredis.ReplyError):
                self.reset()  # a primary that has become a replica, say: look for it anew
                raise LaneClosed(str(reply))
        return replies

    def _exchange(self, commands: Sequence[Command]) -> list[Any]:
        request = b"".join([pack_command(command) for command in commands])
        line = self._line()
        try:
            line.connection.ask(request)
            replies = line.replies(len(commands))
        except (OSError, hiredis.HiredisError) as error:
            line.connection.close()
            self.reset()  # what else is idle is as old, and as broken
            raise LaneClosed(str(error)) from error
        if len(self._idle) < _MOST_IDLE_CONNECTIONS:
            self._idle.append(line)
        return replies

    def _line(self) -> _Line:
        if self._idle:
            try:
                return self._idle.pop()
            except IndexError:  # another thread was faster
                pass
        if self._address is None:
            raise LaneClosed("no address")
        try:
            return _Line(Connection(self._address, self._connect_timeout_seconds, self._timeout_seconds))
        except (OSError, ServerRefused) as error:
            raise LaneClosed(str(error)) from error

    def reset(self) -> None:
        """Close the idle connections; in a forked child they are the parent's."""
        idle, self._idle = self._idle, []
        for line in idle:
            line.connection.close()

    close = reset


def script_command(name: str, keys: Sequence[str], args: Sequence[Any]) -> Command:
    """EVALSHA of a named script, for `Lane.call`."""
    return ("EVALSHA", _digest(name), len(keys), *keys, *args)


def script_text(command: Command) -> str:
    """The text of the script that a command of `script_command` runs, for a server that does not know it."""
    return source(_known[str(command[1])])


_known: dict[str, str] = {}  # digest -> name of each script that was asked for


@cache
def _digest(name: str) -> str:
    digest = hashlib.sha1(source(name).encode(), usedforsecurity=False).hexdigest()
    _known[digest] = name
    return digest


def _unknown(reply: Any) -> bool:
    return isinstance(reply, hiredis.ReplyError) and str(reply).startswith("NOSCRIPT")
