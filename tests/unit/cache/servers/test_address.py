"""Where a server is: every form of URL, read, masked and spelled for Celery."""

from __future__ import annotations

import pytest
from celery import Celery

from torchord.cache.errors import CacheUnreachable, InvalidInput
from torchord.cache.servers.address import Address, ClusterAddress, celery_url, masked
from torchord.cache.servers.redis_client import connect, ping
from torchord.coordinator.local_cluster.embedded_server import free_port
from torchord.coordinator.messages import broker

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


# --- one reading for all -------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "redis://127.0.0.1:7/3",
        "redis://127.0.0.1:7?db=3",
        "redis://127.0.0.1:7?virtual_host=3",
        "redis://127.0.0.1:7/3/",
        "redis://127.0.0.1:7/3?db=3",
        "valkey://127.0.0.1:7/3",
        "REDIS://127.0.0.1:7/3",
        "redis://ada:p%40%2F%3F%23%3A@127.0.0.1:7/3?socket_timeout=5&health_check_interval=2",
        "redis://127.0.0.1:7/3?username=ada&password=p%40%2F%3F%23%3A",
        "redis://127.0.0.1:7/3?socket_connect_timeout=1&socket_keepalive=true",
        "unix:///run/r.sock?db=3",
        "unix:///run/r.sock?virtual_host=3",
        "redis+socket:///run/r.sock?virtual_host=3",
        "unix://ada:p%40%2F%3F%23%3A@/run/r.sock?db=3&socket_timeout=5",
    ],
)
def test_every_reader_means_the_same_server(url: str) -> None:
    """The control plane's client, Celery's broker and results, and the cache node."""
    found = Address.parse(url)
    client = connect(url).connection_pool.connection_kwargs
    app = Celery("reads", broker=broker.celery_url(url), backend=broker.celery_url(url))
    broker_link, results = app.connection(), app.backend.connparams
    assert found.db == client["db"] == results["db"] == 3
    assert broker_link.virtual_host == "3" or "virtual_host=3" in broker_link.hostname
    assert found.password == client.get("password") == results.get("password")
    assert found.username == client.get("username") == results.get("username")
    if not found.path:
        assert (
            (found.host, found.port) == (client["host"], client["port"]) == (results["host"], results["port"])
        )
        assert (broker_link.hostname, broker_link.port) == (found.host, found.port)
        assert (broker_link.userid, broker_link.password) == (found.username, found.password)


def test_timeouts_of_a_url_are_everybodys() -> None:
    url = "redis://h?socket_timeout=7&socket_connect_timeout=3&health_check_interval=2"
    expected = {"socket_timeout": 7.0, "socket_connect_timeout": 3.0, "health_check_interval": 2.0}
    assert dict(Address.parse(url).timeouts) == expected == broker.transport_options(url)
    client = connect(url).connection_pool.connection_kwargs
    assert {name: client[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("redis://h/1?db=3", "several databases: 1, 3"),
        ("redis://h/one", "the number of its database"),
        ("redis://h?nonsense=1", "nobody reads its option 'nonsense'; known are db, "),
        ("redis://h?ssl_cert_reqs=none", "must begin with rediss://"),
        ("redis://h?socket_timeout=soon", "socket_timeout must be a number of seconds"),
        ("redis://h?health_check_interval=-1", "health_check_interval must be a number of seconds"),
        ("redis://h:x/0", "no port"),
        ("redis://h:99999", "no port, a number up to 65535"),
        ("redis://:sec/ret@h/0", "holds one of / [?] #; write them as %2F"),
        ("redis://ada:sec?ret@h", "holds one of / [?] #"),
        ("redis://ada:sec?a=ret@h", "holds one of / [?] #"),
        ("redis://ada:sec#ret@h", "holds one of / [?] #"),
    ],
)
def test_what_some_would_read_otherwise_is_refused(url: str, said: str) -> None:
    for read in (Address.parse, connect, broker.celery_url):
        with pytest.raises((InvalidInput, CacheUnreachable), match=said) as caught:
            read(url)
        assert "sec" not in str(caught.value).replace("seconds", "") and "ret" not in str(caught.value)
