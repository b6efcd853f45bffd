"""Samples that a collate leaves out: what is left of a batch is what its loss is a mean over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor


def collated(samples: list[Any], collate: Callable[[list[Any]], Any]) -> tuple[Any, int | None]:
    """Collate samples, and count those that are in the batch.

    A collate that leaves some out (broken files, say, that the dataset gives as None) is told from one that
    puts several into one row by what it makes of each sample alone: one row, or none.

    Args:
        samples: at least one.
        collate: (list of samples) -> batch.

    Returns:
        (the batch, how many samples are in it), None for all, or where the batch does not show it. (None, 0)
        where there was nothing to collate, every sample being None.

    Raises:
        Exception: what collate raises.
    """
    nothing = all(sample is None for sample in samples)
    try:
        value = collate(list(samples))
    except Exception:
        if nothing:
            return None, 0
        raise
    if value is None and nothing:
        return None, 0
    rows = _rows(value)
    if rows is None or rows >= len(samples):
        return value, None
    return value, rows if sum(_alone(sample, collate) for sample in samples) == rows else None


def _alone(sample: Any, collate: Callable[[list[Any]], Any]) -> int:
    """The rows of a batch of one sample."""
    try:
        return _rows(collate([sample])) or 0
    except Exception:  # noqa: BLE001  a collate need not be able to make an empty batch
        return 0


def _rows(value: Any) -> int | None:
    """The first dimension that all of a batch has in common; None if there is none to be seen."""
    if isinstance(value, (list, tuple, Mapping)) and not value:
        return 0
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, (list, tuple)) for item in value):
        lengths = {len(item) for item in value}  # columns, such as the pictures and the boxes of a detector
    else:
        lengths = _lengths(value)
    return lengths.pop() if len(lengths) == 1 else None


def _lengths(value: Any) -> set[int]:
    if isinstance(value, (Tensor, np.ndarray)):
        return {value.shape[0]} if value.ndim else set()
    if isinstance(value, Mapping):
        value = list(value.values())
    if not isinstance(value, (list, tuple)):
        return set()
    if value and all(isinstance(item, (str, bytes, int, float)) for item in value):
        return {len(value)}
    return set().union(*(_lengths(item) for item in value))
