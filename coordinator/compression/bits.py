"""Bits in bytes, and ascending indices in few bits."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from torchord.cache.errors import ManifestMismatch
from torchord.coordinator.compression.layout import Layout

_EIGHT = tuple(1 << place for place in range(8))


def pack_bits(bits: Tensor) -> Tensor:
    """Write bits eight to a byte, the first in the lowest place, with zeros at the end.

    Args:
        bits: bool, 1-D.

    Returns:
        uint8, of shape (ceil(bits / 8),).
    """
    if bits.device.type == "cpu":
        return torch.from_numpy(np.packbits(bits.numpy(), bitorder="little"))
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, -bits.numel() % 8)).view(-1, 8)
    return (padded * padded.new_tensor(_EIGHT)).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """Return the first `count` bits that `pack_bits` wrote, as 0 and 1 in uint8."""
    if packed.device.type == "cpu":
        return torch.from_numpy(np.unpackbits(packed.numpy(), count=count, bitorder="little"))
    places = packed.new_tensor(range(8))
    return ((packed.unsqueeze(1) >> places) & 1).view(-1)[:count]


def places_layout(chosen: int, count: int) -> Layout:
    """Return the parts of `chosen` indices below `count`; see `pack_places`."""
    low = _low_bits(chosen, count)
    bits = chosen + ((count - 1) >> low) + 1
    return {
        "high": (torch.uint8, (-(-bits // 8),)),
        "low": (torch.uint8, (low, -(-chosen // 8))),
    }


def pack_places(places: Tensor, count: int, parts: Mapping[str, Tensor]) -> None:
    """Write ascending indices in at most 2 + log2(count / indices) bits each.

    The lowest l = floor(log2(count / indices)) bits of each index are written as they are, one
    plane of bits after the other; of the rest, bit (index_j >> l) + j is set for the j-th index
    (the code of Elias and Fano; half a bit from the least possible).

    Paper:
        Elias, "Efficient storage and retrieval by content and address of static files",
        Journal of the ACM 21(2), 1974.

    Args:
        places: int64, ascending, each once, at least one.
        count: the indices are below this.
        parts: to be written to, as `places_layout` says.
    """
    low = _low_bits(places.numel(), count)
    set_bits = torch.zeros(parts["high"].numel() * 8, dtype=torch.bool, device=places.device)
    set_bits[(places >> low) + torch.arange(places.numel(), device=places.device)] = True
    parts["high"].copy_(pack_bits(set_bits))
    for plane in range(low):
        parts["low"][plane] = pack_bits((places >> plane) & 1 != 0)


def unpack_places(parts: Mapping[str, Tensor], chosen: int, count: int) -> Tensor:
    """Return the `chosen` indices below `count` that `pack_places` wrote, as int64.

    Raises:
        ManifestMismatch: these are not that many ascending indices below `count`.
    """
    low = _low_bits(chosen, count)
    high = parts["high"]
    set_bits = unpack_bits(high, high.numel() * 8).nonzero().view(-1)
    if set_bits.numel() == chosen:
        places = (set_bits - torch.arange(chosen, device=high.device)) << low
        for plane in range(low):
            places |= unpack_bits(parts["low"][plane], chosen).to(torch.int64) << plane
        if bool((torch.diff(places) > 0).all()) and int(places[-1]) < count:
            return places
    raise ManifestMismatch(f"the positions are not {chosen} ascending ones within {count} elements")


def _low_bits(chosen: int, count: int) -> int:
    return (count // chosen).bit_length() - 1
