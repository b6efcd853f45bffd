"""Somebody who is told: a real HTTP server that checks each call's signature and keeps what it was told."""

from __future__ import annotations

import hashlib
import hmac
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "what the receiver and the training servers know"


class Receiver:
    """What was told so far.

    Attributes:
        url: where it listens.
        answers: statuses of the next answers; then 204.
        calls: path, headers and body of each call.
        notices: of the calls that were signed and taken.
    """

    def __init__(self) -> None:
        self.url = ""
        self.answers: list[int] = []
        self.calls: list[tuple[str, dict[str, str], bytes]] = []
        self.notices: list[dict[str, Any]] = []

    def of(self, run: str) -> list[dict[str, Any]]:
        """What was told of a run, told twice included."""
        return [notice for notice in list(self.notices) if notice["run"] == run]

    def take(self, path: str, headers: dict[str, str], body: bytes) -> int:
        """The status that a call is answered with."""
        self.calls.append((path, headers, body))
        status = self.answers.pop(0) if self.answers else 204
        signed = headers["Torchord-Timestamp"].encode() + b"." + body
        expected = "v1=" + hmac.new(KEY.encode(), signed, hashlib.sha256).hexdigest()
        if not hmac.compare_digest(expected, headers["Torchord-Signature"]):
            return 403
        if status < 300:
            self.notices.append(json.loads(body))
        return status


@contextmanager
def receiving() -> Iterator[Receiver]:
    """A receiver on loopback."""
    made = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(made.take(self.path, dict(self.headers), body))
            self.send_header("Location", f"{made.url}/elsewhere")
            self.end_headers()

        def log_message(self, *words: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield made
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
