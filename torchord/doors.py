"""The old names `tasks`, `coordinator` and `cache`, in a checkout: the same modules, never a second copy.

A checkout has the three packages in folders of these names, so `celery -A tasks worker`,
`from coordinator import Master` and `python -m coordinator` find them when they run there. Such a folder's
`__init__` calls `open_door`, which puts torchord's module in its own place.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import InspectLoader, Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import CodeType, ModuleType


class _Doors(MetaPathFinder, Loader):
    """Finds `coordinator.x` where `torchord.coordinator.x` is, for the packages whose doors are open."""

    def __init__(self) -> None:
        self.open: set[str] = set()
        self._specs: dict[str, ModuleSpec | None] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder`."""
        package, _, rest = fullname.partition(".")
        if package not in self.open or not rest:
            return None
        found = find_spec(f"torchord.{fullname}")
        return None if found is None else ModuleSpec(fullname, self, origin=found.origin)

    def get_code(self, fullname: str) -> CodeType | None:
        """What `python -m coordinator` runs as its program: the code of torchord's module."""
        spec = find_spec(f"torchord.{fullname}")
        return spec.loader.get_code(spec.name) if spec and isinstance(spec.loader, InspectLoader) else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """See `importlib.abc.Loader`: torchord's own module, imported if it was not."""
        module = import_module(f"torchord.{spec.name}")
        self._specs[spec.name] = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """See `importlib.abc.Loader`; the module has run. Importing set its `__spec__` to the old name's."""
        spec = module.__spec__
        if spec is not None and spec.name in self._specs:
            module.__spec__ = self._specs.pop(spec.name)


_doors = _Doors()


def open_door(package: str) -> None:
    """Let a package's old name stand for torchord's, and what lies below it likewise.

    Args:
        package: "tasks", "coordinator" or "cache".
    """
    if not _doors.open:
        sys.meta_path.insert(0, _doors)
    _doors.open.add(package)
    sys.modules[package] = import_module(f"torchord.{package}")
