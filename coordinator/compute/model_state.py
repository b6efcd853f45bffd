"""A model taken apart into the tensors that are its state, and what keeps it from being taken apart."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchord.cache.errors import InvalidInput
from torchord.cache.tensors.codec import starts_aligned
from torchord.coordinator.spec.config import TrainingConfig


@dataclass(frozen=True)
class BufferHome:
    """Where a buffer hangs in the module tree; a forward may put another tensor there."""

    module: nn.Module
    name: str


Mark = tuple[int, int]
"""torch's count of writes to a tensor, and where its memory begins: neither sees `.data` written in place."""


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

    Their order in memory is the recipe's and stays; a tensor that shared memory with them does no more.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if not starts_aligned(tensor):
            tensor.data = tensor.data.clone()


def homes(model: nn.Module, buffers: Mapping[str, Tensor]) -> dict[str, list[BufferHome]]:
    """Buffer name -> every place in the module tree where the buffer hangs."""
    found: dict[str, list[BufferHome]] = {name: [] for name in buffers}
    names = {id(buffer): name for name, buffer in buffers.items()}
    for module in model.modules():
        for local, buffer in module._buffers.items():
            if buffer is not None:
                found[names[id(buffer)]].append(BufferHome(module, local))
    return found


def marks(tensors: Iterable[Tensor]) -> list[Mark]:
    """The mark of each tensor; another one later means that it was written to, or put elsewhere."""
    return [(tensor._version, address(tensor)) for tensor in tensors]


@torch.no_grad()
def put(tensor: Tensor, value: Tensor, began: int, stride: tuple[int, ...]) -> None:
    """Copy a value into a tensor; where somebody gave that another memory or shape, into memory of its own.

    Args:
        began: its address.
        stride: its order in memory, in elements.
    """
    if address(tensor) != began or tensor.shape != value.shape or tensor.dtype != value.dtype:
        tensor.data = torch.empty_strided(value.shape, stride, dtype=value.dtype, device=value.device)
    tensor.copy_(value)


def address(tensor: Tensor) -> int:
    """Where a tensor's memory begins; 0 for a subclass that wraps others and has none of its own."""
    try:
        return tensor.data_ptr()
    except RuntimeError:
        return 0


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
