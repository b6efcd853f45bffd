"""The codec "topk": of each tensor, the elements of largest magnitude."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from cache.errors import ManifestMismatch
from coordinator.compression.arguments import require_fraction, require_integer, require_switch
from coordinator.compression.codec import Compressed, TensorCodec, expect
from coordinator.compression.numbers import number_format, peak_of, slices

_SAMPLE = 1 << 16
_ESCAPE = {torch.uint8: 255, torch.uint16: 65535}


class TopK(TensorCodec):
    """Sends the k = ceil(fraction * n) elements of largest magnitude of each tensor of n elements.

    Equation:
        decode(C(v))_i = v_i if i is among the k largest |v_i|, else 0; of equal magnitudes, the
        lowest indices are taken. Zeros are never sent, so a tensor of few non-zero elements
        (the gradient of an embedding) sends fewer than k.

    Positions travel as gaps between them (see `pack_gaps`), about 1.1 bytes each at 1 %, 2 at
    0.1 %. Values are rounded to `values`, and error feedback keeps the rounding, too.

    Selection is exact. A threshold below the k-th magnitude is guessed from elements at fixed
    places, and what passes it is then sorted out exactly, so the guess costs time at worst.

    Paper:
        Lin et al., "Deep Gradient Compression", arXiv 1712.01887; Stich et al., "Sparsified SGD
        with memory", arXiv 1809.07599.

    Deviations:
        Of Deep Gradient Compression, momentum correction with momentum factor masking is the
        option `momentum`, and warm-up is the option `warmup`; local gradient clipping is left to
        `clip_norm`, which acts on the average. The paper guesses the threshold from a random
        sample and lets the number of elements vary; here it is exact. The paper sends float32
        values and runs of zeros in 16 bits; here values have 16 bits, and gaps 8 or 16.

    Args:
        fraction: of a tensor's elements to send, above 0 and at most 1.
        values: number format of the values: "fp32", "fp16", "bf16" or "int8".
        minimum: tensors of fewer elements travel as they are; at least 1.
        feedback: whether what was not sent is kept for the next step.

    Raises:
        ConfigError: a value is out of range.
    """

    def __init__(
        self, fraction: float, values: str = "bf16", minimum: int = 256, feedback: bool = True
    ) -> None:
        self.fraction = require_fraction("fraction", fraction)
        self.minimum = require_integer("minimum", minimum, minimum=1)
        self.numbers = number_format(values)
        self.feedback = require_switch("feedback", feedback)

    def suits(self, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        """See `TensorCodec.suits`."""
        count = math.prod(shape)
        chosen = self._chosen(count)
        return count >= self.minimum and self.numbers.nbytes(chosen) + chosen < count * dtype.itemsize

    def compress(
        self, name: str, values: Tensor, state: Mapping[str, Tensor], *, peak: float, error: bool
    ) -> Compressed:
        """See `TensorCodec.compress`."""
        flat = values.view(-1)
        places = largest(flat, self._chosen(flat.numel()))
        chosen = flat[places]
        parts = self.numbers.pack(chosen, peak_of(chosen))
        if error:
            flat[places] = self.numbers.subtract(parts, chosen)
        return Compressed({**parts, "gaps": pack_gaps(places)}, values if error else None)

    def expand(self, parts: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """See `TensorCodec.expand`."""
        count = math.prod(shape)
        gaps = parts.get("gaps")
        if gaps is None or gaps.dtype not in _ESCAPE:
            gaps = expect("gaps", gaps, (-1,), torch.uint8)
        places = unpack_gaps(gaps, count)
        found = torch.zeros(count, dtype=dtype, device=gaps.device)
        found[places] = self.numbers.unpack(parts, places.numel(), dtype)
        return found.view(shape)

    def _chosen(self, count: int) -> int:
        return math.ceil(self.fraction * count)


def largest(flat: Tensor, count: int) -> Tensor:
    """Return where the elements of largest magnitude are; of equal ones, the lowest indices.

    Args:
        flat: 1-D, finite.
        count: how many are wanted, from 1 to the number of elements.

    Returns:
        int64 indices, ascending; fewer than `count` if there are fewer non-zero elements.
    """
    threshold = _guess(flat, count)
    places = _above(flat, threshold)
    if places.numel() < count and threshold > 0:
        places = _above(flat, 0.0)  # the sample was off
    if places.numel() <= count:
        return places
    magnitudes = flat[places].abs_()
    least = torch.topk(magnitudes, count, sorted=False).values.amin()
    keep = magnitudes > least
    ties = (magnitudes == least).nonzero().view(-1)
    keep[ties[: count - int(keep.sum())]] = True
    return places[keep]


def _guess(flat: Tensor, count: int) -> float:
    """Return a magnitude that somewhat more than `count` elements should reach; 0 for all."""
    stride = flat.numel() // _SAMPLE
    if stride < 2:
        return 0.0
    sample = flat[::stride].abs()
    expected = count / stride
    rank = math.ceil(expected + 4 * math.sqrt(expected) + 4)
    if rank >= sample.numel():
        return 0.0
    return float(torch.topk(sample, rank, sorted=False).values.amin())


def _above(flat: Tensor, threshold: float) -> Tensor:
    """Return the indices of non-zero elements that reach a magnitude, ascending."""
    if flat.is_cuda:
        magnitudes = flat.abs()
        return ((magnitudes >= threshold) & (magnitudes > 0)).nonzero().view(-1)
    found = []
    for where in slices(flat.numel(), flat.device):
        magnitudes = flat[where].abs()
        mask = magnitudes >= threshold if threshold > 0 else magnitudes > 0
        found.append(np.flatnonzero(mask.numpy()) + where.start)
    return torch.from_numpy(np.concatenate(found)) if found else torch.empty(0, dtype=torch.int64)


def pack_gaps(places: Tensor) -> Tensor:
    """Write ascending indices as the number of places skipped before each.

    A gap g is written as g // m times the largest number m, then g % m, in bytes (m = 255) or in
    16-bit numbers (m = 65535), whichever is shorter.

    Args:
        places: int64, ascending, each once.

    Returns:
        uint8 or uint16, 1-D.
    """
    gaps = torch.diff(places, prepend=places.new_full((1,), -1)) - 1
    sizes = {dtype: int((gaps // most + 1).sum()) for dtype, most in _ESCAPE.items()}
    dtype = torch.uint8 if sizes[torch.uint8] <= 2 * sizes[torch.uint16] else torch.uint16
    most = _ESCAPE[dtype]
    ends = torch.cumsum(gaps // most + 1, 0) - 1
    codes = torch.full((sizes[dtype],), most, dtype=torch.int32, device=places.device)
    codes[ends] = (gaps % most).to(torch.int32)
    return codes.to(dtype)


def unpack_gaps(gaps: Tensor, count: int) -> Tensor:
    """Return the indices that `pack_gaps` wrote.

    Args:
        gaps: from `pack_gaps`.
        count: the indices are below this.

    Raises:
        ManifestMismatch: they are not, or the last gap is unfinished.
    """
    codes = gaps.to(torch.int64)
    ends = (codes != _ESCAPE[gaps.dtype]).nonzero().view(-1)
    places = torch.cumsum(codes, 0)[ends] + torch.arange(ends.numel(), device=gaps.device)
    unfinished = codes.numel() > 0 and (ends.numel() == 0 or int(ends[-1]) != codes.numel() - 1)
    if unfinished or (places.numel() > 0 and int(places[-1]) >= count):
        raise ManifestMismatch(f"the positions do not lie within a tensor of {count} elements.")
    return places
