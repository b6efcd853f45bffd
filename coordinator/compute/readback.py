"""What a shard's computation leaves in the model, brought to the host: gradients, buffers, figures.

On the CPU that is taking references. From a device everything leaves together, by one copy and one wait
(`DeviceMemory.gather`): no tensor is read by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torchord.cache.errors import InvalidInput
from torchord.cache.tensors.codec import layout, views
from torchord.coordinator.compute.replica import Replica

_FIGURES = "torchord/figures"  # no parameter or buffer has a name with a slash in it


class Collected(NamedTuple):
    """What was brought to the host.

    Attributes:
        tensors: those that were given, on the CPU.
        buffers: buffer name -> value after the forward, on the CPU, where it changed.
        norm: L2 norm of all `tensors` together.
        figures: the values of the figures that were given.
    """

    tensors: dict[str, Tensor]
    buffers: dict[str, Tensor]
    norm: float
    figures: list[float]


def collect(replica: Replica, tensors: Mapping[str, Tensor], figures: Sequence[Tensor]) -> Collected:
    """Bring what a computation has left to the host. Call with the process pinned.

    Args:
        replica: the model that computed.
        tensors: name -> gradient (or pseudo-gradient) on the replica's device; on the CPU they are
            kept, not copied.
        figures: tensors of one element each, on the replica's device, such as the loss.

    Raises:
        InvalidInput: a forward replaced a buffer by one of another shape or dtype.
    """
    if replica.memory is None:
        read = [float(figure) for figure in figures]
        return Collected(dict(tensors), replica.changed_buffers(), norm_of(tensors), read)
    with torch.no_grad():
        numbers = [figure.detach().reshape(()).double() for figure in (*figures, norm(tensors))]
        together = {**tensors, **replica.written_tensors()}
        together[_FIGURES] = torch.stack([number.to(replica.device) for number in numbers])
    manifest = layout(together)
    found = views(replica.memory.gather(together, manifest), manifest)
    *read, size = found.pop(_FIGURES).tolist()
    taken = {name: found.pop(name) for name in tensors}
    return Collected(taken, replica.changed(found), size, read)


def take_gradients(replica: Replica) -> dict[str, Tensor]:
    """Take the gradients out of the parameters, where they are; parameters without one are left out."""
    gradients: dict[str, Tensor] = {}
    for name, parameter in replica.parameters.items():
        gradient, parameter.grad = parameter.grad, None
        if gradient is None:
            continue
        if gradient.layout is not torch.strided:
            raise InvalidInput(
                f"the gradient of {name!r} is {gradient.layout}; give its layer dense gradients "
                "(sparse=False)"
            )
        gradients[name] = gradient.detach()
    return gradients


def norm(tensors: Mapping[str, Tensor]) -> Tensor:
    """L2 norm of all tensors together: a float64 scalar, on their device."""
    if not tensors:
        return torch.zeros((), dtype=torch.float64)
    norms = torch.stack([torch.linalg.vector_norm(g).double() for g in tensors.values()])
    whole: Tensor = torch.linalg.vector_norm(norms)
    return whole


def norm_of(tensors: Mapping[str, Tensor]) -> float:
    """L2 norm of all tensors together, in float64."""
    return float(norm(tensors))
