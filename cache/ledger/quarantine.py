"""What of queues was no message: kept for a person to look at, and counted."""

from __future__ import annotations

from typing import Any, cast

import redis

from torchord.cache import keys
from torchord.cache.servers.redis_client import translated

_MOST_KEPT, _MOST_KEPT_NBYTES = 100, 4096


def keep(client: Any, entry: Any) -> None:
    """Keep an entry, the newest ones of which stay, and count it.

    Args:
        client: a connection to the broker's server, whose errors are the caller's.
        entry: its text or bytes, or what was read from it.
    """
    text = entry if isinstance(entry, str | bytes) else repr(entry)
    with client.pipeline(transaction=False) as pipe:
        pipe.lpush(keys.QUARANTINE, text[:_MOST_KEPT_NBYTES])
        pipe.ltrim(keys.QUARANTINE, 0, _MOST_KEPT - 1)
        pipe.expire(keys.QUARANTINE, keys.QUARANTINE_TTL_SECONDS)
        pipe.incr(keys.QUARANTINED)
        pipe.expire(keys.QUARANTINED, keys.QUARANTINE_TTL_SECONDS)
        pipe.execute()


def quarantined(client: redis.Redis, url: str) -> int:
    """How many entries there were since there was a week without one.

    Raises:
        CacheUnreachable: the server stays away longer than the connection's patience.
    """
    with translated(url, "count what was set aside"):
        found = cast("str | None", client.get(keys.QUARANTINED))
    return int(found) if found and found.isascii() and found.isdigit() else 0


def in_words(count: int) -> str:
    """The count as one line for a person, "" if there were none."""
    if not count:
        return ""
    entries = "1 entry of a queue" if count == 1 else f"{count} entries of queues"
    where = f"the workers' logs say why, LRANGE {keys.QUARANTINE} 0 -1 shows the last of them"
    return f"{entries} set aside as no message of torchord's: {where}"
