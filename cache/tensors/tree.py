"""Trees of plain values and tensors <-> JSON and named tensors.

Optimizer and scheduler states are nested dicts and lists. Here they are split into a
skeleton that JSON carries exactly, and the tensors, which safetensors carries. Nothing is
pickled, so reading a tree back runs no code.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchord.cache.errors import CheckpointError
from torchord.cache.reading import FOREIGN

_NONFINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
_DICTS: dict[type, str] = {dict: "dict", OrderedDict: "ordered", Counter: "counter"}
_DICTS_BACK: dict[str, type] = {tag: kind for kind, tag in _DICTS.items()}


def flatten(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """Take the tensors out of a tree.

    Args:
        tree: dicts (also OrderedDict and Counter) with str or int keys, lists, tuples, None,
            bool, int, float (inf and NaN included), str, torch dtypes, numpy scalars (which
            become Python's), numpy arrays and tensors, nested to any depth.

    Returns:
        (skeleton, tensors): a JSON-able value, and name -> tensor (the same objects) with the
        dotted path in the tree as name. `unflatten` puts them together again.

    Raises:
        CheckpointError: the tree holds something else; the message names its path.

    Example:
        >>> skeleton, tensors = flatten({"step": 3, "m": torch.ones(2)})
        >>> list(tensors)
        ['m']
    """
    tensors: dict[str, Tensor] = {}
    return _flatten(tree, "", tensors), tensors


def unflatten(skeleton: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Rebuild the tree that `flatten` took apart.

    Raises:
        CheckpointError: the skeleton is malformed or names a tensor that is not there.
    """
    try:
        return _unflatten(skeleton, tensors)
    except FOREIGN as error:
        raise CheckpointError(
            f"the saved state is damaged: {type(error).__name__}: {error!s:.200}"
        ) from error


def _flatten(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return {"tensor": _store(value, path, tensors)}
    if isinstance(value, np.ndarray):
        return {"array": _store(_tensor(value, path), path, tensors)}
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if type(value) is list:
        return [_flatten(item, _below(path, place), tensors) for place, item in enumerate(value)]
    if type(value) is tuple:
        return {"tuple": [_flatten(item, _below(path, place), tensors) for place, item in enumerate(value)]}
    if type(value) in _DICTS:
        return {_DICTS[type(value)]: [_pair(key, item, path, tensors) for key, item in value.items()]}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    raise CheckpointError(
        f"cannot save {path or 'the state'!r}: it is a {type(value).__module__}.{type(value).__qualname__}; "
        "states may hold dicts, lists, tuples, numbers, strings, booleans, None, dtypes and tensors"
    )


def _tensor(array: np.ndarray[Any, Any], path: str) -> Tensor:
    try:
        return torch.from_numpy(np.ascontiguousarray(array))
    except TypeError as error:
        raise CheckpointError(f"cannot save {path or 'the state'!r}: {error}") from error


def _pair(key: Any, item: Any, path: str, tensors: dict[str, Tensor]) -> list[Any]:
    if type(key) not in (str, int):
        raise CheckpointError(f"cannot save {path or 'the state'!r}: its key {key!r} is neither str nor int")
    return [key, _flatten(item, _below(path, key), tensors)]


def _below(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _store(tensor: Tensor, path: str, tensors: dict[str, Tensor]) -> str:
    name, number = path or "tensor", 1
    while name in tensors:  # {"a.b": x} and {"a": {"b": y}} have equal paths
        number += 1
        name = f"{path or 'tensor'}~{number}"
    tensors[name] = tensor
    return name


def _unflatten(node: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(node, list):
        return [_unflatten(item, tensors) for item in node]
    if not isinstance(node, dict):
        return node
    ((tag, body),) = node.items()
    if tag == "tensor":
        return tensors[body]
    if tag == "array":
        return tensors[body].numpy()
    if tag == "float":
        return _NONFINITE[body]
    if tag == "tuple":
        return tuple(_unflatten(item, tensors) for item in body)
    if tag == "dtype":
        dtype = getattr(torch, body)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{body!r} is no dtype")
        return dtype
    return _DICTS_BACK[tag]({key: _unflatten(item, tensors) for key, item in body})
