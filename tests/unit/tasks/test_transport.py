"""Which sockets the worker's event loop watches, and how often it is told of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from kombu import Connection, Queue
from kombu.asynchronous import Hub

from tests.support.waiting import wait_until
from torchord.tasks.transport import Transport

QUEUE = "transport-test"


class Loop:
    """A connection with a consumer on an event loop, as in a worker.

    Attributes:
        told: file descriptor -> how often the kernel was told of it.
        received: bodies of messages.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.hub = Hub()
        self.told: Counter[int] = Counter()
        self.received: list[Any] = []
        register = self.hub.poller.register

        def counted(fd: int, events: int) -> None:
            self.told[fd] += 1
            register(fd, events)

        self.hub.poller.register = counted
        self.connection = Connection(url, transport=Transport)
        channel = self.connection.channel()
        consumer = self.connection.Consumer(
            [Queue(QUEUE, no_declare=True)], channel, callbacks=[self._receive], no_ack=True, accept=["json"]
        )
        consumer.consume()
        self.connection.register_with_event_loop(self.hub)

    def _receive(self, body: Any, message: Any) -> None:
        self.received.append(body)

    def turn(self) -> list[int]:
        """What happens before each poll; the sockets that are to be watched."""
        for callback in list(self.hub.on_tick):
            callback()
        return list(self.connection.transport.cycle.fds)

    def watched(self, fd: int) -> bool:
        """Whether what comes on a socket goes to the transport."""
        return fd in self.hub.readers and self.hub.readers[fd][0] == self.connection.transport.on_readable

    def receive(self, body: str) -> None:
        """Send a message and let the loop turn until it is there."""
        with Connection(self.url) as sender:
            sender.Producer().publish(body, routing_key=QUEUE, exchange="", serializer="json")

        def turned() -> bool:
            self.hub.run_once()
            return body in self.received

        wait_until(turned, message=f"message {body}", interval=0.0)

    def close(self) -> None:
        self.connection.close()
        self.hub.close()


@pytest.fixture
def loop(redis_url: str) -> Iterator[Loop]:
    made = Loop(redis_url)
    yield made
    made.close()


def test_the_kernel_is_told_of_a_socket_once(loop: Loop) -> None:
    for number in range(3):
        loop.receive(f"message {number}")
    assert loop.received == [f"message {number}" for number in range(3)]
    for _ in range(3):
        fds = loop.turn()
    assert fds and [loop.told[fd] for fd in fds] == [1] * len(fds)


def test_a_socket_that_the_loop_forgot_is_watched_again(loop: Loop) -> None:
    [fd, *_] = loop.turn()
    loop.hub.remove(fd)
    loop.turn()
    assert loop.watched(fd) and loop.told[fd] == 2
    loop.receive("after that")


def test_a_socket_under_the_number_of_one_that_was_anothers_is_watched(loop: Loop) -> None:
    """A number is free once its socket is closed, and what the loop knew of it goes on being there."""
    [fd, *_] = loop.turn()
    others: list[int] = []
    loop.hub.remove(fd)
    loop.hub.readers[fd] = (others.append, (fd,))
    loop.turn()
    assert loop.watched(fd)
    loop.receive("to the one that has the number now")
    assert others == []
