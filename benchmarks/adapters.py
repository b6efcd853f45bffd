"""A model that is mostly frozen, with trained adapters (LoRA) beside its layers; see `bench_rest`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

WIDTH, LAYERS = 512, 12


class Adapted(nn.Module):
    """A frozen linear layer and, trained, the product of two thin matrices beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.down = nn.Parameter(torch.randn(1, WIDTH) / WIDTH**0.5)
        self.up = nn.Parameter(torch.zeros(WIDTH, 1))

    def forward(self, inputs: Tensor) -> Tensor:
        """What the layers make of some inputs, added to them."""
        return inputs + torch.tanh(self.base(inputs) + inputs @ self.down.T @ self.up.T)


def adapters(whole: bool = False) -> nn.Module:
    """The model; `whole` has the process that makes it store versions whole, for comparison."""
    if whole:
        from torchord.coordinator.server import version_writer

        version_writer.LEAST_NBYTES = 1 << 60
    return nn.Sequential(*(Adapted() for _ in range(LAYERS)), nn.Linear(WIDTH, 4))


def points() -> TensorDataset:
    """256 points of four classes."""
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randn(256, WIDTH, generator=generator), torch.randint(4, (256,), generator=generator)
    )
