"""What a recipe's `order` and `batches` are called with: what their parameters name."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torchord.cache.errors import RecipeError

_DATASET = "data_source"  # what torch's samplers call the dataset
OFFERED = {
    "order": ("size", "epoch", "seed", "dataset", _DATASET),
    "batches": ("size", "epoch", "seed", "dataset", _DATASET, "batch_size"),
}
"""Entry -> the parameters that it may have without a value bound to them."""


def offered(name: str, call: Callable[..., Any]) -> tuple[str, ...]:
    """Return which of the values in `OFFERED` a callable takes: those that its parameters name.

    A class's own defaults are left alone, since it was written for other callers: its `size` need not be the
    dataset's.

    Args:
        name: "order" or "batches".
        call: function, class, or a partial of one; what a partial binds is not given again.

    Raises:
        RecipeError: it needs another value, or its parameters cannot be seen.
    """
    bound: set[str] = set()
    inner, places = call, 0
    while isinstance(inner, functools.partial):
        bound.update(inner.keywords)
        places += len(inner.args)
        inner = inner.func
    try:
        parameters = list(inspect.signature(inner).parameters.values())[places:]
    except (TypeError, ValueError):
        raise RecipeError(
            f"recipe entry {name!r} has no parameters that Python can tell; write a function of your own "
            f"around it, with those of {_choice(name)} that it needs"
        ) from None
    free = [p for p in parameters if p.name not in bound and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    for parameter in free:
        given = parameter.name in OFFERED[name] and parameter.kind is not parameter.POSITIONAL_ONLY
        if not given and parameter.default is parameter.empty:
            raise RecipeError(
                f"recipe entry {name!r} needs a value for {parameter.name!r}; bind it with functools.partial "
                f"or name what it is to be given: {_choice(name)}"
            )
    taken = [p for p in free if not inspect.isclass(inner) or p.default is p.empty]
    return tuple(p.name for p in taken if p.name in OFFERED[name] and p.kind is not p.POSITIONAL_ONLY)


def _choice(name: str) -> str:
    *first, last = (each for each in OFFERED[name] if each != _DATASET)
    return f"{', '.join(first)} and {last}"
