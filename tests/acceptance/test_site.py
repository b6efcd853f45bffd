"""The documentation as a site: built without a warning, loads nothing from elsewhere, can be searched."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import torchord
from tests.support.browser import ABSENT, PROGRAM, Browser

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


class Silent(SimpleHTTPRequestHandler):
    """Files of a folder, without a log."""

    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def address(built: Path) -> Iterator[str]:
    """Where a web server has the site."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Silent, directory=str(built)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the site, built as `make docs` does."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def texts(folder: Path, pattern: str) -> dict[str, str]:
    found = {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob(pattern)}
    assert found
    return found


def test_what_a_page_loads_lies_beside_it(built: Path) -> None:
    loaded = r'<(?:link|script|img|iframe|source)\b[^>]*?\b(?:src|href)="?(?:https?:)?//[^>]*>'
    for name, text in texts(built, "*.html").items():
        assert re.findall(loaded, text) == [], name
        assert 'class="mermaid"' not in text, f"{name}: the theme would load what draws it from elsewhere"
    for name, text in texts(built, "*.css").items():
        assert not re.search(r"(?:@import|url\()\s*['\"]?(?:https?:)?//", text), name


def test_tables_and_lists_are_none_of_the_text(built: Path) -> None:
    """A table or list that lacks the empty line or the indentation that Python's Markdown asks for."""
    for name, text in texts(built, "*.html").items():
        prose = re.sub(r"<(pre|code)\b.*?</\1>", "", text, flags=re.DOTALL)
        assert not re.search(r"\|\s*-{3,}|^```|<p>[^<]*\n(?:[-*]|\d+\.) ", prose, re.MULTILINE), name


def test_the_reference_has_every_public_name_with_its_text(built: Path) -> None:
    page = (built / "reference.html").read_text()
    assert all(f'id="torchord.{name}"' in page for name in torchord.__all__ if name != "app")
    assert "global batch" in page and '<span class="gp">&gt;&gt;&gt; </span>' in page


def test_a_reader_finds_a_word_and_nothing_is_fetched_from_elsewhere(address: str) -> None:
    if PROGRAM is None:
        pytest.skip(ABSENT)
    with Browser() as browser:
        page = browser.page()
        page.call("Network.setBlockedURLs", urls=["https://*"])
        page.go(f"{address}/index.html")
        page.until("document.querySelector('.md-search__input')", "the search")
        page.ask("document.querySelector('.md-search__input').focus()")
        page.ask("document.querySelector('.md-search__input').value = 'sentinel'")
        page.ask(
            "document.querySelector('.md-search__input').dispatchEvent(new Event('input', {bubbles: true}))"
        )
        page.until("document.querySelectorAll('.md-search-result__link').length > 0", "what was found")
        loaded = page.ask("performance.getEntriesByType('resource').map(entry => entry.name)")
        assert loaded and all(name.startswith((address, "blob:", "data:")) for name in loaded)
        assert page.problems == []
