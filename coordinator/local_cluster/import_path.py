"""Where this process finds modules beyond what is installed, and what its workers are told of it."""

from __future__ import annotations

import site
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).absolute().parents[3]  # above torchord/


def beyond_installation() -> list[Path]:
    """The directories of `sys.path` that belong to no installation, in order (a script's, PYTHONPATH's)."""
    installed = _installed()
    entries = (Path(entry).absolute() for entry in sys.path if Path(entry).is_dir())
    beyond = (path for path in entries if not any(path == base or base in path.parents for base in installed))
    return list(dict.fromkeys(beyond))


def for_workers() -> list[Path]:
    """The PYTHONPATH of a worker that is to import what this process can import, and the same files.

    That is `beyond_installation` in its order, then the working directory. The directory above torchord/
    comes last, and only where a worker would not find torchord without it: in a checkout it has folders
    `tasks`, `coordinator` and `cache`, which must not stand before a user's own modules of these names.
    """
    root = [] if _finds_torchord() else [ROOT]
    return list(dict.fromkeys((*beyond_installation(), Path.cwd(), *root)))


def allow_list(directory: Path, given: tuple[str, ...] | None = None) -> tuple[str, ...]:
    """What a program admits, and its workers whose server nobody else submits to.

    That is what is given, else what lies where it was started, wherever that is; in torchord's checkout its
    tests and examples, too.
    """
    if given is not None:
        return given
    own = ("tests", "benchmarks", "examples") if is_checkout(directory) else ()
    return (".", "torch", *own)


def is_checkout(root: Path) -> bool:
    """Whether a directory is a checkout of torchord."""
    marks = ("torchord/doors.py", "coordinator/spec/admission.py", "pyproject.toml")
    return all((root / mark).is_file() for mark in marks)


def _installed() -> set[Path]:
    return {
        Path(path)
        for path in (*sysconfig.get_paths().values(), *site.getsitepackages(), site.getusersitepackages())
    }


def _finds_torchord() -> bool:
    """Whether any interpreter of this installation finds torchord: in site-packages, or in editable form."""
    if ROOT in _installed():
        return True
    editable = (one for one in sys.meta_path if getattr(one, "__module__", "").startswith("__editable__"))
    return any(_leads_here(finder.find_spec("torchord", None)) for finder in editable)


def _leads_here(spec: object) -> bool:
    origin = getattr(spec, "origin", None)
    return origin is not None and Path(origin).absolute() == ROOT / "torchord" / "__init__.py"
