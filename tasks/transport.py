"""The Redis transport, with less to do in each turn of the worker's event loop."""

from __future__ import annotations

from typing import Any

from kombu.transport.redis import Transport as RedisTransport


class Transport(RedisTransport):
    """Kombu's Redis transport.

    Kombu registers each socket with the event loop anew in every turn, that is several times a task: a
    system call each, which the kernel answers with "exists already". Here a socket is registered when it
    is not.
    """

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        """See kombu."""
        known = set(loop.on_tick)
        super().register_with_event_loop(connection, loop)  # type: ignore[no-untyped-call]
        cycle: Any = self.cycle
        on_readable, readers = self.on_readable, loop.readers

        def on_poll_start() -> None:
            cycle.on_poll_start()
            for fd in cycle.fds:
                if fd not in readers or readers[fd][0] != on_readable:
                    loop.add_reader(fd, on_readable, fd)

        for callback in set(loop.on_tick) - known:
            loop.on_tick.discard(callback)
        loop.on_tick.add(on_poll_start)
