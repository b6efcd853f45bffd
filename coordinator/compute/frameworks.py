"""Habits of Keras on torch, as far as it keeps them for each process or has them beside torch's.

Keras counts the layers of a process, and names variables by the count: the second model of a process has
other names than the first. It has training switched by an argument of the call, which torch's `train()` does
not reach. Random functions without a seed draw from one generator a process. Nothing of it is imported here:
a process in which nobody has imported Keras has none of these habits.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

from torch import nn

from torchord.cache.errors import InvalidInput

_STATE = "keras.src.backend.common.global_state"
_LAYER = "keras.src.layers.layer"
_COUNTS, _GENERATOR = "object_name_uids", "global_seed_generator"


@contextmanager
def first_names() -> Iterator[None]:
    """Layers that are made within the block have the names of a process that has made none before.

    The process's count goes on afterwards: other models of it may be nobody's run.
    """
    state = _state()
    if state is None:
        yield
        return
    before = state.get_global_attribute(_COUNTS)
    state.set_global_attribute(_COUNTS, None)
    try:
        yield
    finally:
        state.set_global_attribute(_COUNTS, before)


def forget_generator() -> None:
    """Let random functions without a seed begin anew, with a seed from the `random` module."""
    state = _state()
    if state is not None and state.get_global_attribute(_GENERATOR) is not None:
        state.set_global_attribute(_GENERATOR, None)


def adopt(model: nn.Module) -> None:
    """Let a model's Keras layers train when the model is in training mode.

    A layer that is called from outside of Keras takes its own mode as `training=`, and hands it on to those
    within it; an argument that the call has goes before.

    Raises:
        InvalidInput: a layer has no variables yet, or this Keras finds the mode elsewhere.
    """
    kind = getattr(sys.modules.get(_LAYER), "Layer", None)
    if kind is None:
        return
    for name, layer in model.named_modules():
        if not isinstance(layer, kind):
            continue
        shown = f"{name or type(layer).__name__!r}"
        if not layer.built:
            raise InvalidInput(
                f"the Keras model {shown} is not built and has no variables yet; give it an Input, or "
                "call it on a batch in the recipe's model function"
            )
        if not hasattr(layer, "_get_call_context"):
            raise InvalidInput(
                f"the Keras model {shown} is of a Keras whose training mode torchord does not know; use one "
                "that pyproject.toml admits"
            )
        object.__setattr__(layer, "_get_call_context", MethodType(_context, layer))


def _context(layer: Any) -> Any:
    """The context of a call; the outermost layer's has the layer's mode."""
    found = type(layer)._get_call_context(layer)
    if found.entry_layer is layer and getattr(found, "training", None) is None:
        found.training = layer.training
    return found


def _state() -> Any:
    """Keras' own state of this thread, None where there is no Keras."""
    return sys.modules.get(_STATE)
