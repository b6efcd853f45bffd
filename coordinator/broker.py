"""The broker's URL as Celery spells it: one spelling for people, whichever library reads it."""

from __future__ import annotations

from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from cache.connection import connect, masked
from cache.errors import CacheUnreachable


def celery_url(url: str) -> str:
    """Return a Redis URL in the form that both Celery and kombu accept.

    Celery wants a unix socket as `redis+socket://` with its database as `virtual_host`, and refuses a
    `rediss://` URL that does not say whether certificates are checked; here they are, unless it says
    otherwise.

    Args:
        url: redis://, rediss:// or unix:// URL, as redis-py reads it.

    Raises:
        CacheUnreachable: the URL cannot be read. Whether a server answers is not tried.

    Example:
        >>> celery_url("unix:///run/redis.sock?db=2")
        'redis+socket:///run/redis.sock?virtual_host=2'
    """
    connect(url).close()
    parts = urlsplit(url)
    options = dict(parse_qsl(parts.query))
    if parts.scheme == "unix":
        options["virtual_host"] = options.pop("db", "0")
        return f"redis+socket://{parts.netloc}{parts.path}?{urlencode(options)}"
    database = parts.path.strip("/")
    if database and not database.isdigit():
        raise CacheUnreachable(
            f"{masked(url)!r} is not a Redis URL ({database!r} is not the number of a database); use "
            "redis://HOST:PORT/DB, rediss:// or unix://"
        )
    if parts.scheme == "rediss" and "ssl_cert_reqs" not in options:
        options["ssl_cert_reqs"] = "required"
        return urlunsplit(parts._replace(query=urlencode(options)))
    return url
