"""A codec that is no part of torchord, as docs/compression.md shows one."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, dtype

from torchord.coordinator.compression import Kept, Layout, TensorCodec


class EveryNth(TensorCodec):
    """Sends every n-th element."""

    def __init__(self, n: int, feedback: bool = True) -> None:
        self.n, self.feedback = n, feedback

    def layout(self, shape: tuple[int, ...], dtype: dtype) -> Layout | None:
        return {"sent": (dtype, (len(range(0, math.prod(shape), self.n)),))}

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
        parts["sent"].copy_(values.view(-1)[:: self.n])
        return Kept()

    def expand(self, parts: Mapping[str, Tensor], shape: tuple[int, ...], dtype: dtype) -> Tensor:
        found = parts["sent"].new_zeros(math.prod(shape))
        found[:: self.n] = parts["sent"]
        return found.view(shape)
