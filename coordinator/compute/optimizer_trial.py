"""The recipe's optimizer and scheduler, tried by whoever submits: what the run's start would refuse.

They are made over one small parameter, since the model is not there, and judged by what they are. What
torch's own constructors say of their arguments is as true of the model's parameters; what code of the user's
raises may be due to the parameter alone, and is left to the run's start, as is what this process has not
imported.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from torchord.cache.errors import InvalidInput
from torchord.coordinator.compute.determinism import generators, set_generators
from torchord.coordinator.compute.optimizers import require_serviceable, require_steppable
from torchord.coordinator.spec.config import TrainingConfig
from torchord.coordinator.spec.recipe import Recipe
from torchord.coordinator.spec.targets import Entry, Target


def try_optimizers(recipe: Recipe, config: TrainingConfig) -> None:
    """Refuse an optimizer or scheduler that could not serve on any model.

    Raises:
        InvalidInput: as `optimizers.build_optimizer`; or the entry does not take the arguments that are bound
            to it, or torch's own constructor does not.
    """
    before = generators()
    try:
        with _quietly():
            made = _made("optimizer", recipe.optimizer, [nn.Parameter(torch.zeros(2, 2))])
            if made is not None:
                require_serviceable(made)
            if recipe.parameter_groups is not None:
                _made("parameter_groups", recipe.parameter_groups, None)
            if recipe.scheduler is not None:
                # A scheduler may have a value for each group, and the model may decide how many there are.
                sure = recipe.parameter_groups is None and _torchs(_called(recipe.optimizer)[0])
                scheduler = _made("scheduler", recipe.scheduler, made, sure=sure)
                if scheduler is not None:
                    require_steppable(scheduler, config)
            if recipe.outer_optimizer is not None and config.local_steps > 1:
                outer = _made("outer_optimizer", recipe.outer_optimizer, [nn.Parameter(torch.zeros(2, 2))])
                if outer is not None:
                    require_serviceable(outer)
    finally:
        set_generators(before)


def _made(name: str, entry: Entry, given: Any, *, sure: bool = True) -> Any:
    """What an entry makes of one argument; None where that cannot be found out here.

    Args:
        given: parameters, or the optimizer; None if the entry is only to be looked at.
        sure: whether what torch's constructors refuse is refused whatever the model is.
    """
    function, args, kwargs = _called(entry)
    if function is None:
        return None
    called = getattr(function, "__name__", name)
    try:
        inspect.signature(function, follow_wrapped=False).bind(*args, given, **kwargs)
    except ValueError:  # it has none that can be read
        pass
    except TypeError as error:
        raise InvalidInput(
            f"recipe entry {name!r}: {error}, which {called} would raise as the run starts; correct the "
            "arguments that are bound to it"
        ) from None
    if given is None or (isinstance(entry, (str, Target)) and not _is_kind(function)):
        return None
    try:
        return function(*args, given, **kwargs)
    except (Exception, SystemExit) as error:
        if (
            sure
            and _is_kind(function)
            and function.__module__[:6] == "torch."
            and isinstance(error, (TypeError, ValueError))
        ):
            raise InvalidInput(
                f"recipe entry {name!r}: {error}, which {called} raises with the arguments that are bound "
                "to it; correct them"
            ) from error
        return None


def _called(entry: Entry) -> tuple[Callable[..., Any] | None, tuple[Any, ...], dict[str, Any]]:
    """The function of an entry and what is bound to it; none if this process has not imported it."""
    if isinstance(entry, partial):
        return entry.func, entry.args, entry.keywords
    if not isinstance(entry, (str, Target)):
        return entry, (), {}
    target = Target(entry) if isinstance(entry, str) else entry
    module, _, path = target.target.partition(":")
    found: Any = None if target.kinds else sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, part, None)
    return (found if callable(found) else None), target.args, dict(target.kwargs or {})


def _is_kind(function: Any) -> bool:
    return isinstance(function, type) and issubclass(function, (torch.optim.Optimizer, LRScheduler))


def _torchs(function: Any) -> bool:
    return _is_kind(function) and function.__module__.startswith("torch.")


@contextmanager
def _quietly() -> Iterator[None]:
    """No warning of theirs twice, and not torch's compiler, which a process's first optimizer imports."""
    kind: Any = torch.optim.Optimizer
    plain = kind.add_param_group
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if "torch._dynamo" not in sys.modules:  # a second; what is decorated with it is the same without it
            kind.add_param_group = getattr(plain, "__wrapped__", plain)
        try:
            yield
        finally:
            kind.add_param_group = plain
