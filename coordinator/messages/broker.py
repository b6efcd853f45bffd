"""The broker's URL as Celery spells it: one spelling for people, whichever library reads it."""

from __future__ import annotations

from urllib.parse import parse_qsl, quote, urlencode, urlsplit, urlunsplit

from torchord.cache.errors import CacheUnreachable
from torchord.cache.servers.redis_client import connect, masked
from torchord.cache.servers.sentinel import SentinelUrl, is_sentinel


def celery_url(url: str) -> str:
    """Return a Redis URL in the form that both Celery and kombu accept.

    Celery wants a unix socket as `redis+socket://` with its database as `virtual_host`, and refuses a
    `rediss://` URL that does not say whether certificates are checked; here they are, unless it says
    otherwise.

    Args:
        url: redis://, rediss:// or unix:// URL, as redis-py reads it, or sentinel:// (see
            `torchord.cache.servers.sentinel`), which also needs `transport_options`.

    Raises:
        CacheUnreachable: the URL cannot be read. Whether a server answers is not tried.

    Example:
        >>> celery_url("unix:///run/redis.sock?db=2")
        'redis+socket:///run/redis.sock?virtual_host=2'
    """
    if is_sentinel(url):
        return _sentinels(url)
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


def transport_options(url: str) -> dict[str, object]:
    """What Celery's broker and result backend need to know beside the URL: the service, for Sentinel."""
    if not is_sentinel(url):
        return {}
    found = _parsed(url)
    options: dict[str, object] = {"master_name": found.service}
    if found.password is not None:
        options["sentinel_kwargs"] = {}  # the password is the primary's; sentinels without one refuse it
    return options


def _parsed(url: str) -> SentinelUrl:
    try:
        return SentinelUrl.parse(url)
    except ValueError as error:
        raise CacheUnreachable(f"{masked(url)!r} cannot be used: {error}") from error


def _sentinels(url: str) -> str:
    """Celery's spelling: one URL a sentinel, joined by semicolons, each with the database."""
    found = _parsed(url)
    user = "" if found.password is None else f"{quote(found.username or '')}:{quote(found.password)}@"
    return ";".join(f"sentinel://{user}{host}:{port}/{found.db}" for host, port in found.sentinels)
