"""A URL with a password may stand in a file, and nobody is shown what stands there."""

from __future__ import annotations

import traceback
from pathlib import Path

import pytest

from torchord.cache.errors import CacheUnreachable, InvalidInput
from torchord.cache.ledger.workers import Registry
from torchord.cache.servers.redis_client import connect
from torchord.cache.settings import DEFAULT_URL, from_environment
from torchord.coordinator import cli
from torchord.coordinator.commands.common import UNREACHABLE
from torchord.coordinator.local_cluster.embedded_server import EmbeddedServer, free_port

NAMES = ("CELERY_BROKER_URL", "TORCHORD_URL", "TORCHORD_CACHE_URLS")


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(f"{name}_FILE", raising=False)


def test_urls_stand_in_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "url").write_text("redis://ada:hunter2@h/0\n")
    (tmp_path / "urls").write_text("redis://:hunter2@a,\nredis+cluster://:hunter2@b,c\n")
    monkeypatch.setenv("TORCHORD_URL_FILE", str(tmp_path / "url"))
    monkeypatch.setenv("TORCHORD_CACHE_URLS_FILE", str(tmp_path / "urls"))
    found = from_environment()
    assert found.url == "redis://ada:hunter2@h/0"
    assert found.cache_urls == ("redis://:hunter2@a", "redis+cluster://:hunter2@b,c")
    assert "hunter2" not in repr(found)


def test_a_variable_that_is_set_comes_before_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "url").write_text("redis://ada:hunter2@h/0")
    monkeypatch.setenv("TORCHORD_URL_FILE", str(tmp_path / "url"))
    monkeypatch.setenv("TORCHORD_URL", "")
    assert from_environment().url == "redis://ada:hunter2@h/0", "set but empty is not set"
    monkeypatch.setenv("TORCHORD_URL", "redis://other/0")
    assert from_environment().url == "redis://other/0"
    monkeypatch.setenv("TORCHORD_URL", "")
    monkeypatch.setenv("TORCHORD_URL_FILE", "")
    assert from_environment().url == DEFAULT_URL


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file"),
        (b" \n", "nothing stands"),
        (b"\xff\xfehunter2", "it is no text"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(
    content: bytes | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if content is not None:
        (tmp_path / "url").write_bytes(content)
    monkeypatch.setenv("TORCHORD_URL_FILE", str(tmp_path / "url"))
    with pytest.raises(InvalidInput, match=f"TORCHORD_URL_FILE names .*{said}") as caught:
        from_environment()
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


def test_who_is_refused_or_finds_nobody_sees_no_password(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The causes of an error are shown with it, and redis-py's own say what they were given."""
    with EmbeddedServer() as server:
        where = f"127.0.0.1:{server.port}"
        urls = (
            f"redis://:hunter2@{where}/0",
            f"redis://ada:hunter2@{where}/0",
            f"redis://{where}/0?password=hunter2",
            f"rediss://ada:hunter2@{where}/0?ssl_cert_reqs=required",
            f"redis://ada:hunter2@127.0.0.1:{free_port()}/0",
        )
        for url in urls:
            with pytest.raises(CacheUnreachable) as caught, connect(url, patience_seconds=0.1) as client:
                Registry(client, url).alive()
            assert "hunter2" not in "".join(traceback.format_exception(caught.value)), url
        assert cli.main(["list", "--url", urls[0]]) == UNREACHABLE
    said = capsys.readouterr()
    assert said.err.startswith("error: ")
    assert "hunter2" not in said.out + said.err + caplog.text
