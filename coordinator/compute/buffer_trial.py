"""Whether what a forward leaves in a buffer depends on the batch, tried once.

Shards may agree on a value that is not the batch's: each of four equal shards moves a pointer by a quarter.
So where a buffer without a rule changes for the first time in a process, the forward is run once more on
half of the shard's examples, from the same version with the same seeds. What then comes out otherwise would
come out otherwise for the whole batch, too.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from torchord.coordinator.compute.batch import IndexArray, read_batch
from torchord.coordinator.compute.buffer_rules import AGREE, unruled
from torchord.coordinator.compute.determinism import pinned
from torchord.coordinator.compute.gradient import forward_backward
from torchord.coordinator.compute.model_state import same_bytes
from torchord.coordinator.compute.replica import Replica
from torchord.coordinator.spec.config import TrainingConfig
from torchord.coordinator.spec.resolving import ResolvedRecipe

log = logging.getLogger(__name__)


def require_no_batch(
    replica: Replica,
    recipe: ResolvedRecipe,
    config: TrainingConfig,
    dataset: Any,
    indices: IndexArray,
    place: tuple[int, ...],
    changed: Iterable[str],
) -> None:
    """Refuse buffers without a rule that a batch enters.

    Costs nothing for running statistics and buffers with a rule, and for others two forwards and backwards
    a process.

    Args:
        replica: the model, loaded with the shard's version; its buffers are left as something made them.
        indices: the shard's examples.
        place: what seeds its forward, see `forward_backward`.
        changed: the buffers that the shard has changed.

    Raises:
        InvalidInput: names the buffer and its ways out.
    """
    names = [name for name in changed if replica.rules.get(name) == AGREE and name not in replica.tried]
    if not names:
        return
    replica.tried.update(names)
    half = indices[: len(indices) // 2] if len(indices) > 1 else [*indices, *indices]
    whole = _left(replica, recipe, config, dataset, indices, place)
    try:
        part = _left(replica, recipe, config, dataset, half, place)
    except Exception as error:  # noqa: BLE001 - a model need not take another number of examples
        log.info("buffers %s could not be tried on %d examples: %s", ", ".join(names), len(half), error)
        return
    for name in names:
        if not same_bytes(whole[name], part[name]):
            raise unruled(name, whole[name])


def _left(
    replica: Replica,
    recipe: ResolvedRecipe,
    config: TrainingConfig,
    dataset: Any,
    indices: IndexArray,
    place: tuple[int, ...],
) -> dict[str, Tensor]:
    """What a forward leaves in every buffer and in the frozen parameters that it writes."""
    with pinned(config.threads, config.deterministic, replica.device):
        replica.reset_buffers()
        batch = read_batch(recipe, config, dataset, indices, place)
        try:
            forward_backward(replica, recipe, config, batch, place, replica.loss_scale)
            written = replica.written_tensors()
        finally:
            replica.model.zero_grad(set_to_none=True)
        held = {**replica.held(), **written}
        return {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in held.items()}
