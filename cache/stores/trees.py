"""Trees in the chunk store: the tensors as one blob, the rest in the record that points to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchord.cache.blobs.blob import BlobRef
from torchord.cache.ledger.records import StateRecord
from torchord.cache.stores.damage import require_fitting, telling
from torchord.cache.tensors import tree
from torchord.cache.tensors.codec import Manifest, layout, pack, views


def put_tree(
    value: Any, put: Callable[[Tensor], BlobRef], draft: Callable[[int], Tensor] | None = None
) -> StateRecord:
    """Store a tree.

    Args:
        value: as for `torchord.cache.tensors.tree.flatten`; tensors on the CPU.
        put: stores the tensors' bytes (uint8, 1-D); not called if they have none.
        draft: makes the buffer to lay them out in, of so many bytes; None: new memory.

    Raises:
        CheckpointError: the tree holds what cannot be stored.
        CacheError: the bytes could not be stored.
    """
    skeleton, tensors = tree.flatten(value)
    manifest = layout(tensors)
    blob = None
    if manifest.nbytes:
        blob = put(pack(tensors, manifest, None if draft is None else draft(manifest.nbytes)))
    return StateRecord(skeleton, manifest.to_json(), blob)


def get_tree(what: str, state: StateRecord, get: Callable[[BlobRef], Tensor]) -> Any:
    """Read a tree that `put_tree` stored; its tensors are views of one received buffer.

    Args:
        what: it is, for messages.
        get: reads a blob: uint8, 1-D.

    Raises:
        ChunkMissing, ChunkCorrupt: its bytes are lost; the message names the tensors.
        ManifestMismatch: the record does not describe its bytes.
        CheckpointError: the record is damaged.
    """
    manifest = Manifest.from_json(state.manifest)
    if state.blob is None:
        return tree.unflatten(state.skeleton, views(torch.empty(0, dtype=torch.uint8), manifest))
    what = f"{what} {state.blob.key}"
    require_fitting(what, state.blob, manifest)
    with telling(what, state.blob, lambda: state.manifest):
        tensors = views(get(state.blob), manifest)
    return tree.unflatten(state.skeleton, tensors)
