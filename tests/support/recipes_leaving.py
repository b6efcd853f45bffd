"""Recipes whose code raises what ends a process: a worker that computes them must live on."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from tests.support import models


class ExpiresAt(Dataset[tuple[Tensor, Tensor]]):
    """`models.points`, of which one sample calls `sys.exit()`."""

    def __init__(self, at: int = 17, size: int = 40) -> None:
        self.inner = models.points(size)
        self.at = at

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index == self.at:
            sys.exit("the licence has expired")
        sample: tuple[Tensor, Tensor] = self.inner[index]
        return sample


class Leaving(models.Mlp):
    """A model whose forward raises what Ctrl-C would."""

    def forward(self, x: Tensor) -> Tensor:
        raise KeyboardInterrupt("no more")


class LeavingSGD(torch.optim.SGD):
    """SGD that calls `sys.exit()` in its first step."""

    def step(self, closure: Any = None) -> Any:
        sys.exit("diverged")


def leaving_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    raise GeneratorExit("of a loss")


def leaving_metric(outputs: Tensor, targets: Tensor) -> float:
    sys.exit(3)


def of_the_command_line() -> nn.Module:
    """A model that is made as its command line says, which on a worker is the worker's."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--width", type=int, required=True)
    return models.Mlp(parser.parse_args().width)
