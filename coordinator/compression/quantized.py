"""The codecs "fp16", "bf16" and "int8": every element travels, with fewer bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from cache.errors import ConfigError
from coordinator.compression.codec import Compressed, TensorCodec
from coordinator.compression.numbers import Blocks, Cast, Half, NumberFormat


class _Quantized(TensorCodec):
    """Writes all elements in one number format."""

    @property
    def numbers(self) -> NumberFormat:
        """The number format."""
        raise NotImplementedError

    def suits(self, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        """Whether the format is smaller than the elements are."""
        count = _count(shape)
        return self.numbers.nbytes(count) < count * dtype.itemsize

    def compress(
        self, name: str, values: Tensor, state: Mapping[str, Tensor], *, peak: float, error: bool
    ) -> Compressed:
        """See `TensorCodec.compress`."""
        return Compressed(self.numbers.pack(values, peak))

    def expand(self, parts: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """See `TensorCodec.expand`."""
        return self.numbers.unpack(parts, _count(shape), dtype).view(shape)
