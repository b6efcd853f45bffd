"""Writes requirements/: the versions of constraints.txt with the SHA-256 of each file that pip may take.

    python .ci/lock.py [--torch PLACE]...   asks the index that pip is set up with (half an hour)
    python .ci/lock.py --check              says whether the files fit constraints.txt and pyproject.toml

run.txt has what the image needs, dev.txt what tests and linters need besides; both are whole, so that pip is
given `--no-deps` with them, and both are without torch, whose build is a choice: torch.txt has the hashes of
its builds, those of PyPI and those at each PLACE (an index or a folder of wheels), and cuda.txt what PyPI's
build brings along on Linux. docs/dependencies.md says how they are used.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "requirements"
PYTHONS = ("3.11", "3.12", "3.13")
RUN = ("demo", "keys", "tensorboard")
DEV = (*RUN, "dev", "docs", "images", "models", "store", "sweeps")


def _manylinux(machine: str) -> list[str]:
    old = [f"manylinux{name}_{machine}" for name in ("1", "2010", "2014")]
    return [f"linux_{machine}", *old, *(f"manylinux_2_{minor}_{machine}" for minor in range(5, 40))]


PLATFORMS: dict[str, list[str]] = {
    "linux x86_64": _manylinux("x86_64"),
    "linux aarch64": _manylinux("aarch64"),
    "darwin arm64": [
        f"macosx_{major}_0_{kind}" for major in range(11, 16) for kind in ("arm64", "universal2")
    ],
}
LINUX = [name for name in PLATFORMS if name.startswith("linux")]
HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})")


def pinned(path: Path) -> dict[str, str]:
    """Package -> its version, as a file of `name==version` lines says."""
    lines = (line.split()[0] for line in path.read_text().splitlines() if line[:1] not in ("", "#", " "))
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}


def report(python: str, platform: str, words: Iterable[str]) -> list[Mapping[str, Any]]:
    """What pip would install there: `metadata` and `download_info` of each."""
    tags = [word for tag in PLATFORMS[platform] for word in ("--platform", tag)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        command += ["--only-binary", ":all:", "--target", folder, "--python-version", python, *tags]
        subprocess.run([*command, "--report", str(file), *words], check=True)
        return json.loads(file.read_text())["install"]


def hash_of(entry: Mapping[str, Any]) -> str:
    """The SHA-256 of the file."""
    return entry["download_info"]["archive_info"]["hashes"]["sha256"]


def needs(requirements: Iterable[str], extras: Iterable[str]) -> Iterable[Requirement]:
    """The requirements that hold on the platforms of ours, with some extras."""
    for text in requirements:
        one = Requirement(text)
        environments = [
            {"sys_platform": name, "platform_system": name.capitalize(), "python_full_version": f"{python}.9"}
            | {"python_version": python, "os_name": "posix", "implementation_name": "cpython"}
            for name in ("linux", "darwin")
            for python in PYTHONS
        ]
        chosen = [{**known, "extra": extra} for known in environments for extra in (*extras, "")]
        if one.marker is None or any(one.marker.evaluate(environment) for environment in chosen):
            yield one


def closure(extras: Iterable[str], metadata: Mapping[str, Iterable[str]]) -> set[str]:
    """Names of all that torchord needs with some extras; not of what torch alone needs on Linux.

    Args:
        extras: of pyproject.toml.
        metadata: package -> its requirements.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    first = [
        *project["dependencies"],
        *(r for name in extras for r in project["optional-dependencies"][name]),
    ]
    first += tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    found: set[tuple[str, frozenset[str]]] = set()
    waiting = [(canonicalize_name(one.name), frozenset(one.extras)) for one in needs(first, ())]
    while waiting:
        name, wanted = waiting.pop()
        if (name, wanted) in found or name not in metadata:
            continue
        found.add((name, wanted))
        inner = needs(metadata[name], wanted)
        waiting += [(canonicalize_name(one.name), frozenset(one.extras)) for one in inner]
    return {name for name, _ in found}


def write(name: str, head: str, lines: Mapping[str, tuple[str, set[str]]]) -> None:
    """One file: package -> version and hashes."""
    text = "".join(f"# {line}\n" for line in head.splitlines())
    for package in sorted(lines):
        version, hashes = lines[package]
        text += " \\\n    ".join(
            [f"{package}=={version}", *(f"--hash=sha256:{one}" for one in sorted(hashes))]
        )
        text += "\n"
    (FOLDER / name).write_text(text)


def make(places: list[str]) -> None:
    """Ask the index, and write the files."""
    versions = pinned(ROOT / "constraints.txt")
    wanted = [f"{name}=={version}" for name, version in versions.items()]
    hashes: dict[str, set[str]] = defaultdict(set)
    metadata: dict[str, list[str]] = {}
    beside: dict[str, tuple[str, set[str]]] = {}
    for platform in PLATFORMS:
        for python in PYTHONS:
            print(f"lock: {platform}, Python {python}", file=sys.stderr)
            for entry in report(python, platform, ["--no-deps", *wanted]):
                name = canonicalize_name(entry["metadata"]["name"])
                hashes[name].add(hash_of(entry))
                metadata[name] = entry["metadata"].get("requires_dist", [])
            if platform in LINUX:
                torch = f"torch=={versions['torch']}"
                for entry in report(python, platform, ["-c", str(ROOT / "constraints.txt"), torch]):
                    name = canonicalize_name(entry["metadata"]["name"])
                    if name not in versions:
                        beside.setdefault(name, (entry["metadata"]["version"], set()))[1].add(hash_of(entry))
    for place in places:
        for platform in LINUX:
            for python in PYTHONS:
                option = "--extra-index-url" if "://" in place else "--find-links"
                try:
                    found = report(
                        python, platform, ["--no-deps", option, place, f"torch=={versions['torch']}"]
                    )
                except subprocess.CalledProcessError:
                    continue
                hashes["torch"].update(map(hash_of, found))
    FOLDER.mkdir(exist_ok=True)
    made = "Made by .ci/lock.py from constraints.txt; see docs/dependencies.md."

    def part(names: Iterable[str]) -> dict[str, tuple[str, set[str]]]:
        return {name: (versions[name], hashes[name]) for name in names}

    write("run.txt", f"{made}\nWhat the image has beside torch.", part(closure(RUN, metadata) - {"torch"}))
    write("dev.txt", f"{made}\nThe same with tests and linters.", part(closure(DEV, metadata) - {"torch"}))
    write("torch.txt", f"{made}\nPyPI's builds of torch, and builds for the CPU.", part({"torch"}))
    write("cuda.txt", f"{made}\nWhat PyPI's build of torch needs beside, on Linux.", beside)


def faults() -> list[str]:
    """What in the files does not fit constraints.txt and pyproject.toml."""
    versions, broken = pinned(ROOT / "constraints.txt"), []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    files = {name: pinned(FOLDER / f"{name}.txt") for name in ("run", "dev", "torch", "cuda")}
    for file, found in files.items():
        entries = re.split(r"\n(?=\S)", (FOLDER / f"{file}.txt").read_text())
        broken += [
            f"{file}.txt: no hash for {e.split()[0]}" for e in entries if e[:1] != "#" and not HASH.search(e)
        ]
        for name, version in found.items():
            if version != versions.get(name, version):
                broken.append(f"{file}.txt: {name}=={version}, and constraints.txt says {versions[name]}")
            if file in ("run", "dev") and name not in versions:
                broken.append(f"{file}.txt: {name} is not in constraints.txt")
    for file, extras in (("run", RUN), ("dev", DEV)):
        direct = [*project["dependencies"], *(r for e in extras for r in project["optional-dependencies"][e])]
        names = {canonicalize_name(Requirement(text).name) for text in direct} - {"torch"}
        broken += [f"{file}.txt: no {name}" for name in sorted(names - files[file].keys())]
    if missing := sorted(files["run"].keys() - files["dev"].keys()):
        broken.append(f"dev.txt: no {missing[0]}, which run.txt has")
    if files["torch"].keys() != {"torch"} or "torch" in files["run"].keys() | files["dev"].keys():
        broken.append("torch.txt has torch, and nothing else has it")
    if files["cuda"].keys() & versions.keys():
        broken.append("cuda.txt has what constraints.txt has")
    return broken


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--torch", action="append", default=[], metavar="PLACE")
    arguments = parser.parse_args()
    if not arguments.check:
        make(arguments.torch)
    for fault in (broken := faults()):
        print(f"lock: {fault}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
