"""The digests of the self-test that portable kernels have, by release of torch.

Seen alike on an AMD processor with AVX-512 and on emulated Intel and AMD ones without; `python -m benchmarks
portable` compares them. A release that is not here is compared between the workers of a run alone.
"""

from __future__ import annotations

from collections.abc import Mapping

PORTABLE_DIGESTS: Mapping[str, Mapping[str, str]] = {
    "2.13.0+cpu": {
        "matmul": "7425c20d",
        "matrix times vector": "9d99d0ee",
        "batched matmul": "69d332d3",
        "linear": "84425781",
        "conv2d": "93581c6f",
        "strided conv2d": "4b7b165c",
        "depthwise conv2d": "e89882cd",
        "conv1d": "8f70b994",
        "transposed conv2d": "992f193c",
        "pooling": "e1d5bf3f",
        "layer norm": "fdeab86f",
        "batch norm": "4c4f2fd6",
        "softmax": "0a20ae52",
        "cross entropy": "bb396c9d",
        "attention": "a7c7bdd2",
        "embedding": "849e0724",
        "sums": "65516564",
        "exp and log": "ba8cf814",
        "tanh": "3996657c",
        "sigmoid and silu": "42e965fb",
        "gelu": "d148092e",
        "erf": "10103a36",
        "sin and cos": "f47adabf",
        "arc tangents": "df943004",
        "square roots": "8d0e5ed0",
        "adam": "947b44f3",
        "random numbers": "57902ef0",
    },
}
