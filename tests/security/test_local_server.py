"""The server of a local cluster: no other user of the host gets in, and its password is shown nowhere."""

from __future__ import annotations

import os
import socket
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from examples import launch
from tests.support.other_user import as_another_user, only_root_becomes_another
from tests.support.processes import guardian_pid
from torchord import LocalCluster
from torchord.cache.servers.redis_client import connect, process_id
from torchord.cache.settings import Settings, from_environment
from torchord.coordinator.local_cluster import embedded_server as embedded
from torchord.coordinator.local_cluster.embedded_server import EmbeddedServer

linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it reads /proc")


COLD = True


def password_of(url: str) -> str:
    found = urlsplit(url).password
    assert found is not None and len(found) >= 32
    return found


def said(port: int, command: str) -> str:
    """What the server answers to a stranger."""
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.sendall(f"{command}\r\nQUIT\r\n".encode())
        reply = b""
        while part := connection.recv(65536):
            reply += part
    return reply.decode()


@pytest.fixture
def stub(cluster: Callable[..., LocalCluster]) -> LocalCluster:
    """A server and a training server and a Client, which import no torch."""
    return cluster(1, app="tests.support.stub_app", pool="solo")


def test_without_the_password_nothing_is_answered() -> None:
    with EmbeddedServer() as server:
        for command in (
            "PING",
            "INFO",
            "KEYS *",
            "CONFIG GET requirepass",
            "ACL LIST",
            "FLUSHALL",
            "SHUTDOWN",
        ):
            assert said(server.port, command).startswith("-NOAUTH"), command
        assert said(server.port, "AUTH torchord").startswith("-WRONGPASS")
        assert process_id(server.url) == server.pid


def test_each_server_has_a_password_of_its_own_and_keeps_it() -> None:
    with EmbeddedServer() as one, EmbeddedServer() as other:
        url = one.url
        assert password_of(one.url) != password_of(other.url)
        one.restart()
        assert one.url == url
        with connect(url) as client:
            assert client.ping()


def test_a_stranger_on_the_port_learns_no_password_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who takes the port first is asked whether he is our server, and hears a password: no other server's."""
    with EmbeddedServer() as first:
        tried: list[str] = []
        ports = iter([first.port])
        free_port, asked = embedded.free_port, process_id
        monkeypatch.setattr(embedded, "free_port", lambda: next(ports, None) or free_port())
        monkeypatch.setattr(
            "torchord.cache.servers.redis_client.process_id", lambda url: tried.append(url) or asked(url)
        )
        with EmbeddedServer() as server:
            heard = {password_of(url) for url in tried if urlsplit(url).port == first.port}
            assert heard and password_of(server.url) not in heard


@only_root_becomes_another
@linux_only
def test_another_user_finds_neither_a_way_in_nor_the_password(stub: LocalCluster) -> None:
    server, worker = stub.broker, stub.processes["client1"]
    assert server._scratch is not None and server.pid is not None
    files = [
        server._scratch / "server.conf",
        worker.log,
        *(Path(f"/proc/{pid}/{name}") for pid in (server.pid, worker.pid) for name in ("environ", "mem")),
    ]

    def attempt() -> dict[str, str]:
        found = {"ping": said(server.port, "PING")}
        for file in files:
            try:
                with file.open("rb"):
                    found[str(file)] = "opened"
            except PermissionError:
                found[str(file)] = "refused"
        return found

    found = as_another_user(attempt)
    assert found.pop("ping").startswith("-NOAUTH")
    assert found == dict.fromkeys(map(str, files), "refused")


def test_no_command_line_log_or_repr_shows_it(stub: LocalCluster) -> None:
    password, guardian = password_of(stub.url), guardian_pid(stub)
    assert guardian is not None
    family = [psutil.Process(guardian), *psutil.Process(guardian).children(recursive=True)]
    assert len(family) >= 4
    shown = [word for process in family for word in process.cmdline()]
    shown += [repr(stub), repr(stub.broker), repr(stub.processes), stub.processes["client1"].command]
    shown += [process.log.read_text() for process in stub.processes.values()]
    assert stub.broker.log is not None
    shown.append(stub.broker.log.read_text())
    assert "redis://:***@127.0.0.1" in repr(stub)
    assert password not in "\n".join(shown)


@linux_only
def test_what_holds_it_is_its_owners(stub: LocalCluster) -> None:
    server = stub.broker
    assert server._scratch is not None and server.pid is not None
    for path, mode in {server._scratch: 0o700, server._scratch / "server.conf": 0o600}.items():
        found = path.lstat()
        assert (stat.S_IMODE(found.st_mode), found.st_uid) == (mode, os.geteuid())
    for pid in (server.pid, stub.processes["client1"].pid):
        assert psutil.Process(pid).rlimit(psutil.RLIMIT_CORE)[0] == 0, "a core dump would hold it"
        assert Path(f"/proc/{pid}/environ").stat().st_mode & 0o077 == 0


def test_what_is_kept_on_disk_is_its_owners(tmp_path: Path) -> None:
    with EmbeddedServer(persistence_dir=tmp_path / "data") as server:
        with connect(server.url) as client:
            client.set("name", "value")
        found = list((tmp_path / "data").rglob("*"))
        assert found and not any(path.stat().st_mode & 0o077 for path in [tmp_path / "data", *found])


def test_settings_show_no_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHORD_URL", "redis://:hunter2@127.0.0.1/0")
    monkeypatch.setenv("TORCHORD_CACHE_URLS", "redis://ada:hunter2@a,redis+cluster://:hunter2@b,c")
    assert from_environment().cache_urls[1].endswith("@b,c")
    assert "hunter2" not in f"{from_environment()} {from_environment()!r}"
    assert "hunter2" not in repr(Settings(url="redis://:hunter2@127.0.0.1/0"))


def test_a_cluster_that_stays_up_tells_a_file_and_not_the_screen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, modes = tmp_path / "url", []

    def interrupted(_seconds: float) -> None:
        modes.append((stat.S_IMODE(file.stat().st_mode), file.read_text()))
        raise KeyboardInterrupt

    monkeypatch.setattr(launch.time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        launch._stay(file, "redis://:hunter2@127.0.0.1:7/0")
    assert modes == [(0o600, "redis://:hunter2@127.0.0.1:7/0")]
    assert not file.exists()
    printed = capsys.readouterr().out
    assert "hunter2" not in printed and str(file) in printed
