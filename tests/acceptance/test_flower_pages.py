"""The pages about runs in a real Flower, started by the console script where nothing of torchord's lies."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import pytest
import redis

from tests.support.control import SPEC, history
from tests.support.waiting import PATIENCE_SECONDS, wait_until
from torchord.cache import keys
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.servers.redis_client import connect
from torchord.coordinator.local_cluster.embedded_server import EmbeddedServer, free_port

pytestmark = pytest.mark.slow
RUNS = 200
PASSWORD = "user:secret"


class Site:
    """Flower, with a prefix and a password.

    Args:
        address: where it answers, prefix included.
    """

    def __init__(self, address: str) -> None:
        self.address = address

    def ask(self, path: str, *, password: str | None = PASSWORD, **more: Any) -> tuple[int, str, Any]:
        """Status, body and headers of the answer."""
        headers = dict(more.pop("headers", {}))
        if password is not None:
            headers["Authorization"] = f"Basic {base64.b64encode(password.encode()).decode()}"
        try:
            with urlopen(Request(self.address + path, headers=headers, **more), timeout=60) as reply:
                return reply.status, reply.read().decode(errors="replace"), reply.headers
        except HTTPError as error:
            with error:
                return error.code, error.read().decode(), error.headers

    def json(self, path: str) -> Any:
        status, body, _ = self.ask(path)
        assert status == 200, body
        return json.loads(body)


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedServer]:
    """A Redis with many runs, none of which ever had a worker."""
    with EmbeddedServer() as started:
        client = redis.Redis.from_url(started.url)
        entries = {str(entry.version): entry.to_json() for entry in history(12, 2)}
        for number in range(RUNS):
            ledger = Ledger(connect(started.url), started.url, f"run-{number:03d}")
            ledger.create(SPEC, incarnation="life")
            client.hset(ledger.keys.ledger, mapping=entries)
            fields = {"status": "running", "version": 12, "total_steps": 20, "committed_at": 1000.0}
            client.hset(ledger.keys.head, mapping=fields)
        client.hset(keys.RunKeys("run-007").head, "version", "<script>alert(1)</script>")
        client.close()
        yield started


@pytest.fixture(scope="module")
def site(server: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Flower beside it."""
    folder, port = tmp_path_factory.mktemp("elsewhere"), free_port()
    command = [str(Path(sys.executable).with_name("celery")), "-A", "torchord", "flower", f"--port={port}"]
    options = ["--url_prefix=watch", f"--basic_auth={PASSWORD}", "--runs-allow=pause,cancel"]
    log = folder / "flower.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, *options],
            cwd=folder,
            env={**os.environ, "TORCHORD_URL": server.url},
            stdout=out,
            stderr=out,
        )

    def answers() -> bool:
        try:
            urlopen(f"http://127.0.0.1:{port}/watch/healthcheck", timeout=5).close()
        except URLError:
            return process.poll() is not None
        return True

    try:
        wait_until(answers, PATIENCE_SECONDS, "Flower", 0.1)
        assert process.poll() is None, log.read_text()
        yield Site(f"http://127.0.0.1:{port}/watch")
    finally:
        process.terminate()
        process.wait(PATIENCE_SECONDS)


def test_the_pages_are_behind_flowers_password(site: Site) -> None:
    for path in ("/runs", "/runs/lines", "/run/run-001"):
        assert site.ask(path, password=None)[0] == 401, path
        assert site.ask(path, password="user:wrong")[0] == 401, path
        assert site.ask(path)[0] == 200, path


def test_the_tab_is_on_flowers_own_pages(site: Site) -> None:
    for path in ("/workers", "/tasks", "/broker", "/runs"):
        body = site.ask(path)[1]
        assert 'href="/watch/runs"' in body, path
    _, body, headers = site.ask("/runs")
    assert "script-src 'self'" in headers["Content-Security-Policy"]
    sources = [
        part.split('"')[0] for part in body.split('src="')[1:] + body.split('href="/watch/runs/static')[1:]
    ]
    assert any("/runs/static/runs.js" in source for source in sources)
    for source in sources:
        if source.startswith("/watch/"):
            assert site.ask(source.removeprefix("/watch"))[0] == 200, source


def test_many_runs_are_listed_and_one_that_is_broken_hides_none(site: Site) -> None:
    found = {line["name"]: line for line in site.json("/runs/lines")["runs"]}
    assert len(found) == RUNS and found["run-007"]["state"] == "unreadable"
    others = [line for name, line in found.items() if name != "run-007"]
    assert {line["state"] for line in others} == {"running"}
    assert all(line["waits"][0]["what"].startswith("a worker on queue") for line in others)


def post(site: Site, path: str, token: str, **headers: str) -> tuple[int, Any]:
    status, body, _ = site.ask(path, data=b"", method="POST", headers={"Cookie": f"_xsrf={token}", **headers})
    return status, json.loads(body)


def test_buttons_act_when_their_own_page_asks_and_flower_admits_them(site: Site) -> None:
    page = site.ask("/run/run-002")[1]
    assert 'data-verb="pause"' in page and 'data-verb="resume"' not in page
    token = page.split('name="_xsrf" value="')[1].split('"')[0]
    own = {"X-XSRFToken": token}
    assert post(site, "/run/run-002/pause", token)[0] == 403
    assert post(site, "/run/run-002/pause", token, **own, Origin="http://evil.example")[0] == 403
    assert post(site, "/run/run-002/pause", token, **own, **{"Sec-Fetch-Site": "cross-site"})[0] == 403
    status, answer = post(site, "/run/run-002/resume", token, **own)
    assert status == 403 and "--runs-allow=resume" in answer["error"]
    assert site.json("/run/run-002/overview")["state"] == "running"
    assert post(site, "/run/run-002/pause", token, **own) == (200, {"state": "paused"})
    assert site.json("/run/run-002/overview")["state"] == "paused"
    status, answer = post(site, "/run/unheard-of/cancel", token, **own)
    assert status == 404 and "unheard-of" in answer["error"]


def test_names_from_an_address_are_text(site: Site) -> None:
    status, body, _ = site.ask("/run/%3Cscript%3Ealert(1)%3C%2Fscript%3E")
    assert status == 200 and "<script>alert" not in body and "&lt;script&gt;alert" in body
    assert site.ask("/run/%3Cscript%3E/overview")[0] == 400
