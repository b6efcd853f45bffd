"""Whether the declared ranges hold: unit tests and demo with the lowest and newest versions on each Python.

    python -m tests.ranges                               every Python on the PATH
    python -m tests.ranges --folder ~/.pyenv/versions    and every one below a folder
    python -m tests.ranges --python python3.13 --end lowest -- -k checkpoint

For each Python that `requires-python` admits, and for each end of the ranges in pyproject.toml, it makes a
virtual environment, lets pip fill it (all extras; wheels only, so that nobody needs a compiler), runs
the unit tests and the demo there, and deletes it: one after the other, since each takes some 6 GB with
torch's build for CUDA. What the commands print passes through; a table of what passed comes last. The exit
status is 1 if anything failed, or if a Python that a classifier names was not there.

*lowest*: each direct dependency at its floor (`>=`), everything else as pip chooses. *newest*: the newest
that the ranges admit and pip finds, without constraints.txt.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[1]
ENDS = ("lowest", "newest")
CLASSIFIER = "Programming Language :: Python :: "
SHOWN = ("celery", "numpy", "redis", "safetensors", "torch")  # what the table tells the versions of
ASK = "import sys; print('.'.join(map(str, sys.version_info[:3])))"


@dataclass(frozen=True)
class Outcome:
    """What one environment showed; a step that was not reached is "-"."""

    python: str
    end: str
    versions: str = "-"
    steps: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every step did."""
        return len(self.steps) == len(STEPS) and all(step == "passed" for step in self.steps)


STEPS = {
    "installs": ["pip", "check"],
    "unit tests": ["pytest", "-q", "tests/unit"],
    "demo": ["examples.digits"],
}
"""Column of the table -> what `python -m` runs, once pip has installed what there is to install."""


def project() -> dict[str, Any]:
    """The table [project] of pyproject.toml."""
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return table


def floors(declared: dict[str, Any]) -> list[str]:
    """Constraint lines that hold every direct dependency, of all extras, at its lower bound.

    Raises:
        ValueError: a requirement has none, or several.
    """
    lines = [*declared["dependencies"]]
    for extra in declared["optional-dependencies"].values():
        lines += extra
    pinned = []
    for requirement in map(Requirement, lines):
        lowest = [part.version for part in requirement.specifier if part.operator == ">="]
        if len(lowest) != 1:
            raise ValueError(f"{requirement} needs one lower bound (>=)")
        marker = f"; {requirement.marker}" if requirement.marker else ""
        pinned.append(f"{requirement.name}=={lowest[0]}{marker}")
    return pinned


def named_pythons(declared: dict[str, Any]) -> set[str]:
    """The versions ("3.12") that a classifier names."""
    names = (line.removeprefix(CLASSIFIER) for line in declared["classifiers"] if line.startswith(CLASSIFIER))
    return {name for name in names if "." in name}


def candidates(path: str, folders: Iterable[Path]) -> Iterator[Path]:
    """What may be a Python: `python3` and `python3.N` in the directories of `path`, and below `folders`.

    A folder holds one installation a subdirectory, as pyenv's `versions` does.
    """
    for directory in map(Path, filter(None, path.split(os.pathsep))):
        found = directory.glob("python3*") if directory.is_dir() else []
        yield from sorted(name for name in found if re.fullmatch(r"python3(\.\d+)?", name.name))
    for folder in folders:
        yield from sorted(folder.expanduser().glob("*/bin/python3"))


def interpreters(found: Iterable[Path], admitted: SpecifierSet) -> dict[str, Path]:
    """Version ("3.12.1") -> program, oldest first: the first that starts of each minor version admitted."""
    by_minor: dict[tuple[int, ...], tuple[str, Path]] = {}
    for name in found:
        program = Path(shutil.which(name) or name).absolute()
        try:
            answer = subprocess.run(
                [program, "-c", ASK], capture_output=True, text=True, check=True, timeout=60
            )
        except (OSError, subprocess.SubprocessError):
            continue  # a name that leads nowhere, such as the shim of a version that is not switched on
        version = answer.stdout.strip()
        minor = tuple(int(part) for part in version.split(".")[:2])
        if version in admitted:
            by_minor.setdefault(minor, (version, program))
    return dict(by_minor[minor] for minor in sorted(by_minor))


def run(python: Path, *arguments: str) -> bool:
    """Whether `python -m arguments`, from the root of the checkout, succeeds."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    print("$", python, "-m", *arguments, flush=True)
    return subprocess.run([python, "-m", *arguments], cwd=ROOT, env=kept, check=False).returncode == 0


def installed(python: Path) -> str:
    """The versions there of the packages that the table shows."""
    ask = f"import importlib.metadata as m; print(*(f'{{n}} {{m.version(n)}}' for n in {SHOWN}), sep=', ')"
    return subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout.strip()


def fill(python: Path, end: str, folder: Path) -> bool:
    """Whether pip installs the checkout, with all its extras, at this end of the ranges."""
    declared = project()
    arguments = ["-q", "--disable-pip-version-check", "--only-binary", ":all:"]
    if end == "lowest":
        constraints = folder / "lowest.txt"
        constraints.write_text("\n".join(floors(declared)) + "\n")
        arguments += ["-c", str(constraints)]
    extras = ",".join(declared["optional-dependencies"])
    return run(python, "pip", "install", *arguments, "-e", f".[{extras}]")


def try_out(version: str, program: Path, end: str, tests: Sequence[str]) -> Outcome:
    """Make an environment, run each step in it, and delete it.

    Args:
        tests: more arguments for pytest.
    """
    print(f"== Python {version}, {end} versions", flush=True)
    with tempfile.TemporaryDirectory(prefix=f"ranges-{version}-{end}-") as name:
        folder = Path(name)
        python = folder / "bin" / "python"
        if not (run(program, "venv", name) and fill(python, end, folder)):
            return Outcome(version, end, steps=("FAILED", *("-" for _ in range(len(STEPS) - 1))))
        steps = []
        for column, command in STEPS.items():
            more = [*tests] if column == "unit tests" else []
            if column == "demo":
                more = ["--out", str(folder / "demo"), "--checkpoints", str(folder / "checkpoints")]
            steps.append("passed" if run(python, *command, *more) else "FAILED")
        return Outcome(version, end, installed(python), tuple(steps))


def table(outcomes: Sequence[Outcome]) -> str:
    """The outcomes as a Markdown table."""
    rows = [("Python", "versions", *STEPS, "of which")]
    rows += [(outcome.python, outcome.end, *outcome.steps, outcome.versions) for outcome in outcomes]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "| " + " | ".join("---" for _ in rows[0]) + " |", *lines[1:]])


def main(arguments: Sequence[str] | None = None) -> int:
    """Try every combination; 1 if one failed or a named Python was not there."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.ranges", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "--python", action="append", type=Path, metavar="PROGRAM", help="this one only; repeatable"
    )
    parser.add_argument(
        "--folder",
        action="append",
        type=Path,
        default=[],
        help="look at FOLDER/*/bin/python3, too; repeatable",
    )
    parser.add_argument("--end", action="append", choices=ENDS, help="this end only; both if not given")
    parser.add_argument("tests", nargs="*", metavar="ARGUMENT", help="for pytest, after --")
    options = parser.parse_args(arguments)

    declared = project()
    found = options.python or candidates(os.environ.get("PATH", ""), options.folder)
    pythons = interpreters(found, SpecifierSet(declared["requires-python"]))
    outcomes = [
        try_out(version, program, end, options.tests)
        for version, program in pythons.items()
        for end in options.end or ENDS
    ]
    print(table(outcomes))
    tried = {version.rpartition(".")[0] for version in pythons}
    missing = set() if options.python else named_pythons(declared) - tried
    if missing:
        print(f"not here: Python {', '.join(sorted(missing))}", file=sys.stderr)
    return 0 if pythons and not missing and all(outcome.passed for outcome in outcomes) else 1


if __name__ == "__main__":
    raise SystemExit(main())
