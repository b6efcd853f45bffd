"""Which runs a server knows."""

from __future__ import annotations

import contextlib
from typing import cast

import redis
from redis.exceptions import NoPermissionError

from torchord.cache import keys
from torchord.cache.servers.redis_client import translated


class Runs:
    """The registry of all runs, finished ones included as long as they are kept.

    Args:
        client: a connection from `torchord.cache.servers.redis_client`.
        url: its URL, for messages.

    Raises:
        CacheUnreachable: from any method, when the server stays away longer than the connection's patience.
    """

    def __init__(self, client: redis.Redis, url: str) -> None:
        self.client = client
        self.url = url

    def listed(self) -> list[str]:
        """Names of the runs, oldest first; some may have expired."""
        with translated(self.url, "list the runs"):
            return cast(list[str], self.client.zrange(keys.RUNS, 0, -1))

    def newest(self, count: int) -> list[str]:
        """Names of the runs that were submitted last, oldest first; some may have expired."""
        with translated(self.url, "list the newest runs"):
            return cast(list[str], self.client.zrange(keys.RUNS, -count, -1))

    def known(self) -> list[str]:
        """Names of the runs that are there, oldest first; those that have expired leave the registry."""
        names = [name for name in self.listed() if keys.is_name(name)]
        if not names:
            return []
        with translated(self.url, "list the runs"):
            pipe = self.client.pipeline(transaction=False)
            for name in names:
                pipe.exists(keys.RunKeys(name).head)
            there = dict(zip(names, pipe.execute(), strict=True))
            if gone := [name for name in names if not there[name]]:
                with contextlib.suppress(NoPermissionError):  # who may only read leaves it to others
                    self.client.zrem(keys.RUNS, *gone)
        return [name for name in names if there[name]]
