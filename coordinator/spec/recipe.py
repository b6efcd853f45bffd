"""`Recipe`: what is trained, as names that every worker can import.

A recipe holds callables; what travels is its spec, plain JSON that says for each entry which
module and attribute to import and which arguments to bind. Nothing is pickled. A worker
resolves a spec only within its allow-list (`torchord.coordinator.spec.admission`).
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, TypeAlias

from torchord.cache.errors import NotAllowed, RecipeError
from torchord.coordinator.spec.admission import (
    OWN_TARGETS,
    START_DIRECTORY,
    Admission,
    present_name,
    source_file,
)
from torchord.coordinator.spec.arguments import Encoder, names_in, restored
from torchord.coordinator.spec.codecs import CodecOf, codecs_within


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

_REQUIRED = ("model", "dataset", "optimizer")
_FUNCTIONS = ("loss", "step", "collate")
_TORCH_PUBLIC = ("torch.nn.functional", "torch", "torch.special", "torch.linalg", "torch.fft")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is trained. Each entry is an importable callable, a `functools.partial` of one with
    arguments bound, or the string "package.module:attribute".

    Attributes:
        model: () -> torch.nn.Module.
        dataset: () -> map-style dataset (`__len__` and `__getitem__`, optionally `__getitems__`).
        optimizer: (parameters, or the groups of `parameter_groups`) -> torch.optim.Optimizer.
        loss: (outputs, targets) -> mean loss over the shard, a scalar tensor; the batch must
            then be a pair (inputs, targets) and the model is called as model(inputs).
        step: (model, batch) -> mean loss over the shard, for any other model; give exactly one
            of `loss` and `step`.
        scheduler: (optimizer) -> torch learning-rate scheduler, stepped once a global step.
        evaluation: () -> map-style dataset for evaluations.
        metrics: name -> (outputs, targets) -> mean over the shard, a number or scalar tensor;
            only with `loss`, since `step` hands out no outputs.
        collate: (list of samples) -> batch; None: torch's default collate.
        parameter_groups: (model) -> parameter groups for the optimizer; None:
            model.parameters().
        outer_optimizer: (parameters) -> torch.optim.Optimizer that the training server applies to the
            averaged pseudo-gradients when the config asks for local steps; `optimizer` and
            `scheduler` are then the shards' own. None: the mean of the shards' weights (Local SGD);
            `torchord.coordinator.local_steps:diloco` is DiLoCo's.

    Arguments arrive at the workers as what they are (numbers of Python and numpy, NaN included, strings,
    bytes, lists, tuples, dicts, paths, dtypes, devices, members of enumerations, importable callables
    and partials of them), or are refused.

    Raises:
        RecipeError: an entry is missing, superfluous or not callable. Whether the workers can
            import it is checked by `to_spec`, which `Master.submit` calls.

    Example:
        >>> from functools import partial
        >>> recipe = Recipe(model=partial("my_models:Net"), ...)  # doctest: +SKIP
    """

    model: Entry
    dataset: Entry
    optimizer: Entry
    loss: Entry | None = None
    step: Entry | None = None
    scheduler: Entry | None = None
    evaluation: Entry | None = None
    metrics: Mapping[str, Entry] | None = None
    collate: Entry | None = None
    parameter_groups: Entry | None = None
    outer_optimizer: Entry | None = None

    def __post_init__(self) -> None:
        if (self.loss is None) == (self.step is None):
            given = "neither" if self.loss is None else "both"
            raise RecipeError(
                "a recipe needs exactly one of loss=(outputs, targets) -> scalar and step=(model, batch) -> "
                f"scalar; {given} was given"
            )
        if self.metrics and self.step is not None:
            raise RecipeError(
                "metrics need loss=: a step returns only its loss, so there are no outputs to measure; leave "
                "metrics out, or give model and loss separately"
            )
        if self.metrics is not None and not isinstance(self.metrics, Mapping):
            raise RecipeError("metrics must be a dict of name -> callable")
        for name, entry in _entries(self).items():
            _check_kind(name, entry)

    def to_spec(self) -> dict[str, Any]:
        """Return the recipe as plain JSON, after checking that each entry can be imported by name.

        Returns:
            entry name -> {"target": "package.module:attribute", "args": [...], "kwargs": {...}}, with
            "kinds" where arguments are more than JSON; entries that were not given are left out, and
            "metrics" maps names to such entries.

        Raises:
            RecipeError: a worker could not import a callable (a lambda, a local function or
                class, something of the script that is being run, a method of an object), or an
                argument cannot arrive as what it is.
        """
        spec: dict[str, Any] = {}
        for name, entry in _entries(self).items():
            target = _encode(name, entry)
            encoded = replace(target, target=present_name(target.target)).to_json()
            group, _, metric = name.partition(".")
            if metric:
                spec.setdefault(group, {})[metric] = encoded
            else:
                spec[name] = encoded
        return spec

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> Recipe:
        """Rebuild a recipe from `to_spec` without importing anything.

        Raises:
            RecipeError: the spec has an unknown or malformed entry.
        """
        entries: dict[str, Any] = {}
        for name, value in spec.items():
            if name not in {field.name for field in fields(cls)}:
                raise RecipeError(f"a recipe has no entry {name!r}")
            if name == "metrics" and isinstance(value, Mapping):
                entries[name] = {metric: _decode(f"metrics.{metric}", v) for metric, v in value.items()}
            else:
                entries[name] = _decode(name, value)
        return cls(**entries)


@dataclass(frozen=True, kw_only=True)
class ResolvedRecipe:
    """A recipe whose callables were imported, arguments bound; the fields of `Recipe`.

    Attributes:
        codec: the codec that a config's `compression` or a slot's record names; one of an import path
            comes from where the recipe may.
    """

    model: Callable[..., Any]
    dataset: Callable[..., Any]
    optimizer: Callable[..., Any]
    loss: Callable[..., Any] | None
    step: Callable[..., Any] | None
    scheduler: Callable[..., Any] | None
    evaluation: Callable[..., Any] | None
    metrics: Mapping[str, Callable[..., Any]]
    collate: Callable[..., Any] | None
    parameter_groups: Callable[..., Any] | None
    outer_optimizer: Callable[..., Any] | None = None
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
    entries = _entries(recipe)
    targets = _targets(recipe)
    admission = Admission(allowed, directory or START_DIRECTORY, tuple(sorted(targets - OWN_TARGETS)))
    found = {name: _bind(name, entry, admission) for name, entry in entries.items()}
    metrics = {name.partition(".")[2]: call for name, call in found.items() if name.startswith("metrics.")}
    plain = {field.name: found.get(field.name) for field in fields(ResolvedRecipe)}
    return ResolvedRecipe(**{**plain, "metrics": metrics, "codec": codecs_within(admission)})  # type: ignore[arg-type]


def modules_of(spec: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the modules that a spec names, sorted, each once."""
    return tuple(sorted({target.partition(":")[0] for target in _targets(Recipe.from_spec(spec))}))


def fingerprint(spec: Mapping[str, Any]) -> str:
    """Return digests of the user's own source files that a spec names.

    Covered are the modules that contain the named callables, where they are Python files
    outside installed packages, the standard library and torch; modules that those import are
    not. A module that cannot be found here is left out.

    Returns:
        "module=digest" (BLAKE2b of the file's bytes, 16 hex digits), comma-separated and
        sorted by module; equal sources give equal strings. Compare with `skewed`.
    """
    digests = []
    for module in modules_of(spec):
        file = source_file(module)
        if file is not None:
            digests.append(f"{module}={hashlib.blake2b(file.read_bytes(), digest_size=8).hexdigest()}")
    return ",".join(digests)


def skewed(ours: str, theirs: str) -> list[str]:
    """Return the modules whose sources differ between two fingerprints, among those in both."""
    mine = dict(item.split("=", 1) for item in ours.split(",") if item)
    other = dict(item.split("=", 1) for item in theirs.split(",") if item)
    return sorted(module for module in mine.keys() & other.keys() if mine[module] != other[module])


# --- from callables to names ------------------------------------------------------------


def _entries(recipe: Recipe) -> dict[str, Entry]:
    """Return the entries that were given by name, metrics as "metrics.<name>"."""
    found: dict[str, Entry] = {}
    for field in fields(recipe):
        value = getattr(recipe, field.name)
        if field.name == "metrics":
            found.update({f"metrics.{name}": entry for name, entry in (value or {}).items()})
        elif value is not None or field.name in _REQUIRED:
            found[field.name] = value
    return found


def _targets(recipe: Recipe) -> set[str]:
    """Return all that a recipe made from a spec has its workers import."""
    entries = (entry for entry in _entries(recipe).values() if isinstance(entry, Target))
    return set().union(*(entry.targets() for entry in entries))


def _check_kind(name: str, entry: Any) -> None:
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
    if isinstance(function, type) and (name in _FUNCTIONS or name.startswith("metrics.")):
        raise RecipeError(
            f"recipe entry {name!r} is the class {function.__name__}, but must be a function: calling the "
            f"class would make an object instead of a result: {_advice(name)}"
        )


def _unwrapped(entry: Any) -> Any:
    return entry.func if isinstance(entry, functools.partial) else entry


def _is_module_object(value: Any) -> bool:
    """Whether this is an object of a torch module, without importing torch for the question."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.nn.Module)


def _advice(name: str) -> str:
    if name in _FUNCTIONS or name.startswith("metrics."):
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


def _encode(name: str, entry: Entry, where: str = "") -> Target:
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
    return _encode(name, value, where).to_json() if isinstance(value, named) else None


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


# --- from names to callables ------------------------------------------------------------


def _decode(name: str, value: Any) -> Target:
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


def _bind(name: str, entry: Entry, admission: Admission) -> Callable[..., Any]:
    if not isinstance(entry, Target):  # pragma: no cover - from_spec makes Targets only
        raise RecipeError(f"recipe entry {name!r} is not a reference")
    try:
        found = admission.fetch(entry.target)
    except NotAllowed as error:
        raise NotAllowed(f"recipe entry {name!r}: {error}") from None
    except RecipeError as error:
        raise RecipeError(f"recipe entry {name!r}: {error}") from error.__cause__
    if inspect.isclass(found) and (name in _FUNCTIONS or name.startswith("metrics.")):
        raise RecipeError(f"recipe entry {name!r}: {entry.target!r} is a class, but must be a function")
    if not (entry.args or entry.kwargs):
        return found
    try:
        bound = restored(
            entry.arguments(),
            entry.kinds,
            fetch=admission.fetch,
            bind=lambda value: _bind(f"{name}'s argument", _decode(name, value), admission),
        )
    except NotAllowed as error:
        raise NotAllowed(f"recipe entry {name!r}: {error}") from None
    except RecipeError as error:
        raise RecipeError(f"recipe entry {name!r}: {error}") from error.__cause__
    return functools.partial(found, *bound["args"], **bound["kwargs"])
