"""Averages of a step's shards that a minority of them cannot move far.

The mean is the step of the whole batch, and one shard alone can move it anywhere. What is here is not: it is
another estimate of the same gradient, and a run that uses it trains something else than a plain loop does. In
exchange up to f of the K shards may be anything:

- *coordinate-wise median* and *trimmed mean*: D. Yin, Y. Chen, K. Ramchandran, P. Bartlett,
  "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML 2018, arXiv:1803.01498.
  Each coordinate lies between the least and the largest of the honest shards' as long as f < K / 2 (median),
  or f is not above what is trimmed.
- *Krum*: P. Blanchard, E. M. El Mhamdi, R. Guerraoui, J. Stainer, "Machine Learning with Adversaries:
  Byzantine Tolerant Gradient Descent", NeurIPS 2017. The gradient of one shard, the one with the least sum
  of squared distances to its K - f - 2 nearest others; K > 2 f + 2.

All keep the K gradients of a step in the training server's memory, where the mean keeps one. They are made
in slot order on one machine, so that they have the same bits on every fleet. A shard counts as one whatever
its number of examples (those of a step differ by one at most). A parameter that has no gradient in a shard
counts as zero there, as it does in the mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from torchord.cache.errors import InvalidInput
from torchord.coordinator.compute.buffer_rules import Rule
from torchord.coordinator.compute.buffer_rules import wide as _wide
from torchord.coordinator.compute.sums import Accumulator, Aggregate


def median(values: Tensor) -> Tensor:
    """The coordinate-wise median; of an even number of shards the mean of the two in the middle.

    Args:
        values: one row a shard, any shape behind.

    Example:
        >>> median(torch.tensor([[1.0], [2.0], [90.0]]))
        tensor([2.])
    """
    return trimmed_mean(values, (len(values) - 1) // 2)


def trimmed_mean(values: Tensor, faults: int) -> Tensor:
    """The coordinate-wise mean without the `faults` least and the `faults` largest values.

    Args:
        values: one row a shard, more than 2 * `faults` of them.

    Example:
        >>> trimmed_mean(torch.tensor([[1.0], [2.0], [4.0], [90.0]]), 1)
        tensor([3.])
    """
    kept = values.sort(dim=0).values[faults : len(values) - faults]
    total = kept[0].clone()
    for row in kept[1:]:  # in one order, whatever kernel a sum over a dimension has
        total += row
    return total / len(kept)


def krum(shards: list[list[Tensor]], faults: int) -> int:
    """The shard that Krum selects; of several that are alike the first.

    Args:
        shards: each shard's tensors, in one order; more than 2 * `faults` + 2 shards.

    Example:
        >>> krum([[torch.tensor([one])] for one in (1.0, 1.1, 1.2, 1.1, 90.0)], 1)
        1
    """
    count = len(shards)
    apart = [[0.0] * count for _ in shards]
    for one in range(count):
        for other in range(one):
            parts = zip(shards[one], shards[other], strict=True)
            between = sum(float((a.double() - b.double()).square().sum()) for a, b in parts)
            apart[one][other] = apart[other][one] = between if math.isfinite(between) else math.inf
    scores = []
    for one in range(count):
        others = sorted(apart[one][other] for other in range(count) if other != one)
        scores.append(sum(others[: count - faults - 2]))
    return scores.index(min(scores))


class RobustAccumulator(Accumulator):
    """Keeps the shards of one step, and averages them robustly at the end.

    Args:
        old, examples, rules: as for `Accumulator`.
        aggregation: "median", "trimmed_mean" or "krum".
        faults: f. A step with fewer shards than that takes (the last of an epoch may have) takes as many as
            it can; with fewer than three shards nothing is robust, and it is the median.
    """

    def __init__(
        self,
        old: Mapping[str, Tensor],
        examples: int,
        rules: Mapping[str, Rule] | None,
        aggregation: str,
        faults: int,
    ) -> None:
        super().__init__(old, examples, rules)
        self._aggregation = aggregation
        self._faults = faults
        self._shards: list[dict[str, Tensor]] = []

    @torch.no_grad()
    def add(
        self,
        gradients: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        examples: int,
        weight: float | None = None,
    ) -> None:
        """Keep the next shard; as `Accumulator.add`.

        Raises:
            InvalidInput: it changed a buffer, or weighs something else than its examples: a buffer or a
                weight moves the model as a gradient does, and is not looked at here.
        """
        if buffers or weight is not None:
            what = f"changes the buffer {min(buffers)!r}" if buffers else "weighs what its loss says"
            raise InvalidInput(
                f"a shard {what}, and aggregation={self._aggregation!r} is for gradients of equal shards: "
                "use layers without running statistics (GroupNorm) and losses that are means over the "
                "examples, or aggregation='mean'"
            )
        for name, gradient in gradients.items():
            if gradient.is_complex() or gradient.is_sparse:
                raise InvalidInput(
                    f"the gradient of {name!r} is {'complex' if gradient.is_complex() else 'sparse'}, which "
                    f"aggregation={self._aggregation!r} cannot order: use aggregation='mean'"
                )
        super().add({}, {}, examples, weight)
        for name, gradient in gradients.items():
            self._dtypes.setdefault(name, gradient.dtype)
        self._shards.append({name: _wide(gradient).clone() for name, gradient in gradients.items()})

    @torch.no_grad()
    def result(self) -> Aggregate:
        """Return the average, once; as `Accumulator.result`."""
        for shard in self._shards:
            for name in self._dtypes:
                if name not in shard:
                    shard[name] = torch.zeros_like(next(each[name] for each in self._shards if name in each))
        self._gradients = self._averaged()
        return super().result()

    def _averaged(self) -> dict[str, Tensor]:
        count, names = len(self._shards), list(self._dtypes)
        if self._aggregation == "krum" and count > 2:
            faults = min(self._faults, (count - 3) // 2)
            return self._shards[krum([[shard[name] for name in names] for shard in self._shards], faults)]
        most = (count - 1) // 2  # as many as the median leaves out
        faults = min(self._faults, most) if self._aggregation == "trimmed_mean" else most
        stacked = ((name, torch.stack([shard[name] for shard in self._shards])) for name in names)
        return {name: trimmed_mean(values, faults) for name, values in stacked}


def accumulator(
    old: Mapping[str, Tensor],
    examples: int,
    rules: Mapping[str, Rule] | None,
    *,
    aggregation: str,
    faults: int,
) -> Accumulator:
    """What averages the shards of one step by `TrainingConfig.aggregation`."""
    if aggregation == "mean":
        return Accumulator(old, examples, rules)
    return RobustAccumulator(old, examples, rules, aggregation, faults)
