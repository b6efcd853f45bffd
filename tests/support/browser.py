"""A headless Chromium for tests of pages, driven over its debugging protocol: no driver to install."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from tornado.websocket import WebSocketClientConnection, websocket_connect

from tests.support.waiting import PATIENCE_SECONDS, wait_until

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ABSENT = "there is no Chromium on this machine; install the package 'chromium' to try the pages in a browser"
_MESSAGE_NBYTES = 64 << 20
_OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--remote-debugging-port=0",
)


class Browser:
    """One Chromium, with a profile of its own that is thrown away."""

    def __enter__(self) -> Browser:
        assert PROGRAM is not None, ABSENT
        self._folder = Path(tempfile.mkdtemp(prefix="torchord-browser-"))
        self._process = subprocess.Popen(
            [PROGRAM, *_OPTIONS, f"--user-data-dir={self._folder}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._pages: list[Page] = []
        try:
            self._port = wait_until(self._listens, message="Chromium", interval=0.05)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for page in self._pages:
            page.close()
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _listens(self) -> int:
        assert self._process.poll() is None, "Chromium ended at once"
        said = self._folder / "DevToolsActivePort"
        lines = said.read_text().split() if said.exists() else []
        return int(lines[0]) if len(lines) == 2 else 0

    def page(self) -> Page:
        """A new tab."""
        request = Request(f"http://127.0.0.1:{self._port}/json/new?about:blank", method="PUT")
        with urlopen(request, timeout=PATIENCE_SECONDS) as reply:
            found = Page(json.load(reply)["webSocketDebuggerUrl"])
        self._pages.append(found)
        return found


class Page:
    """One tab.

    Attributes:
        problems: what its console said in earnest: errors, exceptions, addresses that gave none of 2xx.
    """

    def __init__(self, address: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._socket: WebSocketClientConnection = self._loop.run_until_complete(_connected(address))
        self._number = 0
        self.problems: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        """Leave the tab to its browser."""
        self._loop.run_until_complete(self._closed())
        self._loop.close()

    async def _closed(self) -> None:
        self._socket.close()

    def call(self, method: str, **arguments: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result."""
        self._number += 1
        message = json.dumps({"id": self._number, "method": method, "params": arguments})
        return self._loop.run_until_complete(
            asyncio.wait_for(self._called(message, self._number), PATIENCE_SECONDS)
        )

    async def _called(self, message: str, number: int) -> dict[str, Any]:
        await self._socket.write_message(message)
        while True:
            text = await self._socket.read_message()
            assert text is not None, "Chromium is gone"
            found = json.loads(text)
            if found.get("id") == number:
                assert "error" not in found, (message, found["error"])
                result: dict[str, Any] = found["result"]
                return result
            self._heard(found.get("method", ""), found.get("params", {}))

    def _heard(self, method: str, said: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            details = said["exceptionDetails"]
            self.problems.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Runtime.consoleAPICalled" and said["type"] in ("error", "warning"):
            self.problems.append(" ".join(str(each.get("value", each)) for each in said["args"]))
        elif method == "Log.entryAdded" and said["entry"]["level"] == "error":
            self.problems.append(f"{said['entry']['text']} {said['entry'].get('url', '')}")

    def login(self, password: str) -> None:
        """Send a "user:password" with each request."""
        token = base64.b64encode(password.encode()).decode()
        self.call("Network.setExtraHTTPHeaders", headers={"Authorization": f"Basic {token}"})

    def size(self, width: int, height: int = 900) -> None:
        """Show the page in a window of so many pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def prefer(self, scheme: str) -> None:
        """Prefer a colour scheme, "light" or "dark", as a person's system does."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", features=[feature])

    def go(self, address: str) -> None:
        """Open an address and wait until it is there."""
        self.call("Page.navigate", url=address)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'", "the page")

    def ask(self, expression: str) -> Any:
        """The value of an expression of JavaScript; of a promise, what it comes to."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, expression: str, message: str = "") -> None:
        """Wait until an expression is true; while it raises, it is not."""
        wait_until(
            lambda: self.ask(
                f"(function () {{ try {{ return Boolean({expression}); }} catch (e) {{ return null; }} }}())"
            ),
            message=lambda: (
                f"{message or expression}; the page: {self.ask('document.body.innerText')[:2000]}"
            ),
            interval=0.05,
        )

    def text(self, selector: str) -> str:
        """What a person reads in the first element of a selector, "" if there is none."""
        return str(self.ask(f"(document.querySelector({json.dumps(selector)}) || {{}}).innerText || ''"))

    def click(self, selector: str) -> None:
        """Click the first element of a selector."""
        self.ask(f"document.querySelector({json.dumps(selector)}).click()")

    def drag(self, selector: str, since: float, until: float) -> None:
        """Drag across an element, from one part of its width to another."""
        box = self.ask(
            f"(function () {{ var node = document.querySelector({json.dumps(selector)});"
            "node.scrollIntoView({block: 'center', behavior: 'instant'});"
            "var b = node.getBoundingClientRect();"
            "return [b.left, b.top, b.width, b.height]; }())"
        )
        places = [
            (box[0] + part * box[2], box[1] + box[3] / 2) for part in (since, (since + until) / 2, until)
        ]
        kinds = ("mousePressed", "mouseMoved", "mouseMoved")
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=places[0][0], y=places[0][1])
        for kind, (x, y) in zip(kinds, places, strict=True):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)
        x, y = places[-1]
        self.call("Input.dispatchMouseEvent", type="mouseReleased", x=x, y=y, button="left", clickCount=1)

    def picture(self, path: Path) -> None:
        """Write the whole page as a PNG."""
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))


async def _connected(address: str) -> WebSocketClientConnection:
    return await websocket_connect(address, max_message_size=_MESSAGE_NBYTES)
