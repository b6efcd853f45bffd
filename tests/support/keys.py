"""What a test leaves behind in its database."""

from __future__ import annotations

from torchord.cache.servers.redis_client import connect


def keys_without_ttl(url: str, pattern: str = "torchord:*") -> list[str]:
    """Names of the keys that would stay for ever (I7: every key has a TTL), sorted."""
    client = connect(url)
    try:
        keys = list(client.scan_iter(match=pattern, count=1000))
        with client.pipeline(transaction=False) as pipe:
            for key in keys:
                pipe.pttl(key)
            ttls = pipe.execute()
        # -1: no TTL; -2: gone between SCAN and PTTL
        return sorted(key for key, ttl in zip(keys, ttls, strict=True) if ttl == -1)
    finally:
        client.close()
