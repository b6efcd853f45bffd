"""What goes into a prediction and what comes out of it, as values that travel and can be joined.

Inputs are rows of tensors, or samples for the recipe's collate. Outputs of a model are tensors in dicts,
lists and tuples, or in an object of a class of its own (a Hugging Face `ModelOutput`, a dataclass, a named
tuple), which arrives as `Outputs`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchord.cache.errors import InvalidInput, TorchordError
from torchord.cache.tensors import tree
from torchord.coordinator.compute.batch import during, pair
from torchord.coordinator.spec.resolving import ResolvedRecipe

_FIELDS = "torchord outputs"  # marks a dict that was an object


class Outputs(dict[str, Any]):
    """The outputs of a model that returns an object: its fields by key, by place, and as attributes.

    Attributes:
        left_out: names of fields that hold neither tensors nor plain values, such as a cache of keys and
            values, and did not travel.

    Example:
        >>> Outputs({"logits": 1}).logits
        1
    """

    def __init__(self, fields: Mapping[str, Any], left_out: Iterable[str] = ()) -> None:
        super().__init__(fields)
        self.left_out = tuple(left_out)

    def __getitem__(self, key: str | int) -> Any:
        return list(self.values())[key] if isinstance(key, int) else super().__getitem__(key)

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            lacking = f"; {name!r} cannot travel and was left out" if name in self.left_out else ""
            raise AttributeError(f"these outputs have {', '.join(self)}, but no {name!r}{lacking}") from None


def plain(value: Any) -> Any:
    """Outputs as `torchord.cache.tensors.tree.flatten` takes them; `restored` gives objects back.

    Raises:
        InvalidInput: they hold what cannot travel; the message says where.
    """
    found = _plain(value)
    try:
        tree.flatten(found)
    except TorchordError as error:
        raise InvalidInput(
            f"the outputs of the model cannot travel: {error}; return tensors, in dicts, lists or tuples, "
            "from the recipe's predict=(model, batch)"
        ) from error
    return found


def restored(value: Any) -> Any:
    """The inverse of `plain`: objects as `Outputs`."""
    if type(value) is dict:
        if set(value) == {_FIELDS, "left out"}:
            fields = {key: restored(item) for key, item in value[_FIELDS].items()}
            return Outputs(fields, left_out=value["left out"])
        return {key: restored(item) for key, item in value.items()}
    return type(value)(map(restored, value)) if type(value) in (list, tuple) else value


def joined(parts: Sequence[Any]) -> Any:
    """The outputs of all parts as one value of the same form, an example a row.

    Tensors are put one after the other along their first dimension; where they differ in another one, as
    those of texts that were padded part by part, they become a list with a tensor for each example. Tensors
    without dimensions are stacked, one for each part.
    """
    first = parts[0]
    if isinstance(first, Tensor):
        if not first.ndim:
            return torch.stack(list(parts))
        if any(part.shape[1:] != first.shape[1:] for part in parts):
            return [row for part in parts for row in part]
        return torch.cat(list(parts))
    if isinstance(first, dict):
        fields = {name: joined([part[name] for part in parts]) for name in first}
        return Outputs(fields, left_out=first.left_out) if isinstance(first, Outputs) else fields
    if isinstance(first, (list, tuple)):
        return type(first)(joined([part[i] for part in parts]) for i in range(len(first)))
    return None if all(part is None for part in parts) else list(parts)


def rows(inputs: Any, size: int) -> Iterator[Any] | None:
    """Inputs that are tensors already, cut into batches of `size` rows; None for any others.

    Args:
        inputs: a tensor, or a mapping with tensors (or mappings, lists and tuples of them), an example a row;
            such as a Hugging Face `BatchEncoding`.

    Raises:
        InvalidInput: the tensors have no rows, or differ in how many.
    """
    if isinstance(inputs, Tensor):
        if not inputs.ndim:
            raise InvalidInput(
                "predict() takes a tensor whose first dimension counts examples, got a 0-d tensor"
            )
        return _cut(inputs, len(inputs), size)
    if not isinstance(inputs, Mapping):
        return None
    counts = dict(_counts(inputs, ""))
    if len(set(counts.values())) > 1 or not counts:
        shown = ", ".join(f"{name}: {count}" for name, count in counts.items()) or "no tensors"
        raise InvalidInput(
            f"predict() takes a mapping of tensors with an example a row in each, got {shown}; give a list "
            "or a Dataset of samples where each has a form of its own"
        )
    return _cut(inputs, next(iter(counts.values())), size)


def collated(resolved: ResolvedRecipe, samples: list[Any]) -> Any:
    """A batch of samples as the recipe's collate makes it; with `loss`, of a pair the inputs."""
    assert resolved.collate is not None
    with during("collating the samples"):
        batch = resolved.collate(samples)
    if resolved.predict is None and resolved.loss is not None:
        return pair(batch)[0] if type(batch) in (list, tuple) and len(batch) == 2 else batch
    return batch


def _plain(value: Any) -> Any:
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return _object(dict(zip(value._fields, value, strict=True)))
    if isinstance(value, Mapping) and type(value) is not dict:
        return _object({str(key): item for key, item in value.items()})
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _object({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    if type(value) is dict:
        return {key: _plain(item) for key, item in value.items()}
    return type(value)(map(_plain, value)) if type(value) in (list, tuple) else value


def _object(fields: Mapping[str, Any]) -> dict[str, Any]:
    found = {key: _plain(item) for key, item in fields.items()}
    fitting = {key: item for key, item in found.items() if _fits(item)}
    return {_FIELDS: fitting, "left out": [key for key in found if key not in fitting]}


def _fits(value: Any) -> bool:
    try:
        tree.flatten(value)
    except TorchordError:
        return False
    return True


def _counts(value: Any, path: str) -> Iterator[tuple[str, int]]:
    if isinstance(value, Tensor):
        yield path, len(value) if value.ndim else 0
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _counts(item, f"{path}.{key}" if path else str(key))
    elif type(value) in (list, tuple):
        for place, item in enumerate(value):
            yield from _counts(item, f"{path}.{place}")
    else:
        raise InvalidInput(
            f"predict() takes a mapping of tensors with an example a row, but {path!r} is a "
            f"{type(value).__name__}; ask the tokenizer for tensors (return_tensors='pt'), or give a list of "
            "samples and the recipe a collate"
        )


def _cut(inputs: Any, count: int, size: int) -> Iterator[Any]:
    for first in range(0, count, size):
        yield _rows(inputs, first, first + size)


def _rows(value: Any, first: int, last: int) -> Any:
    if isinstance(value, Tensor):
        return value[first:last].detach().cpu()
    if isinstance(value, Mapping):
        return {key: _rows(item, first, last) for key, item in value.items()}
    return type(value)(_rows(item, first, last) for item in value)
