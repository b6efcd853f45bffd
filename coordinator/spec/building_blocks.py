"""Torch's own parts that a recipe may name, each in its place.

A closed list, by what a thing is and where it stands. Torch is on every worker, and it has parts that
unpickle what they are given, load files or native code, or call whatever they are told. So what the word
"torch" of an allow-list admits are building blocks alone: public names, one level below their module, and of
the kind that the entry of a recipe is. What else a recipe needs of torch is called by a function of its own
module, whose owner wrote it.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from types import BuiltinFunctionType, FunctionType
from typing import Any

_MODULES = "torch.nn:classes of modules"
_FUNCTIONAL = "torch.nn.functional:functions"
_OPTIMIZERS = "torch.optim:optimizers"
_SCHEDULERS = "torch.optim.lr_scheduler:schedulers"
_AVERAGES = "torch.optim.swa_utils:averages"
_DATA = "torch.utils.data:TensorDataset"
_SAMPLERS = "torch.utils.data:samplers"
_COLLATES = "torch.utils.data:default_collate"
_INITS = "torch.nn.init:functions"
_MATHS = "torch:functions of tensors"

_ROLES: dict[str, tuple[str, ...]] = {
    "model": (_MODULES,),
    "loss": (_FUNCTIONAL, _MATHS),
    "metrics": (_FUNCTIONAL, _MATHS),
    "optimizer": (_OPTIMIZERS,),
    "outer_optimizer": (_OPTIMIZERS,),
    "scheduler": (_SCHEDULERS,),
    "dataset": (_DATA,),
    "evaluation": (_DATA,),
    "collate": (_COLLATES,),
    "order": (_SAMPLERS,),
    "batches": (_SAMPLERS,),
    "average": (_AVERAGES,),
    "argument": (
        _MODULES,
        _FUNCTIONAL,
        _OPTIMIZERS,
        _SCHEDULERS,
        _INITS,
        _MATHS,
        _COLLATES,
        _SAMPLERS,
    ),
}
"""Entry of a recipe -> what of torch may stand there. What is no key takes none: `step`, `weight`, `predict`,
`parameter_groups`, `gradients` and functions of buffers come from users' modules."""

_CLASSES = {
    "torch.nn": "torch.nn:Module",
    "torch.optim": "torch.optim:Optimizer",
    "torch.optim.lr_scheduler": "torch.optim.lr_scheduler:LRScheduler",
}
_PUBLIC = {"torch._C._nn": "torch.nn.functional", "torch.utils.data.dataset": "torch.utils.data"}
_MATH_MODULES = ("torch", "torch.special", "torch.linalg", "torch.fft")
_READS_FILES = frozenset({"from_file"})


def admitted(target: str, found: Any, role: str, *, origin: str) -> bool:
    """Whether a part of torch may stand in this place of a recipe.

    Args:
        target: "torch.module:name", as the recipe has it, or what a module of the user's calls such a part.
        found: what that leads to.
        origin: the module that it says it comes from.
        role: entry of the recipe ("model", "metrics.accuracy", ...), or "argument" for what is given to one;
            "" for any.
    """
    module, _, name = target.partition(":")
    if module.partition(".")[0] != "torch":
        module, name = _PUBLIC.get(origin, origin), getattr(found, "__name__", name)
        if inspect.isclass(found):
            module = next((home for home in _CLASSES if issubclass(found, _base(_CLASSES[home]))), module)
    if "." in name or name.startswith("_"):
        return False
    role = role.partition(".")[0]
    places = _ROLES.get(role, ()) if role else _ROLES["argument"] + (_DATA, _AVERAGES)
    return any(_is_at_home(place, module) and _KINDS[place](found, name) for place in places)


def wanted(role: str) -> str:
    """What of torch may stand in a place, in words."""
    places = _ROLES.get(role.partition(".")[0], ())
    return ", ".join(place.replace(":", ": ") for place in places) or "nothing of torch"


def _is_at_home(place: str, module: str) -> bool:
    """Whether a module is the public one of a place."""
    return module == place.partition(":")[0] or (place == _MATHS and module in _MATH_MODULES)


def _base(name: str) -> type:
    module, _, path = name.partition(":")
    found: type = getattr(importlib.import_module(module), path)
    return found


def _subclass_of(name: str) -> Callable[[Any, str], bool]:
    return lambda found, _: inspect.isclass(found) and issubclass(found, _base(name))


def _function(found: Any, name: str) -> bool:
    own = getattr(found, "__module__", None) in ("torch.nn.functional", "torch.nn.init")
    return isinstance(found, BuiltinFunctionType) or (isinstance(found, FunctionType) and own)


def _of_tensors(found: Any, name: str) -> bool:
    """Whether it is an operator: native code that gets and gives tensors."""
    return isinstance(found, BuiltinFunctionType) and name not in _READS_FILES and _is_operator(found, name)


def _is_operator(found: Any, name: str) -> bool:
    import torch

    native: Any = torch._C
    parts = native._VariableFunctions, native._special, native._linalg, native._fft
    names = {name, f"special_{name}", f"linalg_{name}", f"fft_{name}"}
    return any(getattr(part, each, None) is found for part in parts for each in names) or any(
        getattr(found, "__self__", None) is part for part in parts
    )


def _named(*names: str) -> Callable[[Any, str], bool]:
    return lambda found, name: name in names


_KINDS: dict[str, Callable[[Any, str], bool]] = {
    _MODULES: _subclass_of("torch.nn:Module"),
    _FUNCTIONAL: _function,
    _OPTIMIZERS: _subclass_of("torch.optim:Optimizer"),
    _SCHEDULERS: _subclass_of("torch.optim.lr_scheduler:LRScheduler"),
    _AVERAGES: _named("get_ema_multi_avg_fn", "get_swa_multi_avg_fn", "get_ema_avg_fn", "get_swa_avg_fn"),
    _DATA: _named("TensorDataset"),
    _SAMPLERS: _subclass_of("torch.utils.data:Sampler"),
    _COLLATES: _named("default_collate"),
    _INITS: _function,
    _MATHS: _of_tensors,
}
