"""A path through which a worker reaches its server, and that can be made worse in the ways of networks.

It can forget its connections as a NAT does, let nothing through one way, take its time, and lose packets: TCP
sends those again, so what is lost comes later, and what follows waits for it.
"""

from __future__ import annotations

import random
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

_CHUNK_NBYTES = 1 << 16
_PAUSE_SECONDS = 0.02
_RETRANSMISSION_SECONDS = 0.3


class Relay:
    """Passes bytes between whoever connects and one server on this machine.

    Attributes:
        port: where to connect to, on 127.0.0.1.
        swallowed: bytes that went nowhere.
        delay_seconds: that a packet takes, each way.
        loss: share of the packets that are lost and sent again.
        closed: ways on which nothing passes: "to the server", "to the client".
    """

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self._selector = selectors.DefaultSelector()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._peers: dict[socket.socket, socket.socket] = {}
        self._forgotten: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.port: int = self._listener.getsockname()[1]
        self.swallowed = 0
        self.delay_seconds = 0.0
        self.loss = 0.0
        self.closed: frozenset[str] = frozenset()
        self._upward: set[socket.socket] = set()  # those of clients
        self._late: dict[socket.socket, deque[tuple[float, bytes]]] = {}  # receiver -> (when, what)
        self._random = random.Random(0)

    def __enter__(self) -> Self:
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        for each in (self._listener, *self._peers):
            each.close()
        self._selector.close()

    @property
    def connections(self) -> int:
        """How many are remembered."""
        with self._lock:
            return (len(self._peers) - len(self._forgotten)) // 2

    def forget(self) -> int:
        """Drop from now on what comes on the connections that there are; returns how many they are."""
        with self._lock:
            fresh = set(self._peers) - self._forgotten
            self._forgotten |= fresh
        return len(fresh) // 2

    @contextmanager
    def worse(
        self, *, delay_seconds: float = 0.0, loss: float = 0.0, closed: tuple[str, ...] = ()
    ) -> Iterator[None]:
        """A worse path for the block; what was closed meanwhile knows nothing of its connections after it."""
        self.delay_seconds, self.loss, self.closed = delay_seconds, loss, frozenset(closed)
        try:
            yield
        finally:
            self.delay_seconds, self.loss, self.closed = 0.0, 0.0, frozenset()
            if closed:
                self.forget()

    def _run(self) -> None:
        while not self._stop.is_set():
            self._deliver()
            for key, _ in self._selector.select(_PAUSE_SECONDS if not self._late else 0.001):
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    assert isinstance(key.fileobj, socket.socket)
                    self._pass_on(key.fileobj)

    def _accept(self) -> None:
        here, _ = self._listener.accept()
        try:
            there = socket.create_connection(("127.0.0.1", self._server_port))
        except OSError:
            here.close()
            return
        self._upward.add(here)
        for one, other in ((here, there), (there, here)):
            with self._lock:
                self._peers[one] = other
            self._selector.register(one, selectors.EVENT_READ)

    def _pass_on(self, one: socket.socket) -> None:
        try:
            data = one.recv(_CHUNK_NBYTES)
            if (data and one in self._forgotten) or (
                data and ("to the server" if one in self._upward else "to the client") in self.closed
            ):
                self.swallowed += len(data)
            elif data:
                self._send(self._peers[one], data)
        except OSError:
            data = b""
        if not data:
            self._close(one)

    def _send(self, other: socket.socket, data: bytes) -> None:
        """Pass on what has come, or keep it until it is due."""
        late = self._late.get(other)
        seconds = self.delay_seconds + (_RETRANSMISSION_SECONDS if self._random.random() < self.loss else 0.0)
        if not seconds and not late:
            other.sendall(data)
            return
        if late is None:
            late = self._late[other] = deque()
        before = late[-1][0] if late else 0.0
        late.append((max(before, time.monotonic() + seconds), data))

    def _deliver(self) -> None:
        """Pass on what is due."""
        now = time.monotonic()
        for other, late in list(self._late.items()):
            try:
                while late and late[0][0] <= now:
                    other.sendall(late.popleft()[1])
            except OSError:
                late.clear()
            if not late:
                del self._late[other]

    def _close(self, one: socket.socket) -> None:
        with self._lock:
            other = self._peers.pop(one, None)
        ends = [one] if other is None or one in self._forgotten else [one, other]
        for end in ends:
            with self._lock:
                self._peers.pop(end, None)
                self._forgotten.discard(end)
            self._upward.discard(end)
            self._late.pop(end, None)
            self._selector.unregister(end)
            end.close()
