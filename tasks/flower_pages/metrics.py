"""Flower's `/metrics` with torchord's below its own."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from functools import cache

from flower.views.monitor import Metrics

from torchord.cache.settings import from_environment
from torchord.coordinator.metrics.collector import Collector
from torchord.coordinator.metrics.families import CONTENT_TYPE, UP, Samples
from torchord.coordinator.runtime.control_plane import ControlPlane

_SECONDS = 5.0
"""For torchord's part; a store that is away shall not cost Flower's own."""

_PATIENCE_SECONDS = 2.0
_thread = ThreadPoolExecutor(1, thread_name_prefix="torchord-metrics")


class MetricsHandler(Metrics):
    """Answers a scrape; as Flower's own, without credentials. Scrapes that overlap share an answer."""

    _asked: asyncio.Future[str] | None = None

    async def get(self) -> None:
        """See `tornado.web.RequestHandler`."""
        kind = type(self)
        if kind._asked is None or kind._asked.done():
            kind._asked = asyncio.get_running_loop().run_in_executor(_thread, _scraped)
        try:
            text = await asyncio.wait_for(asyncio.shield(kind._asked), _SECONDS)
        except TimeoutError:
            text = _nothing()
        await super().get()
        self.write(text)
        self.set_header("Content-Type", CONTENT_TYPE)


def _scraped() -> str:
    return _collector().text()


@cache
def _collector() -> Collector:
    return Collector(ControlPlane(from_environment(), patience_seconds=_PATIENCE_SECONDS))


def _nothing() -> str:
    samples = Samples()
    samples.add(UP, 0)
    return samples.text()
