"""Local steps: a shard takes several optimizer steps of its own and sends how far it got.

With H local steps, a shard starts from version θ, runs the recipe's optimizer over its parts of H
batches, and its *pseudo-gradient* is Δ = θ - θ_local. The training server averages the pseudo-gradients
like gradients and hands the mean to the *outer* optimizer:

    plain SGD with learning rate 1:      θ ← θ - mean(Δ), the average of the shards' weights
                                         (Local SGD: Stich, arXiv 1805.09767)
    SGD with Nesterov momentum 0.9,
    learning rate 0.7:                   DiLoCo (Douillard et al., arXiv 2311.08105)

Deviations from both papers: a shard's inner optimizer state (and scheduler) belongs to the shard's slot,
not to a machine, so any worker may compute the next step of the slot with the same bits; shards are
weighted by what they weigh over all their local steps (their examples, if the loss is a mean over those),
which differs from the papers' plain mean only where that is unequal; a local step that weighs nothing is left
out; with a clip norm, each inner gradient is clipped, not the pseudo-gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import ASGD, SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, RAdam, RMSprop

from torchord.cache.errors import NonFinite
from torchord.cache.ledger.step_metrics import Row
from torchord.coordinator.compute import step_metrics
from torchord.coordinator.compute.batch import IndexArray, read_batch
from torchord.coordinator.compute.determinism import pinned
from torchord.coordinator.compute.gradient import ShardGradient, forward_backward
from torchord.coordinator.compute.gradient_rule import change
from torchord.coordinator.compute.loss_scale import LossScale, at_start, exhausted
from torchord.coordinator.compute.optimizers import (
    Groups,
    build_optimizer,
    require_same_trained,
    step_scheduler,
)
from torchord.coordinator.compute.readback import collect
from torchord.coordinator.compute.replica import Replica
from torchord.coordinator.compute.shares import mean_loss, total_weight
from torchord.coordinator.compute.step_metrics import Terms
from torchord.coordinator.compute.trainer import restore_optimizer
from torchord.coordinator.compute.weights import weight_of
from torchord.coordinator.spec.config import TrainingConfig
from torchord.coordinator.spec.resolving import ResolvedRecipe

_TELLING = frozenset({SGD, Adam, AdamW, RMSprop, Adagrad, Adadelta, Adamax, NAdam, RAdam, ASGD})
"""Optimizers that a gradient with a NaN or infinity always takes to parameters with a NaN or infinity."""


@dataclass(frozen=True)
class LocalSteps:
    """What one shard contributes to its step, and what its slot keeps for the next.

    Attributes:
        gradient: pseudo-gradients as `gradients`; loss is the weighted mean over the local steps, and
            metrics are put together over them as over shards.
        state: tree of the inner optimizer's, the scheduler's and fp16's loss scale's state.
    """

    gradient: ShardGradient
    state: dict[str, Any]


def compute(
    replica: Replica,
    resolved: ResolvedRecipe,
    config: TrainingConfig,
    dataset: Any,
    parts: Sequence[IndexArray],
    step: int,
    shard: int,
    state: Any = None,
) -> LocalSteps:
    """Take one local step for each part and return the pseudo-gradient.

    Args:
        replica: the model, loaded with the step's version; it is put back to it afterwards.
        resolved: the run's recipe; its optimizer and scheduler are the inner ones.
        config: the run's config; `clip_norm` clips each inner gradient, after the recipe's `gradients`.
        dataset: the training dataset.
        parts: dataset indices of each local step, from `Plan.parts`.
        step: the global step.
        shard: the shard's number.
        state: what the slot kept from its last step, None at first.

    Raises:
        InvalidInput: the recipe's code returned what cannot be used.
        Exception: whatever the recipe's code raises.
    """
    examples = sum(len(part) for part in parts)
    losses: list[Tensor] = []
    terms: list[Terms] = []
    norms: list[Tensor] = []
    weights: list[float | None] = []
    attached = False
    try:
        with pinned(config.threads, config.deterministic, replica.device):
            attached = replica.own()
            if attached:
                replica.reset_buffers()  # its parameters are a copy of the version
            else:
                replica.restore()
            optimizer, scheduler = build_optimizer(resolved, config, replica)
            groups = Groups(optimizer, scheduler, replica.parameters)
            if state is not None:
                groups.arrange(state.get("groups"))
                restore_optimizer(optimizer, scheduler, state)
            scale = at_start(config) if state is None else _scale_of(state)
            overflows = [False] * len(parts)
            measured = _is_measured(config, resolved, optimizer, replica)
            for number, part in enumerate(parts):
                place = (step, shard, number)
                batch = read_batch(resolved, config, dataset, part, place)
                weighed = forward_backward(replica, resolved, config, batch, place, scale)
                loss, name = weighed.loss, f"local step {number} of shard {shard} in step {step}"
                weights.append(weight_of(weighed, len(part), name))
                terms.append(weighed.terms)
                if weights[number] == 0:  # left out
                    optimizer.zero_grad(set_to_none=True)
                    losses.append(torch.zeros_like(loss))
                    norms += [torch.zeros(())] * measured
                    continue
                losses.append(loss)
                if measured:
                    norms.append(_clip(replica, resolved, config.clip_norm, place))
                if scale is not None:  # a local step waits for a device here, and for its weight
                    overflow = overflows[number] = not math.isfinite(float(norms[-1]))
                    _check_scale(config, scale, float(loss), overflow=overflow)
                    scale = scale.after(overflow=overflow, interval=config.loss_scale_interval)
                if not overflows[number]:
                    optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            measures = list(chain.from_iterable(map(step_metrics.figures, terms)))
            found = collect(replica, _moved(replica), [*losses, *norms, *measures])
            values, more = found.figures[: len(parts)], found.figures[len(parts) :]
            sizes, more = more[: len(norms)] or [0.0] * len(parts), more[len(norms) :]
            counts = [len(part) for part in parts]
            mean = mean_loss(zip(values, counts, weights, strict=True))
            weight = total_weight(zip(counts, weights, strict=True))
            metrics = _metrics(terms, more, counts, weights)
            if scheduler is not None:
                step_scheduler(scheduler, mean)
            groups.check(step)
            require_same_trained(replica, f"step {step}, shard {shard}")
            kept = {
                "optimizer": optimizer.state_dict(),
                "scheduler": None if scheduler is None else scheduler.state_dict(),
                **({} if (joined := groups.names()) is None else {"groups": joined}),
                **({} if scale is None else {"loss_scale": scale.tensor()}),
            }
    finally:
        replica.model.zero_grad(set_to_none=True)
        if attached and replica.flat is not None:
            replica.attach(replica.flat, replica.rest)
        else:
            replica.restore()
    finite = all(map(math.isfinite, (found.norm, *values))) and all(
        overflow or math.isfinite(size) for overflow, size in zip(overflows, sizes, strict=True)
    )
    sent = found.tensors if replica.memory is None else {n: d for n, d in found.tensors.items() if _counts(d)}
    loss = 0.0 if weight == 0 else mean
    made = ShardGradient(sent, found.buffers, loss, found.norm, examples, finite, weight, metrics)
    return LocalSteps(made, kept)


def _metrics(
    terms: Sequence[Terms], figures: Sequence[float], counts: Sequence[int], weights: Sequence[float | None]
) -> dict[str, Row] | None:
    """What the local steps measured beside their losses, as that of one."""
    parts, start = [], 0
    for each, count, weight in zip(terms, counts, weights, strict=True):
        stop = start + len(step_metrics.figures(each))
        parts.append((step_metrics.read(each, figures[start:stop]), count, weight))
        start = stop
    return step_metrics.joined(parts)


def _scale_of(state: Mapping[str, Any]) -> LossScale | None:
    return LossScale.of(state["loss_scale"]) if "loss_scale" in state else None


def _check_scale(config: TrainingConfig, scale: LossScale, loss: float, *, overflow: bool) -> None:
    if overflow and math.isfinite(loss) and exhausted(config, scale, loss):
        raise NonFinite(
            f"the gradients of a local step overflow at a loss scale of {scale.scale:g}, which is not the "
            "scale's doing; lower the learning rate, set clip_norm, or set nonfinite='skip'"
        )


def _is_measured(
    config: TrainingConfig, resolved: ResolvedRecipe, optimizer: torch.optim.Optimizer, replica: Replica
) -> bool:
    """Whether the norm of each gradient is wanted."""
    asked = config.clip_norm is not None or config.precision == "fp16" or resolved.gradients is not None
    return asked or not _tells(optimizer, replica)


def _tells(optimizer: torch.optim.Optimizer, replica: Replica) -> bool:
    """Whether the pseudo-gradient shows that a gradient was not finite, so that none has to be looked at."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    trained = (parameter for parameter in replica.parameters.values() if parameter.requires_grad)
    return type(optimizer) in _TELLING and all(id(parameter) in held for parameter in trained)


def _clip(
    replica: Replica, resolved: ResolvedRecipe, clip_norm: float | None, place: tuple[int, int, int]
) -> Tensor:
    """Change and clip the gradients in the parameters as the run asks; returns their norm before clipping.

    It is not finite either if they were not before the recipe changed them.
    """
    if resolved.gradients is not None:
        before = get_total_norm(p.grad for p in replica.parameters.values() if p.grad is not None)
        change(resolved.gradients, replica, "step {}, shard {}, local step {}".format(*place))
        return torch.maximum(before, _clip(replica, replace(resolved, gradients=None), clip_norm, place))
    parameters = [p for p in replica.parameters.values() if p.grad is not None]
    if clip_norm is None:
        return get_total_norm(p.grad for p in parameters if p.grad is not None)
    return torch.nn.utils.clip_grad_norm_(parameters, clip_norm)


@torch.no_grad()
def _moved(replica: Replica) -> dict[str, Tensor]:
    """θ - θ_local of each trained parameter, where it is; on the CPU, of those that moved."""
    version = replica.version_here()
    trained = {name: p.detach() for name, p in replica.parameters.items() if p.requires_grad}
    differences = ((name, version[name] - parameter) for name, parameter in trained.items())
    return {name: d for name, d in differences if replica.memory is not None or _counts(d)}


def _counts(difference: Tensor) -> bool:
    """Whether a parameter moved, or is not finite any more."""
    return bool(difference.count_nonzero()) or not bool(torch.isfinite(difference).all())
