"""Inputs and outputs of a prediction as JSON has them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from torchord.cache.errors import InvalidInput


def as_tensors(value: Any) -> Any:
    """Nested lists of numbers as a tensor, an example a row; a mapping of such as one of tensors.

    Whole numbers become int64, others float32. What is a tensor or an array keeps its dtype.

    Raises:
        InvalidInput: the lists are ragged, empty, or hold something else.
    """
    if isinstance(value, Mapping):
        if not value:
            raise InvalidInput("the inputs are an empty mapping; give at least one list")
        return {str(key): as_tensors(item) for key, item in value.items()}
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if not isinstance(value, list) or not value:
        raise InvalidInput("the inputs are lists of numbers, an example an item, or a mapping of such")
    try:
        found = torch.tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InvalidInput(f"the inputs are no rows of numbers: {error}") from None
    return found if found.dtype in (torch.int64, torch.bool) else found.float()


def in_lists(value: Any) -> Any:
    """Outputs as nested lists; a number that is not finite is None."""
    if isinstance(value, torch.Tensor):
        return in_lists(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): in_lists(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [in_lists(item) for item in value]
    if isinstance(value, complex):
        return [in_lists(value.real), in_lists(value.imag)]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
