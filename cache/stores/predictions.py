"""Predictions: the inputs and outputs of each part, and what became of it.

Whoever asks stores the inputs of a part under a key of the request; the Client stores the outputs likewise
and writes one answer, which whoever asked looks for. All of it carries a TTL, should nobody delete it.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from torchord.cache import keys
from torchord.cache.blobs.content_digest import ContentDigest
from torchord.cache.blobs.tiered_store import TieredStore
from torchord.cache.errors import ChunkMissing
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.ledger.records import StateRecord, canonical
from torchord.cache.stores.trees import get_tree, put_tree

log = logging.getLogger(__name__)


class PredictionStore:
    """Moves what goes into a prediction and what comes out of it.

    Args:
        chunks: where the bytes go.
    """

    def __init__(self, chunks: TieredStore) -> None:
        self.chunks = chunks

    def put_inputs(self, ledger: Ledger, request: str, part: int, batch: Any) -> StateRecord:
        """Store the inputs of one part: a tree as for `torchord.cache.tensors.tree.flatten`."""
        return self._put(ledger.keys.predict_blob(request, part, "inputs"), batch, ledger.digest)

    def keep_inputs(self, record: StateRecord, batch: Any) -> None:
        """Have a part's inputs live on; stored again, under their name, if they were lost.

        Args:
            record: of the inputs.
            batch: the inputs themselves.
        """
        for blob in record.blobs():
            try:
                self.chunks.touch(blob, keys.PREDICT_TTL_SECONDS)
            except ChunkMissing:
                self._put(blob.key, batch, "")

    def put_outputs(self, ledger: Ledger, request: str, part: int, outputs: Any) -> StateRecord:
        """Store the outputs of one part; `answer` then tells whoever asked."""
        return self._put(ledger.keys.predict_blob(request, part, "outputs"), outputs, ledger.digest)

    def get(self, record: StateRecord) -> Any:
        """Inputs or outputs, as they were given.

        Raises:
            ChunkMissing, ChunkCorrupt: their bytes are lost.
        """
        return get_tree("prediction", record, self.chunks.get)

    def answer(
        self, ledger: Ledger, request: str, part: int, answer: StateRecord | str, *, asked: str = ""
    ) -> None:
        """Say once what became of a part.

        Args:
            answer: the record of its outputs, or why there are none.
            asked: what it answers, see `question`.
        """
        said = {"error": answer} if isinstance(answer, str) else answer.as_dict()
        ledger.write_output(request, part, {**said, "asked": asked})

    def answers(
        self, ledger: Ledger, request: str, asked: Mapping[int, str] | None = None
    ) -> dict[int, StateRecord | str]:
        """What became of the parts that are computed: a record of the outputs, or why there are none.

        Args:
            asked: the question of each part; an answer to another one is dropped. None: it does not matter.
        """
        found: dict[int, StateRecord | str] = {}
        for part, said in ledger.outputs(request).items():
            answers = said.pop("asked", "")
            if asked is not None and answers != asked.get(part, answers):
                log.error("part %d of a prediction answers another question: it is computed again", part)
                ledger.drop_output(request, part)
                continue
            found[part] = said["error"] if "error" in said else StateRecord.from_dict(said)
        return found

    @staticmethod
    def question(version: int, inputs: Mapping[str, Any], samples: bool) -> str:
        """A digest of what a part asks for, 32 hexadecimal digits."""
        asked = canonical([version, inputs, samples])
        return hashlib.blake2b(asked.encode(), digest_size=16).hexdigest()

    def delete(self, records: Iterable[StateRecord]) -> None:
        """Delete inputs and outputs that nobody reads any more."""
        self.chunks.delete([blob for record in records for blob in record.blobs()])

    def _put(self, key: str, value: Any, digest: ContentDigest) -> StateRecord:
        life = keys.PREDICT_TTL_SECONDS
        return put_tree(value, partial(self.chunks.put, key, ttl_seconds=life, digest=digest))
