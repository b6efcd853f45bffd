"""Orders that recipes name: `order=partial(balanced, labels=my_labels)`, `batches=partial(bucketed, ...)`.

Each is a pure function of its arguments, the same on every platform and in every version of every library.
They live under this name because specs on disk carry it. A function of yours, or a torch `Sampler`, is as
good: see docs/recipes.md, "Data".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from torchord.cache.errors import InvalidInput
from torchord.coordinator.spec.plan import Indices, derive_seed, permutation

Given = Sequence[Any] | Callable[[Any], Sequence[Any]]
"""A value for each example, or a function (dataset) -> these values."""


def weighted(
    size: int, epoch: int, seed: int, dataset: Any, *, weights: Given, examples: int | None = None
) -> Indices:
    """Draw examples with replacement, each in proportion to its weight.

    Args:
        size: examples in the dataset.
        epoch: from 0.
        seed: the run's.
        dataset: what a callable `weights` is called with.
        weights: a number from 0 for each example, not all 0.
        examples: how many are drawn an epoch; None: `size`.

    Raises:
        InvalidInput: the weights are no such numbers.
    """
    chances = np.asarray(_values("weights", weights, dataset, size), dtype=np.float64)
    if chances.shape != (size,) or not np.isfinite(chances).all() or chances.min() < 0 or not chances.any():
        raise InvalidInput("weights must be one finite number from 0 for each example, and not all 0")
    return _drawn(chances, examples or size, derive_seed(seed, "weighted", epoch))


def balanced(
    size: int,
    epoch: int,
    seed: int,
    dataset: Any,
    *,
    labels: Given | None = None,
    examples: int | None = None,
) -> Indices:
    """Draw examples with replacement so that each class comes equally often, in expectation.

    Args:
        size: examples in the dataset.
        epoch: from 0.
        seed: the run's.
        dataset: what a callable `labels` is called with.
        labels: the class of each example; None: the dataset's `targets` or `labels`, or the last tensor of
            a `TensorDataset`, also through a `Subset`.
        examples: how many are drawn an epoch; None: `size`.

    Raises:
        InvalidInput: the labels are not to be found, or not one for each example.
    """
    known = _labels(dataset) if labels is None else _values("labels", labels, dataset, size)
    _, place, counts = np.unique(np.asarray(known), return_inverse=True, return_counts=True)
    return _drawn(1.0 / counts[place], examples or size, derive_seed(seed, "balanced", epoch))


def bucketed(
    size: int, epoch: int, seed: int, dataset: Any, batch_size: int, *, lengths: Given, pool: int = 100
) -> list[Indices]:
    """Batches of examples of about one length: pools of random examples, sorted by length and cut.

    Each epoch visits every example once. The last batch of the last pool may be smaller.

    Args:
        size: examples in the dataset.
        epoch: from 0.
        seed: the run's.
        dataset: what a callable `lengths` is called with.
        batch_size: examples in a batch.
        lengths: a number for each example, such as its tokens.
        pool: batches in a pool; more make the lengths in a batch more alike, and the batches less random.

    Returns:
        The batches of the epoch, in random order.
    """
    known = np.asarray(_values("lengths", lengths, dataset, size))
    order = permutation(derive_seed(seed, "bucketed", epoch), size)
    batches: list[Indices] = []
    for start in range(0, size, pool * batch_size):
        some = order[start : start + pool * batch_size]
        some = some[np.argsort(known[some], kind="stable")]
        batches += [some[first : first + batch_size] for first in range(0, len(some), batch_size)]
    return [
        batches[place] for place in permutation(derive_seed(seed, "bucketed", epoch, "batches"), len(batches))
    ]


def by_parts(size: int, epoch: int, seed: int, dataset: Any) -> Indices:
    """Visit a `torchord.coordinator.streaming.Streamed` part after part, in random order inside each.

    Args:
        size: examples in the dataset.
        epoch: from 0.
        seed: the run's.
        dataset: a `Streamed`, or another with the `sizes` of its parts, which lie one after the other.
    """
    sizes = np.asarray(dataset.sizes)
    starts = np.cumsum(sizes) - sizes
    order = permutation(derive_seed(seed, "parts", epoch), len(sizes))
    found: list[Indices] = [
        starts[part] + permutation(derive_seed(seed, "part", epoch, int(part)), int(sizes[part]))
        for part in order
    ]
    return np.concatenate(found)


def _drawn(chances: npt.NDArray[np.float64], examples: int, seed: int) -> Indices:
    """Indices in proportion to chances: uniform numbers looked up in their running sum."""
    ends = np.cumsum(chances)
    raw = np.asarray(np.random.Philox(key=seed).random_raw(examples), dtype=np.uint64)
    places = np.searchsorted(ends, (raw >> np.uint64(11)) * 2.0**-53 * ends[-1], side="right")
    found: Indices = np.minimum(places, np.flatnonzero(chances)[-1]).astype(np.int64)
    return found


def _values(name: str, given: Given, dataset: Any, size: int) -> Sequence[Any]:
    values = given(dataset) if callable(given) else given
    if len(values) != size:
        raise InvalidInput(f"{name} has {len(values)} values for the dataset's {size} examples")
    return values


def _labels(dataset: Any) -> Any:
    for name in ("targets", "labels"):
        if hasattr(dataset, name):
            return getattr(dataset, name)
    if hasattr(dataset, "tensors"):
        return dataset.tensors[-1]
    if hasattr(dataset, "indices") and hasattr(dataset, "dataset"):
        return np.asarray(_labels(dataset.dataset))[np.asarray(dataset.indices)]
    raise InvalidInput(
        f"a {type(dataset).__name__} has neither targets nor labels to balance; give balanced its labels, a "
        "function (dataset) -> the class of each example"
    )
