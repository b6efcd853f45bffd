"""What Celery is told of the broker: one spelling of its URL for people, whichever library reads it."""

from __future__ import annotations

from torchord.cache.errors import CacheUnreachable, InvalidInput
from torchord.cache.servers import address
from torchord.cache.servers.address import Address, masked
from torchord.cache.servers.redis_client import connect


def celery_url(url: str) -> str:
    """A URL in the form that both Celery and kombu accept; see `torchord.cache.servers.address.celery_url`.

    Args:
        url: of one server, or of sentinels, which also need `transport_options`.

    Raises:
        CacheUnreachable: the URL cannot be read. Whether a server answers is not tried.

    Example:
        >>> celery_url("unix:///run/redis.sock?db=2")
        'redis+socket:///run/redis.sock?virtual_host=2'
    """
    connect(url).close()
    try:
        return address.celery_url(url)
    except InvalidInput as error:
        raise CacheUnreachable(
            f"{masked(url)!r} is not a Redis URL ({error}); use redis://HOST:PORT/DB, rediss:// or unix://"
        ) from error


def transport_options(url: str) -> dict[str, object]:
    """What Celery's broker and result backend need to know beside the URL: the service, for Sentinel.

    Args:
        url: as for `celery_url`, which has accepted it.
    """
    if not address.is_sentinel(url):
        return {}
    found = Address.parse(url)
    options: dict[str, object] = {"master_name": found.service}
    if found.password is not None:
        options["sentinel_kwargs"] = {}  # the password is the primary's; sentinels without one refuse it
    return options
