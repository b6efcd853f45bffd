"""One shard's gradient: a pure function of (run, parameter version, shard).

Computing runs in two phases, each with all generators seeded by (run, step, shard) alone:
the data phase reads samples and collates them, the model phase runs forward and backward.
Buffers start from the loaded version each time. So the same shard gives the same bytes
however often, wherever and after whatever else it is computed (like hardware and builds
provided; see `determinism`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchord.cache.errors import InvalidInput
from torchord.coordinator.compute.batch import (
    Batch,
    IndexArray,
    during,
    formatted,
    pair,
    read_batch,
    to_device,
)
from torchord.coordinator.compute.determinism import pinned, seed_everything
from torchord.coordinator.compute.forward_watch import due
from torchord.coordinator.compute.loss_scale import LossScale, unscale
from torchord.coordinator.compute.optimizers import require_same_trained
from torchord.coordinator.compute.readback import collect, take_gradients
from torchord.coordinator.compute.replica import Replica
from torchord.coordinator.spec.config import TrainingConfig
from torchord.coordinator.spec.plan import derive_seed
from torchord.coordinator.spec.resolving import ResolvedRecipe

_HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}

ALONE = (
    "a BatchNorm cannot train on a shard of one example; set drop_last=True, or choose batch_size and "
    "shards so that each shard of the epoch's last, smaller batch has at least two"
)

Watch = Callable[[LossScale | None], AbstractContextManager[None]]


def unwatched(scale: LossScale | None) -> AbstractContextManager[None]:
    """The context of a backward that nobody watches."""
    return nullcontext()


@dataclass(frozen=True)
class ShardGradient:
    """What one shard contributes to its step.

    Attributes:
        gradients: parameter name -> gradient of the shard's mean loss, on the CPU, in the
            parameter's shape and dtype; parameters that the loss does not reach are left out.
        buffers: buffer name -> value after the forward, on the CPU, where it changed.
        loss: mean loss over the shard.
        grad_norm: L2 norm of all gradients together.
        examples: examples in the shard.
        finite: whether loss and norm are finite.
    """

    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]
    loss: float
    grad_norm: float
    examples: int
    finite: bool


def compute(
    replica: Replica,
    resolved: ResolvedRecipe,
    config: TrainingConfig,
    dataset: Any,
    indices: IndexArray,
    step: int,
    shard: int,
    watched: Watch = unwatched,
) -> ShardGradient:
    """Compute the gradient of a shard's mean loss at the replica's version.

    Args:
        replica: the model, loaded with the step's version.
        resolved: the run's recipe.
        config: the run's config.
        dataset: what the recipe's dataset entry returned, or anything map-style that gives
            the same samples for the same indices.
        indices: dataset indices of the shard's examples, in order.
        step: the global step.
        shard: the shard's number within the step.
        watched: the context that the backward runs in, made from the loss scale that its gradients will
            be divided by afterwards.

    Returns:
        Gradients, changed buffers and figures. The tensors belong to the caller.

    Raises:
        InvalidInput: there are no indices, or the recipe's code returned what cannot be used.
        Exception: whatever the recipe's code raises, with a note (PEP 678) that says in which
            phase, and for which sample.
    """
    if len(indices) == 0:
        raise InvalidInput(f"shard {shard} of step {step} has no examples")
    with pinned(config.threads, config.deterministic, replica.device):
        replica.reset_buffers()
        batch = read_batch(resolved, config, dataset, indices, (step, shard))
        loss = forward_backward(replica, resolved, config, batch, (step, shard), replica.loss_scale, watched)
        gradients = take_gradients(replica)
        require_same_trained(replica, f"step {step}, shard {shard}")
        with during("collecting buffers"):
            found = collect(replica, gradients, [loss])
    value, tensors = found.figures[0], found.tensors
    finite = math.isfinite(value) and math.isfinite(found.norm)
    return ShardGradient(tensors, found.buffers, value, found.norm, len(indices), finite)


def forward_backward(
    replica: Replica,
    resolved: ResolvedRecipe,
    config: TrainingConfig,
    batch: Batch,
    place: tuple[int, ...],
    scale: LossScale | None = None,
    watched: Watch = unwatched,
) -> Tensor:
    """Run forward and backward on a batch, and return the loss; the gradients are in the parameters.

    The loss is a tensor of one element on the replica's device: nothing here waits for a device.

    Called with the process pinned. Arguments as in `compute`; `place` seeds, `(step, shard)` or with
    local steps `(step, shard, local step)`; `scale` multiplies the loss that the backward starts from,
    and the gradients are divided by it; `watched` is the backward's context.
    """
    model = replica.train()
    replica.watch.begin(whole=due(place))
    seed_everything(derive_seed(config.seed, "model", *place))
    with during("computing forward and loss"), _alone(batch.examples), autocast(config, replica.device):
        loss = loss_of(resolved, model, formatted(to_device(batch.value, replica.device), config))
    _require_loss(loss)
    with during("computing the backward"), watched(scale):
        (loss if scale is None else loss.float() * scale.scale).backward()
    replica.watch.end()
    if scale is not None:
        unscale(replica.parameters.items(), scale)
    detached: Tensor = loss.detach()
    return detached


# --- parts ------------------------------------------------------------------------------


def loss_of(resolved: ResolvedRecipe, model: Any, batch: Any) -> Any:
    """What the recipe says is the loss of a batch on the model's device, unchecked."""
    if resolved.step is not None:
        return resolved.step(model, batch)
    assert resolved.loss is not None
    inputs, targets = pair(batch)
    return resolved.loss(model(inputs), targets)


def _require_loss(loss: Any) -> None:
    if not isinstance(loss, Tensor):
        raise InvalidInput(f"the loss is a {type(loss).__name__}, but must be a scalar tensor")
    if loss.numel() != 1:
        raise InvalidInput(
            f"the loss has shape {tuple(loss.shape)}, but must be a scalar; take its mean over the shard"
        )
    if not loss.is_floating_point():
        raise InvalidInput(f"the loss has dtype {loss.dtype}, but must be a floating-point tensor")
    if not loss.requires_grad:
        raise InvalidInput(
            "the loss depends on no trainable parameter (all frozen, detached or converted on the way?)"
        )


@contextmanager
def _alone(examples: int) -> Iterator[None]:
    """Explain why a BatchNorm refuses a shard of one example."""
    try:
        yield
    except ValueError as error:
        if examples == 1 and "more than 1 value per channel" in str(error):
            raise InvalidInput(ALONE) from error
        raise


def autocast(config: TrainingConfig, device: torch.device) -> AbstractContextManager[Any]:
    """The context that the config's precision computes in."""
    half = _HALVES.get(config.precision)
    return nullcontext() if half is None else torch.autocast(device.type, dtype=half)
