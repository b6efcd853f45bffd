"""TLS for a server that has none: an authority of our own, and a relay that ends TLS before the server."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

_EC = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]


def certificates(folder: Path) -> Path:
    """Make ca.crt and, signed by it, server.crt (of localhost) and client.crt; stranger.crt is another's."""
    openssl = shutil.which("openssl") or pytest.skip("needs openssl")

    def run(*words: str) -> None:
        subprocess.run([openssl, *words], cwd=folder, check=True, capture_output=True, timeout=60)

    for name in ("ca", "stranger"):
        extensions = ["-addext", "keyUsage=critical,digitalSignature,keyCertSign"]
        run(
            "req",
            "-x509",
            *_EC,
            "-subj",
            f"/CN={name}",
            *extensions,
            "-keyout",
            f"{name}.key",
            "-out",
            f"{name}.crt",
        )
    (folder / "san.ext").write_text("subjectAltName=DNS:localhost\n")
    for name in ("server", "client"):
        run("req", *_EC, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")
        signed = ["-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "san.ext"]
        run("x509", "-req", "-in", f"{name}.csr", *signed, "-out", f"{name}.crt")
    return folder


def options(folder: Path, client: str = "client") -> str:
    """What a URL says of TLS: check the server, show a certificate."""
    return (
        f"ssl_cert_reqs=required&ssl_ca_certs={folder}/ca.crt"
        f"&ssl_certfile={folder}/{client}.crt&ssl_keyfile={folder}/{client}.key"
    )


@contextlib.contextmanager
def tls_front(port: int, folder: Path) -> Iterator[int]:
    """A port that takes TLS from who has a client certificate, in front of a plain port of this host."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(folder / "ca.crt"))
    context.load_cert_chain(folder / "server.crt", folder / "server.key")
    context.verify_mode = ssl.CERT_REQUIRED
    loop = asyncio.new_event_loop()
    started: list[int] = []
    ready = threading.Event()

    async def copy(source: asyncio.StreamReader, goal: asyncio.StreamWriter) -> None:
        while data := await source.read(1 << 18):
            goal.write(data)
            await goal.drain()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", port)
        ways = [asyncio.ensure_future(way) for way in (copy(reader, back), copy(there, writer))]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            for end in (writer, back):
                end.transport.abort()

    async def run() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
        started.append(server.sockets[0].getsockname()[1])
        ready.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        server.close()

    def work() -> None:
        asyncio.set_event_loop(loop)
        loop.set_exception_handler(lambda _loop, _context: None)  # of handshakes that are meant to fail
        main.append(loop.create_task(run()))
        loop.run_until_complete(main[0])
        rest = asyncio.all_tasks(loop)
        for task in rest:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*rest, return_exceptions=True))
        loop.run_until_complete(asyncio.sleep(0.05))  # for the transports to close
        loop.close()

    main: list[asyncio.Task[None]] = []
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    ready.wait(10)
    try:
        yield started[0]
    finally:
        loop.call_soon_threadsafe(main[0].cancel)
        thread.join(10)
