"""`Target`: one entry of a recipe by name, from the callable that it stands for and to JSON."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, TypeAlias

from torchord.cache.errors import RecipeError
from torchord.coordinator.spec.admission import present_name
from torchord.coordinator.spec.arguments import Encoder, names_in


@dataclass(frozen=True)
class Target:
    """An importable callable with bound arguments, by name; nothing is imported to hold one.

    Attributes:
        target: "package.module:attribute"; the attribute may be dotted.
        args: positional arguments bound first.
        kwargs: keyword arguments.
        kinds: what the arguments are beyond JSON, as a spec has it (`torchord.coordinator.spec.arguments`);
            leave it out where they are the values themselves.
    """

    target: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None
    kinds: tuple[Any, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the entry of a spec."""
        return {"target": self.target, **self.arguments(), **({"kinds": [*self.kinds]} if self.kinds else {})}

    def arguments(self) -> dict[str, Any]:
        """Return the arguments as a spec has them."""
        return {"args": list(self.args), "kwargs": dict(self.kwargs or {})}

    def targets(self) -> set[str]:
        """Return all that is imported for it: the callable, and what the arguments name."""
        return {self.target, *names_in(self.arguments(), self.kinds)}


Entry: TypeAlias = Callable[..., Any] | str | Target


FUNCTIONS = ("loss", "step", "collate", "predict", "gradients", "buffers", "weight")


def is_function(name: str) -> bool:
    """Whether an entry does a thing, and so must be no class; the others make one."""
    return name.partition(".")[0] in FUNCTIONS


_TORCH_PUBLIC = ("torch.nn.functional", "torch", "torch.special", "torch.linalg", "torch.fft")


def check_kind(name: str, entry: Any) -> None:
    """Refuse what cannot be an entry, whatever its home."""
    if isinstance(entry, str):
        _check_syntax(name, entry)
        return
    if isinstance(entry, Target):
        _check_syntax(name, entry.target)
        return
    function = _unwrapped(entry)
    if not callable(function) or (not isinstance(function, type) and _is_module_object(function)):
        raise RecipeError(
            f"recipe entry {name!r} is an object of class {type(entry).__name__}, but must be a callable "
            f"that makes or does it: {_advice(name)}"
        )
    if name in ("dataset", "evaluation") and (kind := _kind_of_stream(function)):
        raise RecipeError(
            f"recipe entry {name!r} is {function.__name__}, {kind}, whose examples have no places by which "
            f"workers could share them: {STREAMED}"
        )
    if isinstance(function, type) and name.startswith("metrics."):
        lacking = [verb for verb in ("update", "compute", "merge_state") if not hasattr(function, verb)]
        if lacking:
            raise RecipeError(
                f"recipe entry {name!r} is the class {function.__name__}, which has no "
                f"{' and no '.join(lacking)}: {_advice(name)}"
            )
    elif isinstance(function, type) and is_function(name):
        raise RecipeError(
            f"recipe entry {name!r} is the class {function.__name__}, but must be a function: calling the "
            f"class would make an object instead of a result: {_advice(name)}"
        )


STREAMED = (
    "give a map-style dataset, with __len__ and __getitem__, or list its parts and their sizes: "
    "dataset=partial(Streamed, open=one_part, parts=[...], sizes=[...]) of torchord.coordinator.streaming"
)
"""The way out for data that can only be read one after the other."""


def _kind_of_stream(function: Any) -> str:
    """What gives a dataset entry no places, "" if nothing that can be seen before it is called."""
    if inspect.isgeneratorfunction(function):
        return "a generator function"
    return "" if not isinstance(function, type) or map_style(function) else stream(function)


def map_style(kind: type) -> bool:
    """Whether a class has lengths and places; torch's `Dataset` has a `__getitem__` that only refuses."""
    torch = sys.modules.get("torch")
    getter = getattr(kind, "__getitem__", None)
    refusing = torch is not None and getter is torch.utils.data.Dataset.__getitem__
    return getter is not None and not refusing and hasattr(kind, "__len__")


def stream(kind: type) -> str:
    """What a class without places is, in words, "" if it cannot be iterated over either."""
    torch = sys.modules.get("torch")
    if torch is not None and issubclass(kind, torch.utils.data.DataLoader):
        return "an iterable of batches"
    if torch is not None and issubclass(kind, torch.utils.data.IterableDataset):
        return "an IterableDataset"
    return "an iterable" if hasattr(kind, "__iter__") else ""


def _unwrapped(entry: Any) -> Any:
    return entry.func if isinstance(entry, functools.partial) else entry


def _is_module_object(value: Any) -> bool:
    """Whether this is an object of a torch module, without importing torch for the question."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.nn.Module)


def _advice(name: str) -> str:
    if name.startswith("metrics."):
        return (
            "give a function (outputs, targets) -> number in a module, a pair of functions (state, finish), "
            "or a class such as torchmetrics' itself, not called, e.g. functools.partial(BinaryAUROC, ...)"
        )
    if is_function(name):
        return "write a function in a module, or use one such as torch.nn.functional.cross_entropy"
    return f"give the class or function itself, not called, e.g. {name}=functools.partial(Thing, size=3)"


def _check_syntax(name: str, text: str) -> None:
    module, colon, attribute = text.partition(":")
    parts = [*module.split("."), *attribute.split(".")]
    if not colon or not all(part.isidentifier() for part in parts):
        raise RecipeError(
            f"recipe entry {name!r} is {text!r}, but a string must read 'package.module:attribute', e.g. "
            "'my_models.digits:DigitNet'"
        )


def encode(name: str, entry: Entry, where: str = "") -> Target:
    """Return an entry by name; `where` is which of its arguments it is, if it is one."""
    if isinstance(entry, str):
        return Target(entry)
    if isinstance(entry, Target):
        if entry.kinds:
            return entry
        args, kwargs = entry.args, dict(entry.kwargs or {})
        target = entry.target
    elif isinstance(entry, functools.partial):
        args, kwargs = entry.args, entry.keywords
        target = _name_of(name, entry.func, where)
    else:
        return Target(_name_of(name, entry, where))
    encoder = Encoder(name, functools.partial(_callable, name))
    of = f" of {where}" if where else ""
    plain_args = tuple(
        encoder.argument(value, ("args", place), f"argument {place}{of}") for place, value in enumerate(args)
    )
    plain_kwargs = {
        key: encoder.argument(value, ("kwargs", key), f"argument {key!r}{of}")
        for key, value in kwargs.items()
    }
    return Target(target, plain_args, plain_kwargs, tuple(encoder.kinds))


def _callable(name: str, where: str, value: Any) -> dict[str, Any] | None:
    """Return the spec of a callable among the arguments, None for a value of another sort."""
    named = (functools.partial, Target, type, FunctionType, BuiltinFunctionType, MethodType)
    return encode(name, value, where).to_json() if isinstance(value, named) else None


def _name_of(name: str, function: Any, where: str = "") -> str:
    """Return "module:qualname" under which importing gives this very object.

    Args:
        where: which argument of the entry it is, "" for the entry itself.
    """
    owner = getattr(function, "__self__", None)
    module: str
    path: str | None
    if isinstance(function, MethodType) and isinstance(owner, type):  # a classmethod
        module, path = owner.__module__, f"{owner.__qualname__}.{function.__name__}"
    else:
        module = getattr(function, "__module__", None) or ""
        path = getattr(function, "__qualname__", None)
    shown = f"{module}.{path}" if path else repr(function)
    public = _public_torch_name(function) if module == "torch" or module.startswith("torch.") else None
    if public is not None:
        return public
    if module not in ("", "__main__") and path and "<" not in path:
        found = _look_up(module, path)
        if found is function or (isinstance(function, MethodType) and found == function):
            return f"{_shortest_home(module, path, found)}:{path}"
    which = f"{name!r}: {where}" if where else repr(name)
    raise RecipeError(
        f"recipe entry {which} is {shown}, {_why_unimportable(function, module, path)}, so no worker can "
        "import it; move it to a module, e.g. my_models.py, and import it from there"
    )


def _shortest_home(module: str, path: str, found: Any) -> str:
    """Return torch.optim for torch.optim.adamw: torch moves things between its inner modules."""
    parts = module.split(".")
    if parts[0] == "torch":
        for depth in range(1, len(parts)):
            if _look_up(".".join(parts[:depth]), path) is found:
                return ".".join(parts[:depth])
    return module


def _why_unimportable(function: Any, module: Any, path: Any) -> str:
    if isinstance(path, str) and "<lambda>" in path:
        return "a lambda"
    if isinstance(path, str) and "<locals>" in path:
        return "which is defined inside a function"
    if module == "__main__":
        return "which belongs to the script or session that is being run"
    if isinstance(function, MethodType):
        return "a method of an object"
    if path is None:
        return f"an object of class {type(function).__name__}"
    return "which is not what its name leads to (was it decorated or replaced?)"


def _look_up(module: str, path: str) -> Any:
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, part, None)
    return found


def _public_torch_name(function: Any) -> str | None:
    """Return the public name of one of torch's functions, many of which carry a private one."""
    for module in _TORCH_PUBLIC:
        namespace: ModuleType | None = sys.modules.get(module)
        for name, value in vars(namespace).items() if namespace else ():
            if value is function and not name.startswith("_"):
                return f"{module}:{name}"
    return None


def decode(name: str, value: Any) -> Target:
    """Return an entry of a spec as what it is, with nothing imported.

    Raises:
        RecipeError: it is malformed.
    """
    if not isinstance(value, Mapping) or not isinstance(value.get("target"), str):
        raise RecipeError(f"recipe entry {name!r} is malformed: {value!r}")
    args, kwargs = value.get("args", []), value.get("kwargs", {})
    if not isinstance(args, (list, tuple)) or not isinstance(kwargs, Mapping):
        raise RecipeError(f"recipe entry {name!r} has malformed arguments: {value!r}")
    _check_syntax(name, value["target"])
    kinds = value.get("kinds", [])
    if not isinstance(kinds, (list, tuple)) or not all(isinstance(kind, list) for kind in kinds):
        raise RecipeError(f"recipe entry {name!r} has malformed kinds of arguments: {kinds!r}")
    return Target(present_name(value["target"]), tuple(args), dict(kwargs), tuple(kinds))
