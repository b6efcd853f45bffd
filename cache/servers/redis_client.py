"""Connections to the control plane's Redis, and the border that redis-py's errors do not cross."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import redis
from redis.backoff import ExponentialBackoff, NoBackoff
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    ConnectionError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TimeoutError,
)
from redis.retry import Retry
from redis.sentinel import Sentinel, SentinelManagedConnection

from torchord.cache.errors import FULL, CacheError, CacheUnreachable, InvalidInput
from torchord.cache.servers.address import TIMEOUTS, Address, is_cluster, is_sentinel, masked
from torchord.cache.servers.fast_client import UNREADABLE

CONNECT_TIMEOUT_SECONDS = 2.0
CLIENT_PATIENCE_SECONDS = 2.0
PERSON_TIMEOUT_SECONDS = 3.0  # three tries of a server that takes connections and answers nothing: 10 s
WORKER_PATIENCE_SECONDS = 90.0
_BACKOFF_CAP_SECONDS = 1.0


def hint_of(error: Exception) -> str:
    """What to do about an error of the server; "" if nothing is known. redis-py cuts the code OOM off."""
    full = "maxmemory" in str(error) or "OOM" in str(error)
    return f" ({FULL})" if full else ""


@contextmanager
def translated(url: str, what: str) -> Iterator[None]:
    """Turn what redis-py raises inside the block into torchord's errors.

    Args:
        url: the server, for the message; its password is masked.
        what: what was being done, as in "commit version 12 of run 'digits'".

    Raises:
        CacheUnreachable: the server does not answer.
        CacheError: the server answered with an error.
    """
    try:
        yield
    except AuthenticationError as error:
        raise CacheUnreachable(
            f"cannot {what}: {masked(url)} refuses the user or password; give them in the URL, as in "
            "redis://USER:PASSWORD@HOST:PORT/DB"
        ) from error
    except (ConnectionError, TimeoutError, BusyLoadingError) as error:
        raise CacheUnreachable(
            f"cannot {what}: no Redis answers at {masked(url)} ({error}); start one there, or set "
            "TORCHORD_URL"
        ) from error
    except ReadOnlyError as error:
        raise CacheError(
            f"cannot {what}: {masked(url)} is a read-only replica; point TORCHORD_URL at the primary"
        ) from error
    except ResponseError as error:
        raise CacheError(f"cannot {what}: {masked(url)} answered '{error}'{hint_of(error)}") from error
    except RedisError as error:
        raise CacheError(f"cannot {what}: {masked(url)}: {error}") from error


def connect(url: str, *, patience_seconds: float = CLIENT_PATIENCE_SECONDS) -> redis.Redis:
    """A client that waits `patience_seconds` for a server that is away, then gives up.

    Every operation of the control plane may be sent twice without harm (see the scripts), so
    a broken connection is answered by sending again.

    Args:
        url: redis://, rediss:// or unix:// URL.
        patience_seconds: how long an operation goes on trying. Clients of a person use about
            2 s, workers 90 s, so that a restarted Redis does not end a run.

    Raises:
        CacheUnreachable: if the URL cannot be read.
    """
    tries = max(1, round(patience_seconds / _BACKOFF_CAP_SECONDS))
    if is_sentinel(url):
        return _primary(url, tries)
    if is_cluster(url):
        raise CacheUnreachable(
            f"{masked(url)!r} names a Redis Cluster, which Celery cannot use as a broker: give "
            "TORCHORD_URL a single server or sentinel://, and TORCHORD_CACHE_URLS the cluster"
        )
    found = _parsed(url)
    tcp: dict[str, Any] = {"socket_connect_timeout": CONNECT_TIMEOUT_SECONDS, "socket_keepalive": True}
    timeouts = {
        "socket_timeout": 5.0 if patience_seconds > CLIENT_PATIENCE_SECONDS else PERSON_TIMEOUT_SECONDS,
        "health_check_interval": 30,
        **({} if found.path else tcp),
        **{name: seconds for name, seconds in found.timeouts if name in _waits_of(found)},
    }
    return redis.Redis.from_url(
        found.url(),
        decode_responses=True,
        encoding_errors=UNREADABLE,
        retry=Retry(
            ExponentialBackoff(cap=_BACKOFF_CAP_SECONDS, base=0.05),
            retries=tries,
            supported_errors=(ConnectionError, TimeoutError, BusyLoadingError),
        ),
        **timeouts,
    )


def _parsed(url: str) -> Address:
    try:
        return Address.parse(url)
    except InvalidInput as error:
        raise CacheUnreachable(f"{error}; use redis://HOST:PORT/DB, rediss:// or unix://") from error


def _waits_of(found: Address) -> tuple[str, ...]:
    """The timeouts that there are: a unix socket is connected at once."""
    return tuple(name for name in TIMEOUTS if not found.path or name != "socket_connect_timeout")


class PrimaryConnection(SentinelManagedConnection):
    """Asks the sentinels again whenever it has to reconnect.

    redis-py asks them when a connection is taken from the pool, but a command that is sent again over
    the connection that it already holds reconnects to the old address (redis-py 8.1): after a failover
    such a command would wait for a server that is gone until its patience ends.
    """

    def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        """See redis-py; one try, since the command's own policy tries again."""
        if self._sock is None:
            self.connect_to(self.connection_pool.get_master_address())  # type: ignore[no-untyped-call]
        super().send_packed_command(command, check_health)  # type: ignore[no-untyped-call]


def _primary(url: str, tries: int) -> redis.Redis:
    """A client of whatever primary the sentinels name at each new connection."""
    found = _parsed(url)
    asking = {"socket_timeout": CONNECT_TIMEOUT_SECONDS, "socket_connect_timeout": CONNECT_TIMEOUT_SECONDS}
    # Each is asked once: the command that needs a primary tries again, as long as its patience lasts.
    sentinel: Any = Sentinel(  # type: ignore[no-untyped-call]
        list(found.sentinels), sentinel_kwargs={**asking, "retry": Retry(NoBackoff(), 0)}, **asking
    )
    return cast(
        redis.Redis,
        sentinel.master_for(
            found.service,
            connection_class=PrimaryConnection,
            db=found.db,
            username=found.username,
            password=found.password,
            decode_responses=True,
            encoding_errors=UNREADABLE,
            socket_timeout=5.0,
            socket_connect_timeout=CONNECT_TIMEOUT_SECONDS,
            retry=Retry(
                ExponentialBackoff(cap=_BACKOFF_CAP_SECONDS, base=0.05),
                retries=tries,
                supported_errors=(ConnectionError, TimeoutError, BusyLoadingError, ReadOnlyError),
            ),
        ),
    )


def ping(client: redis.Redis, url: str) -> None:
    """Fail within seconds if nothing answers.

    Raises:
        CacheUnreachable: with the URL and the way out.
    """
    with translated(url, "reach the control plane"):
        client.ping()


def process_id(url: str, timeout_seconds: float = 1.0) -> int | None:
    """Process id of the server at `url`; None if none answers there, or it still reads its data."""
    try:
        with redis.Redis.from_url(
            Address.parse(url).url(),
            socket_connect_timeout=timeout_seconds,
            socket_timeout=timeout_seconds,
            retry=Retry(NoBackoff(), retries=0),
            protocol=2,
        ) as client:
            client.ping()  # refused while it reads its data, which INFO is not
            return int(cast(dict[str, Any], client.info("server"))["process_id"])
    except (RedisError, LookupError, ValueError, InvalidInput):
        return None


class Clients:
    """One client per URL and process; a forked child makes its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._made: dict[tuple[int, str, float], redis.Redis] = {}

    def get(self, url: str, patience_seconds: float) -> redis.Redis:
        """The client of this process for `url`, made at first use."""
        key = (os.getpid(), url, patience_seconds)
        with self._lock:
            if key not in self._made:
                self._made[key] = connect(url, patience_seconds=patience_seconds)
            return self._made[key]
