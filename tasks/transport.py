"""The Redis transport for our queues: less to do in each turn of the event loop, and for each message."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from json import JSONDecodeError
from typing import Any

import kombu
from kombu.transport import redis, virtual

from torchord.cache import keys
from torchord.cache.ledger.quarantine import keep
from torchord.coordinator.messages.inspection import fault_of, fault_of_any, fault_of_taken, fault_of_text
from torchord.coordinator.messages.task_names import is_ours

log = logging.getLogger(__name__)


class QoS(redis.QoS):
    """Kombu's record in Redis of what workers have taken and not acknowledged, for all queues but ours.

    A message of ours is held by the worker that took it, and by nothing in Redis: what a killed worker held
    is sent again by the supervisor (a prediction's part by its caller) within seconds. Kombu's record costs
    two transactions a task and would be looked at an hour later.
    """

    def append(self, message: Any, delivery_tag: str) -> None:
        """See kombu."""
        if _is_ours(message):
            virtual.QoS.append(self, message, delivery_tag)
        else:
            super().append(message, delivery_tag)  # type: ignore[no-untyped-call]

    def ack(self, delivery_tag: str) -> None:
        """See kombu."""
        if self._holds(delivery_tag):
            virtual.QoS.ack(self, delivery_tag)
        else:
            super().ack(delivery_tag)  # type: ignore[no-untyped-call]

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        """See kombu."""
        if self._holds(delivery_tag) and not requeue:
            virtual.QoS.ack(self, delivery_tag)
        else:
            super().reject(delivery_tag, requeue=requeue)  # type: ignore[no-untyped-call]

    def restore_by_tag(self, tag: str, client: Any = None, leftmost: bool = False) -> None:
        """Give a message back to its queue; see kombu."""
        if not self._holds(tag):
            if not self._set_aside(tag, client):
                super().restore_by_tag(tag, client=client, leftmost=leftmost)  # type: ignore[no-untyped-call]
            return
        message = self._delivered[tag]
        place = message.delivery_info
        with self.pipe_or_acquire(client=client) as pipe:
            self.channel._do_restore_message(
                message._raw, place["exchange"], place["routing_key"], pipe, leftmost
            )
            pipe.execute()

    def _set_aside(self, tag: str, client: Any) -> bool:
        """Take what is no message out of Kombu's record; False if it is one."""
        with self.channel.conn_or_acquire(client) as connection:
            entry = connection.hget(self.unacked_key, tag)
            if not entry or (why := fault_of_taken(entry)) is None:
                return False
            with connection.pipeline() as pipe:
                self._remove_from_indices(tag, pipe)  # type: ignore[no-untyped-call]
                pipe.execute()
        set_aside(self.channel, entry, why)
        return True

    def restore_visible(self, *args: Any, **kwargs: Any) -> None:
        """Look for what dead workers held; see kombu. A worker that serves our queues alone need not."""
        if not all(map(is_ours, self.channel.active_queues)):
            super().restore_visible(*args, **kwargs)  # type: ignore[no-untyped-call]

    def restore_unacked(self, client: Any = None) -> None:
        """Give back what this process holds, when it ends or loses its connection; see kombu.

        Where the broker is away, that is one line in the log: ours are sent again by the supervisor, others'
        are still in Redis, in the record of what is taken. Kombu's base class would write all messages as a
        pickle into the temporary directory if it heard of them here.
        """
        held = len(self._delivered)
        try:
            super().restore_unacked(client=client)  # type: ignore[no-untyped-call]
        except self.channel.connection_errors as error:
            log.warning("%d messages could not be given back to the broker: %s", held, error)
            self._delivered.clear()

    def _holds(self, delivery_tag: str) -> bool:
        message = self._delivered.get(delivery_tag)
        return message is not None and _is_ours(message)


def _is_ours(message: Any) -> bool:
    return is_ours(message.delivery_info.get("routing_key") or "")


class Door:
    """Of a channel: what is no message is set aside before anybody stumbles over it."""

    def _brpop_read(self: Any, **options: Any) -> Any:
        try:
            return super()._brpop_read(**options)  # type: ignore[misc]
        except (JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            entry = getattr(error, "doc", None) or getattr(error, "object", None) or ""
            set_aside(self, entry, f"it is no JSON ({type(error).__name__})")
            return True
        except ValueError as error:
            set_aside(self, "", f"it cannot be read ({error})")
            return True
        except self.connection.channel_errors as error:
            if not (str(error).startswith("WRONGTYPE") and self._other_kinds_deleted()):
                raise
            return True

    def _other_kinds_deleted(self: Any) -> bool:
        """Delete what lies under a queue's name and is no queue; False if nothing does."""
        deleted = False
        with self.conn_or_acquire() as client:
            for queue in self.active_queues:
                for priority in self.priority_steps:
                    name = self._q_for_pri(queue, priority)
                    if self._is_of_another_kind(client, name):
                        client.delete(name)
                        set_aside(self, name, "what lay under this name is no queue, and was deleted")
                        deleted = True
        return deleted

    def _is_of_another_kind(self: Any, client: Any, name: str) -> bool:
        try:
            client.llen(name)
            return False
        except self.connection.channel_errors as error:
            if str(error).startswith("WRONGTYPE"):
                return True
            raise

    def _handle_message(self, client: Any, response: Any) -> Any:
        """What is broadcast; see kombu, which passes an empty one over."""
        found: Mapping[str, Any] = super()._handle_message(client, response)  # type: ignore[misc]
        data = found.get("data")
        if data and isinstance(data, str | bytes) and (why := fault_of_text(data)) is not None:
            set_aside(self, data, why)
            return {**found, "data": None}
        return found


def set_aside(channel: Any, entry: Any, why: str) -> None:
    """Keep an entry of a queue that is no message of ours where a person can look at it, and say so.

    Args:
        entry: its text or bytes, or what was read from it.
        why: it is none.
    """
    text = entry if isinstance(entry, str | bytes) else repr(entry)
    log.error("an entry of a queue was set aside (in %s): %s: %.200r", keys.QUARANTINE, why, text)
    try:
        with channel.conn_or_acquire() as client:
            keep(client, text)
    except (*channel.connection_errors, *channel.connection.channel_errors) as error:
        log.warning("it could not be kept: %s", error)


class Channel(Door, redis.Channel):
    """Kombu's channel, with the above."""

    QoS = QoS


class SentinelChannel(Door, redis.SentinelChannel):
    """Kombu's channel for Sentinel, with the above."""

    QoS = QoS


class Transport(redis.Transport):
    """Kombu's Redis transport.

    Kombu registers each socket with the event loop anew in every turn, that is several times a task: a
    system call each, which the kernel answers with "exists already". Here a socket is registered when it
    is not.
    """

    Channel = Channel

    def _deliver(self, message: Any, queue: str) -> None:
        """See kombu; what is no message goes no further, on a queue of ours what is none of ours."""
        why = fault_of(message) if queue and is_ours(queue) else fault_of_any(message, queue)
        if why is not None:
            channel = next(iter(self.channels), None)
            if channel is not None:
                set_aside(channel, message, why)
            return
        super()._deliver(message, queue)  # type: ignore[no-untyped-call]

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


class SentinelTransport(Transport):
    """The same for Sentinel."""

    default_port = redis.SentinelTransport.default_port  # type: ignore[assignment]
    Channel = SentinelChannel  # type: ignore[assignment]


_OURS: dict[Any, type[Transport]] = {redis.Transport: Transport, redis.SentinelTransport: SentinelTransport}


class Connection(kombu.Connection):
    """Kombu's connection, which uses the transports above where kombu would use its own for Redis.

    Set on one app (`app.amqp.Connection`), it changes no other's, and URLs read as ever.
    """

    def get_transport_cls(self) -> Any:
        """See kombu."""
        found = super().get_transport_cls()  # type: ignore[no-untyped-call]
        return _OURS.get(found, found)
