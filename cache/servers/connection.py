"""One connection to a Redis-compatible server, moving large values without a copy of its own.

A general client joins what it sends into one string and builds what it receives from pieces.
Here a value leaves straight from the tensor's memory (gathered with its command into one
system call) and arrives straight in the tensor's memory (scattered, so that the few bytes of
protocol behind a value land in a scratch buffer).
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeAlias

from torchord.cache.servers.address import Address

SCRATCH_NBYTES = 4096
_MOST_BUFFERS = 256  # per system call; POSIX allows as few as 16, Linux and macOS 1,024

_LEAST_WINDOW_NBYTES, _MOST_WINDOW_NBYTES = 2 << 20, 32 << 20
_LINK_NBYTES_PER_SECOND = 1.25e9  # of a 10 Gbit/s link

_MOST_REPLY_NBYTES = 64 << 20  # of what is read into new memory; values have memory of their own
_MOST_REPLY_ITEMS = 1 << 20

Reply: TypeAlias = "str | int | bytes | list[Reply] | None"


class ServerRefused(Exception):
    """An error reply; stays inside `cache/`, see `torchord.cache.servers.node`."""


class Connection:
    """A socket that speaks the protocol's second version (RESP2).

    Not for several threads at once. After an OSError the connection is out of step and must be
    closed; after a `ServerRefused` it is in step.

    Args:
        address: where to.
        connect_timeout_seconds: longest wait for the connection and for each reply of the log-in.
        timeout_seconds: longest wait without a byte moving.

    Attributes:
        window_nbytes: what may be asked for and not yet received, or sent and not yet acknowledged:
            as much as a 10 Gbit/s link holds during one round trip (the time to connect), but at
            least 2 MiB, and at most 32 MiB, which the server buffers for each reader.

    Raises:
        OSError: no connection (ConnectionError, TimeoutError, ssl.SSLError and so on).
        ServerRefused: the server did not accept the credentials or the database.
    """

    def __init__(self, address: Address, connect_timeout_seconds: float, timeout_seconds: float) -> None:
        self._bytes = bytearray(SCRATCH_NBYTES)
        self._scratch = memoryview(self._bytes)
        self._start = self._end = 0
        self._tls = address.tls is not None
        if address.sentinels:
            host, port = _primary_of(address, connect_timeout_seconds)
            address = replace(address, host=host, port=port, sentinels=())
        started = time.perf_counter()
        self._socket = _connect(address, connect_timeout_seconds)
        held = int((time.perf_counter() - started) * _LINK_NBYTES_PER_SECOND)
        self.window_nbytes = max(_LEAST_WINDOW_NBYTES, min(held, _MOST_WINDOW_NBYTES))
        try:
            self._set_timeout(connect_timeout_seconds)
            self._log_in(address)
            self._set_timeout(timeout_seconds)
        except BaseException:
            self.close()
            raise

    def send(
        self, buffers: Sequence[bytes | memoryview], meanwhile: Callable[[], bool] | None = None
    ) -> None:
        """Send buffers one after the other, each from its own memory.

        Args:
            meanwhile: called while the kernel takes no more, so that the server has enough to do; it
                does a little work (some tens of microseconds) and tells whether there was any.
        """
        if self._tls:
            for buffer in buffers:
                self._socket.sendall(buffer)
            return
        for first in range(0, len(buffers), _MOST_BUFFERS):
            rest: Sequence[bytes | memoryview] = buffers[first : first + _MOST_BUFFERS]
            while rest:
                if meanwhile is None:
                    count = self._within_timeout_sendmsg(rest)
                else:
                    try:
                        count = self._socket.sendmsg(rest, [], socket.MSG_DONTWAIT)
                    except BlockingIOError:
                        if not meanwhile():
                            meanwhile = None
                        continue
                rest = _after(rest, count)

    def ask(self, request: bytes) -> None:
        """Send one small buffer."""
        try:
            self._socket.sendall(request)
        except BlockingIOError as error:
            raise TimeoutError("the server takes no more data") from error

    def receive(self, at_most_nbytes: int) -> bytes:
        """Read what is there, at least one byte; for a caller who parses replies itself.

        Not to be mixed with `reply` and `reply_into`, which read ahead.
        """
        try:
            data = self._socket.recv(at_most_nbytes)
        except BlockingIOError as error:
            raise TimeoutError("the server does not reply") from error
        if not data:
            raise ConnectionResetError("the server closed the connection")
        return data

    def reply(self) -> Reply:
        """Read one reply: text, a number, bytes, None for nil, or a list of these.

        Raises:
            ServerRefused: the server answered with an error.
        """
        line = self._line()
        if line == b"+OK":
            return "OK"
        kind, text = line[:1], line[1:]
        if kind == b"+":
            return text.decode(errors="replace")
        if kind == b"-":
            raise ServerRefused(text.decode(errors="replace"))
        if kind == b":":
            return _number(line)
        if kind == b"$":
            nbytes = _number(line, _MOST_REPLY_NBYTES)
            if nbytes < 0:
                return None
            value = bytearray(nbytes)
            self._value_into(memoryview(value))
            return bytes(value)
        if kind == b"*":
            return [self.reply() for _ in range(_number(line, _MOST_REPLY_ITEMS))]
        raise _unexpected(line)

    def reply_into(
        self,
        part: memoryview,
        received: Callable[[memoryview], object] | None = None,
        piece_nbytes: int | None = None,
    ) -> int | None:
        """Read one string reply into memory of the expected size.

        Args:
            part: where the value belongs.
            received: called with each piece of the value, in order, while it is still in the
                processor's cache; not called for a value of another length.
            piece_nbytes: at most so much is received at once; None: whatever is there.

        Returns:
            The value's length in bytes, or None for nil. With any other length than that of
            `part` the value was skipped and `part` is untouched.

        Raises:
            ServerRefused: the server answered with an error.
        """
        head = b"$%d\r\n" % len(part)
        if self._start == self._end:
            self._start = self._end = 0
            self._fill(len(head))
        if self._end - self._start >= len(head) and self._bytes.startswith(head, self._start):
            self._start += len(head)  # as expected; what follows is for all other replies
            self._value_into(part, received, piece_nbytes)
            return len(part)
        line = self._line()
        if line[:1] == b"-":
            raise ServerRefused(line[1:].decode(errors="replace"))
        if line[:1] != b"$":
            raise _unexpected(line)
        nbytes = _number(line)
        if nbytes < 0:
            return None
        if nbytes == len(part):
            self._value_into(part, received, piece_nbytes)
        else:
            self._skip(nbytes + 2)
        return nbytes

    def close(self) -> None:
        """Close the socket; the peer is not told more than that."""
        with contextlib.suppress(OSError, AttributeError):  # AttributeError: never opened
            self._socket.close()

    def __del__(self) -> None:
        """An abandoned store need not be closed."""
        self.close()

    def _log_in(self, address: Address) -> None:
        if address.password is not None:
            user = () if address.username is None else (address.username,)
            self.send([command("AUTH", *user, address.password)])
            self.reply()
        if address.db:
            self.send([command("SELECT", str(address.db))])
            self.reply()

    def _set_timeout(self, seconds: float) -> None:
        """Plain sockets stay blocking and let the kernel watch the clock, which saves a poll per call."""
        if self._tls:
            self._socket.settimeout(seconds)
            return
        self._socket.settimeout(None)
        interval = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, interval)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, interval)

    def _within_timeout_sendmsg(self, buffers: Sequence[bytes | memoryview]) -> int:
        try:
            return self._socket.sendmsg(buffers)
        except BlockingIOError as error:
            raise TimeoutError("the server takes no more data") from error

    def _receive(self, part: memoryview, overflow: memoryview | None) -> int:
        """Read into `part` and, on a plain socket, beyond it into `overflow`."""
        try:
            if overflow is None or self._tls:
                count = self._socket.recv_into(part)
            else:
                count = self._socket.recvmsg_into([part, overflow])[0]
        except BlockingIOError as error:
            raise TimeoutError("the server sends no more data") from error
        if not count:
            raise ConnectionResetError("the server closed the connection")
        return count

    def _value_into(
        self,
        part: memoryview,
        received: Callable[[memoryview], object] | None = None,
        piece_nbytes: int | None = None,
    ) -> None:
        filled = min(self._end - self._start, len(part))
        if filled:
            part[:filled] = self._scratch[self._start : self._start + filled]
            self._start += filled
            if received is not None:
                received(part[:filled])
        if filled < len(part):
            # What follows is most likely the header of a value of the same length. Reading just that
            # far lets the next value start where the kernel copies fastest, at the head of its memory.
            overflow = self._scratch[: len(str(len(part))) + 5]
            step = piece_nbytes or len(part)
            while filled < len(part):
                piece = part[filled : filled + step]
                last = filled + len(piece) == len(part)
                count = self._receive(piece, overflow if last else None)
                if received is not None:
                    received(piece[:count])
                filled += count
            self._start, self._end = 0, filled - len(part)
        if self._end - self._start >= 2:
            self._start += 2
        else:
            self._skip(2)

    def _skip(self, nbytes: int) -> None:
        while nbytes > self._end - self._start:
            nbytes -= self._end - self._start
            self._start = self._end = 0
            self._fill(SCRATCH_NBYTES)
        self._start += nbytes

    def _line(self) -> bytes:
        while (stop := self._bytes.find(b"\r\n", self._start, self._end)) < 0:
            self._fill(SCRATCH_NBYTES)
        line = self._bytes[self._start : stop]
        self._start = stop + 2
        return bytes(line)

    def _fill(self, at_most_nbytes: int) -> None:
        if self._start:
            rest = bytes(self._scratch[self._start : self._end])
            self._scratch[: len(rest)] = rest
            self._start, self._end = 0, len(rest)
        if self._end == SCRATCH_NBYTES:
            raise ConnectionError("a reply without end: is that a Redis-compatible server?")
        try:
            count = self._socket.recv_into(self._scratch[self._end : self._end + at_most_nbytes])
        except BlockingIOError as error:
            raise TimeoutError("the server does not reply") from error
        if not count:
            raise ConnectionResetError("the server closed the connection")
        self._end += count


def command(*words: str | bytes) -> bytes:
    """Encode a command whose arguments are all small."""
    encoded = [word.encode() if isinstance(word, str) else word for word in words]
    return b"*%d\r\n" % len(encoded) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in encoded)


def get_command(key: bytes) -> bytes:
    """Encode GET key."""
    return b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(key), key)


def set_command(key: bytes, value: memoryview, ttl_seconds: int) -> tuple[bytes, memoryview, bytes]:
    """Encode SET key value EX ttl around a value that stays where it is."""
    head = b"*5\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%d\r\n" % (len(key), key, len(value))
    ttl = b"%d" % ttl_seconds
    return head, value, b"\r\n$2\r\nEX\r\n$%d\r\n%s\r\n" % (len(ttl), ttl)


def _number(line: bytes, most: int | None = None) -> int:
    """The number in a reply's first line; a length is at most `most`."""
    try:
        number = int(line[1:])
    except ValueError:
        raise _unexpected(line) from None
    if most is not None and number > most:
        raise _unexpected(line)
    return number


def _unexpected(line: bytes) -> ConnectionError:
    return ConnectionError(f"unexpected reply {line[:32]!r}: is that a Redis-compatible server?")


def _after(buffers: Sequence[bytes | memoryview], sent: int) -> Sequence[bytes | memoryview]:
    """Return what is left of `buffers` after their first `sent` bytes."""
    for i, buffer in enumerate(buffers):
        if sent < len(buffer):
            return [memoryview(buffer)[sent:], *buffers[i + 1 :]]
        sent -= len(buffer)
    return ()


def _primary_of(address: Address, timeout_seconds: float) -> tuple[str, int]:
    """Ask the sentinels where the primary is.

    Raises:
        ConnectionError: none of them answers, or none knows the service.
    """
    last: object = "no sentinel is named"
    for host, port in address.sentinels:
        sentinel = Address(f"{host}:{port}", host, port, "", 0, None, None, None)
        try:
            connection = Connection(sentinel, timeout_seconds, timeout_seconds)
            try:
                connection.send([command("SENTINEL", "get-master-addr-by-name", address.service)])
                match connection.reply():
                    case [bytes() as where, bytes() as at]:
                        return where.decode(), int(at)
                last = f"sentinel {host}:{port} watches no service {address.service!r}"
            finally:
                connection.close()
        except (OSError, ServerRefused) as error:
            last = f"sentinel {host}:{port}: {error}"
    raise ConnectionError(f"no primary known for {address.service!r} ({last})")


def _connect(address: Address, timeout_seconds: float) -> socket.socket:
    if address.path:
        plain = socket.socket(socket.AF_UNIX)
        try:
            plain.settimeout(timeout_seconds)
            plain.connect(address.path)
        except BaseException:
            plain.close()
            raise
        return plain
    plain = socket.create_connection((address.host, address.port), timeout_seconds)
    try:
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, name):
                plain.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        if address.tls is None:
            return plain
        return address.tls.wrap_socket(plain, server_hostname=address.host)
    except BaseException:
        plain.close()
        raise
