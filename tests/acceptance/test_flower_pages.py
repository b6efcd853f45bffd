"""The pages about runs in a real Flower, started by the console script where nothing of torchord's lies."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import pytest
import redis

from tests.support.browser import ABSENT, PROGRAM, Browser, Page
from tests.support.control import SPEC, history
from tests.support.waiting import PATIENCE_SECONDS, wait_until
from torchord.cache import keys
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.servers.redis_client import connect
from torchord.coordinator.local_cluster.embedded_server import EmbeddedServer, free_port
from torchord.coordinator.pages.tokens import made

pytestmark = pytest.mark.slow
RUNS, OTHER, FAILED = 200, 4, 3
PASSWORD = "user:secret"
AXE = files("axe_core_python").joinpath("axe.min.js").read_text()
TOKEN = made("a-program", "write")


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
    """A Redis with many runs, none of which ever had a worker: one is broken, one another, one has failed."""
    with EmbeddedServer() as started:
        client = redis.Redis.from_url(started.url)
        entries = {str(entry.version): entry.to_json() for entry in history(12, 2)}
        other = {**SPEC, "config": {**SPEC["config"], "epochs": 5}}
        reason: dict[str, Any] = {
            "kind": "E",
            "message": "a NaN",
            "traceback": "model.py:3 in forward",
            "worker": "w0",
        }
        reason["log"] = ["12:00 INFO the last line"]
        for number in range(RUNS):
            ledger = Ledger(connect(started.url), started.url, f"run-{number:03d}")
            ledger.create(other if number == OTHER else SPEC, incarnation="life")
            client.hset(ledger.keys.ledger, mapping=entries)
            fields = {"status": "running", "version": 12, "total_steps": 20, "committed_at": 1000.0}
            client.hset(ledger.keys.head, mapping=fields)
            if number == FAILED:
                ledger.record_evaluation(10, {"loss": 0.4, "accuracy": 0.9})
                ledger.transition(
                    "failed", allowed=("running",), event="failed", data={"message": "a NaN"}, error=reason
                )
        client.hset(keys.RunKeys("run-007").head, "version", "<script>alert(1)</script>")
        client.close()
        yield started


@pytest.fixture(scope="module")
def site(server: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Flower beside it."""
    folder, port = tmp_path_factory.mktemp("elsewhere"), free_port()
    command = [str(Path(sys.executable).with_name("celery")), "-A", "torchord", "flower", f"--port={port}"]
    options = ["--url_prefix=watch", f"--basic_auth={PASSWORD}", "--runs-allow=pause,cancel"]
    log, tokens = folder / "flower.log", folder / "tokens"
    tokens.write_text(f"# who may pause\n{TOKEN[1]}\n")
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, *options],
            cwd=folder,
            env={**os.environ, "TORCHORD_URL": server.url, "TORCHORD_API_TOKENS_FILE": str(tokens)},
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


@pytest.mark.parametrize("path", ["/runs", "/run/run-001", "/runs/compare?run=run-001&run=run-002"])
def test_a_page_loads_what_it_needs_from_here_and_has_nothing_inline(site: Site, path: str) -> None:
    status, body, headers = site.ask(path)
    assert status == 200 and "script-src 'self';" in headers["Content-Security-Policy"]
    sources = re.findall(r'<(?:script|link|img)[^>]* (?:src|href)="([^"]*)"', body)
    assert any("/runs/static/" in source for source in sources)
    for source in sources:
        assert source.startswith("/watch/") and site.ask(source.removeprefix("/watch"))[0] == 200, source
    assert not re.search(r"<script(?![^>]* src=)|<style| style=| on[a-z]+=", body)


def test_many_runs_are_listed_and_one_that_is_broken_hides_none(site: Site) -> None:
    found = {line["name"]: line for line in site.json("/runs/lines")["runs"]}
    assert len(found) == RUNS and found["run-007"]["state"] == "unreadable"
    others = [line for name, line in found.items() if name != "run-007"]
    assert {line["state"] for line in others} == {"running", "failed"}
    going = [line for line in others if line["state"] == "running"]
    assert len(going) == RUNS - 2
    assert all(line["waits"][0]["what"].startswith("a worker on queue") for line in going)


def test_a_run_is_read_in_parts(site: Site) -> None:
    curves = site.json("/run/run-001/curves?points=100&first=2&last=4")
    assert curves["series"]["loss"]["step"] == [2, 3, 4]
    assert [lane["worker"] for lane in site.json("/run/run-001/timeline")["lanes"]] == ["w0"]
    assert site.json("/run/run-001/audit")["ok"] is False  # made up, with no stored version
    compared = site.json("/runs/compare/lines?run=run-001&run=run-002")
    assert len(compared["runs"]) == 2 and compared["differences"] == []
    assert site.ask("/run/run-001/curves?first=x")[0] == 400
    assert site.ask("/run/run-001/model.safetensors")[0] == 403  # not among what Flower was started with


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


def test_a_program_with_a_token_is_answered_beside_flowers_own_api(site: Site) -> None:
    token = {"Authorization": f"Bearer {TOKEN[0]}"}
    status, body, _ = site.ask("/api/runs/run-010", password=None, headers=token)
    assert status == 200 and json.loads(body)["version"] == 12
    status, body, _ = site.ask(
        "/api/runs/run-010/pause", password=None, method="POST", data=b"", headers=token
    )
    assert (status, json.loads(body)) == (200, {"name": "run-010", "state": "paused"})
    assert site.ask("/api/runs/run-011/pause", method="POST", data=b"")[0] == 403
    assert site.ask("/api/runs", password=None)[0] == 401 and site.ask("/api/runs")[0] == 200
    assert site.json("/api/openapi.json")["servers"] == [{"url": "/watch"}]
    assert site.ask("/api/workers")[0] == 200


def test_names_from_an_address_are_text(site: Site) -> None:
    status, body, _ = site.ask("/run/%3Cscript%3Ealert(1)%3C%2Fscript%3E")
    assert status == 200 and "<script>alert" not in body and "&lt;script&gt;alert" in body
    assert site.ask("/run/%3Cscript%3E/overview")[0] == 400


# --- as a person sees them ---


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if PROGRAM is None:
        pytest.skip(ABSENT)
    with Browser() as started:
        yield started


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A tab that has logged in, and complained of nothing when the test ends."""
    found = browser.page()
    found.login(PASSWORD)
    found.size(1280)
    yield found
    assert found.problems == []


def opened(page: Page, site: Site, path: str) -> None:
    page.go(site.address + path)
    page.until("document.querySelector('#runs-dot.status-dot-live')", "an answer")


def counted(page: Page, selector: str) -> Any:
    return page.ask(f"document.querySelectorAll({json.dumps(selector)}).length")


def test_the_list_is_searched_sorted_and_chosen_from(site: Site, page: Page) -> None:
    opened(page, site, "/runs")
    assert counted(page, "#runs-table tbody tr") == RUNS and page.text("#runs-failed") == "2"
    page.ask("document.querySelector('#runs-search').value = 'run-00'")
    page.ask("document.querySelector('#runs-search').dispatchEvent(new Event('input'))")
    assert counted(page, "#runs-table tbody tr") == 10
    page.click("#runs-table th[data-column=name] button")
    assert page.text("#runs-table tbody tr .runs-link") == "run-000"
    page.click("[aria-label='compare run-001']")
    page.click(f"[aria-label='compare run-00{OTHER}']")
    page.click("#runs-compare")
    page.until("document.querySelectorAll('#charts .uplot').length >= 5", "curves")
    assert "config.epochs" in page.text("#compare-differs") and "run-001" in page.text("#charts .u-legend")
    page.until("document.querySelectorAll('#charts .u-legend .u-series').length >= 3")


@pytest.mark.parametrize("path", ["/runs", f"/run/run-00{FAILED}", "/runs/compare?run=run-001&run=run-004"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_fits_a_telephone_in_either_scheme(site: Site, page: Page, path: str, scheme: str) -> None:
    page.prefer(scheme)
    page.size(400)
    opened(page, site, path)
    assert page.ask("document.documentElement.getAttribute('data-bs-theme')") == scheme
    assert page.ask("document.documentElement.scrollWidth <= window.innerWidth")
    assert serious(page) == []


def serious(page: Page) -> list[Any]:
    """What axe-core finds that keeps people from reading or using the page; Flower's own bar is not ours."""
    page.until("!document.querySelector('#charts') || document.querySelector('#charts .uplot')", "curves")
    page.ask(AXE)
    told = "one => [one.id, one.nodes.map(node => node.html.slice(0, 150) + ' ' + node.failureSummary)]"
    grave = "one => ['serious', 'critical'].includes(one.impact)"
    return list(
        page.ask(
            f"axe.run({{exclude: [['.navbar']]}}).then(found => found.violations.filter({grave}).map({told}))"
        )
    )


def test_curves_grow_while_the_run_trains_and_show_a_part(
    site: Site, server: EmbeddedServer, page: Page
) -> None:
    opened(page, site, "/run/run-005")
    page.until("document.querySelectorAll('#charts .uplot').length === 5", "curves")
    grown = history(14, 2)[12:]
    with redis.Redis.from_url(server.url) as client:
        names = keys.RunKeys("run-005")
        client.hset(names.ledger, mapping={str(each.version): each.to_json() for each in grown})
        client.hset(names.head, "version", 14)
    page.until("document.querySelector('#run-figures .metric-value').innerText === '14'", "the new steps")
    page.until(
        "document.querySelector('.lane-box svg').getAttribute('aria-label').endsWith('to 14')", "lanes"
    )

    def in_part() -> bool:
        page.drag("#charts .u-over", 0.5, 0.9)
        return bool(page.ask("!document.querySelector('#chart-tools button').hidden"))

    wait_until(in_part, message="a part of the curves", interval=0.2)
    page.click("#chart-tools button")
    page.until("document.querySelector('#chart-tools button').hidden", "all of the curves")
    page.click("#chart-log")
    page.until("document.querySelectorAll('#charts .uplot').length === 5", "curves by their logarithm")


def test_a_failure_has_its_reason_and_its_mark(site: Site, page: Page) -> None:
    opened(page, site, f"/run/run-00{FAILED}")
    page.until("document.querySelectorAll('.lane-mark').length === 2", "marks")
    assert "a NaN" in page.text("#run-failure") and "model.py:3 in forward" in page.text("#run-failure")
    assert page.ask("document.getElementById('run-failure-lines').textContent") == "12:00 INFO the last line"
    said = page.ask(
        "Array.from(document.querySelectorAll('.lane-mark title')).map(n => n.textContent).join()"
    )
    assert "failed: message a NaN" in said and "evaluation: metrics loss 0.4, accuracy 0.9" in said
    assert '"m:Model"' in page.text("#run-spec") and "accuracy" in page.text("#charts")


def test_a_button_asks_before_it_acts(site: Site, page: Page) -> None:
    opened(page, site, "/run/run-006")
    page.click("[data-verb=cancel]")
    assert "btn-danger" in page.ask("document.querySelector('#run-dialog-yes').className")
    page.click("#run-dialog-no")
    page.click("[data-verb=pause]")
    assert "Pause run run-006?" in page.text("#run-dialog")
    page.click("#run-dialog-yes")
    page.until("document.querySelector('#run-state').innerText === 'paused'", "the state")
    page.until("document.querySelector('[data-verb=pause]').hidden")


def test_a_runs_page_leads_to_its_tasks(site: Site, page: Page) -> None:
    opened(page, site, "/run/run-008")
    page.click("#run-tasks")
    page.until("document.querySelector('#tasks-table_filter input').value === 'name:torchord kwargs:run-008'")
