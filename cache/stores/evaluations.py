"""Evaluations: what each part keeps for the figures that no mean of parts gives.

A part's bytes have one name, since whoever computes it stores the same; they are deleted once the evaluation
is recorded, and carry a TTL, should nobody do that.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from torchord.cache import keys
from torchord.cache.blobs.tiered_store import TieredStore
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.ledger.records import StateRecord
from torchord.cache.stores.trees import get_tree, put_tree


class EvaluationStore:
    """Moves the states of metrics.

    Args:
        chunks: where the bytes go.
    """

    def __init__(self, chunks: TieredStore) -> None:
        self.chunks = chunks

    def put(self, ledger: Ledger, version: int, part: int, states: dict[str, Any]) -> StateRecord:
        """Store the states of one part: a tree as for `torchord.cache.tensors.tree.flatten`."""
        key = ledger.keys.evaluation_blob(version, part)
        life = keys.WORK_TTL_SECONDS
        return put_tree(states, partial(self.chunks.put, key, ttl_seconds=life, digest=ledger.digest))

    def get(self, record: StateRecord) -> dict[str, Any]:
        """The states of one part, as they were given.

        Raises:
            ChunkMissing, ChunkCorrupt: their bytes are lost.
        """
        found: dict[str, Any] = get_tree("states of metrics", record, self.chunks.get)
        return found

    def delete(self, records: Iterable[StateRecord]) -> None:
        """Delete the states of parts that nobody reads any more."""
        self.chunks.delete([blob for record in records for blob in record.blobs()])
