"""torchord installed as people install it: from a wheel or in editable form, in a venv of its own, offline.

The venv sees the dependencies of the interpreter that runs the tests, through a path file, and not that
interpreter's own torchord: path files in a directory that a path file names are not read.
"""

from __future__ import annotations

import shutil
import site
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("cache", "coordinator", "tasks", "torchord", "pyproject.toml", "README.md", "LICENSE")


@dataclass(frozen=True)
class Installation:
    """A venv with torchord in it.

    Attributes:
        folder: the venv.
        wheel: what was installed.
    """

    folder: Path
    wheel: Path

    def program(self, name: str) -> str:
        """Path of a console script, or of `python`."""
        return str(self.folder / "bin" / name)


def checkout(folder: Path) -> Path:
    """A copy of what the package is built from, links as links."""
    folder.mkdir()
    for name in PARTS:
        source = ROOT / name
        if source.is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, folder / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(source, folder / name)
    return folder


def install(source: Path, folder: Path, *, editable: bool) -> Installation:
    """Build a wheel of a checkout and install it into a new venv.

    Args:
        source: from `checkout`.
        folder: for the venv and the wheel; it must not exist.
        editable: whether the wheel only leads to `source`.
    """
    wheels, environment = folder / "wheels", folder / "venv"
    wheels.mkdir(parents=True)
    build = "build_editable" if editable else "build_wheel"
    code = f"import sys; from setuptools import build_meta; build_meta.{build}(sys.argv[1])"
    _run([sys.executable, "-c", code, str(wheels)], cwd=source)
    [wheel] = wheels.glob("*.whl")
    venv.EnvBuilder(symlinks=True).create(environment)
    packages = Path(sysconfig.get_path("purelib", vars={"base": environment, "platbase": environment}))
    places = dict.fromkeys(
        [*(sysconfig.get_path(key) for key in ("purelib", "platlib")), *site.getsitepackages()]
    )
    (packages / "dependencies.pth").write_text("".join(f"{place}\n" for place in places))
    python = environment / "bin" / "python"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "--quiet",
        "install",
        "--no-deps",
        "--no-index",
    ]
    _run([*pip, str(wheel)], cwd=folder)
    script = environment / "bin" / "celery"  # as pip writes it for Celery's entry point
    body = 'import sys\nfrom celery.__main__ import main\nif __name__ == "__main__":\n    sys.exit(main())\n'
    script.write_text(f"#!{python}\n{body}")
    script.chmod(0o755)
    return Installation(environment, wheel)


def _run(command: list[str], *, cwd: Path) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
