"""What lies in queues that are not torchord's, in mailboxes and in kombu's records can be garbage, too."""

from __future__ import annotations

import base64
import bz2
import json
import lzma
import time
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from kombu import Connection, Queue
from kombu.asynchronous import Hub
from kombu.pidbox import Mailbox

from tests.security.test_garbage import GARBAGE, message
from tests.support.waiting import wait_until
from torchord.cache import keys
from torchord.cache.ledger.quarantine import in_words, quarantined
from torchord.cache.servers.redis_client import connect
from torchord.coordinator import cli
from torchord.coordinator.messages.inspection import fault_of, fault_of_any
from torchord.coordinator.messages.task_names import GRADIENTS
from torchord.tasks.transport import Transport

OTHERS = "others-queue"
NO_JSON = [b"garbage", b"", b"\xff\xfe\x00", b"[" * 100_000 + b"]" * 100_000, b'{"a":' + b"9" * 5000 + b"}"]
SHAPES = [b"5", b"null", b"[]", b"{}", b'{"properties": 5}', b'{"properties": {"delivery_tag": 5}}']


def letter(found: Any, headers: Any = None, **properties: Any) -> dict[str, Any]:
    """What kombu broadcasts."""
    body = base64.b64encode(json.dumps(found).encode()).decode()
    place = {"exchange": "t.pidbox", "routing_key": ""}
    sent = {"delivery_tag": "t", "delivery_info": place, "delivery_mode": 2, "priority": 0}
    sent |= {"body_encoding": "base64", **properties}
    kind = {"content-encoding": "utf-8", "content-type": "application/json"}
    return {"body": body, **kind, "headers": headers or {}, "properties": sent}


CALL = {"method": "ping", "arguments": {}, "destination": None}
LETTERS: dict[str, Any] = {
    "a number": letter(5),
    "a list": letter([CALL]),
    "a method that is a list": letter({**CALL, "method": []}),
    "arguments that are a list": letter({**CALL, "arguments": [1]}),
    "a destination that is a number": letter({**CALL, "destination": 5}),
    "a pattern that is a number": letter({**CALL, "pattern": 5, "matcher": "glob"}),
    "a pattern that takes for ever": letter({**CALL, "pattern": "(.+)+!", "matcher": "pcre"}),
    "a clock that is a text": letter(CALL, {"clock": "noon"}),
    "a clock without end": letter(CALL, {"clock": 10**40}),
    "an end that is a text": letter(CALL, {"expires": "noon"}),
    "a body of another encoding": letter(CALL, body_encoding="rot13"),
    "a body that is a number": letter(CALL) | {"body": 5},
    "nested": letter(CALL) | {"body": base64.b64encode(b"[" * 70 + b"]" * 70).decode()},
    "compressed": letter(CALL, {"compression": "zlib"}),
}


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as made:
        yield made


class Listener:
    """Queues of others and a mailbox, on an event loop as in a worker."""

    def __init__(self, url: str) -> None:
        self.hub = Hub()
        self.received: list[Any] = []
        self.connection = Connection(url, transport=Transport)
        self.mailbox = Mailbox("t", type="fanout", connection=self.connection)
        channel = self.connection.channel()
        queue = Queue(OTHERS, no_declare=True)
        consumer = self.connection.Consumer([queue], channel, callbacks=[self._receive], accept=["json"])
        consumer.consume()
        self.channel = channel
        node = self.mailbox.Node("node@here", channel=self.connection.channel())
        node.handler(self.ping)
        node.listen(callback=node.handle_message)
        self.connection.register_with_event_loop(self.hub)

    def ping(self, state: Any, **more: Any) -> None:
        self.received.append("ping")

    def _receive(self, body: Any, message: Any) -> None:
        self.received.append(body)
        message.ack()

    def until(self, expected: Any) -> None:
        """Let the loop turn until something was received."""

        def turned() -> bool:
            self.hub.run_once()
            return expected in self.received

        wait_until(turned, message=f"{expected}", interval=0.0)

    def close(self) -> None:
        self.connection.close()
        self.hub.close()


@pytest.fixture
def listener(redis_url: str) -> Iterator[Listener]:
    made = Listener(redis_url)
    yield made
    made.close()


def told(client: redis.Redis) -> int:
    return int(client.get(keys.QUARANTINED) or 0)


def test_garbage_in_anothers_queue_is_set_aside(listener: Listener, client: redis.Redis) -> None:
    client.lpush(OTHERS, *NO_JSON, *SHAPES, json.dumps(letter("fine")))
    listener.until("fine")
    client.lpush(OTHERS, json.dumps(letter("last")))
    listener.until("last")
    assert listener.received == ["fine", "last"] and told(client) == len(NO_JSON) + len(SHAPES)
    assert client.llen(OTHERS) == 0 and 0 < client.ttl(keys.QUARANTINED) <= keys.QUARANTINE_TTL_SECONDS


def test_garbage_that_is_broadcast_is_set_aside(listener: Listener, client: redis.Redis) -> None:
    channel = f"/{client.connection_pool.connection_kwargs['db']}.t.pidbox"

    def heard() -> bool:
        listener.hub.run_once()
        return bool(client.publish(channel, ""))

    wait_until(heard, message="the mailbox", interval=0.0)
    entries = [*(each for each in NO_JSON if each), *SHAPES, *(json.dumps(each) for each in LETTERS.values())]
    for entry in entries:
        assert client.publish(channel, entry) == 1
    client.publish(channel, json.dumps(letter(CALL)))
    listener.until("ping")
    assert listener.received == ["ping"] and told(client) == len(entries)


def test_garbage_among_the_answers_is_set_aside(redis_url: str, client: redis.Redis) -> None:
    with Connection(redis_url, transport=Transport) as connection:
        mailbox = Mailbox("t", type="fanout", connection=connection)(connection)
        queue = mailbox.reply_queue.name
        entries = [
            *NO_JSON,
            *SHAPES,
            *(json.dumps(LETTERS[kind]) for kind in ("a number", "a list", "nested")),
        ]
        answer = letter({"node@here": {"ok": "pong"}}, {"ticket": "x", "expires": time.time() + 60})
        client.lpush(queue, *entries, json.dumps(answer))
        assert mailbox._collect("x", limit=len(entries) + 1, timeout=5) == [{"node@here": {"ok": "pong"}}]
    assert told(client) == len(entries)


TAKEN = [b"garbage", b"[]", b"[1, 2]", b'{"a": 1}', b"[" * 5000, b'[{}, "", 5]', b'[[], "", "others-queue"]']


def test_garbage_among_what_was_taken_is_set_aside(listener: Listener, client: redis.Redis) -> None:
    ours = json.dumps([GARBAGE["an unknown task"], "", GRADIENTS]).encode()
    entries = [*TAKEN, ours]
    fine = json.dumps([letter("given back"), "", OTHERS])
    for number, entry in enumerate([*entries, fine]):
        client.hset("unacked", f"tag{number}", entry)
        client.zadd("unacked_index", {f"tag{number}": number})
    for _ in range(10):  # kombu looks in one of ten turns
        listener.channel.qos.restore_visible(num=100)
    listener.until("given back")
    assert told(client) == len(entries) and client.hlen("unacked") == 0 and client.llen(GRADIENTS) == 0


@pytest.mark.parametrize("kind", ["a text", "a hash"])
def test_what_lies_under_a_queues_name_is_made_way_for(
    listener: Listener, client: redis.Redis, kind: str
) -> None:
    listener.hub.run_once()
    if kind == "a text":
        client.set(f"{OTHERS}\x06\x163", "x", ex=60)
    else:
        client.hset(OTHERS, "a", "b")
    wait_until(lambda: listener.hub.run_once() or told(client) == 1, message="the quarantine", interval=0.0)
    client.lpush(OTHERS, json.dumps(letter("fine")))
    listener.until("fine")
    assert told(client) == 1 and OTHERS.encode() in client.lindex(keys.QUARANTINE, 0)


@pytest.mark.parametrize("pack", [zlib.compress, bz2.compress, lzma.compress])
def test_little_that_unpacks_to_much_is_not_unpacked(pack: Any) -> None:
    name = {zlib.compress: "zlib", bz2.compress: "bzip2", lzma.compress: "xz"}[pack]
    small, large = pack(b'"x"'), pack(bytes(65 << 20))
    assert len(large) < 1 << 20

    def sent(body: bytes) -> dict[str, Any]:
        return letter(None, {"compression": name}) | {"body": base64.b64encode(body).decode()}

    assert fault_of_any(sent(small), OTHERS) is None
    assert fault_of_any(sent(large), OTHERS) == "its body is too large unpacked"
    assert fault_of_any(sent(b"nonsense"), OTHERS) == "its body cannot be unpacked"
    assert fault_of(message({"compression": name})) == "it is no plain JSON"


def test_a_person_sees_how_many_there_were(
    redis_url: str, client: redis.Redis, capsys: pytest.CaptureFixture[str]
) -> None:
    with connect(redis_url) as ours:
        assert quarantined(ours, redis_url) == 0 and in_words(0) == ""
        client.set(keys.QUARANTINED, 1, ex=60)
        assert "1 entry of a queue set aside" in in_words(quarantined(ours, redis_url))
        client.set(keys.QUARANTINED, "garbage", ex=60)
        assert quarantined(ours, redis_url) == 0
    client.set(keys.QUARANTINED, 7, ex=60)
    assert cli.main(["health", "--url", redis_url]) == 1, "no worker lives"
    assert "7 entries of queues set aside" in capsys.readouterr().out
