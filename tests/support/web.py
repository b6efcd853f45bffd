"""Handlers of Flower's in a web server of this process, and whoever asks it."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from tornado.httpserver import HTTPServer
from tornado.testing import bind_unused_port
from tornado.web import Application

TIMEOUT_SECONDS = 60


class Asker:
    """Asks one server.

    Args:
        address: where it answers.
        token: that is given unless another one is.
    """

    def __init__(self, address: str, token: str | None = None) -> None:
        self.address = address
        self.token = token

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> Request:
        """A request; `body` becomes JSON unless it is bytes. Underscores in names of headers are dashes."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        if self.token is not None:
            given.setdefault("Authorization", f"Bearer {self.token}")
        if data is not None:
            given.setdefault("Content-Type", "application/json")
        elif method == "POST":
            data = b""
        return Request(self.address + path, data=data, headers=given, method=method)

    def __call__(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """Status and JSON of the answer."""
        status, found, _ = self.whole(method, path, body, **headers)
        return status, json.loads(found) if found else None

    def whole(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, str, Any]:
        """Status, text and headers of the answer."""
        try:
            with urlopen(self.request(method, path, body, **headers), timeout=TIMEOUT_SECONDS) as reply:
                return reply.status, reply.read().decode(), reply.headers
        except HTTPError as error:
            with error:
                return error.code, error.read().decode(), error.headers


@contextmanager
def served(handlers: list[Any], **options: Any) -> Iterator[str]:
    """The address at which these answer, with options as Flower has them."""
    defaults = {"basic_auth": [], "auth": "", "read_only": False, "url_prefix": "", "debug": False}
    ready, place, loop = threading.Event(), [], asyncio.new_event_loop()

    async def serve() -> None:
        application: Any = Application(
            handlers, cookie_secret="for a test", xsrf_cookies=True, login_url="/login"
        )
        application.options = SimpleNamespace(**{**defaults, **options})
        socket, port = bind_unused_port()
        server = HTTPServer(application)
        server.add_socket(socket)
        place.append((port, asyncio.Event(), server))
        ready.set()
        await place[0][1].wait()
        server.stop()
        await server.close_all_connections()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), daemon=True)
    thread.start()
    assert ready.wait(TIMEOUT_SECONDS)
    port, done, _ = place[0]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        loop.call_soon_threadsafe(done.set)
        thread.join(TIMEOUT_SECONDS)
        loop.close()
