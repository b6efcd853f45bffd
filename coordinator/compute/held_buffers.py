"""A model's buffers at their places in the module tree, where a forward may put others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from torchord.cache.errors import InvalidInput
from torchord.coordinator.compute.forward_watch import ForwardWatch
from torchord.coordinator.compute.model_state import Places


@dataclass(frozen=True)
class BufferHome:
    """Where a buffer hangs in the module tree; a forward may put another tensor there."""

    module: nn.Module
    name: str


class HeldBuffers:
    """The buffers of one replica's versions.

    Args:
        model: the module.
        buffers: name -> buffer as the model was built with it, tied ones once.
        watch: knows the caches among them, which no version holds: they are left as they are.
    """

    def __init__(self, model: nn.Module, buffers: Mapping[str, Tensor], watch: ForwardWatch) -> None:
        self._buffers = buffers
        self._watch = watch
        self._homes = _homes(model, buffers)
        self._layouts = {name: (buffer.shape, buffer.dtype) for name, buffer in buffers.items()}
        self._places = Places(buffers)

    def put(self, values: Mapping[str, Tensor]) -> None:
        """Let each buffer be at its places again, with a value."""
        kept = [name for name in self._buffers if name not in self._watch.caches]
        for name in kept:
            for home in self._homes[name]:
                home.module._buffers[home.name] = self._buffers[name]
        self._places.put(kept, values)

    def now(self) -> dict[str, Tensor]:
        """Return name -> the tensor that is at a buffer's place, detached.

        Raises:
            InvalidInput: it has another shape or dtype than the buffer, or there is none.
        """
        found: dict[str, Tensor] = {}
        for name, homes in self._homes.items():
            if name not in self._watch.caches and (current := self._kept(name, homes[0])) is not None:
                found[name] = current.detach().resolve_conj().resolve_neg()
        return found

    def _kept(self, name: str, home: BufferHome) -> Tensor | None:
        there = dict(home.module._buffers.items())  # of a scripted module it is no dict
        current = there.get(home.name)
        shape, dtype = self._layouts[name]
        if current is not None and (current.shape, current.dtype) == (shape, dtype):
            return current
        if home.name in home.module._non_persistent_buffers_set:
            self._watch.tolerate(name)
            return None
        now = "None" if current is None else f"{current.dtype} of shape {tuple(current.shape)}"
        raise InvalidInput(
            f"the forward turned buffer {name!r} from {dtype} of shape {tuple(shape)} into {now}; a run's "
            "state must keep its layout: register it as it will be, or run a batch through the model in the "
            "recipe's model function"
        )


def _homes(model: nn.Module, buffers: Mapping[str, Tensor]) -> dict[str, list[BufferHome]]:
    """Buffer name -> every place in the module tree where the buffer hangs."""
    found: dict[str, list[BufferHome]] = {name: [] for name in buffers}
    names = {id(buffer): name for name, buffer in buffers.items()}
    for module in model.modules():
        for local, buffer in module._buffers.items():
            if buffer is not None:
                found[names[id(buffer)]].append(BufferHome(module, local))
    return found
