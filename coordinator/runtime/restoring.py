"""A stored version taken over by model and optimizer, on a training server or on a participant of a round."""

from __future__ import annotations

from torchord.cache.ledger.ledger import Ledger
from torchord.cache.ledger.records import VersionRecord
from torchord.cache.stores.parameters import ParameterCache
from torchord.coordinator.compute.trainer import Trainer


def restore(parameters: ParameterCache, ledger: Ledger, trainer: Trainer, record: VersionRecord) -> None:
    """Bring a trainer to a stored version with its optimizer state.

    Args:
        record: of the version; it has a state.

    Raises:
        CacheError: its bytes cannot be had; the trainer is as it was.
    """
    assert record.state is not None
    found = parameters.fetch_bytes(ledger, record.version, manifest=trainer.replica.manifest, record=record)[
        1
    ]
    state = parameters.fetch_state(record.state)
    trainer.replica.load(found.own, found.rest)
    trainer.load_state(state)
