"""Who may be called, and how: by allow-list, signed, within seconds, nowhere else."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.receiver import KEY, Receiver, receiving
from torchord.cache.errors import InvalidInput, NotTold
from torchord.cache.servers.redis_client import connect
from torchord.cache.settings import Settings, from_environment
from torchord.coordinator.messages import webhook
from torchord.coordinator.messages.addressees import check, named, read_on, require_allowed, shown
from torchord.coordinator.messages.broker import publisher
from torchord.coordinator.messages.sender import Sender

ALLOWED = Settings(
    tell_tasks=("shop.tasks.deploy", "mail.*"), tell_urls=("https://hooks.example.org/torchord", "http://")
)
PAGE = Path(__file__).resolve().parents[4] / "docs" / "told.md"
NOTICE = {"id": "digits/5e1f/done-40.0", "run": "digits", "event": "done", "metrics": {"loss": None}}


# --- the allow-list -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "addressee",
    [
        "shop.tasks.deploy",
        "mail.send",
        "mail.all.send",
        "https://hooks.example.org/torchord",
        "https://HOOKS.example.org/torchord/a?key=b",
        "http://anywhere.example",
    ],
)
def test_who_is_on_the_list_may_be_told(addressee: str) -> None:
    assert read_on({"done": addressee}, ALLOWED) == {"done": [addressee]}


@pytest.mark.parametrize(
    "addressee",
    [
        "shop.tasks.deploy.all",
        "shop.tasks",
        "email.send",
        "torchord.advance",
        "celery.backend_cleanup",
        "https://hooks.example.org",
        "https://hooks.example.org/torchord2",
        "https://hooks.example.org/torchord/../admin",
        "https://hooks.example.org/torchord/%2e%2e/admin",
        "https://hooks.example.org/admin?x/../torchord",
        "https://hooks.example.org/admin#/../torchord",
        "https://hooks.example.org:444/torchord",
        "https://hooks.example.org.evil.example/torchord",
    ],
)
def test_who_is_not_on_the_list_is_refused_by_name(addressee: str) -> None:
    check("done", addressee)
    with pytest.raises(InvalidInput, match=r"TORCHORD_TELL_|not for that"):
        require_allowed(addressee, ALLOWED)
    with pytest.raises(InvalidInput):
        require_allowed(addressee, Settings())


def test_torchords_own_tasks_are_never_called() -> None:
    with pytest.raises(InvalidInput, match="not for that"):
        require_allowed("torchord.advance", Settings(tell_tasks=("*",)))
    require_allowed("anybody.at.all", Settings(tell_tasks=("*",)))


@pytest.mark.parametrize(
    ("on", "said"),
    [
        ({"step": "mail.send"}, "what can be told is done, failed"),
        ({"done": []}, "0 addressees"),
        ({"done": ["mail.send"] * 5}, "5 addressees"),
        ({"done": "mail send"}, "neither a task"),
        ({"done": ""}, "neither a task"),
        ({"done": [3]}, "must be a text"),
        ({"done": "x" * 3000}, "at most 2000"),
        ({"done": "ftp://host/x"}, "no address"),
        ({"done": "file:///etc/passwd"}, "no address"),
        ({"done": "http://"}, "no address"),
        ({"done": "http://host:99999/"}, "no URL"),
        ({"done": "http://host/a b"}, "a sign"),
        ({"done": "http://host/\r\nX: y"}, "a sign"),
        ({"done": "http://user:secret@host/"}, "password"),
        ("done", "must map events"),
    ],
)
def test_what_is_no_subscription_is_refused_in_a_sentence(on: Any, said: str) -> None:
    with pytest.raises(InvalidInput, match=said) as caught:
        read_on(on, ALLOWED)
    assert "secret" not in str(caught.value)


def test_pages_show_neither_path_nor_query() -> None:
    assert shown("https://hooks.example.org/T0/SECRET?k=SECRET") == "https://hooks.example.org/…"
    assert shown("https://hooks.example.org") == "https://hooks.example.org"
    assert shown("mail.send") == "mail.send"


def test_a_host_is_named_by_more_than_its_scheme() -> None:
    settings = Settings(tell_urls=("http://10.0.0.5:8080", "https://"))
    assert named("http://10.0.0.5:8080/hook?x=1", settings)
    assert not named("https://10.0.0.5/hook", settings)


def test_the_environment_says_who_may_be_called(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "key").write_text("a secret\n")
    monkeypatch.setenv("TORCHORD_TELL_TASKS", "shop.*, mail.send")
    monkeypatch.setenv("TORCHORD_TELL_URLS", "https://hooks.example.org")
    monkeypatch.setenv("TORCHORD_TELL_KEY_FILE", str(tmp_path / "key"))
    found = from_environment()
    assert (found.tell_tasks, found.tell_urls) == (("shop.*", "mail.send"), ("https://hooks.example.org",))
    assert (found.tell_key, found.tell_queue) == ("a secret", "celery")
    assert "secret" not in repr(found)


# --- the call -------------------------------------------------------------------------------------


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as made:
        yield made


def test_a_call_is_signed_over_time_and_body(receiver: Receiver) -> None:
    webhook.post(f"{receiver.url}/hook?a=b", NOTICE, key=KEY, private=True)
    ((path, headers, body),) = receiver.calls
    assert path == "/hook?a=b"
    assert json.loads(body) == NOTICE
    assert receiver.notices == [json.loads(body)], "it has checked the signature"
    assert headers["Torchord-Id"] == NOTICE["id"]


def test_the_receiver_of_the_page_believes_what_is_genuine_and_recent(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    (snippet,) = re.findall(r"^```python\n(import hashlib\n.*?)^```", PAGE.read_text(), re.S | re.M)
    told: dict[str, Any] = {}
    exec(snippet, told)  # noqa: S102  # the page's own code
    webhook.post(receiver.url, NOTICE, key=KEY, private=True)
    ((_, headers, body),) = receiver.calls
    believed = told["is_torchords"]
    assert believed(KEY, headers, body)
    assert not believed("another key", headers, body)
    assert not believed(KEY, headers, body + b" ")
    earlier = str(int(headers["Torchord-Timestamp"]) - 1)
    assert not believed(KEY, {**headers, "Torchord-Timestamp": earlier}, body)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 301)
    assert not believed(KEY, headers, body), "a call that somebody has kept is no call"


@pytest.mark.parametrize("status", [302, 307, 400, 404, 500, 503])
def test_only_what_is_taken_is_told_and_no_redirect_is_followed(receiver: Receiver, status: int) -> None:
    receiver.answers.append(status)
    with pytest.raises(NotTold, match=f"answered {status}"):
        webhook.post(receiver.url, NOTICE, key=KEY, private=True)
    assert [path for path, _, _ in receiver.calls] == ["/"]


def test_another_key_signs_otherwise(receiver: Receiver) -> None:
    with pytest.raises(NotTold, match="answered 403"):
        webhook.post(receiver.url, NOTICE, key="another", private=True)


def test_without_a_key_nobody_is_called(receiver: Receiver) -> None:
    with pytest.raises(NotTold, match="TORCHORD_TELL_KEY"):
        webhook.post(receiver.url, NOTICE, key="", private=True)
    assert receiver.calls == []


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0", "[::1]", "[::ffff:127.0.0.1]"])
def test_a_private_address_is_called_only_where_it_was_named(receiver: Receiver, host: str) -> None:
    url = receiver.url.replace("127.0.0.1", host)
    with pytest.raises(NotTold, match=r"private network|Error"):
        webhook.post(url, NOTICE, key="key", private=False)
    assert receiver.calls == []


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("10.1.2.3", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("192.168.0.1", False),
        ("224.0.0.1", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:10.0.0.1", False),
        ("64:ff9b::10.0.0.1", False),
        ("2002:0a00:0001::1", False),
    ],
)
def test_which_addresses_are_public(address: str, public: bool) -> None:
    assert webhook.is_public(address) is public


def test_the_address_that_was_looked_at_is_the_one_that_is_called(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that leads to a public address when it is asked for, and to a private one a moment later."""
    port = int(receiver.url.rpartition(":")[2])
    asked: list[str] = []

    def resolve(host: str, port: int, **_: Any) -> list[Any]:
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with pytest.raises(NotTold, match="private network"):
        webhook.post(f"http://rebound.example:{port}/", NOTICE, key="key", private=False)
    assert asked == ["rebound.example"]


@contextmanager
def trickling(text: bytes) -> Iterator[int]:
    """A server that answers with one byte at a time, as slowly as keeps each read alive, and never ends."""
    ended = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                try:
                    for place in range(10**6):
                        connection.sendall(text[place : place + 1] or b"x")
                        if ended.wait(0.02):
                            return
                except OSError:
                    return

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listening.getsockname()[1]
        ended.set()
        thread.join()


@pytest.mark.parametrize("text", [b"", b"HTTP/1.1 200 OK\r\nX: "])
def test_whoever_answers_without_end_is_given_up(text: bytes) -> None:
    with trickling(text) as port, pytest.raises(NotTold, match=r"within 0.3 s"):
        webhook.post(f"http://127.0.0.1:{port}/", NOTICE, key="key", private=True, seconds=0.3)


def test_whoever_speaks_no_tls_is_none_of_https(receiver: Receiver) -> None:
    with pytest.raises(NotTold):
        webhook.post(receiver.url.replace("http", "https"), NOTICE, key="key", private=True)
    assert receiver.calls == []


def test_nobody_at_the_address_is_said() -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    with pytest.raises(NotTold, match="ConnectionRefused"):
        webhook.post(f"http://127.0.0.1:{port}/", NOTICE, key="key", private=True)


# --- a task -------------------------------------------------------------------------------------------


def test_a_task_is_a_message_that_any_app_reads_and_the_same_notice_has_one_id(redis_url: str) -> None:
    sender = Sender(publisher(redis_url, {}))
    for _ in range(2):
        sender.tell("shop.tasks.deploy", NOTICE, queue="shop")
    with connect(redis_url) as client:
        first, second = (json.loads(text) for text in client.lrange("shop", 0, -1))
        client.delete("shop")
    assert first["headers"]["task"] == "shop.tasks.deploy"
    assert first["headers"]["id"] == second["headers"]["id"]
    assert json.loads(b64decode(first["body"]))[:2] == [[NOTICE], {}]
    assert first["content-type"] == "application/json" and first["headers"]["ignore_result"] is True
