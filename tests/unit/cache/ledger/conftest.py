"""The control plane in all its kinds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.control import Plane, memory_state, redis_state
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.ledger.workers import Registry
from torchord.cache.servers.fast_client import Lane
from torchord.cache.servers.redis_client import connect
from torchord.cache.testing.memory_ledger import MemoryLedger
from torchord.cache.testing.memory_plane import MemoryPlane
from torchord.cache.testing.memory_registry import MemoryRegistry


@pytest.fixture(params=["redis", "lane", "memory"])
def plane(request: pytest.FixtureRequest, redis_url: str) -> Iterator[Plane]:
    """The real control plane in one run of each test, by the short way in another, the twin in the third."""
    if request.param == "memory":
        memory = MemoryPlane()
        yield Plane(
            lambda run: MemoryLedger(memory, run), MemoryRegistry(memory), lambda: memory_state(memory)
        )
        return
    client = connect(redis_url)
    lane = Lane(redis_url) if request.param == "lane" else None
    yield Plane(
        lambda run: Ledger(client, redis_url, run, lane=lane),
        Registry(client, redis_url),
        lambda: redis_state(client),
    )
    if lane is not None:
        lane.close()
    client.close()
