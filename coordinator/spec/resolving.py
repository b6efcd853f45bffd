"""`ResolvedRecipe`: a recipe's callables in this process, imported within its allow-list."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torchord.cache.errors import NotAllowed, RecipeError
from torchord.coordinator.spec.admission import OWN_TARGETS, START_DIRECTORY, Admission
from torchord.coordinator.spec.arguments import restored
from torchord.coordinator.spec.buffer_entries import functions_of, words_of
from torchord.coordinator.spec.codecs import CodecOf, codecs_within
from torchord.coordinator.spec.recipe import Recipe, entries_of, metric_entries, targets_of
from torchord.coordinator.spec.targets import Entry, Target, decode, is_function

_ARGUMENT = "'s argument"


@dataclass(frozen=True)
class MetricPair:
    """A metric in two halves: `state` of each micro-batch, and `finish` of the list of all states."""

    state: Callable[..., Any]
    finish: Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class ResolvedRecipe:
    """A recipe whose callables were imported, arguments bound; the fields of `Recipe`.

    Attributes:
        codec: the codec that a config's `compression` or a slot's record names; one of an import path
            comes from where the recipe may.
        buffers: name or pattern -> rule; None for a run that was submitted when there were no rules, and goes
            on with the mean of all floating-point buffers.
    """

    model: Callable[..., Any]
    dataset: Callable[..., Any]
    optimizer: Callable[..., Any]
    loss: Callable[..., Any] | None
    step: Callable[..., Any] | None
    scheduler: Callable[..., Any] | None
    evaluation: Callable[..., Any] | None
    metrics: Mapping[str, Callable[..., Any] | MetricPair]
    collate: Callable[..., Any] | None
    parameter_groups: Callable[..., Any] | None
    outer_optimizer: Callable[..., Any] | None = None
    predict: Callable[..., Any] | None = None
    gradients: Callable[..., Any] | None = None
    average: Callable[..., Any] | None = None
    order: Callable[..., Any] | None = None
    batches: Callable[..., Any] | None = None
    buffers: Mapping[str, str | Callable[..., Any]] | None = None
    weight: Callable[..., Any] | None = None
    loss_over: str = "batch"
    codec: CodecOf


def resolve(
    spec: Mapping[str, Any], *, allowed: tuple[str, ...] | None, directory: Path | None = None
) -> ResolvedRecipe:
    """Import what a spec names, within the allow-list.

    Args:
        spec: from `Recipe.to_spec`.
        allowed: module prefixes that may be imported ("my_models" admits "my_models.cnn", not
            "my_models2"); "." admits modules whose file lies under `directory` and belongs to no
            installed package, "torch" the parts of torch in `admission.TORCH_MODULES` (others are
            listed by name). None: (".", "torch").
        directory: where this process was started, the default.

    Raises:
        NotAllowed: a module, or what a name leads to, lies outside the allow-list; nothing of
            a refused module was run.
        RecipeError: a module or attribute does not exist here, or is not callable.
    """
    recipe = Recipe.from_spec(spec)
    entries = entries_of(recipe)
    targets = targets_of(recipe)
    admission = Admission(allowed, directory or START_DIRECTORY, tuple(sorted(targets - OWN_TARGETS)))
    found = {name: _bind(name, entry, admission) for name, entry in entries.items()}
    metrics: dict[str, Any] = {}
    for name, entry in (recipe.metrics or {}).items():
        halves = [found[half] for half in metric_entries(name, entry)]
        metrics[name] = MetricPair(*halves) if isinstance(entry, tuple) else halves[0]
    buffers = None
    if "buffers" in spec:
        functions = {name: found[f"buffers.{name}"] for name in functions_of(recipe.buffers)}
        buffers = {**words_of(recipe.buffers), **functions}
    plain: dict[str, Any] = {field.name: found.get(field.name) for field in fields(ResolvedRecipe)}
    plain |= {"metrics": metrics, "buffers": buffers, "loss_over": recipe.loss_over}
    plain["codec"] = codecs_within(admission)
    return ResolvedRecipe(**plain)


def resolve_entry(
    name: str, entry: Target, *, allowed: tuple[str, ...] | None, directory: Path | None = None
) -> Callable[..., Any]:
    """Import what one entry names beside a recipe, arguments bound; arguments and errors as for `resolve`."""
    needed = tuple(sorted(entry.targets() - OWN_TARGETS))
    return _bind(name, entry, Admission(allowed, directory or START_DIRECTORY, needed))


def _bind(name: str, entry: Entry, admission: Admission) -> Callable[..., Any]:
    if not isinstance(entry, Target):  # pragma: no cover - from_spec makes Targets only
        raise RecipeError(f"recipe entry {name!r} is not a reference")
    try:
        found = admission.fetch(entry.target, "argument" if name.endswith(_ARGUMENT) else name)
    except NotAllowed as error:
        raise NotAllowed(f"recipe entry {name!r}: {error}") from None
    except RecipeError as error:
        raise RecipeError(f"recipe entry {name!r}: {error}") from error.__cause__
    if inspect.isclass(found) and is_function(name):
        raise RecipeError(f"recipe entry {name!r}: {entry.target!r} is a class, but must be a function")
    if not (entry.args or entry.kwargs):
        return found
    try:
        bound = restored(
            entry.arguments(),
            entry.kinds,
            fetch=admission.fetch,
            bind=lambda value: _bind(f"{name}{_ARGUMENT}", decode(name, value), admission),
        )
    except NotAllowed as error:
        raise NotAllowed(f"recipe entry {name!r}: {error}") from None
    except RecipeError as error:
        raise RecipeError(f"recipe entry {name!r}: {error}") from error.__cause__
    return functools.partial(found, *bound["args"], **bound["kwargs"])
