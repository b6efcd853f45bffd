"""Gradient compression with error feedback: pure functions from gradients to payloads and back.

See docs/compression.md for what each codec costs and gives; `torchord.coordinator.spec.codecs` finds the one
that a config names.
"""

from torchord.coordinator.compression.codec import Codec, Encoded, Kept, Plain, Shapes, TensorCodec, expect
from torchord.coordinator.compression.layout import Layout
from torchord.coordinator.compression.powersgd import PowerSGD
from torchord.coordinator.compression.quantized import Quantized, bf16, fp16, int8, sign
from torchord.coordinator.compression.topk import TopK

__all__ = [
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
    "expect",
    "fp16",
    "int8",
    "sign",
]
