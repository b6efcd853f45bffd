"""Whatever is wrong with a URL, no error about it shows the password in it, nor does the error's cause."""

from __future__ import annotations

import traceback
from collections.abc import Callable

import pytest

from torchord.cache.blobs.chunk_store import ChunkStore
from torchord.cache.datasets.folder_place import FolderPlace
from torchord.cache.errors import CheckpointError, InvalidInput, TorchordError
from torchord.cache.files.folder import open_folder
from torchord.cache.servers.address import Address, ClusterAddress, masked
from torchord.cache.servers.redis_client import connect
from torchord.coordinator.master.waiting import detached
from torchord.coordinator.messages import broker

MISTYPED = [
    "redis//:hunter2@h:1/0",
    "redis:/:hunter2@h:1/0",
    "redis:ada:hunter2@h:1/0",
    ":hunter2@h:1",
    "ada:hunter2@h:1/0",
    "rediss//ada:hunter2@h",
    "reids://:hunter2@h/0",
    "http://ada:hunter2@h/0",
    "redis://:hunter2",
    "redis://:hunter2/0",
    "redis://ada:hunter2/0",
    "redis://h:hunter2@/x",
    "redis://:hunter2@h:port/0",
    "redis://:hunter2@h:99999/0",
    "redis://:hunter2@[::1",
    "redis://:hunter2@h/zero",
    "redis://:hunter2@h/0?db=1",
    "redis://:hunter2@h/0?nobody=reads",
    "redis://:a/hunter2@h/0",
    "redis://:a#hunter2@h/0",
    "redis://:a?hunter2@h/0",
    "redis://:a@hunter2@h:x/0",
    "redis://h/zero?password=hunter2",
    "redis://h/0?Password=hunter2&db=1&db=x",
    "redis://h/0?pasword=hunter2",
    "redis://h/0?pass=hunter2",
    "redis://h/zero?password=hunter2#left",
    "redis+cluster://:hunter2@a:x,b:1",
    "redis+cluster://:hunter2@a:1/3",
    "redis+cluster://a:1?password=hunter2&nobody=reads",
    "sentinel://:hunter2@h",
    "sentinel://ada:hunter2@a:1,b:2",
    "sentinel://:hunter2@a:x/svc/0",
    "unix://:hunter2@",
    "rediss://:hunter2@h/0?ssl_ca_certs=/no/such/file",
    "rediss://:hunter2@h/0?ssl_cert_reqs=maybe",
    "amqp://guest:hunter2@h",
    "redis://:hunter2@a;redis://:hunter2@b",
]

READERS: dict[str, Callable[[str], object]] = {
    "an address": Address.parse,
    "a cluster": ClusterAddress.parse,
    "the ledger": lambda url: connect(url).close(),
    "Celery": broker.celery_url,
    "cache nodes": lambda url: ChunkStore([url]),
}


@pytest.mark.parametrize("url", MISTYPED)
def test_a_mask_hides_what_may_be_a_password(url: str) -> None:
    assert "hunter2" not in masked(url)


@pytest.mark.parametrize("reader", READERS)
def test_no_reader_shows_the_password_of_a_mistyped_url(reader: str) -> None:
    refused = 0
    for url in MISTYPED:
        try:
            READERS[reader](url)
        except TorchordError as error:
            refused += 1
            assert "hunter2" not in "".join(traceback.format_exception(error)), url
    assert refused > len(MISTYPED) / 2


def test_a_program_that_is_interrupted_says_how_to_come_back_without_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.excepthook", print)  # which it may replace
    detached("digits", "redis://ada:hunter2@h/0")
    said = capsys.readouterr().err
    assert "redis://ada:***@h/0" in said and "hunter2" not in said


def test_a_folder_of_datasets_is_named_without_it() -> None:
    for url in ("ftp://ada:hunter2@h::x", "nobody://ada:hunter2@h/x"):
        with pytest.raises(InvalidInput) as caught:
            FolderPlace(url)
        assert "hunter2" not in "".join(traceback.format_exception(caught.value))


def test_a_folder_of_checkpoints_is_named_without_it() -> None:
    url = "nobody://ada:hunter2@h/x"
    with pytest.raises(CheckpointError) as caught:
        open_folder(url, "digits")
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))
