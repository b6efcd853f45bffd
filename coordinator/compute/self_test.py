"""A digest of what this process's kernels make of some thirty operators, in a few milliseconds.

Machines that share it share the kernels that their libraries chose, as far as these operators show; one whose
memory or processor errs, or that was given another library, differs, and in which operator. The inputs are
integers divided by a power of two, exact on any machine.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2s
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

_MULTIPLIER, _MODULUS = 48271, (1 << 31) - 1  # Park and Miller's generator, here of one value from another
_DIGEST_NBYTES = 4
OF_NUMPY = "numpy"


def values(*shape: int, seed: int = 1) -> Tensor:
    """Float32 in [-2, 2) of 12 bits each, whatever the machine."""
    size = int(np.prod(shape))
    raw = (np.arange(seed, seed + size, dtype=np.int64) * _MULTIPLIER % _MODULUS) * _MULTIPLIER % _MODULUS
    whole = ((raw >> 7) % 4096 - 2048).astype(np.float32)
    return torch.from_numpy(whole / np.float32(1024)).clone().reshape(shape)


def grown(forward: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """What a forward gives, and the gradients of its sum weighted by fixed values."""
    leaves = [each.detach().requires_grad_() for each in inputs]
    out = forward(*leaves)
    total: Any = (out * values(*out.shape, seed=5)).sum()
    total.backward()
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def _adam() -> list[Tensor]:
    """Three steps as torch's, without its optimizers, whose first one imports its compiler."""
    weight, mean, square = values(33, 17), torch.zeros(33, 17), torch.zeros(33, 17)
    for step in range(1, 4):
        grad = values(33, 17, seed=step + 1)
        grad = grad * (1 / (grad.norm() + 1e-6)).clamp(max=1.0)
        mean.lerp_(grad, 0.1)
        square.mul_(0.999).addcmul_(grad, grad, value=0.001)
        corrected = (square.sqrt() / (1 - 0.999**step) ** 0.5).add_(1e-8)
        weight.mul_(1 - 1e-4).addcdiv_(mean, corrected, value=-1e-2 / (1 - 0.9**step))
    return [weight]


def _attention() -> list[Tensor]:
    heads = (values(2, 4, 24, 16, seed=i) for i in (1, 2, 3))
    return grown(lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, is_causal=True), *heads)


def _embedding() -> list[Tensor]:
    rows = (torch.arange(96) * 7 % 13).reshape(4, 24)
    return grown(lambda table: functional.embedding(rows, table), values(13, 40))


def _cross_entropy() -> list[Tensor]:
    return grown(lambda x: functional.cross_entropy(x, torch.arange(48) * 5 % 37).reshape(1), values(48, 37))


def _batch_norm() -> list[Tensor]:
    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional.batch_norm(x, None, None, weight, bias, training=True)

    return grown(forward, values(6, 9, 7, 7), values(9, seed=2), values(9, seed=3))


def _drawn() -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    normal = torch.empty(1000).normal_(generator=generator)
    mask = torch.empty(1000).bernoulli_(0.5, generator=generator)
    uniform, waits = (
        torch.empty(1000).uniform_(generator=generator),
        torch.empty(1000).exponential_(generator=generator),
    )
    return [normal, mask, uniform, waits, torch.randperm(1000, generator=generator).double()]


def _numpy() -> list[Tensor]:
    a, b = values(40, 50).numpy(), values(50, 30, seed=2).numpy()
    double = a.astype(np.float64)
    made = [a @ b, np.exp(a), np.tanh(double), np.sin(a), a.sum(0), double.mean(), np.sort(a, axis=1)]
    return [torch.from_numpy(np.ascontiguousarray(np.asarray(each))) for each in made]


OPERATORS: dict[str, Callable[[], list[Tensor]]] = {
    "matmul": lambda: grown(torch.matmul, values(70, 130), values(130, 65, seed=2)),
    "matrix times vector": lambda: grown(torch.mv, values(67, 129), values(129, seed=2)),
    "batched matmul": lambda: grown(torch.bmm, values(5, 18, 33), values(5, 33, 20, seed=2)),
    "linear": lambda: grown(functional.linear, values(32, 64), values(10, 64, seed=2), values(10, seed=3)),
    "conv2d": lambda: grown(
        lambda x, w, b: functional.conv2d(x, w, b, padding=1),
        values(4, 3, 14, 14),
        values(16, 3, 3, 3, seed=2),
        values(16, seed=3),
    ),
    "strided conv2d": lambda: grown(
        lambda x, w: functional.conv2d(x, w, stride=2, padding=1),
        values(2, 16, 15, 15),
        values(32, 16, 3, 3),
    ),
    "depthwise conv2d": lambda: grown(
        lambda x, w: functional.conv2d(x, w, padding=1, groups=16),
        values(2, 16, 12, 12),
        values(16, 1, 3, 3, seed=2),
    ),
    "conv1d": lambda: grown(functional.conv1d, values(3, 8, 40), values(12, 8, 5, seed=2)),
    "transposed conv2d": lambda: grown(
        lambda x, w: functional.conv_transpose2d(x, w, stride=2),
        values(2, 8, 7, 7),
        values(8, 6, 3, 3, seed=2),
    ),
    "pooling": lambda: [
        *grown(lambda x: functional.avg_pool2d(x, 3), values(2, 5, 12, 12)),
        *grown(lambda x: functional.adaptive_avg_pool2d(x, 1), values(2, 5, 12, 12)),
    ],
    "layer norm": lambda: grown(
        lambda x, w, b: functional.layer_norm(x, (67,), w, b),
        values(24, 67),
        values(67, seed=2),
        values(67, seed=3),
    ),
    "batch norm": _batch_norm,
    "softmax": lambda: grown(lambda x: torch.softmax(x, -1), values(33, 65)),
    "cross entropy": _cross_entropy,
    "attention": _attention,
    "embedding": _embedding,
    "sums": lambda: [*_sums(values(37, 129)), *_sums(values(37, 129).T)],
    "exp and log": lambda: [
        values(999).exp(),
        values(999).abs().log1p(),
        torch.logsumexp(values(40, 50), 1),
    ],
    "tanh": lambda: grown(torch.tanh, values(999)),
    "sigmoid and silu": lambda: [
        *grown(torch.sigmoid, values(999)),
        *grown(functional.silu, values(999)),
    ],
    "gelu": lambda: [
        *grown(functional.gelu, values(999)),
        *grown(lambda x: functional.gelu(x, approximate="tanh"), values(999)),
    ],
    "erf": lambda: grown(torch.erf, values(999)),
    "sin and cos": lambda: [values(999).sin(), values(999).cos(), values(999).abs().pow(1.7)],
    "arc tangents": lambda: [values(999).atan(), torch.atan2(values(999), values(999, seed=2))],
    "square roots": lambda: [
        values(999).abs().sqrt(),
        (values(999).abs() + 1).rsqrt(),
        1 / (values(999) + 3),
    ],
    "adam": _adam,
    "random numbers": _drawn,
    OF_NUMPY: _numpy,
}


def _sums(x: Tensor) -> list[Tensor]:
    return [x.sum(), x.sum(0), x.mean(1), x.var(1), x.norm(), x.cumsum(0), x.double().sum()]


def digests() -> dict[str, str]:
    """Return eight hexadecimal digits for each operator."""
    return {name: digest_of(make()) for name, make in OPERATORS.items()}


def digest_of(made: list[Tensor]) -> str:
    """Eight hexadecimal digits that stand for the bytes of tensors."""
    hashed = blake2s(digest_size=_DIGEST_NBYTES)
    for each in made:
        hashed.update(each.contiguous().numpy().tobytes())
    return hashed.hexdigest()
