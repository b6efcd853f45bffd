"""Number formats of 1 to 4 bytes, for whole gradients and for the values that sparse and
low-rank codecs send.

A format turns a float tensor into named parts and back. Elements are rounded one by one and
scales are maxima, so the bits depend neither on threads nor on vector width nor on memory
alignment, and a CPU and a GPU agree.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from cache.errors import ConfigError
from coordinator.compression.arguments import require_integer
from coordinator.compression.codec import expect

SLICE = 1 << 17
"""Elements that are worked on at a time on a CPU, so that intermediate results stay in its cache."""

_LEVELS = 127


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
    def nbytes(self, count: int) -> int:
        """Return the bytes of `count` elements, scales included."""

    @abstractmethod
    def pack(self, values: Tensor, peak: float) -> dict[str, Tensor]:
        """Write floats.

        Args:
            values: float32 or float64, finite, contiguous, any shape; not written to.
            peak: largest magnitude in `values`.

        Returns:
            part name -> tensor that shares no memory with the values.
        """

    @abstractmethod
    def check(self, parts: Mapping[str, Tensor], count: int, dtype: torch.dtype) -> None:
        """Make sure that `count` elements can be read from the parts.

        Raises:
            ManifestMismatch: the parts are not of this format, or of another count.
        """

    @abstractmethod
    def read(self, parts: Mapping[str, Tensor], where: slice, dtype: torch.dtype) -> Tensor:
        """Return the elements of one of the `slices` as float32 or float64, in memory of their own."""

    def unpack(self, parts: Mapping[str, Tensor], count: int, dtype: torch.dtype) -> Tensor:
        """Return all elements as a tensor of shape (count,) that shares no memory with the parts.

        Args:
            parts: from `pack`.
            count: how many were written.
            dtype: float32 or float64, of the result; as in `pack`.

        Raises:
            ManifestMismatch: the parts are not of this format, or of another count.
        """
        self.check(parts, count, dtype)
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

    def nbytes(self, count: int) -> int:
        """See `NumberFormat.nbytes`."""
        return count * self.dtype.itemsize

    def pack(self, values: Tensor, peak: float) -> dict[str, Tensor]:
        """See `NumberFormat.pack`."""
        most = torch.finfo(self.dtype).max
        if peak > most:
            values = values.clamp(-most, most)
        return {self.name: values.reshape(-1).to(self.dtype, copy=True)}

    def check(self, parts: Mapping[str, Tensor], count: int, dtype: torch.dtype) -> None:
        """See `NumberFormat.check`."""
        expect(self.name, parts.get(self.name), (count,), self.dtype)

    def read(self, parts: Mapping[str, Tensor], where: slice, dtype: torch.dtype) -> Tensor:
        """See `NumberFormat.read`."""
        return parts[self.name][where].to(dtype, copy=True)


class Half(NumberFormat):
    """float16 with a power of two for the whole tensor, so that it neither overflows nor underflows.

    Equation:
        h = fp16(2^s x),  x' = 2^-s h,  with s such that 2^14 <= 2^s max|x| < 2^15

    Scaling by a power of two is exact, so x' = fp16(x) wherever fp16(x) is normal. Elements
    down to 2^-28 of the largest keep all 11 bits, those below 2^-39 of it become 0.
    """

    name = "fp16"

    def nbytes(self, count: int) -> int:
        """See `NumberFormat.nbytes`."""
        return 2 * count + 2

    def pack(self, values: Tensor, peak: float) -> dict[str, Tensor]:
        """See `NumberFormat.pack`."""
        limit = 126 if values.dtype == torch.float32 else 1000  # the dtype has 2^limit and 2^-limit
        shift = 0 if peak == 0.0 else max(-limit, min(limit, 15 - math.frexp(peak)[1]))
        flat = values.reshape(-1)
        half = torch.empty(flat.shape, dtype=torch.float16, device=flat.device)
        for where in slices(flat.numel(), flat.device):
            half[where] = flat[where] * 2.0**shift
        return {"fp16": half, "shift": torch.tensor(shift, dtype=torch.int16, device=flat.device)}

    def check(self, parts: Mapping[str, Tensor], count: int, dtype: torch.dtype) -> None:
        """See `NumberFormat.check`."""
        expect("fp16", parts.get("fp16"), (count,), torch.float16)
        expect("shift", parts.get("shift"), (), torch.int16)

    def read(self, parts: Mapping[str, Tensor], where: slice, dtype: torch.dtype) -> Tensor:
        """See `NumberFormat.read`."""
        shift = max(-1000, min(1000, int(parts["shift"])))
        return parts["fp16"][where].to(dtype, copy=True).mul_(2.0**-shift)


class Blocks(NumberFormat):
    """int8 with one scale for each block of consecutive elements.

    Equation:
        s_b = max|x_i| / 127 over block b,   q_i = round(x_i / s_b),   x'_i = q_i s_b

    rounded to nearest, ties to even: |x_i - x'_i| <= s_b / 2 but for rounding. A block whose
    scale would be denormal is sent as zeros.

    Paper:
        Dettmers et al., "8-bit optimizers via block-wise quantization", arXiv 2110.02861.

    Deviations:
        Levels are evenly spaced, not the paper's dynamic tree: what small values lose, error
        feedback returns, and even levels need no table. x / s_b is x times the rounded
        reciprocal, which can move a value that lies half-way between two levels.

    Args:
        block: elements in a block, a power of two from 16 to 65536.

    Raises:
        ConfigError: the block is none of these.
    """

    name = "int8"

    def __init__(self, block: int = 1024) -> None:
        if require_integer("block", block, minimum=16) not in {1 << power for power in range(4, 17)}:
            raise ConfigError(f"block must be a power of two from 16 to 65536, not {block!r}.")
        self.block = block

    def nbytes(self, count: int) -> int:
        """See `NumberFormat.nbytes`; scales of float32."""
        return count + 4 * -(-count // self.block)

    def pack(self, values: Tensor, peak: float) -> dict[str, Tensor]:
        """See `NumberFormat.pack`."""
        flat = values.reshape(-1)
        levels = torch.empty(flat.shape, dtype=torch.int8, device=flat.device)
        scales = [flat.new_empty(0)]
        for where in slices(flat.numel(), flat.device):
            rows = self._rows(flat[where])
            scale = self._scale(rows)
            inverse = torch.where(scale > 0, 1 / scale, scale)
            rounded = torch.mul(rows, inverse).round_().clamp_(-_LEVELS, _LEVELS)
            levels[where] = rounded.view(-1)[: where.stop - where.start]
            scales.append(scale.view(-1))
        return {"int8": levels, "scale": torch.cat(scales)}

    def check(self, parts: Mapping[str, Tensor], count: int, dtype: torch.dtype) -> None:
        """See `NumberFormat.check`."""
        expect("int8", parts.get("int8"), (count,), torch.int8)
        expect("scale", parts.get("scale"), (-(-count // self.block),), dtype)

    def read(self, parts: Mapping[str, Tensor], where: slice, dtype: torch.dtype) -> Tensor:
        """See `NumberFormat.read`."""
        rows = self._rows(parts["int8"][where]).to(dtype)
        scale = parts["scale"][where.start // self.block : -(-where.stop // self.block)]
        return rows.mul_(scale.view(-1, 1)).view(-1)[: where.stop - where.start]

    def _rows(self, flat: Tensor) -> Tensor:
        """Return blocks as rows, the last one padded with zeros."""
        missing = -flat.numel() % self.block
        padded = torch.nn.functional.pad(flat, (0, missing)) if missing else flat
        return padded.view(-1, self.block)

    def _scale(self, rows: Tensor) -> Tensor:
        """Return the scale of each row as a column, 0 where it would be denormal."""
        finfo = torch.finfo(rows.dtype)
        peaks = rows.abs().amax(1, keepdim=True)
        scale = peaks.clamp_(max=finfo.max * (1 - 2**-20)) / _LEVELS  # 127 scales must not overflow
        return torch.where(scale >= finfo.smallest_normal, scale, torch.zeros_like(scale))


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


def peak_of(values: Tensor) -> float:
    """Return the largest magnitude; 0 for no values."""
    if values.numel() == 0:
        return 0.0
    low, high = torch.aminmax(values)
    return float(torch.maximum(-low, high))
