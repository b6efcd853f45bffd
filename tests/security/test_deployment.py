"""What deploy/secrets.sh makes lets each role in, by password and certificate, and is shown nowhere."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.support.roles import ROLES, rules
from tests.support.tls import certificates, tls_front
from tests.support.waiting import wait_until
from torchord.cache.errors import CacheUnreachable
from torchord.cache.ledger.workers import Registry
from torchord.cache.servers.redis_client import connect
from torchord.coordinator.local_cluster.embedded_server import find_server, free_port

SCRIPT = Path(__file__).resolve().parents[2] / "deploy" / "secrets.sh"
TOLD = """#!/bin/sh
{ cat /proc/$$/cmdline /proc/$$/environ 2>/dev/null || { echo "$0 $*"; env; }; } >> "$TOLD"
exec "$REAL" "$@"
"""


@dataclass(frozen=True)
class Made:
    """What the script has made.

    Attributes:
        folder: where.
        told: what was on the command lines and in the environments of the programs that it ran.
    """

    folder: Path
    told: bytes

    def url(self, role: str, *, fleet: bool = False) -> str:
        return (self.folder / (f"fleet/{role}" if fleet else "") / f"{role}.url").read_text().strip()


def run(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", SCRIPT, *words],
        env={**os.environ, "TORCHORD_SECRETS": str(folder), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    openssl = shutil.which("openssl") or pytest.skip("needs openssl")
    folder = tmp_path_factory.mktemp("made")
    spy = folder / "bin" / "openssl"
    spy.parent.mkdir()
    spy.write_text(TOLD)
    spy.chmod(0o755)
    done = run(
        folder / "secrets",
        "localhost",
        PATH=f"{spy.parent}:{os.environ['PATH']}",
        REAL=openssl,
        TOLD=str(folder / "told"),
    )
    assert (done.returncode, done.stdout) == (0, f"{folder / 'secrets'}\n"), done.stderr
    return Made(folder / "secrets", (folder / "told").read_bytes())


def at(url: str, port: int, files: Path | None = None) -> str:
    """A URL of the script's, for a server of ours and files that lie elsewhere."""
    parts = urlsplit(url)
    found = parts._replace(netloc=f"{parts.username}:{parts.password}@localhost:{port}").geturl()
    return found if files is None else found.replace("/run/secrets", str(files))


@contextmanager
def store(made: Made) -> Iterator[int]:
    """A server with the users that the script has made; its port."""
    port, folder = free_port(), made.folder.parent / "data"
    folder.mkdir(exist_ok=True)
    command = [
        find_server(),
        *("--bind", "127.0.0.1", "--port", str(port)),
        *("--dir", str(folder), "--save", "", "--aclfile", str(made.folder / "users.acl")),
    ]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: ping(port) != "", message="the store")
        yield port
    finally:
        server.kill()
        server.wait(10)


def enter(url: str) -> None:
    """Ask for what every role may read."""
    with connect(url, patience_seconds=0.1) as client:
        Registry(client, url).alive()


def ping(port: int) -> str:
    """What the health check of docker-compose.yml asks."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(100).decode()
    except OSError:
        return ""


def test_no_password_is_told_to_another_program(made: Made) -> None:
    passwords = {urlsplit(made.url(role)).password or "" for role in ROLES}
    assert len(passwords) == len(ROLES) and min(map(len, passwords)) == 64
    assert made.told.count(b"dgst") >= len(ROLES), "the spy was asked"
    assert not [password for password in passwords if password.encode() in made.told]


def test_the_folder_is_its_owners_and_is_made_once(made: Made) -> None:
    assert stat.S_IMODE(made.folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((made.folder / "ca.key").stat().st_mode) == 0o600
    before = {path: path.read_bytes() for path in made.folder.rglob("*") if path.is_file()}
    again = run(made.folder, "localhost")
    assert again.returncode == 1 and "is there already" in again.stderr
    assert {path: path.read_bytes() for path in made.folder.rglob("*") if path.is_file()} == before
    assert [path.name for path in made.folder.parent.glob("secrets*")] == ["secrets"]


def test_a_script_that_fails_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "openssl").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "openssl").chmod(0o755)
    done = run(tmp_path / "secrets", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode != 0
    assert [path.name for path in tmp_path.iterdir()] == ["openssl"]


def test_each_role_enters_with_its_password_and_nobody_without(made: Made) -> None:
    with store(made) as port:
        for role in ROLES:
            enter(at(made.url(role), port))
        assert ping(port).startswith("-NOAUTH")
        with pytest.raises(CacheUnreachable, match="refuses the user or password"):
            enter(at(made.url("worker"), port).replace("worker:", "server:"))
    told = [line.split()[1] for line in (made.folder / "users.acl").read_text().splitlines()]
    assert told == ["default", *ROLES] == list(rules())


def test_a_machine_of_the_fleet_enters_over_tls_with_its_certificate(made: Made, tmp_path: Path) -> None:
    """The relay ends TLS as Python's ssl does; the embedded server has none."""
    for name in ("crt", "key"):
        shutil.copy(made.folder / f"store.{name}", tmp_path / f"server.{name}")
    shutil.copy(made.folder / "ca.crt", tmp_path / "ca.crt")
    (tmp_path / "other").mkdir()
    others = certificates(tmp_path / "other")
    with store(made) as inner, tls_front(inner, tmp_path) as port:
        for role in ROLES:
            files = made.folder / "fleet" / role
            enter(at(made.url(role, fleet=True), port, files))
        url = at(made.url("worker", fleet=True), port, made.folder / "fleet" / "worker")
        mine = f"{made.folder}/fleet/worker/"
        wrong = {
            "no certificate": url.partition("&ssl_certfile")[0],
            "another authority's": url.replace(f"{mine}client", f"{others}/client"),
            "a server of another authority": url.replace(f"{mine}ca.crt", f"{others}/ca.crt"),
            "a server of another name": url.replace("localhost", "127.0.0.1"),
            "no TLS": at(made.url("worker"), port),
        }
        assert url not in wrong.values()
        for why, other in wrong.items():
            with pytest.raises(CacheUnreachable):
                enter(other)
                pytest.fail(f"lets in: {why}")
