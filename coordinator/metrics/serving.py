"""A port of its own for Prometheus: `/metrics`, and `/healthcheck` for whoever looks after the process."""

from __future__ import annotations

from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from torchord.coordinator.metrics.families import CONTENT_TYPE


def server(collect: Callable[[], str], address: str, port: int) -> ThreadingHTTPServer:
    """An HTTP server that answers each scrape with what `collect` returns; to be told to `serve_forever`.

    Args:
        address: to listen at, as in "127.0.0.1".
        port: 0 for any that is free.

    Raises:
        OSError: it cannot listen there.
    """

    class Handler(BaseHTTPRequestHandler):
        timeout = 30

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path not in ("/metrics", "/healthcheck"):
                self.send_error(404)
                return
            body = (collect() if path == "/metrics" else "OK\n").encode()
            self.send_response(200)
            self.send_header("Content-Type", CONTENT_TYPE)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """A scrape every few seconds is nothing to log."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

    return Server((address, port), Handler)
