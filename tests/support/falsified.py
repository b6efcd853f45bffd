"""An operator of the self-test that gives one bit otherwise, as a machine would that errs there.

And torchord's app with one that the environment names: `celery -A tests.support.falsified worker`.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from torchord.coordinator.compute.self_test import OPERATORS
from torchord.tasks import app

__all__ = ["app", "falsify"]

NAME = "FALSIFIED_OPERATOR"


def falsify(name: str) -> None:
    """From now on the first value of what the operator gives has its last bit flipped, in this process."""
    right = OPERATORS[name]

    def wrong() -> list[Tensor]:
        first, *others = right()
        first = first.contiguous()
        first.view(torch.uint8).view(-1)[0] ^= 1
        return [first, *others]

    OPERATORS[name] = wrong


if operator := os.environ.get(NAME):
    falsify(operator)
