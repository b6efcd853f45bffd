"""Which modules a worker may import on behalf of a recipe.

Whoever can write to the queue can name any module in a recipe, and importing a module runs
it. So each module is judged by its name and by where its file lies before anything of it
runs, and what a name leads to is judged once more after it was resolved.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from torchord.cache.errors import NotAllowed, RecipeError
from torchord.coordinator.spec.building_blocks import admitted, wanted
from torchord.coordinator.spec.default_dtype import imported
from torchord.coordinator.spec.start_place import doubt, is_torchords_own, others_write

HERE = "."
"""The word of an allow-list for the modules whose file lies under the directory that the worker was
started in and belongs to no installed package."""

DEFAULT_ALLOWED = (HERE, "torch")
"""The allow-list of a worker that was given none, in a directory that nobody else writes to."""

START_DIRECTORY = Path.cwd().resolve()
"""The directory that the process was started in, as seen when this module was first imported."""

TORCH_MODULES = (
    "torch.amp",
    "torch.distributions",
    "torch.fft",
    "torch.functional",
    "torch.linalg",
    "torch.nn",
    "torch.optim",
    "torch.signal",
    "torch.special",
    "torch.utils.data",
    "torch._C._fft",
    "torch._C._linalg",
    "torch._C._nn",
    "torch._C._special",
)
"""The parts of torch that recipes are made of, with all their submodules; `torch` itself
(`torch.relu`, `torch.float32`) is admitted without its submodules. Whatever else torch has
(`torch.hub`, `torch.serialization`, `torch.package`, `torch.jit`, `torch.ops`,
`torch.distributed`, `torch.utils.cpp_extension`, ...) loads files or runs code, or may come
to; a worker that needs such a part names it in its allow-list."""

OWN_TARGETS = frozenset(
    {
        "torchord:stored_dataset",
        "torchord.coordinator:stored_dataset",
        "torchord.coordinator.datasets:stored_dataset",
        "torchord.coordinator.adapters.keras:finish",
        "torchord.coordinator.adapters.keras:groups_of",
        "torchord.coordinator.adapters.keras:made",
        "torchord.coordinator.adapters.keras:optimizer_of",
        "torchord.coordinator.adapters.keras:predict",
        "torchord.coordinator.adapters.keras:state",
        "torchord.coordinator.adapters.keras:step",
        "torchord.coordinator.adapters.lightning:configured",
        "torchord.coordinator.adapters.lightning:made",
        "torchord.coordinator.adapters.lightning:optimizer_of",
        "torchord.coordinator.adapters.lightning:predict",
        "torchord.coordinator.adapters.lightning:scheduler_of",
        "torchord.coordinator.adapters.lightning:step",
        "torchord.coordinator.adapters.logged:finish",
        "torchord.coordinator.adapters.logged:state",
        "torchord.coordinator.averages:ema",
        "torchord.coordinator.averages:swa",
        "torchord.coordinator.callbacks:Csv",
        "torchord.coordinator.callbacks:JsonLines",
        "torchord.coordinator.callbacks:MLflow",
        "torchord.coordinator.callbacks:TensorBoard",
        "torchord.coordinator.callbacks:WandB",
        "torchord.coordinator.estimator:squared",
        "torchord.coordinator.local_steps:averaging",
        "torchord.coordinator.local_steps:diloco",
        "torchord.coordinator.orders:balanced",
        "torchord.coordinator.orders:bucketed",
        "torchord.coordinator.orders:by_parts",
        "torchord.coordinator.orders:weighted",
        "torchord.coordinator.schedules:each_epoch",
        "torchord.coordinator.streaming:Streamed",
    }
)
"""What torchord itself offers to recipes: admitted by its full name on every worker, wherever
torchord is installed. The rest of those modules is judged like any other."""


_TORCH_NAMES_REFUSED = frozenset({"from_file", "compile", "save", "load"})


def within(name: str, prefix: str) -> bool:
    """Return whether a dotted name is `prefix` or lies below it: "ab.c" is not within "a"."""
    return name == prefix or name.startswith(prefix + ".")


def present_name(target: str) -> str:
    """Today's name of what torchord offers to recipes, for specs from when it had no name at top level.

    Anything else is returned as it is.
    """
    renamed = f"torchord.{target}"
    return renamed if renamed in OWN_TARGETS else target


def torch_admits(name: str) -> bool:
    """Return whether a module is one of the parts of torch that recipes are made of."""
    return name == "torch" or any(within(name, part) for part in TORCH_MODULES)


@dataclass(frozen=True)
class Admission:
    """The rule of one worker.

    Attributes:
        allowed: module prefixes that may be imported, each with what lies below it ("." means
            modules whose file lies under `directory` and is no installed package, "torch" means
            `TORCH_MODULES`, "*" means anything, for a process that wrote the recipe itself);
            None: `DEFAULT_ALLOWED`, but for "." in directories of which `start_place.doubt` says why.
        directory: where the worker was started; consulted only if "." is allowed.
        needs: all targets of the recipe, so that a refusal can say at once what it takes to admit it.
    """

    allowed: tuple[str, ...] | None
    directory: Path = field(default_factory=lambda: START_DIRECTORY)
    needs: tuple[str, ...] = ()

    @property
    def listed(self) -> tuple[str, ...]:
        """The allow-list in force."""
        if self.allowed is not None:
            return self.allowed
        return ("torch",) if self.doubt else DEFAULT_ALLOWED

    @functools.cached_property
    def doubt(self) -> str:
        """Why nothing of the directory is admitted unasked, in words; "" if something is."""
        return doubt(self.directory) if self.allowed is None else ""

    @property
    def warning(self) -> str:
        """What to tell whoever starts the worker in a directory that vouches for nothing; "" for nothing."""
        if not self.doubt:
            return ""
        return (
            f"{self.directory} {self.doubt}, so no module in it is admitted: start the worker in a directory "
            "of your own, or name the modules in TORCHORD_ALLOWED_MODULES (. stands for all that lies there)"
        )

    def describe(self) -> str:
        """What is admitted, in words: "modules under /home/me/project and the building blocks of torch"."""
        if "*" in self.listed:
            return "every module"
        words = {HERE: f"modules under {self.directory}", "torch": "the building blocks of torch"}
        *first, last = (words.get(name, name) for name in self.listed or ("nothing",))
        return f"{', '.join(first)} and {last}" if first else last

    def load(self, module: str) -> ModuleType:
        """Import a module, its parents first, each judged before any of it runs.

        Raises:
            NotAllowed: the module, or a parent, may not be imported here.
            RecipeError: there is no such module, or importing it raised.
        """
        parts = module.split(".")
        loaded: ModuleType | None = None
        for depth in range(1, len(parts) + 1):
            name = ".".join(parts[:depth])
            spec = _find(name, module)
            last = depth == len(parts)
            self._judge(name, spec, target=module, last=last)
            try:
                loaded = imported(name)
            except RecipeError:
                raise
            except Exception as error:
                raise RecipeError(
                    f"importing module {name!r} for the recipe raised {type(error).__name__}: {error}"
                ) from error
            except BaseException as end:
                end.add_note(f"torchord: raised while importing module {name!r}")
                raise
        assert loaded is not None
        return loaded

    def fetch(self, target: str, role: str = "") -> Callable[..., Any]:
        """Import "package.module:attribute" and return the object, judged itself as well.

        Args:
            role: where it stands in the recipe, see `building_blocks.admitted`.

        Raises:
            NotAllowed: module or object may not be used here.
            RecipeError: there is no such module or attribute, or it is not callable.
        """
        module, _, path = target.partition(":")
        if target in OWN_TARGETS:
            own: Callable[..., Any] = getattr(importlib.import_module(module), path)
            return own
        found: Any = self.load(module)
        for name in path.split("."):
            if name.startswith("__"):
                raise NotAllowed(f"{target!r} reaches through {name!r}; recipes name plain attributes only")
            try:
                found = getattr(found, name)
            except AttributeError:
                raise RecipeError(
                    f"module {module!r} has no attribute {path!r} on this worker; does it run the same code "
                    "as the submitter?"
                ) from None
            if isinstance(found, ModuleType):
                self._admit_name(found.__name__, target)
        if not callable(found):
            raise RecipeError(f"{target!r} is of type {type(found).__name__}, but must be a callable")
        self._admit_object(found, target)
        self._admit_block(found, target, role)
        result: Callable[..., Any] = found
        return result

    def _admit_object(self, found: Any, target: str) -> None:
        inner = found
        while isinstance(inner, functools.partial):
            inner = inner.func
        origin = getattr(inner, "__module__", None) or type(inner).__module__
        self._admit_name(origin, target)
        name = getattr(inner, "__name__", "")
        if within(origin, "torch") and name in _TORCH_NAMES_REFUSED and not self._names(origin):
            raise NotAllowed(f"{target!r} is torch.{name}, which loads files or compiles code")

    def _admit_block(self, found: Any, target: str, role: str) -> None:
        """Judge a part of torch by its place, unless the allow-list itself names where it comes from."""
        inner = found.func if isinstance(found, functools.partial) else found
        origin = getattr(inner, "__module__", None) or type(inner).__module__
        module = _module(target)
        if not (within(module, "torch") or within(origin, "torch")) or "*" in self.listed:
            return
        if self._names(module) or (not within(module, "torch") and self._names(origin)):
            return
        if not admitted(target, inner, role, origin=origin):
            raise NotAllowed(
                f"{target!r} is no building block of torch for this place (here it takes {wanted(role)}); "
                "call it in a function of your own module, or name its module in TORCHORD_ALLOWED_MODULES"
            )

    def _admit_name(self, name: str, target: str) -> None:
        """Judge a module that is imported already, as the home of an object."""
        module = sys.modules.get(name)
        spec = getattr(module, "__spec__", None)
        file = getattr(module, "__file__", None)
        if not self._permits(name, spec, file):
            raise self._refusal(name, target)

    def _judge(self, name: str, spec: ModuleSpec, *, target: str, last: bool) -> None:
        if not last and spec.origin is None and spec.submodule_search_locations is not None:
            return  # a namespace package has no code of its own; its child is judged next
        if not last and any(within(p, name) for p in self.listed):
            return  # the allow-list names something below this package, so it admits the package's own file
        if not last and any(within(part, name) for part in TORCH_MODULES):
            return  # torch is running already; its submodule is judged next
        if not self._permits(name, spec, spec.origin if spec.has_location else None):
            raise self._refusal(name, target)

    def _permits(self, name: str, spec: ModuleSpec | None, file: str | None) -> bool:
        if name == "__main__":
            return False
        if "*" in self.listed:
            return True
        if within(name, "torch"):
            return ("torch" in self.listed and torch_admits(name)) or self._names(name)
        if self._names(name):
            return True
        if within(name, "torchord"):  # in its own checkout it lies under the directory, and is no recipe
            return False
        if HERE not in self.listed or file is None or not _is_project_file(Path(file), self.directory):
            return False
        if is_torchords_own(Path(file).resolve(), self.directory.resolve()):
            return False
        return self.allowed is not None or not _is_open(Path(file), self.directory)

    def _names(self, name: str) -> bool:
        """Whether the allow-list itself names the module (for torch: a part of it)."""
        listed = [prefix for prefix in self.listed if prefix not in ("torch", "*")]
        if within(name, "torch._C") and torch_admits(
            name
        ):  # where functions of torch.nn and others really live
            return any(within(prefix, "torch") for prefix in listed)
        return any(within(name, prefix) for prefix in listed)

    def _refusal(self, name: str, target: str) -> NotAllowed:
        others = (_prefix(module) for module in map(_module, self.needs) if self._would_refuse(module))
        missing = dict.fromkeys((_prefix(name), *others))
        why = f"; {self.directory} {self.doubt}" if self.doubt else ""
        return NotAllowed(
            f"this worker may not import {name!r}, which the recipe needs for {target!r} (it admits "
            f"{self.describe()}{why}); to allow it, start the worker with "
            f"TORCHORD_ALLOWED_MODULES={','.join(dict.fromkeys((*self.listed, *missing)))}"
        )

    def _would_refuse(self, module: str) -> bool:
        """Whether a module that is there would be refused, from its outermost package; nothing is run."""
        if within(module, "torch") or self._names(module):
            return not self._permits(module, None, None)
        outermost = module.partition(".")[0]
        try:
            spec = importlib.util.find_spec(outermost)
        except (ImportError, ValueError, AttributeError):
            return False
        if spec is None or spec.origin is None:
            return False
        return not self._permits(outermost, spec, spec.origin if spec.has_location else None)


def _module(target: str) -> str:
    return target.partition(":")[0]


def _prefix(module: str) -> str:
    """What an allow-list names to admit a module: its outermost package, or a part of torch."""
    return module if within(module, "torch") and not torch_admits(module) else module.partition(".")[0]


def _find(name: str, target: str) -> ModuleSpec:
    """Locate a module without running it; its parents were imported (and judged) before."""
    present = sys.modules.get(name)
    try:
        spec = present.__spec__ if present is not None else importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):
        spec = None
    if spec is None and name != "__main__":
        raise RecipeError(
            f"there is no module {name!r} on this machine, which the recipe needs for {target!r}; "
            "start the worker in the directory of your code, or install it there"
        )
    return spec if spec is not None else ModuleSpec(name, None)


def _is_project_file(file: Path, directory: Path) -> bool:
    """Whether a file lies under a directory and belongs to no installed package or interpreter."""
    file = file.resolve()
    directory = directory.resolve()
    if not file.is_relative_to(directory):
        return False
    if {"site-packages", "dist-packages"} & set(file.parts):
        return False
    if any(file.is_relative_to(place) for place in _interpreter_places(directory)):
        return False
    between = [parent for parent in file.parents if parent != directory and parent.is_relative_to(directory)]
    return not any((parent / "pyvenv.cfg").is_file() for parent in between)


def _is_open(file: Path, directory: Path) -> bool:
    """Whether others can write to a file, or put another into one of the folders above it."""
    file, directory = file.resolve(), directory.resolve()
    below = [parent for parent in file.parents if parent != directory and parent.is_relative_to(directory)]
    return any(map(others_write, (file, *below)))


def _interpreter_places(directory: Path) -> Iterator[Path]:
    for key in ("stdlib", "platstdlib", "purelib", "platlib"):
        place = sysconfig.get_path(key)
        if place:
            yield Path(place).resolve()
    for prefix in {sys.prefix, sys.base_prefix, sys.exec_prefix}:
        place_of_prefix = Path(prefix).resolve()
        if place_of_prefix != directory and place_of_prefix.is_relative_to(directory):
            yield place_of_prefix


def source_file(module: str) -> Path | None:
    """Return the source file of a module that is no installed package, else None.

    The module itself is not run; its parent packages are imported.
    """
    if within(module, "torch"):
        return None
    try:
        present = sys.modules.get(module)
        spec = present.__spec__ if present is not None else importlib.util.find_spec(module)
    except (Exception, SystemExit):  # noqa: BLE001  of a parent package, whose import itself says more
        return None
    if spec is None or not spec.has_location or spec.origin is None:
        return None
    file = Path(spec.origin).resolve()
    if file.suffix != ".py" or not _is_project_file(file, Path(file.anchor)):
        return None
    return file
