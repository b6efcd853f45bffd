"""What one process needs to work on any run: connections and stores."""

from __future__ import annotations

from torchord.cache.blobs.chunk_store import ChunkStore
from torchord.cache.blobs.host_tier import HostTier
from torchord.cache.blobs.tiered_store import TieredStore
from torchord.cache.keyring import NO_KEYS, keyring
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.ledger.runs import Runs
from torchord.cache.ledger.workers import Registry
from torchord.cache.servers.fast_client import Lane
from torchord.cache.servers.redis_client import CLIENT_PATIENCE_SECONDS, Clients, ping
from torchord.cache.settings import Settings
from torchord.cache.stores.evaluations import EvaluationStore
from torchord.cache.stores.gradients import GradientStore
from torchord.cache.stores.parameters import ParameterCache
from torchord.cache.stores.predictions import PredictionStore

_LEDGERS_KEPT = 64


class Services:
    """Connections and stores of one process; a forked child makes its own connections.

    Args:
        settings: where the servers are.
        patience_seconds: how long an operation waits for a server that is away.

    Attributes:
        placement: see `ChunkStore`; the same in every process of the fleet.
        keyring: the process's keys.
        file_keyring: those of them that hold for files, too.
    """

    def __init__(self, settings: Settings, *, patience_seconds: float = CLIENT_PATIENCE_SECONDS) -> None:
        self.settings = settings
        self.keyring = keyring(settings.keys, settings.url)
        self.file_keyring = NO_KEYS if self.keyring.local else self.keyring
        self.patience_seconds = patience_seconds
        self._clients = Clients()
        self.lane = Lane(settings.url)
        store = ChunkStore.of(settings, patience_seconds=patience_seconds)
        self.placement = store.placement
        self.chunks = TieredStore(store, HostTier() if settings.host_cache else None)
        self.parameters = ParameterCache(self.chunks)
        self.gradients = GradientStore(self.chunks)
        self.predictions = PredictionStore(self.chunks)
        self.evaluations = EvaluationStore(self.chunks)
        self._ledgers: dict[str, Ledger] = {}

    @property
    def registry(self) -> Registry:
        """The registry of living workers."""
        url = self.settings.url
        return Registry(self._clients.get(url, self.patience_seconds), url)

    @property
    def runs(self) -> Runs:
        """The registry of runs."""
        url = self.settings.url
        return Runs(self._clients.get(url, self.patience_seconds), url)

    def require_reachable(self) -> None:
        """Ask the server of the control plane for a sign of life.

        Raises:
            CacheUnreachable: within seconds, if nothing answers.
        """
        url = self.settings.url
        ping(self._clients.get(url, self.patience_seconds), url)

    def require_same_placement(self) -> None:
        """See `Registry.require_placement`."""
        self.registry.require_placement(self.placement)

    def ledger(self, run: str) -> Ledger:
        """The control plane of one run, made at first use."""
        url = self.settings.url
        client = self._clients.get(url, self.patience_seconds)
        found = self._ledgers.get(run)
        if found is None or found.client is not client:
            if len(self._ledgers) >= _LEDGERS_KEPT:
                self._ledgers.clear()
            found = self._ledgers[run] = Ledger(client, url, run, lane=self.lane, keyring=self.keyring)
        return found

    def close(self) -> None:
        """Let go of the tensor connections."""
        self.chunks.close()
        self.lane.close()
