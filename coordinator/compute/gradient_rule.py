"""The recipe's `gradients`: what changes a step's gradient before it is clipped and applied.

Clipping by layer, centralisation, noise, adaptive clipping (which looks at the weights): a function of
(name -> gradient, name -> parameter) that changes the gradients in place, puts others into the dict, or
returns another dict. A plain step's gradient is the average, on the training server; with local steps
each shard changes the gradient of each of its steps. Random numbers are seeded by the step's place, as
everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchord.cache.errors import InvalidInput
from torchord.coordinator.compute.batch import during
from torchord.coordinator.compute.replica import Replica

GradientRule = Callable[[dict[str, Tensor], Mapping[str, nn.Parameter]], Any]


@torch.no_grad()
def change(rule: GradientRule, replica: Replica, where: str) -> None:
    """Hand the gradients in a replica's parameters to the recipe's rule, and take what it makes of them.

    Call with the process pinned and seeded. A gradient that the rule leaves out is none: the optimizer
    passes that parameter over.

    Args:
        where: the step, for messages.

    Raises:
        InvalidInput: the rule returned something that is not gradients of the model's parameters.
        Exception: what the rule raises, with a note.
    """
    parameters = replica.parameters
    given = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    with during("changing the gradients"):
        returned = rule(given, parameters)
    found = given if returned is None else returned
    if not isinstance(found, Mapping):
        raise InvalidInput(
            f"{where}: the recipe's gradients entry returned a {type(found).__name__}; it must change the "
            "gradients in place, or return a dict of parameter name -> gradient"
        )
    for name, gradient in found.items():
        _require_gradient(where, name, gradient, parameters.get(name))
    for name, parameter in parameters.items():
        parameter.grad = found.get(name)


def _require_gradient(where: str, name: Any, gradient: Any, parameter: nn.Parameter | None) -> None:
    if parameter is None:
        raise InvalidInput(
            f"{where}: the recipe's gradients entry made a gradient for {name!r}, which is no parameter of "
            "the model; use the names that it is given"
        )
    if not isinstance(gradient, Tensor):
        raise InvalidInput(
            f"{where}: the recipe's gradients entry made a {type(gradient).__name__} of the gradient of "
            f"{name!r}, which must be a tensor; leave the name out where there is to be none"
        )
    if (gradient.shape, gradient.dtype, gradient.device) != (
        parameter.shape,
        parameter.dtype,
        parameter.device,
    ):
        raise InvalidInput(
            f"{where}: the recipe's gradients entry made a gradient of {name!r} with {gradient.dtype} "
            f"{tuple(gradient.shape)} on {gradient.device}, where the parameter has {parameter.dtype} "
            f"{tuple(parameter.shape)} on {parameter.device}"
        )
