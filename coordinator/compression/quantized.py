"""The codecs "fp16", "bf16", "int8" and "sign": every element travels, with fewer bits."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from torchord.coordinator.compression.arguments import require_switch
from torchord.coordinator.compression.codec import Kept, TensorCodec
from torchord.coordinator.compression.layout import Layout
from torchord.coordinator.compression.number_formats import (
    Blocks,
    Cast,
    Half,
    NumberFormat,
    Sign,
    memory_format,
)


class Quantized(TensorCodec):
    """Writes all elements of a tensor in one number format.

    Tensors that the format would not make smaller travel as they are.

    Args:
        numbers: the format.
        feedback: whether what rounding takes is added to the next step.
        memory: number format in which it is remembered: "full", "bf16", "fp16", "int8" or "int4".
    """

    def __init__(self, numbers: NumberFormat, *, feedback: bool, memory: str = "full") -> None:
        self.numbers = numbers
        self.feedback = require_switch("feedback", feedback)
        self.memory = memory_format(memory, feedback=self.feedback)

    def layout(self, shape: tuple[int, ...], dtype: torch.dtype) -> Layout | None:
        """See `TensorCodec.layout`."""
        return self.numbers.layout(math.prod(shape), dtype)

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
        self.numbers.pack(values, peak, parts)
        return Kept(self.numbers.subtract(parts, values) if error else None)

    def expand(self, parts: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """See `TensorCodec.expand`."""
        return self.numbers.unpack(parts, math.prod(shape), dtype).view(shape)


def fp16(feedback: bool = False, memory: str = "full") -> Quantized:
    """The codec "fp16": half the bytes of float32.

    Equation:
        see `numbers.Half`: float16 after scaling the tensor by a power of two.

    Paper:
        Micikevicius et al., "Mixed precision training", arXiv 1710.03740.

    Deviations:
        The paper scales the loss by one number for all tensors, found by trial; here each tensor
        has its own, from its largest element, so nothing overflows and no state is needed.

    Args:
        feedback: whether what rounding takes (at most 2^-11 of an element) is kept for the next
            step. Off by default: it would cost a memory as large as the parameters in every slot.
        memory: number format of what is kept: "full", "bf16", "fp16", "int8" or "int4".
    """
    return Quantized(Half(), feedback=feedback, memory=memory)


def bf16(feedback: bool = False, memory: str = "full") -> Quantized:
    """The codec "bf16": half the bytes of float32, with its range and 8 bits of precision.

    Equation:
        x' = bf16(x), to nearest, ties to even.

    Paper:
        Kalamkar et al., "A study of BFLOAT16 for deep learning training", arXiv 1905.12322.

    Args:
        feedback: whether what rounding takes (at most 2^-9 of an element) is kept for the next
            step. Off by default: it would cost a memory as large as the parameters in every slot.
        memory: number format of what is kept: "full", "bf16", "fp16", "int8" or "int4".
    """
    return Quantized(Cast("bf16", torch.bfloat16), feedback=feedback, memory=memory)


def int8(block: int = 1024, feedback: bool = True, memory: str = "full") -> Quantized:
    """The codec "int8": about a quarter of the bytes of float32.

    Equation, paper and deviations:
        see `numbers.Blocks`: int8 with one scale for each block.

    Args:
        block: elements that share a scale, a power of two from 16 to 65536.
        feedback: whether what rounding takes is kept for the next step. Without it, elements
            below 1/254 of their block's largest never arrive.
        memory: number format of what is kept: "full", "bf16", "fp16", "int8" or "int4".

    Raises:
        ConfigError: a value is out of range.
    """
    return Quantized(Blocks(8, block), feedback=feedback, memory=memory)


def sign(block: int = 1024, feedback: bool = True, memory: str = "full") -> Quantized:
    """The codec "sign": about 1/31 of the bytes of float32.

    Equation, papers and deviations:
        see `numbers.Sign`: one bit, with one magnitude for each block.

    Args:
        block: elements that share a magnitude, a power of two from 16 to 65536.
        feedback: whether what was not sent is kept for the next step; without it, signs need not
            converge.
        memory: number format of what is kept: "full", "bf16", "fp16", "int8" or "int4".

    Raises:
        ConfigError: a value is out of range.
    """
    return Quantized(Sign(block), feedback=feedback, memory=memory)
