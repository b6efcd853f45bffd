"""What a shard weighs in its step: what its loss is a mean over.

The step of a whole batch has the gradient Σ w_k g_k / Σ w_k, where g_k is the gradient of shard k's mean loss
and w_k is what that is a mean over: its examples, its labelled tokens, the sum of its samples' class weights:

- the recipe may say it: `Recipe.weight`, or a `loss` or `step` that returns (sum, weight);
- of torch's own losses, given as they are or as partials, it is known what they divide by;
- a loss whose last operation is ATen's negative log-likelihood, which cross entropies of every kind come to,
  shows what that divided by, wherever it was called;
- any other loss is taken to be a mean over the examples. `torchord.coordinator.compute.probe` looks whether
  it is.

A loss that is a sum over its examples, and no mean, is multiplied by (examples in the step) / (examples in
the shard), so that the mean over the shards is the sum of their sums.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from torchord.cache.errors import InvalidInput
from torchord.cache.ledger.step_metrics import Row
from torchord.coordinator.compute import step_metrics
from torchord.coordinator.compute.batch import during, pair
from torchord.coordinator.compute.step_metrics import Terms
from torchord.coordinator.spec.config import TrainingConfig
from torchord.coordinator.spec.resolving import ResolvedRecipe

_MEAN = 1  # ATen's number of the reduction

_ELEMENTWISE: frozenset[Any] = frozenset(
    {
        F.mse_loss,
        F.l1_loss,
        F.smooth_l1_loss,
        F.huber_loss,
        F.binary_cross_entropy,
        F.binary_cross_entropy_with_logits,
        F.soft_margin_loss,
        F.poisson_nll_loss,
        F.hinge_embedding_loss,
        F.kl_div,
    }
)
"""Losses that divide by the number of their elements."""

_LIKELIHOODS = (torch.ops.aten.nll_loss_forward.default, torch.ops.aten.nll_loss2d_forward.default)
_LIKELIHOOD_NODES = ("NllLossBackward0", "NllLoss2DBackward0")


class Weighed(NamedTuple):
    """A batch's loss and what it is a mean over.

    Attributes:
        loss: as the recipe's code returned it, or its sum divided by its weight.
        weight: a number, or a real tensor of one element on the loss's device; None: the examples.
        outputs: of the model, for metrics; None with `step`.
        terms: what was measured beside the loss.
    """

    loss: Any
    weight: Tensor | float | None
    outputs: Any = None
    terms: Terms = MappingProxyType({})

    def figures(self) -> list[Tensor]:
        """What of it has to be brought from a device: the loss, a weight that is a tensor, the metrics."""
        weight = [self.weight] if isinstance(self.weight, Tensor) else []
        return [self.loss, *weight, *step_metrics.figures(self.terms)]

    def read(self, figures: list[float]) -> float | None:
        """The weight as a number, from the values of `figures`."""
        return figures[1] if isinstance(self.weight, Tensor) else self.weight

    def measured(self, figures: list[float]) -> dict[str, Row] | None:
        """The metrics as a record has them, from the values of `figures`."""
        return step_metrics.read(self.terms, figures[1 + isinstance(self.weight, Tensor) :])


def checked(weight: float | None, examples: int, what: str) -> float | None:
    """A weight as a record has it: None where it is the number of examples.

    Args:
        what: what weighs so much, for people.

    Raises:
        InvalidInput: it is negative, NaN or infinite.
    """
    if weight is None or weight == examples:
        return None
    if not (math.isfinite(weight) and weight >= 0):
        raise InvalidInput(
            f"{what} weighs {weight}, but a weight must be finite and at least 0; correct the recipe's "
            "weight=, or the second of the (sum, weight) that it returns"
        )
    return float(weight)


def weight_of(weighed: Weighed, examples: int, what: str) -> float | None:
    """The weight of a batch as a record has it; one that is a tensor is waited for.

    Args, Raises: as for `checked`.
    """
    return None if weighed.weight is None else checked(float(weighed.weight), examples, what)


def left(resolved: ResolvedRecipe, weight: Tensor | float | None, kept: int | None) -> Tensor | float | None:
    """The weight of a batch whose collate has left so many examples; None for `kept`: all."""
    known = weight is not None or kept is None or resolved.loss_over != "batch" or is_sum(resolved)
    return weight if known else float(kept or 0)


def given(resolved: ResolvedRecipe, batch: Any) -> Tensor | float | None:
    """What the recipe's `weight` says of a batch; None if it has none.

    To be asked before the forward, which may write to its inputs.

    Raises:
        InvalidInput: it said no number.
    """
    if resolved.weight is None:
        return None
    with during("computing the weight"), torch.no_grad():
        said = resolved.weight(batch if resolved.step is not None else pair(batch)[1])
    return _number(said, "weight=")


def loss_of(
    resolved: ResolvedRecipe,
    model: Any,
    batch: Any,
    said: Tensor | float | None = None,
    *,
    reads: bool = True,
) -> Weighed:
    """What the recipe says is the loss of a batch on the model's device, and its weight.

    Args:
        said: what `given` returned.
        reads: whether a weight may be read off the loss's last operation.

    Raises:
        InvalidInput: a pair was returned that is no (sum, weight), or a metric that is none. A loss by itself
            is not looked at.
    """
    known: Tensor | float | None = None
    outputs: Any = None
    if resolved.step is not None:
        with _watching() as seen:
            returned = resolved.step(model, batch)
    else:
        assert resolved.loss is not None
        inputs, targets = pair(batch)
        outputs = model(inputs)
        known = _of_torchs(resolved.loss, outputs, targets)
        with _watching() as seen:
            returned = resolved.loss(outputs, targets)
    returned, terms = step_metrics.apart(returned, "loss" if resolved.step is None else "step")
    if type(returned) is tuple and len(returned) == 2:
        if said is not None:
            raise InvalidInput(
                "the loss is a pair (sum, weight), and the recipe has a weight= besides; leave one out"
            )
        total, weight = returned
        weight = _number(weight, "the second of the pair (sum, weight) that was returned")
        require_scalar(total)
        return Weighed(total / weight, weight, outputs, terms)
    if said is not None or resolved.loss_over != "batch" or not isinstance(returned, Tensor):
        return Weighed(returned, said, outputs, terms)
    if known is None and reads:
        known = _of_last_operation(returned) if seen is None else seen.divisor(returned)
    return Weighed(returned, known, outputs, terms)


def reads(resolved: ResolvedRecipe, config: TrainingConfig) -> bool:
    """Whether a training step shows a loss's last operation, which compiled code hides."""
    return not config.compile or resolved.step is None


def is_sum(resolved: ResolvedRecipe) -> bool:
    """Whether the recipe's loss is declared to be a sum over its examples, no mean."""
    if resolved.loss_over == "sum":
        return True
    _, options = _unwrapped(resolved.loss)
    return resolved.loss_over == "batch" and _torchs(resolved.loss) and options.get("reduction") == "sum"


def require_scalar(loss: Any) -> None:
    """Refuse what cannot be a loss.

    Raises:
        InvalidInput: it is no real scalar tensor.
    """
    if not isinstance(loss, Tensor):
        raise InvalidInput(f"the loss is a {type(loss).__name__}, but must be a scalar tensor")
    if loss.numel() != 1:
        raise InvalidInput(
            f"the loss has shape {tuple(loss.shape)}, but must be a scalar; take its mean over the shard"
        )
    if not loss.is_floating_point():
        raise InvalidInput(f"the loss has dtype {loss.dtype}, but must be a floating-point tensor")


# --- parts ------------------------------------------------------------------------------


def _number(value: Any, what: str) -> Tensor | float:
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.dtype is torch.bool or value.is_complex():
            shown = f"a tensor of {value.dtype} and shape {tuple(value.shape)}"
            raise InvalidInput(f"{what} is {shown}, but must be a number or a real tensor of one element")
        return value.detach().reshape(())
    if not isinstance(value, (bool, str, bytes, complex, np.bool_, np.complexfloating)):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    raise InvalidInput(
        f"{what} is a {type(value).__name__}, but must be a number or a real tensor of one element"
    )


def _unwrapped(loss: Any) -> tuple[Any, Mapping[str, Any]]:
    """A loss and the arguments bound to it by name."""
    return (loss.func, loss.keywords) if isinstance(loss, functools.partial) else (loss, {})


def _torchs(loss: Callable[..., Any] | None) -> bool:
    function, _ = _unwrapped(loss)
    return getattr(function, "__name__", None) is not None and function is getattr(F, function.__name__, None)


def _of_torchs(loss: Any, outputs: Any, targets: Any) -> Tensor | float | None:
    """What one of torch's own losses divides by; None for any other, and where it is the examples."""
    function, options = _unwrapped(loss)
    if not (isinstance(outputs, Tensor) and isinstance(targets, Tensor)):
        return None
    if options.get("reduction", "mean") != "mean" or options.get("weight") is not None:
        return None
    if function in (F.cross_entropy, F.nll_loss):
        if targets.is_floating_point():  # probabilities of the classes
            return targets.numel() / targets.shape[min(1, targets.dim() - 1)]
        return _divisor(targets, None, options.get("ignore_index", -100))
    if function in _ELEMENTWISE:
        try:
            return float(torch.broadcast_tensors(outputs, targets)[0].numel())  # type: ignore[no-untyped-call]
        except RuntimeError:  # the loss says more of shapes that do not fit
            return None
    return None


def _of_last_operation(loss: Tensor) -> Tensor | None:
    """What a loss was divided by, where its last operation shows it."""
    node: Any = loss.grad_fn
    if node is None or node.name() not in _LIKELIHOOD_NODES or node._saved_reduction != _MEAN:
        return None
    return _divisor(node._saved_target, node._saved_weight, node._saved_ignore_index)


@torch.no_grad()
def _divisor(targets: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """Σ weight[y] over the targets y that are not ignored; without class weights, their number."""
    counted = targets != ignore_index
    if weight is None:
        return counted.sum()
    each = weight.detach()[torch.where(counted, targets, 0)]
    return torch.where(counted, each, 0.0).sum(dtype=torch.float64)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees the likelihoods that are computed where autograd keeps no graph to read them from."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seen: list[tuple[Tensor, tuple[Any, ...]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _LIKELIHOODS:
            self._seen.append((result[0], args))
        return result

    def divisor(self, loss: Tensor) -> Tensor | None:
        """See `_of_last_operation`."""
        for result, (_, targets, weight, reduction, ignore_index) in self._seen:
            if result is loss and reduction == _MEAN:
                return _divisor(targets, weight, ignore_index)
        return None


def _watching() -> AbstractContextManager[_Watch | None]:
    return nullcontext() if torch.is_grad_enabled() else _Watch()
