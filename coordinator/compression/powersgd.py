"""The codec "powersgd": of each matrix, a product of two thin ones."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from coordinator.compression.arguments import require_integer, require_switch
from coordinator.compression.codec import Kept, Layout, TensorCodec, expect
from coordinator.compression.numbers import NumberFormat, number_format, peak_of


class PowerSGD(TensorCodec):
    """Approximates a matrix by one of low rank, with one step of power iteration.

    A tensor of two or more dimensions is taken as a matrix of its first dimension (n) by the
    product of the others (m); what has fewer dimensions, or would not get smaller, travels as it
    is.

    Equation:
        P = orthonormalised(V Q),   Q' = V^T P,   decode = P Q'^T

    Q' is sent and is also the next step's Q, which so turns towards the leading singular vectors.
    The first Q is pseudo-random from the parameter's name and shape.

    Paper:
        Vogels, Karimireddy and Jaggi, "PowerSGD: practical low-rank gradient compression for
        distributed optimization", arXiv 1905.13727.

    Deviations:
        The paper averages P and Q over the workers in the midst of the iteration (all-reduce).
        Here a shard is encoded by itself, so each slot has its own P and Q, the average has a rank
        of up to shards * rank, and slots need not wait for each other. P is orthonormalised in
        float64 by the modified Gram-Schmidt process. Columns of Q are scaled to a largest element
        of 1 to 2 before use, which leaves the span of P as it is and keeps tiny gradients from
        underflow, and columns that vanish start anew. P and Q may be sent in fewer bits; what
        that takes is in the error, too.

    Elements above the square root of the largest float (1.8e19 in float32) count as NaN.

    Bits: matrix products sum in an order that depends on the thread count and the processor, like
    the gradient itself; encode and decode under `determinism.pinned`.

    Args:
        rank: columns of P and Q, at least 1.
        values: number format of P and Q: "fp32", "fp16", "bf16", "int8", "int4" or "sign".
        feedback: whether what the approximation leaves out is kept for the next step.

    Raises:
        ConfigError: a value is out of range.
    """

    def __init__(self, rank: int, values: str = "fp32", feedback: bool = True) -> None:
        self.rank = require_integer("rank", rank, minimum=1)
        self.numbers: NumberFormat = number_format(values)
        self.feedback = require_switch("feedback", feedback)

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
        rank = min(self.rank, rows, columns)
        left = self.numbers.layout(rows * rank, dtype)
        right = self.numbers.layout(columns * rank, dtype)
        return {
            **{f"p.{part}": what for part, what in left.items()},
            **{f"q.{part}": what for part, what in right.items()},
        }

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
        rank = min(self.rank, rows, columns)
        start = _start(name, columns, rank, matrix)
        if "q" in state:
            held = expect("q", state["q"], (columns, rank), matrix.dtype).to(matrix.device)
            start = torch.where(held.abs().amax(0) > 0, held, start)
        if not error:
            matrix = matrix.clone()  # to memory aligned like everybody's
        left = orthonormalised(matrix @ _scaled(start))
        right = matrix.T @ left
        for prefix, factor in (("p.", left), ("q.", right)):
            self.numbers.pack(factor.T.contiguous(), peak_of(factor), _within(prefix, parts))
        if error:
            matrix -= self._product(parts, rows, columns, matrix.dtype)
        return Kept(values if error else None, {"q": right})

    def expand(self, parts: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """See `TensorCodec.expand`."""
        return self._product(parts, *_matrix(shape), dtype).view(shape)

    def _product(self, parts: Mapping[str, Tensor], rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        rank = min(self.rank, rows, columns)
        left = self.numbers.unpack(_within("p.", parts), rows * rank, dtype).view(rank, rows)
        right = self.numbers.unpack(_within("q.", parts), columns * rank, dtype).view(rank, columns)
        return left.T @ right


def orthonormalised(matrix: Tensor) -> Tensor:
    """Return the columns made orthonormal, from left to right; those that depend on others become 0.

    Modified Gram-Schmidt in float64, each column projected twice.

    Args:
        matrix: shape (n, r), finite.

    Returns:
        The same shape and dtype.
    """
    done: list[Tensor] = []
    for column in matrix.double().T:
        peak = float(column.abs().amax())
        if peak == 0.0 or not math.isfinite(peak):
            done.append(column * (0.0 if peak == 0.0 else math.nan))
            continue
        column = column / peak
        before = float(torch.linalg.vector_norm(column))
        for _ in range(2):
            for other in done:
                column = column - torch.dot(other, column) * other
        after = float(torch.linalg.vector_norm(column))
        done.append(column / after if after > 1e-6 * before else torch.zeros_like(column))
    return torch.stack(done, 1).to(matrix.dtype)


def _scaled(matrix: Tensor) -> Tensor:
    """Return the columns, none of them 0, times powers of two that bring their peaks to [1, 2)."""
    exponents = torch.frexp(matrix.abs().amax(0)).exponent.clamp(-120, 120)
    return torch.ldexp(matrix, 1 - exponents)


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
