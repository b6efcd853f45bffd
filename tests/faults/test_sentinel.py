"""Failover through Sentinel: the primary dies, a replica takes its place, the run keeps its bits."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import models
from tests.support.waiting import PATIENCE_SECONDS, wait_until
from torchord import LocalCluster, Master, TrainingConfig
from torchord.cache.errors import CacheUnreachable
from torchord.cache.servers.redis_client import connect
from torchord.coordinator.local_cluster.embedded_server import EmbeddedServer, find_server, free_port
from torchord.coordinator.messages.broker import celery_url, transport_options

SERVICE = "torchord"


def answers(port: int, *words: str) -> str:
    """The reply of the server on a port to an inline command, "" while there is none."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=2) as connection:
            connection.sendall((" ".join(words) + "\r\n").encode())
            return connection.recv(65536).decode(errors="replace")
    except OSError:
        return ""


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[tuple[EmbeddedServer, int]]:
    """A primary with one replica, watched by one sentinel; gives the primary and the sentinel's port."""
    primary = EmbeddedServer(password=False)
    replica = EmbeddedServer(password=False)
    primary.start()
    replica.start()
    answers(replica.port, "REPLICAOF", "127.0.0.1", str(primary.port))
    wait_until(
        lambda: "master_link_status:up" in answers(replica.port, "INFO", "replication"), message="replication"
    )
    port = free_port()
    configuration = tmp_path / "sentinel.conf"
    configuration.write_text(
        f"port {port}\nbind 127.0.0.1\ndir {tmp_path}\nlogfile {tmp_path}/sentinel.log\n"
        f"sentinel monitor {SERVICE} 127.0.0.1 {primary.port} 1\n"
        f"sentinel down-after-milliseconds {SERVICE} 1000\nsentinel failover-timeout {SERVICE} 5000\n"
    )
    sentinel = subprocess.Popen([str(find_server()), str(configuration), "--sentinel"])
    try:
        knows = lambda: f"127.0.0.1:{replica.port}" in answers(port, "SENTINEL", "replicas", SERVICE)  # noqa: E731
        wait_until(knows, message="the sentinel to know the replica")
        yield primary, port
    finally:
        sentinel.terminate()
        sentinel.wait(10)
        primary.stop()
        replica.stop()


def train(master: Master, name: str, during: Callable[[], None] | None = None) -> tuple[bytes, bool]:
    config = TrainingConfig(epochs=6, batch_size=8, shards=4, fan_in=2, checkpoint_every=5)
    run = master.submit(models.mlp(size=40), config, name=name)
    if during is not None:
        wait_until(lambda: run.status().version >= 8, message="the eighth step")
        during()
        wait_until(lambda: settled(master, name), message="the run to end after the failover")
    run.wait(timeout=PATIENCE_SECONDS)
    return b"".join(v.numpy().tobytes() for v in run.state_dict().values()), run.verify().ok


def settled(master: Master, name: str) -> bool:
    try:
        return master.run(name).status().state in ("done", "failed")
    except CacheUnreachable:
        return False  # in the middle of the failover


def test_a_failover_changes_no_bit(
    watched: tuple[EmbeddedServer, int], cluster: Callable[..., LocalCluster]
) -> None:
    primary, port = watched
    url = f"sentinel://127.0.0.1:{port}/{SERVICE}/0"
    made = cluster(2, url=url)
    master = Master(url, checkpoint_dir=made.checkpoint_dir)
    undisturbed, ok = train(master, "undisturbed")
    assert ok
    was = answers(port, "SENTINEL", "get-master-addr-by-name", SERVICE)
    found, ok = train(master, "failed-over", during=primary.kill)
    assert answers(port, "SENTINEL", "get-master-addr-by-name", SERVICE) != was, "the failover happened"
    assert ok
    assert found == undisturbed


def test_a_command_under_way_finds_the_new_primary(watched: tuple[EmbeddedServer, int]) -> None:
    """Over the connection that it holds already, not only over one that is made afterwards."""
    primary, port = watched
    with connect(f"sentinel://127.0.0.1:{port}/{SERVICE}/0", patience_seconds=30).client() as held:
        was = held.info("server")["process_id"]
        primary.kill()
        assert held.info("server")["process_id"] != was


def test_a_sentinel_url_is_spelled_for_celery() -> None:
    url = "sentinel://user:p%40ss@a:1,b/svc/3"
    assert celery_url(url) == "sentinel://user:p%40ss@a:1/3;sentinel://user:p%40ss@b:26379/3"
    assert transport_options(url)["master_name"] == "svc"
    assert transport_options("redis://localhost") == {}


@pytest.mark.parametrize("url", ["sentinel://", "sentinel://host", "sentinel://host/svc/x"])
def test_a_malformed_sentinel_url_says_how_one_looks(url: str) -> None:
    with pytest.raises(CacheUnreachable, match="sentinel://HOST:26379,HOST:26379/SERVICE/DB"):
        Master(url)
