"""A path through which a worker reaches its server, and that can forget its connections as a NAT does."""

from __future__ import annotations

import selectors
import socket
import threading
from types import TracebackType
from typing import Self

_CHUNK_NBYTES = 1 << 16
_PAUSE_SECONDS = 0.02


class Relay:
    """Passes bytes between whoever connects and one server on this machine.

    Attributes:
        port: where to connect to, on 127.0.0.1.
        swallowed: bytes of forgotten connections that went nowhere.
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

    def _run(self) -> None:
        while not self._stop.is_set():
            for key, _ in self._selector.select(_PAUSE_SECONDS):
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    assert isinstance(key.fileobj, socket.socket)
                    self._pass_on(key.fileobj)

    def _accept(self) -> None:
        here, _ = self._listener.accept()
        there = socket.create_connection(("127.0.0.1", self._server_port))
        for one, other in ((here, there), (there, here)):
            with self._lock:
                self._peers[one] = other
            self._selector.register(one, selectors.EVENT_READ)

    def _pass_on(self, one: socket.socket) -> None:
        try:
            data = one.recv(_CHUNK_NBYTES)
            if data and one in self._forgotten:
                self.swallowed += len(data)
            elif data:
                self._peers[one].sendall(data)
        except OSError:
            data = b""
        if not data:
            self._close(one)

    def _close(self, one: socket.socket) -> None:
        with self._lock:
            other = self._peers.pop(one, None)
        ends = [one] if other is None or one in self._forgotten else [one, other]
        for end in ends:
            with self._lock:
                self._peers.pop(end, None)
                self._forgotten.discard(end)
            self._selector.unregister(end)
            end.close()
