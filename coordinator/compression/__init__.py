"""Gradient compression with error feedback: pure functions from gradients to payloads and back.

See docs/compression.md for what each codec costs and gives.
"""

from torchord.coordinator.compression.codec import (
    Codec,
    Encoded,
    Kept,
    Layout,
    Plain,
    Shapes,
    TensorCodec,
    expect,
)
from torchord.coordinator.compression.powersgd import PowerSGD
from torchord.coordinator.compression.quantized import Quantized, bf16, fp16, int8, sign
from torchord.coordinator.compression.topk import TopK
from torchord.coordinator.spec.codecs import CODECS, check, codec_of, parse

__all__ = [
    "CODECS",
    "Codec",
    "Encoded",
    "Kept",
    "Layout",
    "Plain",
    "PowerSGD",
    "Quantized",
    "Shapes",
    "TensorCodec",
    "TopK",
    "bf16",
    "check",
    "codec_of",
    "expect",
    "fp16",
    "int8",
    "parse",
    "sign",
]
