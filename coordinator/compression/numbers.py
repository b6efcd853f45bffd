"""Number formats of 1 to 4 bytes, for whole gradients and for the values that sparse and
low-rank codecs send.

A format turns a float tensor into named parts and back. Elements are rounded one by one and
scales are maxima, so the bits depend neither on threads nor on vector width nor on memory
alignment, and a CPU and a GPU agree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from cache.errors import ConfigError
from coordinator.compression.codec import expect

_SLICE = 1 << 17
"""Elements that are worked on at a time on a CPU, so that intermediate results stay in its cache."""

_Q = 127


class NumberFormat(Protocol):
    """A way to write floats.

    Attributes:
        name: as in a config.
    """

    @property
    def name(self) -> str:
        """As in a config."""
        ...

    def nbytes(self, count: int) -> int:
        """Return the bytes of `count` elements, scales included."""
        ...

    def pack(self, values: Tensor, peak: float) -> dict[str, Tensor]:
        """Write floats.

        Args:
            values: float32 or float64, finite, contiguous, any shape; not written to.
            peak: largest magnitude in `values`.

        Returns:
            part name -> 1-D (or 0-d) tensor.
        """
        ...

    def unpack(self, parts: Mapping[str, Tensor], count: int, dtype: torch.dtype) -> Tensor:
        """Read floats.

        Args:
            count: how many were written.
            dtype: float32 or float64, of the result.

        Returns:
            Tensor of shape (count,) that shares no memory with the parts.

        Raises:
            ManifestMismatch: the parts are not of this format, or of another count.
        """
        ...


@dataclass(frozen=True, slots=True)
class Cast:
    """float32 or bfloat16: rounded to nearest, ties to even; beyond the range, the largest value.

    Rounding can lift a finite float above the largest bfloat16, which would make it infinite;
    the largest finite value is sent instead and error feedback keeps the rest.
    """

    name: str
    dtype: torch.dtype

    def nbytes(self, count: int) -> int:
        """See `NumberFormat.nbytes`."""
        return count * self.dtype.itemsize

    def pack(self, values: Tensor, peak: float) -> dict[str, Tensor]:
        """See `NumberFormat.pack`."""
        most = torch.finfo(self.dtype).max
        if peak > most:
            values = values.clamp(-most, most)
        return {self.name: values.reshape(-1).to(self.dtype, copy=True)}

    def unpack(self, parts: Mapping[str, Tensor], count: int, dtype: torch.dtype) -> Tensor:
        """See `NumberFormat.unpack`."""
        return expect(self.name, parts.get(self.name), (count,), self.dtype).to(dtype, copy=True)


@dataclass(frozen=True, slots=True)
class Half:
    """float16 with a power of two for the whole tensor, so that it neither overflows nor underflows.

    Equation:
        h = fp16(2^s x),  x' = 2^-s h,  with s such that 2^14 <= 2^s max|x| < 2^15

    Scaling by a power of two is exact, so x' = fp16(x) wherever fp16(x) is normal. Elements
    down to 2^-28 of the largest keep all 11 bits, those below 2^-39 of it become 0.
    """

    name: ClassVar[str] = "fp16"

    def nbytes(self, count: int) -> int:
        """See `NumberFormat.nbytes`."""
        return 2 * count + 2

    def pack(self, values: Tensor, peak: float) -> dict[str, Tensor]:
        """See `NumberFormat.pack`."""
        limit = 126 if values.dtype == torch.float32 else 1000  # 2^limit and 2^-limit exist in the dtype
        shift = 0 if peak == 0.0 else max(-limit, min(limit, 15 - math.frexp(peak)[1]))
        half = torch.empty(values.numel(), dtype=torch.float16, device=values.device)
        scale, flat = 2.0**shift, values.view(-1)
        for part in slices(flat):
            half[part] = flat[part] * scale
        return {"fp16": half, "shift": torch.tensor(shift, dtype=torch.int16, device=values.device)}

    def unpack(self, parts: Mapping[str, Tensor], count: int, dtype: torch.dtype) -> Tensor:
        """See `NumberFormat.unpack`."""
        half = expect("fp16", parts.get("fp16"), (count,), torch.float16)
        shift = int(expect("shift", parts.get("shift"), (), torch.int16))
        return half.to(dtype, copy=True).mul_(2.0 ** -max(-1000, min(1000, shift)))


@dataclass(frozen=True, slots=True)
class Blocks:
    """int8 with one scale for each block of consecutive elements.

    Equation:
        s_b = max|x_i| / 127 over block b,   q_i = round(x_i / s_b),   x'_i = q_i s_b

    rounded to nearest, ties to even. |x_i - x'_i| <= s_b / 2 but for the rounding of s_b. A block
    whose scale is below the smallest normal number is sent as zeros.

    Paper:
        Dettmers et al., "8-bit optimizers via block-wise quantization", arXiv 2110.02861.

    Deviations:
        Levels are evenly spaced, not the paper's dynamic tree: what small values lose, error
        feedback returns, and even levels need no table. x / s_b is x times the rounded
        reciprocal, which can move a value that is half-way between two levels.

    Attributes:
        block: elements in a block.
    """

    block: int = 1024
    name: ClassVar[str] = "int8"

    def nbytes(self, count: int) -> int:
        """See `NumberFormat.nbytes`; scales of float32."""
        return count + 4 * -(-count // self.block)

    def pack(self, values: Tensor, peak: float) -> dict[str, Tensor]:
        """See `NumberFormat.pack`."""
        flat = values.view(-1)
        count, blocks = flat.numel(), -(-flat.numel() // self.block)
        levels = torch.empty(count, dtype=torch.int8, device=flat.device)
        scales = torch.empty(blocks, dtype=flat.dtype, device=flat.device)
        for part, rows in self._rows(count, flat.is_cuda):
            block = flat[part].view(rows.stop - rows.start, -1)
            scale = self._scales(block)
            inverse = torch.where(scale > 0, 1 / scale, scale)
            scaled = (block * inverse).round_().clamp_(-_Q, _Q)
            levels[part] = scaled.view(-1)
            scales[rows] = scale.view(-1)
        return {"int8": levels, "scale": scales}

    def unpack(self, parts: Mapping[str, Tensor], count: int, dtype: torch.dtype) -> Tensor:
        """See `NumberFormat.unpack`."""
        levels = expect("int8", parts.get("int8"), (count,), torch.int8)
        scales = expect("scale", parts.get("scale"), (-(-count // self.block),), dtype)
        found = torch.empty(count, dtype=dtype, device=levels.device)
        for part, rows in self._rows(count, levels.is_cuda):
            torch.mul(
                levels[part].view(rows.stop - rows.start, -1),
                scales[rows].view(-1, 1),
                out=found[part].view(rows.stop - rows.start, -1),
            )
        return found

    def _scales(self, block: Tensor) -> Tensor:
        """Return the scale of each row as a column, 0 where it would be denormal."""
        finfo = torch.finfo(block.dtype)
        peaks = block.abs().amax(1, keepdim=True)
        scale = peaks.clamp_(max=finfo.max * (1 - 2**-20)) / _Q  # 127 scales must not overflow
        return torch.where(scale >= finfo.smallest_normal, scale, torch.zeros_like(scale))

    def _rows(self, count: int, cuda: bool) -> list[tuple[slice, slice]]:
        """Return (elements, blocks) of each piece of work; the last block may be shorter, by itself."""
        whole = count // self.block
        step = max(1, whole if cuda else _SLICE // self.block)
        found = []
        for first in range(0, whole, step):
            last = min(whole, first + step)
            found.append((slice(first * self.block, last * self.block), slice(first, last)))
        if count % self.block:
            found.append((slice(whole * self.block, count), slice(whole, whole + 1)))
        return found


FORMATS: tuple[NumberFormat, ...] = (
    Cast("fp32", torch.float32),
    Cast("bf16", torch.bfloat16),
    Half(),
    Blocks(),
)


def number_format(name: str) -> NumberFormat:
    """Return the format of a name.

    Raises:
        ConfigError: there is none.
    """
    for found in FORMATS:
        if found.name == name:
            return found
    raise ConfigError(f"values must be one of {', '.join(found.name for found in FORMATS)}, not {name!r}.")


def slices(flat: Tensor) -> list[slice]:
    """Return the pieces in which to work through a 1-D tensor: all at once on a GPU."""
    count = flat.numel()
    step = max(1, count if flat.is_cuda else _SLICE)
    return [slice(first, min(count, first + step)) for first in range(0, count, step)]


def peak_of(values: Tensor) -> float:
    """Return the largest magnitude; 0 for no values."""
    if values.numel() == 0:
        return 0.0
    low, high = torch.aminmax(values)
    return float(torch.maximum(-low, high))
