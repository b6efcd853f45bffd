"""The keys of a server that is not there, shared by the twins of all that talk to it."""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any

URL = "memory://"

Hash = dict[str, str]


class NoClient:
    """Stands where a connection would: any use of it is a method that the twin lacks."""

    def __getattr__(self, name: str) -> Any:
        raise NotImplementedError(f"the in-memory twin has no connection to ask for {name!r}; add the method")


class MemoryPlane:
    """What the twins share: the keys of one server, each with its deadline.

    Args:
        clock: Unix time in seconds; a test's own clock makes keys expire without waiting.
    """

    def __init__(self, *, clock: Callable[[], float] = time.time) -> None:
        self.clock = clock
        self.id = secrets.token_hex(20)
        self.changed = threading.Condition(threading.RLock())
        self._values: dict[str, Any] = {}
        self._deadlines: dict[str, float] = {}

    def get(self, key: str) -> Any:
        """The value of a key, None if there is none or it has expired."""
        if self._deadlines.get(key, float("inf")) <= self.clock():
            self.delete(key)
        return self._values.get(key)

    def put(self, key: str, value: Any, ttl_seconds: float | None = None) -> None:
        """Set a key; an empty container means no key, as in Redis."""
        with self.changed:
            if isinstance(value, (dict, set, list)) and not value:
                self.delete(key)
                return
            self._values[key] = value
            if ttl_seconds is not None:
                self.expire(key, ttl_seconds)
            self.changed.notify_all()

    def hash(self, key: str) -> Hash:
        """A copy of a hash, empty if there is none."""
        return dict(self.get(key) or {})

    def hset(self, key: str, fields: dict[str, Any], ttl_seconds: float | None = None) -> None:
        """Set fields of a hash; values become text as they do on the wire."""
        self.put(
            key, {**self.hash(key), **{str(name): str(value) for name, value in fields.items()}}, ttl_seconds
        )

    def hdel(self, key: str, *fields: object) -> None:
        """Delete fields of a hash."""
        gone = {str(name) for name in fields}
        if self.get(key) is not None:
            self.put(key, {name: value for name, value in self.hash(key).items() if name not in gone})

    def hincr(self, key: str, field: str, by: int = 1) -> int:
        """Add to a number in a hash and return it."""
        value = int(self.hash(key).get(field, 0)) + by
        self.hset(key, {field: value})
        return value

    def delete(self, *names: str) -> None:
        """Delete keys."""
        for name in names:
            self._values.pop(name, None)
            self._deadlines.pop(name, None)

    def expire(self, key: str, ttl_seconds: float) -> None:
        """Give a key that exists a deadline."""
        if key in self._values:
            self._deadlines[key] = self.clock() + ttl_seconds

    def ttl(self, key: str) -> float | None:
        """Seconds that a key has to live, None if for ever."""
        deadline = self._deadlines.get(key)
        return None if deadline is None else deadline - self.clock()

    def names(self) -> list[str]:
        """The keys that are there, sorted."""
        return sorted(key for key in list(self._values) if self.get(key) is not None)

    def push(self, queue: str, arguments: dict[str, Any]) -> None:
        """Put a message in a queue, as Celery words it."""
        self.put(queue, [json.dumps({"headers": {"kwargsrepr": repr(arguments)}}), *(self.get(queue) or [])])
