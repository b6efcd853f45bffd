"""What a process makes of a run's first shard, as a digest of each tensor on the way there.

The initial weights, the batch and the gradient at these weights follow from recipe and config alone, so every
process that works on a run must find the same. One that does not would compute other shards than the rest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchord.cache.tensors.codec import memory
from torchord.coordinator.compute import gradient
from torchord.coordinator.compute.batch import read_batch
from torchord.coordinator.compute.determinism import pinned
from torchord.coordinator.compute.replica import Replica
from torchord.coordinator.spec.plan import Plan
from torchord.coordinator.spec.resolving import ResolvedRecipe

Digests = dict[str, str]  # name of a tensor -> digest of its dtype, shape and bytes

_PLACE = (0, 0)  # step and shard


@dataclass(frozen=True)
class FirstShard:
    """The digests of one process.

    Attributes:
        weights: of what the model's constructor made, buffers included.
        batch: of the tensors and arrays in the first shard's batch.
        gradient: of the first shard's gradient at these weights, and its loss.
    """

    weights: Digests = field(default_factory=dict)
    batch: Digests = field(default_factory=dict)
    gradient: Digests = field(default_factory=dict)

    def difference(self, other: FirstShard) -> str:
        """The first tensor that both have and that differs, in words; "" if there is none."""
        for what, ours, theirs in (
            ("the initial value of", self.weights, other.weights),
            ("of the first batch,", self.batch, other.batch),
            ("the first shard's gradient of", self.gradient, other.gradient),
        ):
            for name, digest in ours.items():
                if theirs.get(name, digest) != digest:
                    return f"{what} {name!r} differs"
        return ""


def first_shard(replica: Replica, recipe: ResolvedRecipe, plan: Plan, dataset: Any) -> FirstShard:
    """Compute the first shard at the initial weights.

    Args:
        replica: as it was built; it holds no version afterwards.
    """
    weights = {name: digest_of(tensor) for name, tensor in replica.state_tensors().items()}
    config, indices = plan.config_at(0), plan.parts(*_PLACE)[0]
    batch = batch_of(recipe, plan, dataset)
    replica.load(replica.pack())
    try:
        found = gradient.compute(replica, recipe, config, dataset, indices, *_PLACE)
    finally:
        replica.loaded = None
    made = {name: digest_of(tensor) for name, tensor in found.gradients.items()}
    return FirstShard(weights, batch, {**made, "the loss": repr(found.loss)})


def batch_of(recipe: ResolvedRecipe, plan: Plan, dataset: Any) -> Digests:
    """Read the first shard's batch: digests of what is in it."""
    config, indices = plan.config_at(0), plan.parts(*_PLACE)[0]
    with pinned(config.threads, config.deterministic):
        batch = read_batch(recipe, config, dataset, indices, _PLACE)
    return {path: digest_of(leaf) for path, leaf in _leaves(batch.value, "")}


def digest_of(tensor: Tensor) -> str:
    """16 hexadecimal digits of a tensor's dtype, shape and bytes in row-major order."""
    dense = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    digest = hashlib.blake2b(f"{dense.dtype} {tuple(dense.shape)}".encode(), digest_size=8)
    digest.update(memory(dense))  # as an array of numpy's, a buffer could not be resized any more
    return digest.hexdigest()


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    """The dense tensors and arrays of numbers in a batch, each with its way there; the rest is left out."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        value = torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, Tensor):
        if value.layout is torch.strided and not value.is_quantized and not value.is_nested:
            yield path or "it", value
        return
    children: Any = ()
    if isinstance(value, Mapping):
        children = value.items()
    elif isinstance(value, (list, tuple)):
        children = enumerate(value)
    elif is_dataclass(value) and not isinstance(value, type):
        children = [(each.name, getattr(value, each.name, None)) for each in fields(value)]
    for name, child in children:
        yield from _leaves(child, f"{path}.{name}" if path else str(name))
