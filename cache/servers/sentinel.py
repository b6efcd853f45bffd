"""Sentinel URLs: sentinel://[USER:PASSWORD@]HOST[:PORT][,HOST[:PORT]...]/SERVICE[/DB].

Sentinels watch a primary and its replicas, and elect another primary when it dies. A URL of this
form names the sentinels and the service; who the primary is, is asked at each new connection.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

SCHEME = "sentinel"
DEFAULT_PORT = 26379


@dataclass(frozen=True, slots=True)
class SentinelUrl:
    """What such a URL says.

    Attributes:
        sentinels: (host, port) of each sentinel.
        service: name under which they watch the primary.
        db: logical database of the primary.
        username, password: for the primary, None where it asks for none.
    """

    sentinels: tuple[tuple[str, int], ...]
    service: str
    db: int
    username: str | None = field(repr=False)
    password: str | None = field(repr=False)

    @classmethod
    def parse(cls, url: str) -> SentinelUrl:
        """Read a sentinel:// URL.

        Raises:
            ValueError: it cannot be read; the message says how one looks.
        """
        parts = urlsplit(url)
        credentials, _, hosts = parts.netloc.rpartition("@")
        service, _, db = parts.path.strip("/").partition("/")
        named = [host for host in hosts.split(",") if host]
        if parts.scheme != SCHEME or not named or not service or (db and not db.isdigit()):
            raise ValueError("a Sentinel URL looks like sentinel://HOST:26379,HOST:26379/SERVICE/DB")
        sentinels = []
        for one in named:
            host, colon, port = one.rpartition(":")
            sentinels.append((host, int(port)) if colon else (one, DEFAULT_PORT))
        user, colon, password = credentials.partition(":")
        return cls(
            tuple(sentinels),
            service,
            int(db or 0),
            unquote(user) or None,
            unquote(password) if colon else None,
        )


def is_sentinel(url: str) -> bool:
    """Whether a URL names sentinels."""
    return url.startswith(f"{SCHEME}://")
