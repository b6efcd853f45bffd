"""A server whose users are those of deploy/users.acl."""

from __future__ import annotations

import contextlib
import re
import secrets
import threading
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis

from torchord.coordinator.local_cluster.embedded_server import EmbeddedServer

USERS = Path(__file__).resolve().parents[2] / "deploy" / "users.acl"
ROLES = ("submit", "worker", "server", "monitor")


def rules() -> dict[str, list[str]]:
    """User -> its rules, each a word or a selector in parentheses."""
    found = {}
    for line in USERS.read_text().splitlines():
        _, name, *words = re.findall(r"\([^)]*\)|\S+", line)
        found[name] = words
    return found


@dataclass(frozen=True)
class Guarded:
    """The server.

    Attributes:
        server: for its port.
        owner: a client that may do anything.
        passwords: of each role.
    """

    server: EmbeddedServer
    owner: redis.Redis
    passwords: dict[str, str]

    def url(self, role: str, *, port: int | None = None, tls: str = "") -> str:
        """Where a role enters: at the server itself, or at a port in front of it that takes TLS."""
        user = f"{role}:{self.passwords[role]}"
        if port is None:
            return f"redis://{user}@127.0.0.1:{self.server.port}/0"
        return f"rediss://{user}@localhost:{port}/0?{tls}"

    def client(self, role: str) -> redis.Redis:
        """A client of a role."""
        return redis.Redis.from_url(self.url(role), decode_responses=True)

    def denied(self) -> list[str]:
        """What was refused since this was asked last."""
        entries: Any = self.owner.acl_log(128)
        self.owner.acl_log_reset()
        return [f"{e['username']}: {e['reason']} {e['object']} ({e['context']})" for e in entries]

    @contextlib.contextmanager
    def heard(self) -> Iterator[dict[str, set[str]]]:
        """Fills, at its end, a table: role -> the commands that it sent, those of its scripts included."""
        lines: list[tuple[str, str]] = []  # (address of the client, command)
        users: dict[str, str] = {}
        used: dict[str, set[str]] = defaultdict(set)
        ear = redis.Redis.from_url(self.server.url, socket_timeout=None)

        def listen() -> None:
            with ear.monitor() as monitor:
                ready.set()
                while not ended.is_set():
                    said = monitor.next_command()
                    words = said["command"].lower().split(" ", 2)
                    lua = said["client_type"] == "lua"
                    where = "lua" if lua else f"{said['client_address']}:{said['client_port']}"
                    lines.append((where, "|".join(words[: 2 if words[0] in _HAVE_PARTS else 1])))

        def name() -> None:
            while not ended.wait(0.01):
                users.update((client["addr"], client["user"]) for client in self.owner.client_list())

        ready, ended = threading.Event(), threading.Event()
        threads = [threading.Thread(target=work, daemon=True) for work in (listen, name)]
        for thread in threads:
            thread.start()
        assert ready.wait(10)
        try:
            yield used
        finally:
            ended.set()
            self.owner.ping()  # the line at which the ear wakes up
            for thread in threads:
                thread.join(10)
            ear.close()
        caller = ""
        for where, command in lines:
            caller = caller if where == "lua" else where
            used[users.get(caller, "")].add(command)


_HAVE_PARTS = frozenset({"client", "script", "cluster", "acl", "config"})


@contextlib.contextmanager
def guarded() -> Iterator[Guarded]:
    """A server of our own that knows the four roles."""
    with EmbeddedServer() as server, redis.Redis.from_url(server.url, decode_responses=True) as owner:
        passwords = {role: secrets.token_urlsafe(24) for role in ROLES}
        for role, password in passwords.items():
            owner.execute_command("ACL", "SETUSER", role, *rules()[role], f">{password}")
        yield Guarded(server, owner, passwords)
