"""A recipe names where a dataset lies, and has no worker ask the addresses of its network."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest
import torch

from torchord import stored_dataset
from torchord.cache.datasets.allowed_urls import require_allowed
from torchord.cache.datasets.datasets import Datasets
from torchord.cache.errors import InvalidInput
from torchord.cache.settings import Settings, from_environment

USUAL = [
    "/data/sets",
    "file:///data",
    "local:///data",
    "memory://a",
    "s3://bucket/a",
    "gs://b",
    "az://c",
    "~/d",
]
ELSEWHERE = [
    "http://169.254.169.254/latest/meta-data",
    "HTTP://127.0.0.1:6379/",
    "https://10.0.0.1/x",
    "ftp://host/x",
    "sftp://host/x",
    "smb://host/share",
    "webhdfs://namenode:9870/x",
    "github://org:repo@/x",
    "git:///etc",
    "jupyter://host:8888/x",
    "dask://scheduler/x",
    "://x",
]


@pytest.mark.parametrize("url", USUAL)
def test_directories_and_object_stores_are_opened(url: str) -> None:
    require_allowed(url, None)


@pytest.mark.parametrize("url", ELSEWHERE)
def test_nothing_else_is(url: str) -> None:
    with pytest.raises(InvalidInput, match="only at directories and object stores: add the place"):
        require_allowed(url, None)


def test_no_connection_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """By neither of the two ways on which a recipe's dataset is opened."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        asked: list[object] = []

        def listen() -> None:
            try:
                asked.append(server.accept())
            except OSError:
                return

        thread = threading.Thread(target=listen, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/x"
        for settings in (Settings(), from_environment()):
            with pytest.raises(InvalidInput, match="TORCHORD_DATASET_URLS"):
                Datasets(settings).open("d", url=url)
        with pytest.raises(InvalidInput, match="TORCHORD_DATASET_URLS"):
            stored_dataset("d", url=url)
        server.shutdown(socket.SHUT_RDWR)
        thread.join(10)
    assert asked == [] and not thread.is_alive()


@pytest.mark.parametrize(
    ("url", "opened"),
    [
        ("https://data.example.org/sets", True),
        ("https://DATA.example.org/sets/a/../b", True),
        ("https://data.example.org/sets/../secrets", False),
        ("https://data.example.org/sets/%2e%2e/secrets", False),
        ("https://data.example.org/setsandmore", False),
        ("https://data.example.org@evil.example/sets", False),
        ("https://data.example.org:8443/sets", False),
        ("http://data.example.org/sets", False),
        ("s3://bucket/a", False),
        ("gs://anything/at/all", True),
        ("/srv/sets/x", True),
        ("/srv/sets/../other", False),
        ("/srv/setsx", False),
        ("file:///srv/sets/x", True),
        ("file:///etc", False),
        ("/", False),
    ],
)
def test_a_list_opens_what_lies_below_its_places_alone(url: str, opened: bool) -> None:
    allowed = ("https://data.example.org/sets", "gs://", "/srv/sets")
    if opened:
        require_allowed(url, allowed)
        return
    with pytest.raises(InvalidInput, match=r"only at https://data\.example\.org/sets, gs://, /srv/sets"):
        require_allowed(url, allowed)


def test_no_link_leads_out_of_a_directory_of_the_list(tmp_path: Path) -> None:
    (tmp_path / "sets").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "sets" / "link").symlink_to(tmp_path / "elsewhere")
    allowed = (str(tmp_path / "sets"),)
    require_allowed(str(tmp_path / "sets" / "new"), allowed)
    with pytest.raises(InvalidInput):
        require_allowed(str(tmp_path / "sets" / "link"), allowed)


def test_the_environment_names_the_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHORD_DATASET_URLS", f"{tmp_path}, https://data.example.org")
    settings = from_environment()
    assert settings.dataset_urls == (str(tmp_path), "https://data.example.org")
    datasets = Datasets(settings)
    datasets.put("d", torch.arange(10), url=str(tmp_path))
    assert len(datasets.open("d", url=str(tmp_path))) == 10
    with pytest.raises(InvalidInput, match="opens no stored datasets at 's3://bucket/x', only at"):
        datasets.open("d", url="s3://bucket/x")
    monkeypatch.setenv("TORCHORD_DATASET_URLS", "")
    with pytest.raises(InvalidInput):
        Datasets(from_environment()).open("d", url=str(tmp_path))
