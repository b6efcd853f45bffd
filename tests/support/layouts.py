"""Tensors of equal values that lie in memory in other ways, and computations that must not notice."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset, default_collate

from torchord.cache.tensors.codec import aligned, memory
from torchord.coordinator.compute.determinism import pinned
from torchord.coordinator.compute.gradient import compute
from torchord.coordinator.compute.inference import evaluate, predict
from torchord.coordinator.compute.replica import Replica
from torchord.coordinator.spec.admission import Admission
from torchord.coordinator.spec.codecs import codecs_within
from torchord.coordinator.spec.config import TrainingConfig
from torchord.coordinator.spec.resolving import ResolvedRecipe

Change = Callable[[Tensor], Tensor]
"""The same values, otherwise in memory."""

CONFIG = TrainingConfig(batch_size=13, shards=1, seed=3)


def fresh(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def off(tensor: Tensor, nbytes: int) -> Tensor:
    """A copy that starts so far behind a boundary of 64 bytes, or as far as its elements' size allows."""
    size = tensor.element_size()
    room = torch.empty(tensor.numel() + 128 // size, dtype=tensor.dtype)
    first = (-room.data_ptr() % 64) // size + max(1, nbytes // size)
    found = room[first : first + tensor.numel()].view(tensor.shape).copy_(tensor)
    assert found.data_ptr() % 64 != 0 or not found.numel()
    return found


def backwards(tensor: Tensor) -> Tensor:
    """A copy with the first dimension innermost: column-major."""
    order = tuple(reversed(range(tensor.dim())))
    return tensor.permute(order).contiguous().permute(order)


def every_second(tensor: Tensor) -> Tensor:
    return torch.stack((tensor, torch.zeros_like(tensor)), -1)[..., 0]


def sliced(tensor: Tensor) -> Tensor:
    """Rows from the midst of a longer tensor."""
    return torch.cat((tensor[:1], tensor, tensor))[1 : 1 + len(tensor)] if tensor.dim() else tensor.clone()


def odd_ones(tensor: Tensor) -> Tensor:
    """A copy whose dimensions of one element have strides that do not matter, and that kernels look at."""
    extents = zip(tensor.shape, fresh(tensor).stride(), strict=True)
    strides = [1 if extent == 1 else stride for extent, stride in extents]
    return torch.as_strided(fresh(tensor), tensor.shape, strides)


OFFSETS: dict[str, Change] = {
    f"{nbytes} bytes off": partial(off, nbytes=nbytes) for nbytes in (4, 8, 12, 20, 60)
}
LAYOUTS: dict[str, Change] = {
    **OFFSETS,
    "column-major": backwards,
    "every second": every_second,
    "sliced": sliced,
    "odd strides of one": odd_ones,
}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def digest(*parts: Tensor | float) -> str:
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        found.update(memory(fresh(part.detach())) if isinstance(part, Tensor) else part.hex().encode())
    return found.hexdigest()


# --- operators --------------------------------------------------------------------------


def _transposed(matrix: Tensor, column: Tensor) -> Tensor:
    return matrix.T @ column


_SIZES = ((10, 20), (33, 17), (64, 64), (7, 5))
OPERATORS: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    **{f"gemv {n} x {m}": (torch.matmul, (random(n, m), random(m))) for n, m in _SIZES},
    **{f"gemv of {n} x {m} transposed": (_transposed, (random(n, m), random(n, 1))) for n, m in _SIZES},
    **{f"gemm {n} x {m}": (torch.matmul, (random(n, m), random(m, 3))) for n, m in _SIZES},
    "linear": (F.linear, (random(13, 20), random(5, 20), random(5))),
    "linear, one output": (F.linear, (random(13, 20), random(1, 20), random(1))),
    "convolution": (partial(F.conv2d, padding=1), (random(4, 3, 9, 9), random(8, 3, 3, 3), random(8))),
    "convolution, one channel": (F.conv2d, (random(4, 1, 9, 9), random(8, 1, 3, 3), random(8))),
    "convolution, 1-D": (F.conv1d, (random(4, 3, 19), random(8, 3, 3), random(8))),
    "layer norm": (lambda x, w, b: F.layer_norm(x, (37,), w, b), (random(13, 37), random(37), random(37))),
    "batch norm": (
        lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True),
        (random(13, 7, 5), random(7), random(7)),
    ),
    "group norm": (lambda x, w, b: F.group_norm(x, 2, w, b), (random(13, 6, 5), random(6), random(6))),
    "norm": (torch.linalg.vector_norm, (random(131, 37),)),
    "sum": (torch.sum, (random(131, 37),)),
    "attention": (F.scaled_dot_product_attention, tuple(random(2, 2, 13, 8, seed=s) for s in range(3))),
    "gelu": (F.gelu, (random(13, 37),)),
}


def applied(name: str, change: Change) -> str:
    """Digest of an operator's result on its operands, after they were brought into the one layout."""
    function, operands = OPERATORS[name]
    with pinned(1, True, restore=True):
        return digest(function(*(aligned(change(operand)) for operand in operands)))


# --- shards -----------------------------------------------------------------------------


class Normed(nn.Module):
    """A convolution and both norms, with one output."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 4, 3, padding=1)
        self.batch_norm = nn.BatchNorm2d(4)
        self.layer_norm = nn.LayerNorm(20)
        self.out = nn.Linear(80, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        found = self.batch_norm(self.convolution(inputs.view(-1, 1, 4, 5))).flatten(2)
        return self.out(self.layer_norm(found).flatten(1))


def thin() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 7), nn.Tanh(), nn.Linear(7, 1))


NETS: dict[str, Callable[[], nn.Module]] = {"thin": thin, "normed": Normed}


def dataset() -> TensorDataset:
    return TensorDataset(random(13, 20), random(13, 1))


def recipe(model: Callable[[], nn.Module], change: Change | None = None) -> ResolvedRecipe:
    """A recipe whose batches lie in memory as `change` leaves them."""

    def changed(samples: list[Any]) -> list[Tensor]:
        assert change is not None
        return [change(tensor) for tensor in default_collate(samples)]

    plain = ResolvedRecipe(
        model=model,
        dataset=dataset,
        optimizer=partial(torch.optim.SGD, lr=0.1),
        loss=F.mse_loss,
        step=None,
        scheduler=None,
        evaluation=dataset,
        metrics={},
        collate=None,
        parameter_groups=None,
        codec=codecs_within(Admission(())),
    )
    return plain if change is None else replace(plain, collate=changed)


def shard(name: str, change: Change) -> str:
    """Digest of a gradient, an evaluation and a prediction whose batches lie in memory in some way."""
    found = recipe(NETS[name], change)
    replica = Replica.build(found, CONFIG)
    replica.attach(replica.pack())
    return _all_of(replica, found, change(random(13, 20, seed=9)))


def parameters(name: str, change: Change, *, attach: bool) -> str:
    """The same of a model whose parameters and buffers were made in memory of some kind."""

    def model() -> nn.Module:
        made = NETS[name]()
        for tensor in (*made.parameters(), *made.buffers()):
            tensor.data = change(tensor.data)
        return made

    found = recipe(model)
    replica = Replica.build(found, CONFIG)
    (replica.attach if attach else replica.load)(replica.pack())
    return _all_of(replica, found, random(13, 20, seed=9))


def _all_of(replica: Replica, found: ResolvedRecipe, inputs: Tensor) -> str:
    done = compute(replica, found, CONFIG, dataset(), range(13), 0, 0)
    measured = evaluate(replica, found, CONFIG, dataset(), range(13)).means
    with pinned(1, True, restore=True):
        outputs = predict(replica, found, inputs)
    return digest(
        *done.gradients.values(), *done.buffers.values(), done.loss, done.grad_norm, measured["loss"], outputs
    )


def digests(change: Change) -> Mapping[str, str]:
    """Everything above, for one way to lie in memory."""
    return {
        **{name: applied(name, change) for name in OPERATORS},
        **{name: shard(name, change) for name in NETS},
    }
