"""All of one shard's computing in one pure function: gradient or local steps, then compression.

What a slot keeps from step to step (the error-feedback residual of its codec, the inner optimizer's
state of local steps) goes in and comes out as a tree: the *slot state*. It belongs to the slot, not to
a worker, so whoever computes the slot's next step gets the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from torchord.cache.ledger.step_metrics import Row
from torchord.coordinator.compression.codec import Codec
from torchord.coordinator.compute import gradient
from torchord.coordinator.compute import inner_steps as local_steps
from torchord.coordinator.compute.buffer_trial import require_no_batch
from torchord.coordinator.compute.determinism import pinned
from torchord.coordinator.compute.replica import Replica
from torchord.coordinator.spec.config import TrainingConfig
from torchord.coordinator.spec.plan import Plan
from torchord.coordinator.spec.resolving import ResolvedRecipe


@dataclass(frozen=True)
class ShardWork:
    """What one shard sends and keeps.

    Attributes:
        payload: what travels in the gradients' place: themselves, or their compressed form.
        buffers: buffer name -> value after the forward, where it changed.
        state: slot state for the slot's next step, None if there is none.
        loss: mean loss over the shard.
        grad_norm: L2 norm of the gradient (or pseudo-gradient) before compression.
        examples: examples in the shard.
        weight: what the loss is a mean over; None: the examples. A shard of weight 0 sends nothing.
        metrics: what was measured beside the loss, as a record has it; None: nothing.
    """

    payload: dict[str, Tensor]
    buffers: dict[str, Tensor]
    state: dict[str, Any] | None
    loss: float
    grad_norm: float
    examples: int
    weight: float | None = None
    metrics: dict[str, Row] | None = None


def keeps_state(config: TrainingConfig, recipe: ResolvedRecipe) -> bool:
    """Whether slots of this config hand a state on from step to step."""
    return config.local_steps > 1 or recipe.codec(config.compression).stateful


def work(
    replica: Replica,
    recipe: ResolvedRecipe,
    plan: Plan,
    dataset: Any,
    step: int,
    shard: int,
    state: Mapping[str, Any] | None,
    *,
    watched: gradient.Watch = gradient.unwatched,
) -> ShardWork:
    """Compute one shard.

    Args:
        replica: the model, loaded with version `plan.version_for(step)`.
        plan: says which examples, and which config is in force.
        state: the slot's state at that version; one that another kind of step left (before a switch of
            compression or between plain and local steps) is set aside, and the slot starts afresh.
        watched: as for `gradient.compute`; plain steps only.

    Raises:
        Exception: whatever the recipe's code raises.
    """
    config = plan.config_at(step)
    codec = recipe.codec(config.compression)
    mode = f"{'local' if config.local_steps > 1 else 'plain'} {config.compression}"
    before = state if state is not None and state["mode"] == mode else {}
    kept: dict[str, Any] = {"mode": mode}
    place: tuple[int, ...]
    if config.local_steps > 1:
        parts = plan.parts(step, shard)
        taken = local_steps.compute(replica, recipe, config, dataset, parts, step, shard, before.get("inner"))
        indices, place = parts[0], (step, shard, 0)
        found, kept["inner"] = taken.gradient, taken.state
    else:
        indices, place = plan.indices(step, shard), (step, shard)
        whole = plan.examples(step)
        found = gradient.compute(replica, recipe, config, dataset, indices, step, shard, watched, whole=whole)
    first = gradient.micro_batches(indices, config.micro_batch_size)[0]
    if found.buffers and (plan.shards_in(step) > 1 or len(first) < len(indices)):
        require_no_batch(replica, recipe, config, dataset, first, place, found.buffers)
    gradients = {} if found.weight == 0 else found.gradients
    with pinned(config.threads, config.deterministic, replica.device):
        encoded = codec.encode(gradients, before.get("residual"))
    if codec.stateful:
        kept["residual"] = encoded.residual
    return ShardWork(
        payload=encoded.payload,
        buffers=found.buffers,
        state=kept if len(kept) > 1 else None,
        loss=found.loss,
        grad_norm=found.grad_norm,
        examples=found.examples,
        weight=found.weight,
        metrics=found.metrics,
    )


def decoded(payload: Mapping[str, Tensor], replica: Replica, codec: Codec) -> dict[str, Tensor]:
    """The gradients that a payload stands for, in the parameters' shapes and dtypes."""
    config = replica.config
    with pinned(config.threads, config.deterministic, replica.device):
        return codec.decode(payload, replica.parameters)
