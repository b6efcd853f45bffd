"""One shard's gradient: a pure function of (run, parameter version, shard).

Computing runs in two phases, each with all generators seeded by (run, step, shard) alone:
the data phase reads samples and collates them, the model phase runs forward and backward.
Buffers start from the loaded version each time. So the same shard gives the same bytes
however often, wherever and after whatever else it is computed (like hardware and builds
provided; see `determinism`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchord.cache.errors import InvalidInput
from torchord.cache.ledger.step_metrics import Row
from torchord.coordinator.compute import step_metrics
from torchord.coordinator.compute.batch import (
    Batch,
    IndexArray,
    during,
    formatted,
    read_batch,
    to_device,
)
from torchord.coordinator.compute.determinism import pinned, seed_everything
from torchord.coordinator.compute.forward_watch import due
from torchord.coordinator.compute.loss_scale import LossScale, unscale
from torchord.coordinator.compute.optimizers import require_same_trained
from torchord.coordinator.compute.readback import collect, norm_of, take_gradients
from torchord.coordinator.compute.replica import Replica
from torchord.coordinator.compute.shares import mean_loss, total_weight
from torchord.coordinator.compute.sums import Accumulator
from torchord.coordinator.compute.weights import (
    Weighed,
    checked,
    given,
    is_sum,
    left,
    loss_of,
    reads,
    require_scalar,
)
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
        loss: mean loss over the shard; 0 where it weighs nothing.
        grad_norm: L2 norm of all gradients together.
        examples: examples in the shard.
        finite: whether loss and norm are finite.
        weight: what the loss is a mean over; None: the examples. A shard of weight 0 has no gradients.
        metrics: what was measured beside the loss, as a record has it; None: nothing.
    """

    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]
    loss: float
    grad_norm: float
    examples: int
    finite: bool
    weight: float | None = None
    metrics: dict[str, Row] | None = None


def compute(
    replica: Replica,
    resolved: ResolvedRecipe,
    config: TrainingConfig,
    dataset: Any,
    indices: IndexArray,
    step: int,
    shard: int,
    watched: Watch = unwatched,
    *,
    whole: int | None = None,
) -> ShardGradient:
    """Compute the gradient of a shard's mean loss at the replica's version.

    With `config.micro_batch_size` it is put together from parts of the shard, each computed as a shard is,
    from the version's buffers and with seeds of its own.

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
        whole: examples in the step over all its shards; None: those of this one.

    Returns:
        Gradients, changed buffers and figures. The tensors belong to the caller.

    Raises:
        InvalidInput: there are no indices, or the recipe's code returned what cannot be used.
        Exception: whatever the recipe's code raises, with a note (PEP 678) that says in which
            phase, and for which sample.
    """
    if len(indices) == 0:
        raise InvalidInput(f"shard {shard} of step {step} has no examples")
    parts = micro_batches(indices, config.micro_batch_size)
    if len(parts) == 1:
        return _compute(replica, resolved, config, dataset, indices, (step, shard), watched, whole)
    rest = unwatched, len(indices) if whole is None else whole
    found = (
        _compute(replica, resolved, config, dataset, part, (step, shard, number), *rest)
        for number, part in enumerate(parts)
    )
    with pinned(config.threads, config.deterministic, replica.device):
        return _together(replica, found, len(indices))


def micro_batches(indices: IndexArray, size: int | None) -> list[IndexArray]:
    """Cut a shard into parts of at most `size` examples, as even as they can be; None: it is one part.

    Example:
        >>> [len(part) for part in micro_batches(np.arange(10), 4)]
        [4, 3, 3]
    """
    if size is None:
        return [indices]
    return list(np.array_split(np.asarray(indices), -(-len(indices) // size)))


def _together(replica: Replica, parts: Iterable[ShardGradient], examples: int) -> ShardGradient:
    """A shard from its micro-batches, put together as a step is from its shards; one is held at a time."""
    total = Accumulator(replica.version_tensors, examples, replica.rules)
    figures: list[tuple[float, int, float | None]] = []
    measured: list[step_metrics.Part] = []
    for part in parts:
        total.add(part.gradients, part.buffers, part.examples, part.weight)
        figures.append((part.loss, part.examples, part.weight))
        measured.append((part.metrics, part.examples, part.weight))
    gradients, buffers = total.result()
    weight = total_weight((number, each) for _, number, each in figures)
    loss, norm = (0.0, 0.0) if weight == 0 else (mean_loss(figures), norm_of(gradients))
    finite = math.isfinite(loss) and math.isfinite(norm)
    metrics = step_metrics.joined(measured)
    return ShardGradient(gradients, buffers, loss, norm, examples, finite, weight, metrics)


def _compute(
    replica: Replica,
    resolved: ResolvedRecipe,
    config: TrainingConfig,
    dataset: Any,
    indices: IndexArray,
    place: tuple[int, ...],
    watched: Watch,
    whole: int | None,
) -> ShardGradient:
    """What is computed at once: a shard, at `(step, shard)`, or one of its micro-batches."""
    step, shard, *_ = place
    with pinned(config.threads, config.deterministic, replica.device):
        replica.reset_buffers()
        batch = read_batch(resolved, config, dataset, indices, place)
        scale = replica.loss_scale
        weighed = forward_backward(replica, resolved, config, batch, place, scale, watched, whole=whole)
        gradients = take_gradients(replica)
        require_same_trained(replica, f"step {step}, shard {shard}")
        with during("collecting buffers"):
            found = collect(replica, gradients, weighed.figures())
    value, tensors, norm = found.figures[0], found.tensors, found.norm
    weight = checked(weighed.read(found.figures), len(indices), f"shard {shard} of step {step}")
    if weight == 0:
        value, tensors, norm = 0.0, {}, 0.0
    finite = math.isfinite(value) and math.isfinite(norm)
    metrics = weighed.measured(found.figures)
    return ShardGradient(tensors, found.buffers, value, norm, len(indices), finite, weight, metrics)


def forward_backward(
    replica: Replica,
    resolved: ResolvedRecipe,
    config: TrainingConfig,
    batch: Batch,
    place: tuple[int, ...],
    scale: LossScale | None = None,
    watched: Watch = unwatched,
    *,
    whole: int | None = None,
) -> Weighed:
    """Run forward and backward on a batch, and return the loss; the gradients are in the parameters.

    The loss is a tensor of one element on the replica's device: nothing here waits for a device.

    Called with the process pinned. Arguments as in `compute`; `place` seeds, `(step, shard)` or with
    local steps `(step, shard, local step)`; `scale` multiplies the loss that the backward starts from,
    and the gradients are divided by it; `watched` is the backward's context; `whole` is how many examples a
    loss that is a sum adds up in all, None where that are the batch's.
    """
    model = replica.train()
    if batch.kept == 0:
        return Weighed(torch.zeros((), device=replica.device), None if is_sum(resolved) else 0.0)
    value = formatted(to_device(batch.value, replica.device), config)
    said = given(resolved, value)
    replica.watch.begin(whole=due(place))
    seed_everything(derive_seed(config.seed, "model", *place))
    left_in = batch.examples if batch.kept is None else batch.kept
    with (
        resizing(replica),
        during("computing forward and loss"),
        _alone(left_in),
        autocast(config, replica.device),
    ):
        loss, weight, _, terms = loss_of(resolved, model, value, said, reads=reads(resolved, config))
        if whole is not None and whole != batch.examples and is_sum(resolved) and isinstance(loss, Tensor):
            loss = loss * (whole / batch.examples)
    _require_loss(loss)
    with during("computing the backward"), watched(scale):
        (loss if scale is None else loss.float() * scale.scale).backward()
    replica.watch.end()
    if scale is not None:
        unscale(replica.parameters.items(), scale)
    return Weighed(loss.detach(), left(resolved, weight, batch.kept), terms=terms)


# --- parts ------------------------------------------------------------------------------


def _require_loss(loss: Any) -> None:
    require_scalar(loss)
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


@contextmanager
def resizing(replica: Replica) -> Iterator[None]:
    """Name the buffer that a forward cannot resize where it lies, among the others of a version.

    Raises:
        InvalidInput: it has another shape now.
    """
    try:
        yield
    except RuntimeError as error:
        if "resize storage" in str(error):
            with torch.no_grad():
                replica.written_tensors()
        raise


def autocast(config: TrainingConfig, device: torch.device) -> AbstractContextManager[Any]:
    """The context that the config's precision computes in."""
    half = _HALVES.get(config.precision)
    return nullcontext() if half is None else torch.autocast(device.type, dtype=half)
