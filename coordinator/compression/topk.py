"""The codec "topk": of each tensor, the elements of largest magnitude."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from torchord.coordinator.compression.arguments import require_fraction, require_integer, require_switch
from torchord.coordinator.compression.bits import pack_places, places_layout, unpack_places
from torchord.coordinator.compression.codec import Kept, TensorCodec
from torchord.coordinator.compression.layout import Layout
from torchord.coordinator.compression.number_formats import memory_format, number_format, slices

_SAMPLE = 1 << 16


class TopK(TensorCodec):
    """Sends the k = ceil(fraction * n) elements of largest magnitude of each tensor of n elements.

    Equation:
        decode(C(v))_i = q(v_i) if i is among the k largest |v_i|, else 0

    where q rounds to `values`, and of equal magnitudes the lowest indices are taken. Error
    feedback keeps what was not sent and what was rounded. Positions take 2 + log2(1 / fraction)
    bits at most (`bits.pack_places`).

    Selection is exact. A threshold below the k-th magnitude is guessed from elements at fixed
    places, one pass collects what reaches it, and that is sorted out exactly: a bad guess costs
    time only.

    Paper:
        Lin et al., "Deep Gradient Compression", arXiv 1712.01887; Stich et al., "Sparsified SGD
        with memory", arXiv 1809.07599; with `values="sign"`, Sattler et al., "Robust and
        communication-efficient federated learning from non-IID data", arXiv 1903.02891.

    Deviations:
        Of Deep Gradient Compression this is the sparse update with local accumulation.
        Its momentum correction and warm-up brought nothing on the benchmark (docs/compression.md)
        and are left out; gradients are clipped after averaging (`clip_norm`), not before. The paper
        guesses the threshold from a random sample and lets the number of elements vary; here it
        is exact. The paper sends float32 values and 16-bit runs of zeros; here values have 16 bits
        and positions the code of Elias and Fano. Sattler et al. take one magnitude for a
        tensor, here each 1,024 values that are sent have one, and their positions a Golomb code.

    Args:
        fraction: of a tensor's elements to send, above 0 and at most 1.
        values: number format of the values: "fp32", "fp16", "bf16", "int8", "int4" or "sign".
        minimum: tensors of fewer elements travel as they are; at least 1.
        feedback: whether what was not sent is kept for the next step.
        memory: number format of what is kept: "full", "bf16", "fp16", "int8" or "int4".

    Raises:
        ConfigError: a value is out of range.
    """

    def __init__(
        self,
        fraction: float,
        values: str = "bf16",
        minimum: int = 256,
        feedback: bool = True,
        memory: str = "full",
    ) -> None:
        self.fraction = require_fraction("fraction", fraction)
        self.minimum = require_integer("minimum", minimum, minimum=1)
        self.numbers = number_format(values)
        self.feedback = require_switch("feedback", feedback)
        self.memory = memory_format(memory, feedback=self.feedback)

    def layout(self, shape: tuple[int, ...], dtype: torch.dtype) -> Layout | None:
        """See `TensorCodec.layout`."""
        count = math.prod(shape)
        if count < self.minimum:
            return None
        chosen = self._chosen(count)
        return {**places_layout(chosen, count), **self.numbers.layout(chosen, dtype)}

    def compress(
        self,
        name: str,
        values: Tensor,
        state: Mapping[str, Tensor],
        parts: Mapping[str, Tensor],
        *,
        peak: float,
        error: bool,
    ) -> Kept:
        """See `TensorCodec.compress`."""
        flat = values.view(-1)
        places = largest(flat, self._chosen(flat.numel()))
        chosen = flat[places]
        pack_places(places, flat.numel(), parts)
        self.numbers.pack(chosen, peak, parts)
        if not error:
            return Kept()
        flat[places] = self.numbers.subtract(parts, chosen)
        return Kept(values)

    def expand(self, parts: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """See `TensorCodec.expand`."""
        count = math.prod(shape)
        chosen = self._chosen(count)
        found = torch.zeros(count, dtype=dtype, device=parts["high"].device)
        found[unpack_places(parts, chosen, count)] = self.numbers.unpack(parts, chosen, dtype)
        return found.view(shape)

    def _chosen(self, count: int) -> int:
        return math.ceil(self.fraction * count)


def largest(flat: Tensor, count: int) -> Tensor:
    """Return where the elements of largest magnitude are; of equal ones, the lowest indices.

    Args:
        flat: 1-D, finite.
        count: how many are wanted, from 1 to the number of elements.

    Returns:
        int64 indices, ascending, of shape (count,).
    """
    if count == flat.numel():
        return torch.arange(count, device=flat.device)
    places = _above(flat, _guess(flat, count))
    if places.numel() < count:
        places = torch.arange(flat.numel(), device=flat.device)  # the sample was off
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
    """Return the indices of elements that reach a magnitude, ascending."""
    if flat.device.type != "cpu":
        return (flat.abs() >= threshold).nonzero().view(-1)
    found = [
        np.flatnonzero((flat[where].abs() >= threshold).numpy()) + where.start
        for where in slices(flat.numel(), flat.device)
    ]
    return torch.from_numpy(np.concatenate(found))
