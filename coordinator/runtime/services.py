"""What one process needs to work on any run: connections and stores."""

from __future__ import annotations

from torchord.cache.blobs.chunk_store import ChunkStore
from torchord.cache.blobs.host_tier import HostTier
from torchord.cache.blobs.tiered_store import TieredStore
from torchord.cache.servers.redis_client import CLIENT_PATIENCE_SECONDS
from torchord.cache.settings import Settings
from torchord.cache.stores.evaluations import EvaluationStore
from torchord.cache.stores.gradients import GradientStore
from torchord.cache.stores.parameters import ParameterCache
from torchord.cache.stores.predictions import PredictionStore
from torchord.coordinator.runtime.control_plane import ControlPlane


class Services(ControlPlane):
    """Connections and stores of one process; a forked child makes its own connections.

    Args:
        settings: where the servers are.
        patience_seconds: how long an operation waits for a server that is away.

    Attributes:
        placement: see `ChunkStore`; the same in every process of the fleet.
    """

    def __init__(self, settings: Settings, *, patience_seconds: float = CLIENT_PATIENCE_SECONDS) -> None:
        super().__init__(settings, patience_seconds=patience_seconds)
        store = ChunkStore.of(settings, patience_seconds=patience_seconds)
        self.placement = store.placement
        self.chunks = TieredStore(store, HostTier() if settings.host_cache else None)
        self.parameters = ParameterCache(self.chunks)
        self.gradients = GradientStore(self.chunks)
        self.predictions = PredictionStore(self.chunks)
        self.evaluations = EvaluationStore(self.chunks)

    def require_same_placement(self) -> None:
        """See `Registry.require_placement`."""
        self.registry.require_placement(self.placement)

    def close(self) -> None:
        """Let go of the tensor connections."""
        self.chunks.close()
        self.lane.close()
