"""Where a server is: every form of URL, read, masked and spelled for Celery."""

from __future__ import annotations

import pytest

from torchord.cache.errors import CacheUnreachable, InvalidInput
from torchord.cache.servers.address import Address, ClusterAddress, celery_url, masked
from torchord.cache.servers.redis_client import connect, ping
from torchord.coordinator.local_cluster.embedded_server import free_port

SEVERAL = "sentinel://ada:s%40cret@a:1,b/svc/3"


@pytest.mark.parametrize(
    ("url", "label", "where"),
    [
        ("redis://", "redis://localhost:6379/0", ("localhost", 6379, "", 0)),
        ("valkey://h:1/2", "redis://h:1/2", ("h", 1, "", 2)),
        ("redis://[::1]:7/0", "redis://[::1]:7/0", ("::1", 7, "", 0)),
        ("redis://u:p@h/0#left%20one", "left one", ("h", 6379, "", 0)),
        ("unix:///run/r.sock?db=3", "unix:///run/r.sock?db=3", ("", 0, "/run/r.sock", 3)),
        ("redis+socket:///run/r.sock?virtual_host=3", "unix:///run/r.sock?db=3", ("", 0, "/run/r.sock", 3)),
        (SEVERAL, "sentinel://a:1,b:26379/svc/3", ("", 0, "", 3)),
    ],
)
def test_one_server(url: str, label: str, where: tuple[str, int, str, int]) -> None:
    found = Address.parse(url)
    assert found.label == label
    assert (found.host, found.port, found.path, found.db) == where


def test_the_credentials_of_sentinels_are_the_primarys() -> None:
    found = Address.parse(SEVERAL)
    assert (found.username, found.password) == ("ada", "s@cret")
    assert (found.sentinels, found.service) == ((("a", 1), ("b", 26379)), "svc")
    assert "s@cret" not in repr(found)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://h:1/2", "redis://h:1/2"),
        ("redis://ada@h", "redis://ada@h"),
        ("redis://:secret@h:1/2", "redis://:***@h:1/2"),
        ("redis://ada:se/c@re?t@h:1/2", "redis://ada:***@h:1/2"),
        ("redis://h/0?db=1&password=secret&x=1", "redis://h/0?db=1&password=***&x=1"),
        ("unix://:secret@/run/r.sock", "unix://:***@/run/r.sock"),
        ("unix:///run/me@here.sock", "unix:///run/me@here.sock"),
        ("redis+cluster://ada:secret@a:1,b:2", "redis+cluster://ada:***@a:1,b:2"),
        (SEVERAL, "sentinel://ada:***@a:1,b/svc/3"),
        (celery_url(SEVERAL), "sentinel://ada:***@a:1/3;sentinel://ada:***@b:26379/3"),
        ("redis://ada:secret@h:no-port", "redis://ada:***@h:no-port"),
        ("redis://ada:secret@[::1", "redis://ada:***@[::1"),
        ("", ""),
    ],
)
def test_a_mask_hides_every_password_and_nothing_else(url: str, expected: str) -> None:
    assert masked(url) == expected


@pytest.mark.parametrize("kind", [Address, ClusterAddress])
@pytest.mark.parametrize(
    "url",
    [
        "",
        "h:1",
        "http://:secret@h",
        "redis://:secret@[::1",
        "redis+cluster://:secret@",
        "sentinel://:secret@h",
    ],
)
def test_an_unusable_url_is_refused_without_its_password(
    kind: type[Address] | type[ClusterAddress], url: str
) -> None:
    with pytest.raises(InvalidInput, match="cannot be used") as caught:
        kind.parse(url)
    assert "secret" not in str(caught.value)


@pytest.mark.slow
def test_a_password_before_several_sentinels_is_no_obstacle_to_saying_that_none_answers() -> None:
    url = f"sentinel://:secret@127.0.0.1:{free_port()},127.0.0.1:{free_port()}/svc/0"
    with pytest.raises(CacheUnreachable, match=r"sentinel://:\*\*\*@127\.0\.0\.1:\d+,127") as caught:
        ping(connect(url, patience_seconds=1.0), url)
    assert "secret" not in str(caught.value)
