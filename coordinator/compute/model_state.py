"""A model taken apart into the tensors that are its state, and what keeps it from being taken apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from torchord.cache.errors import InvalidInput
from torchord.cache.tensors.codec import ALIGNMENT_NBYTES, starts_aligned
from torchord.coordinator.spec.config import TrainingConfig

K = TypeVar("K")
T = TypeVar("T", bound=Tensor)
Mark = tuple[int, int]
"""torch's count of writes to a tensor, and where its memory begins: neither sees `.data` written in place."""


class Places:
    """Where some tensors have their memory, and whether something wrote to them or moved them since.

    Args:
        tensors: name -> tensor.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._strides = {name: tensor.stride() for name, tensor in tensors.items()}
        self.note()

    def note(self) -> None:
        """Take them as they are now for unwritten, and for being where they belong."""
        self._marks = dict(zip(self._tensors, marks(self._tensors.values()), strict=True))

    def written(self) -> list[str]:
        """Names of those that something wrote to or moved since."""
        now = zip(self._marks.items(), marks(self._tensors.values()), strict=True)
        return [name for (name, before), after in now if before != after]

    @torch.no_grad()
    def put(self, names: Iterable[str], values: Mapping[str, Tensor]) -> None:
        """Copy values into some; one that was given other memory or shape gets its own, laid out as ever."""
        for name in names:
            tensor, value = self._tensors[name], values[name]
            if address(tensor) != self._marks[name][1] or tensor.shape != value.shape:
                tensor.data = torch.empty_strided(
                    value.shape, self._strides[name], dtype=value.dtype, device=value.device
                )
            tensor.copy_(value)
            self._marks[name] = (tensor._version, address(tensor))


class OnCpu(Mapping[str, Tensor]):
    """The same tensors, copied to the CPU when one is asked for."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name].cpu()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def formatted(model: nn.Module, config: TrainingConfig | None) -> nn.Module:
    """The model with its 4-D parameters in the config's memory format."""
    if config is not None and config.memory_format == "channels_last":
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


@torch.no_grad()
def align(model: nn.Module) -> None:
    """Move parameters and buffers that start elsewhere, such as numpy's, to boundaries of 64 bytes.

    Their order in memory is the recipe's and stays; those that share memory move together.
    """
    tensors = dict(enumerate((*model.parameters(), *model.buffers())))
    together = overlapping(tensors)
    for group in together:
        _move([tensors[key] for key in group])
    alone = tensors.keys() - {key for group in together for key in group}
    for tensor in (tensors[key] for key in sorted(alone)):
        if not starts_aligned(tensor):
            tensor.data = tensor.data.clone()


def _move(group: Sequence[Tensor]) -> None:
    """Move tensors that share memory to a boundary of 64 bytes, if the first of them is at none."""
    spans = [_span(tensor) for tensor in group]
    start = min(first for first, _ in spans)
    if start % ALIGNMENT_NBYTES == 0 or any((first - start) % 16 for first, _ in spans):
        return
    fresh = torch.empty(max(end for _, end in spans) - start, dtype=torch.uint8).untyped_storage()
    for tensor, (first, _) in zip(group, spans, strict=True):
        offset = (first - start) // tensor.dtype.itemsize
        placed = torch.empty(0, dtype=tensor.dtype).set_(fresh, offset, tensor.shape, tensor.stride())
        tensor.data = placed.copy_(tensor)


def overlapping(tensors: Mapping[K, Tensor]) -> list[list[K]]:
    """Groups of tensors that share memory, as views of one another do; the rest is in no group."""
    spans = sorted((*_span(tensor), number) for number, tensor in enumerate(tensors.values()))
    keys, groups, end = list(tensors), list[list[K]](), -1
    for first, last, number in spans:
        if first == last:  # empty
            continue
        if first < end:
            groups[-1].append(keys[number])
        else:
            groups.append([keys[number]])
        end = max(end, last)
    return [group for group in groups if len(group) > 1]


def _span(tensor: Tensor) -> tuple[int, int]:
    """Addresses of a tensor's first byte and behind its last; equal ones for an empty tensor."""
    start = address(tensor)
    if not tensor.numel() or not start:
        return start, start
    reach = sum((extent - 1) * stride for extent, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (reach + 1) * tensor.dtype.itemsize


@torch.no_grad()
def unfold(model: nn.Module) -> None:
    """Give each element of an expanded buffer or frozen parameter memory of its own: it is written to.

    Raises:
        InvalidInput: a trained parameter is expanded.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        shared = any(
            stride == 0 and extent > 1 for extent, stride in zip(tensor.shape, tensor.stride(), strict=True)
        )
        if shared and tensor.requires_grad and tensor.is_leaf:
            raise InvalidInput(
                f"parameter {name!r} is expanded: several of its elements are one in memory, which no "
                "optimizer can write to; clone() it in the model function, or make it small and expand it in "
                "the forward"
            )
        if shared:
            tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)


def marks(tensors: Iterable[Tensor]) -> list[Mark]:
    """The mark of each tensor; another one later means that it was written to, or put elsewhere."""
    return [(tensor._version, address(tensor)) for tensor in tensors]


def address(tensor: Tensor) -> int:
    """Where a tensor's memory begins; 0 for a subclass that wraps others and has none of its own."""
    try:
        return tensor.data_ptr()
    except RuntimeError:
        return 0


def reorder(model: nn.Module, names: Sequence[str]) -> None:
    """Let each module have registered its parameters, buffers and modules in the order of some names.

    Places of what is not named, such as an activation in a sequence, stay as they are.
    """
    ranks = {name: rank for rank, name in enumerate(names)}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for parts in (module._parameters, module._buffers):
            _sort(parts, {name: ranks.get(prefix + name) for name in parts})
        beneath = {
            name: min((ranks[full] for full in names if full.startswith(f"{prefix}{name}.")), default=None)
            for name in module._modules
        }
        _sort(module._modules, beneath)


def _sort(parts: dict[str, Any], ranks: Mapping[str, int | None]) -> None:
    """Sort those entries of a dict, in place, that have a rank."""
    ranked = [name for name in parts if ranks[name] is not None]
    sorted_names = iter(sorted(ranked, key=lambda name: ranks[name] or 0))
    order = [name if ranks[name] is None else next(sorted_names) for name in parts]
    if order != list(parts):
        items = {name: parts[name] for name in order}
        parts.clear()
        parts.update(items)


def named(
    tensors: Callable[..., Iterable[tuple[str, T]]], names: Sequence[str], found: Mapping[str, T]
) -> dict[str, T]:
    """Some tensors of a model under those of their names that are given, and in that order.

    Args:
        tensors: the model's `named_parameters` or `named_buffers`.
        names: which of several names a tied tensor has.
        found: all of them, under the names that the model gives first.
    """
    everywhere = dict(tensors(remove_duplicate=False))
    chosen = {name: everywhere[name] for name in names if name in everywhere}
    held = {id(tensor) for tensor in chosen.values()}
    return chosen | {name: tensor for name, tensor in found.items() if id(tensor) not in held}


def require_plain(model: nn.Module) -> None:
    """Refuse a state that has no bytes yet, or none that lie in a row.

    Raises:
        InvalidInput: a parameter or buffer is lazy, sparse or on the meta device.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)):
            raise InvalidInput(
                f"{name!r} is not materialized yet (a lazy module); run one dummy batch through the model in "
                "the recipe's model function"
            )
        if tensor.device.type == "meta":
            raise InvalidInput(
                f"{name!r} is on the meta device and has no values; build the model on the CPU"
            )
        if tensor.layout is not torch.strided:
            raise InvalidInput(f"{name!r} is {tensor.layout}; a run's state must be dense")


def same_bytes(one: Tensor, other: Tensor) -> bool:
    """Whether two contiguous CPU tensors hold the same bytes."""
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
