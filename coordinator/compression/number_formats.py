"""Number formats of 1 to 32 bits, for whole gradients and for the values that sparse and
low-rank codecs send.

A format writes a float tensor to named parts and reads it back. Elements are rounded one by
one, scales are maxima or sums of integers: so the bits depend neither on threads nor on vector
width nor on memory alignment, and a CPU and a GPU agree.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from torchord.cache.errors import ConfigError
from torchord.coordinator.compression.arguments import require_integer
from torchord.coordinator.compression.bits import pack_bits, unpack_bits
from torchord.coordinator.compression.layout import Layout

_MEMORIES = ("bf16", "fp16", "int8", "int4")

SLICE = 1 << 17
"""Elements that are worked on at a time on a CPU, so that intermediate results stay in its cache."""

_UNITS = 1 << 30
_MOST_BELOW_2_15 = 32752.0


def slices(count: int, device: torch.device) -> list[slice]:
    """Return the pieces in which to work through 1-D tensors: all at once on a GPU."""
    step = max(1, count if device.type == "cuda" else SLICE)
    return [slice(first, min(count, first + step)) for first in range(0, count, step)]


class NumberFormat(ABC):
    """A way to write floats.

    Attributes:
        name: as in a config.
    """

    name: str

    @abstractmethod
    def layout(self, count: int, dtype: torch.dtype) -> Layout:
        """Return the parts of `count` elements that were float32 or float64."""

    @abstractmethod
    def pack(self, values: Tensor, peak: float, parts: Mapping[str, Tensor]) -> None:
        """Write floats.

        Args:
            values: float32 or float64, finite, contiguous, any shape; not written to.
            peak: largest magnitude in `values`.
            parts: to be written to: zeros, as `layout` says.
        """

    @abstractmethod
    def read(self, parts: Mapping[str, Tensor], where: slice, dtype: torch.dtype) -> Tensor:
        """Return the elements of one of the `slices` as float32 or float64, in memory of their own."""

    def unpack(self, parts: Mapping[str, Tensor], count: int, dtype: torch.dtype) -> Tensor:
        """Return all elements as a tensor of shape (count,) that shares no memory with the parts."""
        device = next(iter(parts.values())).device
        found = torch.empty(count, dtype=dtype, device=device)
        for where in slices(count, device):
            found[where] = self.read(parts, where, dtype)
        return found

    def subtract(self, parts: Mapping[str, Tensor], values: Tensor) -> Tensor:
        """Take what the parts stand for off the contiguous values, in place, and return them."""
        flat = values.view(-1)
        for where in slices(flat.numel(), flat.device):
            flat[where] -= self.read(parts, where, flat.dtype)
        return values


class Cast(NumberFormat):
    """float32 or bfloat16: rounded to nearest, ties to even; beyond the range, the largest value.

    Rounding can lift a finite float above the largest bfloat16, which would make it infinite;
    the largest finite value is sent instead and error feedback keeps the rest.

    Args:
        name: as in a config.
        dtype: of the elements that are sent.
    """

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name = name
        self.dtype = dtype

    def layout(self, count: int, dtype: torch.dtype) -> Layout:
        """See `NumberFormat.layout`."""
        return {"value": (self.dtype, (count,))}

    def pack(self, values: Tensor, peak: float, parts: Mapping[str, Tensor]) -> None:
        """See `NumberFormat.pack`."""
        most = torch.finfo(self.dtype).max
        if peak > most:
            values = values.clamp(-most, most)
        parts["value"].copy_(values.reshape(-1))

    def read(self, parts: Mapping[str, Tensor], where: slice, dtype: torch.dtype) -> Tensor:
        """See `NumberFormat.read`."""
        return parts["value"][where].to(dtype, copy=True)


class Half(NumberFormat):
    """float16 with a power of two for the whole tensor, so that it neither overflows nor underflows.

    Equation:
        h = fp16(2^s x),  x' = 2^-s h,  with s such that 2^14 <= 2^s max|x| < 2^15

    Scaling by a power of two is exact, so x' = fp16(x) wherever fp16(x) is normal. Elements
    down to 2^-28 of the largest keep all 11 bits, those below 2^-39 of it become 0.
    """

    name = "fp16"

    def layout(self, count: int, dtype: torch.dtype) -> Layout:
        """See `NumberFormat.layout`."""
        return {"value": (torch.float16, (count,)), "shift": (torch.int16, ())}

    def pack(self, values: Tensor, peak: float, parts: Mapping[str, Tensor]) -> None:
        """See `NumberFormat.pack`."""
        limit = 126 if values.dtype == torch.float32 else 1000  # the dtype has 2^limit and 2^-limit
        shift = 0 if peak == 0.0 else max(-limit, min(limit, 15 - math.frexp(peak)[1]))
        flat = values.reshape(-1)
        for where in slices(flat.numel(), flat.device):
            scaled = flat[where] * 2.0**shift
            if peak > torch.finfo(flat.dtype).max / 2:  # or 2^15 would come back as infinity
                scaled.clamp_(-_MOST_BELOW_2_15, _MOST_BELOW_2_15)
            parts["value"][where] = scaled
        parts["shift"].fill_(shift)

    def read(self, parts: Mapping[str, Tensor], where: slice, dtype: torch.dtype) -> Tensor:
        """See `NumberFormat.read`."""
        shift = max(-1000, min(1000, int(parts["shift"])))
        return parts["value"][where].to(dtype, copy=True).mul_(2.0**-shift)


class Blocks(NumberFormat):
    """Evenly spaced levels in 8 or 4 bits, with one scale for each block of consecutive elements.

    Equation:
        s_b = max|x_i| / L over block b,   q_i = round(x_i / s_b),   x'_i = q_i s_b

    with L = 127 or 7, rounded to nearest, ties to even: |x_i - x'_i| <= s_b / 2 but for rounding.
    A block whose scale would be denormal is sent as zeros. Two 4-bit levels share a byte, the
    first in its lower half.

    Paper:
        Dettmers et al., "8-bit optimizers via block-wise quantization", arXiv 2110.02861.

    Deviations:
        Levels are evenly spaced, not the paper's dynamic tree: what small values lose, error
        feedback returns, and even levels need no table. x / s_b is x times the rounded
        reciprocal, which can move a value that lies half-way between two levels.

    Args:
        bits: 8 or 4.
        block: elements in a block, a power of two from 16 to 65536.

    Raises:
        ConfigError: the block is none of these.
    """

    def __init__(self, bits: int = 8, block: int = 1024) -> None:
        self.name = f"int{bits}"
        self.block = require_block(block)
        self._narrow = bits == 4
        self._levels = (1 << (bits - 1)) - 1

    def layout(self, count: int, dtype: torch.dtype) -> Layout:
        """See `NumberFormat.layout`."""
        blocks = -(-count // self.block)
        level = (torch.uint8, (-(-count // 2),)) if self._narrow else (torch.int8, (count,))
        return {"level": level, "scale": (dtype, (blocks,))}

    def pack(self, values: Tensor, peak: float, parts: Mapping[str, Tensor]) -> None:
        """See `NumberFormat.pack`."""
        flat = values.reshape(-1)
        for where in slices(flat.numel(), flat.device):
            rows = rows_of(flat[where], self.block)
            scale = self._scale(rows)
            inverse = torch.where(scale > 0, 1 / scale, scale)
            levels = torch.mul(rows, inverse).round_().clamp_(-self._levels, self._levels).view(-1)
            self._write(levels, where, parts["level"])
            parts["scale"][blocks_of(where, self.block)] = scale.view(-1)

    def read(self, parts: Mapping[str, Tensor], where: slice, dtype: torch.dtype) -> Tensor:
        """See `NumberFormat.read`."""
        rows = rows_of(self._read(parts["level"], where), self.block).to(dtype)
        scale = parts["scale"][blocks_of(where, self.block)]
        return rows.mul_(scale.view(-1, 1)).view(-1)[: where.stop - where.start]

    def _write(self, levels: Tensor, where: slice, target: Tensor) -> None:
        """Write the levels of a slice; there may be more, of its padding, which are 0."""
        if not self._narrow:
            target[where] = levels[: where.stop - where.start]
            return
        pairs = levels.to(torch.int16).add_(8).view(-1, 2)
        joined = pairs[:, 0] + pairs[:, 1] * 16
        target[where.start // 2 : -(-where.stop // 2)] = joined[: -(-(where.stop - where.start) // 2)].to(
            torch.uint8
        )

    def _read(self, source: Tensor, where: slice) -> Tensor:
        """Return the levels of a slice as int8."""
        if not self._narrow:
            return source[where]
        joined = source[where.start // 2 : -(-where.stop // 2)]
        pairs = torch.stack((joined & 15, joined >> 4), 1)
        return pairs.view(-1)[: where.stop - where.start].to(torch.int8) - 8

    def _scale(self, rows: Tensor) -> Tensor:
        """Return the scale of each row as a column, 0 where it would be denormal."""
        finfo = torch.finfo(rows.dtype)
        peaks = rows.abs().amax(1, keepdim=True)
        scale = peaks.clamp_(max=finfo.max * (1 - 2**-20)) / self._levels  # L scales must not overflow
        return torch.where(scale >= finfo.smallest_normal, scale, torch.zeros_like(scale))


class Sign(NumberFormat):
    """One bit: the sign, with one magnitude for each block of consecutive elements.

    Equation:
        x'_i = m_b if x_i >= 0 else -m_b,   m_b = mean|x_i| over block b

    The mean is taken of |x_i| in units of max|x| 2^-30 over the whole tensor, as integers, so
    that it does not depend on the order of summation.

    Paper:
        Seide et al., "1-bit stochastic gradient descent ...", Interspeech 2014; scaled by the
        mean magnitude as in Karimireddy et al., arXiv 1901.09847.

    Deviations:
        Seide et al. take two magnitudes for each column of a matrix, Karimireddy et al. one
        for each tensor; here each block has one.

    Args:
        block: elements in a block, a power of two from 16 to 65536.

    Raises:
        ConfigError: the block is none of these.
    """

    name = "sign"

    def __init__(self, block: int = 1024) -> None:
        self.block = require_block(block)

    def layout(self, count: int, dtype: torch.dtype) -> Layout:
        """See `NumberFormat.layout`."""
        return {"sign": (torch.uint8, (-(-count // 8),)), "scale": (dtype, (-(-count // self.block),))}

    def pack(self, values: Tensor, peak: float, parts: Mapping[str, Tensor]) -> None:
        """See `NumberFormat.pack`."""
        flat = values.reshape(-1)
        unit = peak / _UNITS
        if unit < torch.finfo(flat.dtype).smallest_normal:
            unit = 0.0
        for where in slices(flat.numel(), flat.device):
            part = flat[where]
            parts["sign"][where.start // 8 : -(-where.stop // 8)] = pack_bits(part >= 0)
            if unit:
                rows = rows_of(part, self.block)
                sums = (rows.abs() / unit).round_().to(torch.int64).sum(1)
                counts = torch.full_like(sums, self.block)
                counts[-1] = (part.numel() - 1) % self.block + 1
                parts["scale"][blocks_of(where, self.block)] = (sums.double() / counts * unit).to(flat.dtype)

    def read(self, parts: Mapping[str, Tensor], where: slice, dtype: torch.dtype) -> Tensor:
        """See `NumberFormat.read`."""
        count = where.stop - where.start
        signs = unpack_bits(parts["sign"][where.start // 8 : -(-where.stop // 8)], count).to(dtype)
        rows = rows_of(signs.mul_(2).sub_(1), self.block)
        scale = parts["scale"][blocks_of(where, self.block)]
        return rows.mul(scale.view(-1, 1)).view(-1)[:count]


def peak_of(values: Tensor) -> float:
    """Return the largest magnitude; 0 for no values."""
    if values.numel() == 0:
        return 0.0
    low, high = torch.aminmax(values)
    return float(torch.maximum(-low, high))


def rows_of(flat: Tensor, block: int) -> Tensor:
    """Return blocks as rows, the last one padded with zeros."""
    missing = -flat.numel() % block
    padded = torch.nn.functional.pad(flat, (0, missing)) if missing else flat
    return padded.view(-1, block)


def blocks_of(where: slice, block: int) -> slice:
    """Return which blocks a slice of elements covers; it starts with a block."""
    return slice(where.start // block, -(-where.stop // block))


def require_block(block: object) -> int:
    """Return a block size.

    Raises:
        ConfigError: it is no power of two from 16 to 65536.
    """
    size = require_integer("block", block, minimum=16)
    if size not in {1 << power for power in range(4, 17)}:
        raise ConfigError(f"block must be a power of two from 16 to 65536, not {block!r}")
    return size


FORMATS: tuple[NumberFormat, ...] = (
    Cast("fp32", torch.float32),
    Cast("bf16", torch.bfloat16),
    Half(),
    Blocks(8),
    Blocks(4),
    Sign(),
)


def number_format(name: str) -> NumberFormat:
    """Return the format of a name.

    Raises:
        ConfigError: there is none.
    """
    for found in FORMATS:
        if found.name == name:
            return found
    raise ConfigError(f"values must be one of {', '.join(found.name for found in FORMATS)}, not {name!r}")


def memory_format(name: str, *, feedback: bool) -> NumberFormat | None:
    """Return the format that a codec's memory is stored in; None for "full", as wide as it was computed.

    Raises:
        ConfigError: there is none of that name, or no feedback, and so no memory.
    """
    if name == "full":
        return None
    if name not in _MEMORIES:
        raise ConfigError(f"memory must be one of full, {', '.join(_MEMORIES)}, not {name!r}")
    if not feedback:
        raise ConfigError(f"memory={name} needs feedback=on: without feedback there is no memory")
    return number_format(name)
