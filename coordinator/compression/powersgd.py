"""The codec "powersgd": of each matrix, a product of two thin ones."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from torchord.coordinator.compression.arguments import require_integer, require_switch
from torchord.coordinator.compression.codec import Kept, TensorCodec, expect
from torchord.coordinator.compression.layout import Layout
from torchord.coordinator.compression.number_formats import (
    NumberFormat,
    memory_format,
    number_format,
    peak_of,
)


class PowerSGD(TensorCodec):
    """Approximates a matrix by one of low rank, with one step of power iteration.

    A tensor of two or more dimensions is taken as a matrix of its first dimension (n) by the
    product of the others (m); what has fewer dimensions, or would not get smaller, travels as it
    is. Where the two factors have no fewer numbers than the matrix, its own numbers are sent.

    Equation:
        r = max(rank, floor(least / (n + m)))
        P = orthonormalised(V Q),   Q' = V^T P,   decode = P Q'^T

    Q' is sent and is also the next step's Q, which so turns towards the leading singular vectors.
    The first Q is pseudo-random from the parameter's name and shape.

    `least` spends bytes where they are cheap: a rank costs n + m numbers, so what one more rank costs
    in a large layer pays for many in a small one, whose gradient has no fewer directions.

    Paper:
        Vogels, Karimireddy and Jaggi, "PowerSGD: practical low-rank gradient compression for
        distributed optimization", arXiv 1905.13727.

    Deviations:
        The paper averages P and Q over the workers in the midst of the iteration (all-reduce).
        Here a shard is encoded by itself, so each slot has its own P and Q, the average has a rank
        of up to shards * rank, and slots need not wait for each other. P is orthonormalised in
        float64 by the Gram-Schmidt process, twice. Columns of Q are scaled to a largest element
        of 1 to 2 before use, which leaves the span of P as it is and keeps tiny gradients from
        underflow, and columns that vanish start anew. P and Q may be sent in fewer bits; what
        that takes is in the error, too; with 8 bits or fewer each column of Q' is first scaled by a
        power of two to a largest element of 1 to 2, since the columns are as unequal as singular
        values and share blocks. The paper has one rank for all matrices, here `least` raises it.

    Elements above the square root of the largest float (1.8e19 in float32) count as NaN.

    Bits: matrix products sum in an order that depends on the thread count and the processor, like
    the gradient itself; encode and decode under `determinism.pinned`.

    Args:
        rank: columns of P and Q, at least 1.
        values: number format of P and Q: "fp32", "fp16", "bf16", "int8", "int4" or "sign".
        least: how many numbers a matrix may take before its rank is held down to `rank`, at least 0;
            0: every matrix has the same rank.
        feedback: whether what the approximation leaves out is kept for the next step.
        memory: number format of what is kept (Q stays as it is): "full", "bf16", "fp16", "int8" or "int4".

    Raises:
        ConfigError: a value is out of range.
    """

    def __init__(
        self, rank: int, values: str = "fp32", least: int = 0, feedback: bool = True, memory: str = "full"
    ) -> None:
        self.rank = require_integer("rank", rank, minimum=1)
        self.least = require_integer("least", least, minimum=0)
        self.numbers: NumberFormat = number_format(values)
        self._levelled = values in ("int8", "int4", "sign")
        self.feedback = require_switch("feedback", feedback)
        self.memory = memory_format(memory, feedback=self.feedback)

    @property
    def stateful(self) -> bool:
        """Q is remembered even without feedback."""
        return True

    def ceiling(self, dtype: torch.dtype) -> float:
        """See `TensorCodec.ceiling`; sums of products must not overflow."""
        return math.sqrt(torch.finfo(dtype).max)

    def layout(self, shape: tuple[int, ...], dtype: torch.dtype) -> Layout | None:
        """See `TensorCodec.layout`."""
        if len(shape) < 2:
            return None
        rows, columns = _matrix(shape)
        rank = self._rank(rows, columns)
        if rank == 0:
            return self.numbers.layout(rows * columns, dtype)
        left = self.numbers.layout(rows * rank, dtype)
        right = self.numbers.layout(columns * rank, dtype)
        return {
            **{f"p.{part}": what for part, what in left.items()},
            **{f"q.{part}": what for part, what in right.items()},
            **({"q.exponent": (torch.int8, (rank,))} if self._levelled else {}),
        }

    def _rank(self, rows: int, columns: int) -> int:
        """Return the rank of a matrix; 0 where two factors would have no fewer numbers than it."""
        rank = max(self.rank, self.least // (rows + columns))
        return rank if rank * (rows + columns) < rows * columns else 0

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
        matrix = values.view(_matrix(tuple(values.shape)))
        rows, columns = matrix.shape
        rank = self._rank(rows, columns)
        if rank == 0:
            self.numbers.pack(values, peak, parts)
            return Kept(self.numbers.subtract(parts, values) if error else None)
        start = _start(name, columns, rank, matrix)
        if "q" in state:
            held = expect("q", state["q"], (columns, rank), matrix.dtype).to(matrix.device)
            start = torch.where(held.abs().amax(0) > 0, held, start)
        left = orthonormalised(matrix @ _scaled(start))
        right = matrix.T @ left
        sent = right
        if self._levelled:
            exponents = _exponents(right)
            parts["q.exponent"].copy_(exponents)
            sent = torch.ldexp(right, -exponents)
        for prefix, factor in (("p.", left), ("q.", sent)):
            self.numbers.pack(factor.T.contiguous(), peak_of(factor), _within(prefix, parts))
        if error:
            matrix -= self._product(parts, rows, columns, matrix.dtype)
        return Kept(values if error else None, {"q": right})

    def expand(self, parts: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """See `TensorCodec.expand`."""
        rows, columns = _matrix(shape)
        if self._rank(rows, columns) == 0:
            return self.numbers.unpack(parts, rows * columns, dtype).view(shape)
        return self._product(parts, rows, columns, dtype).view(shape)

    def _product(self, parts: Mapping[str, Tensor], rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        rank = self._rank(rows, columns)
        left = self.numbers.unpack(_within("p.", parts), rows * rank, dtype).view(rank, rows)
        right = self.numbers.unpack(_within("q.", parts), columns * rank, dtype).view(rank, columns)
        if self._levelled:
            right = torch.ldexp(right, parts["q.exponent"].to(torch.int32).view(-1, 1))
        return left.T @ right


def orthonormalised(matrix: Tensor) -> Tensor:
    """Return the columns made orthonormal, from left to right; those that depend on others become 0.

    Classical Gram-Schmidt in float64, each column projected twice, which is as good as the modified one.

    Args:
        matrix: shape (n, r), finite.

    Returns:
        The same shape and dtype.
    """
    found = torch.zeros(matrix.shape, dtype=torch.float64, device=matrix.device)
    for number, column in enumerate(matrix.double().T):
        peak = float(column.abs().amax())
        if peak == 0.0 or not math.isfinite(peak):
            found[:, number] = 0.0 if peak == 0.0 else math.nan
            continue
        column = column / peak
        before = float(torch.linalg.vector_norm(column))
        done = found[:, :number]
        for _ in range(2):
            column = column - done @ (done.T @ column)
        after = float(torch.linalg.vector_norm(column))
        if after > 1e-6 * before:
            found[:, number] = column / after
    return found.to(matrix.dtype)


def _scaled(matrix: Tensor) -> Tensor:
    """Return the columns, none of them 0, times powers of two that bring their peaks to [1, 2)."""
    return torch.ldexp(matrix, -_exponents(matrix))


def _exponents(matrix: Tensor) -> Tensor:
    """Return for each column the power of two that its peak is 1 to 2 times, from 2^-121 to 2^119."""
    return torch.frexp(matrix.abs().amax(0)).exponent.clamp(-120, 120) - 1


def _start(name: str, columns: int, rank: int, like: Tensor) -> Tensor:
    """Return a pseudo-random Q, uniform in (-1, 1): a function of name and shape on any machine."""
    text = f"powersgd {columns} {rank} {name}".encode()
    seed = int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")
    drawn = np.random.Philox(key=seed).random_raw(columns * rank) >> np.uint64(41)
    centred = (drawn.astype(np.float64) + 0.5) / 2.0**22 - 1.0
    return torch.from_numpy(centred).view(columns, rank).to(like)


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[0], math.prod(shape[1:])


def _within(prefix: str, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): part for name, part in parts.items() if name.startswith(prefix)}
