"""The program that tries the declared ranges (`make ranges`): what it takes for floors, and which Pythons."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tests import ranges

DECLARED = ranges.project()


def program(path: Path, body: str) -> Path:
    """An executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def python(path: Path, version: str) -> Path:
    """What says that it is this Python, and does nothing else."""
    return program(path, f'[ "$1" = -c ] && echo {version}')


def test_every_floor_lies_in_its_range() -> None:
    lines = [*DECLARED["dependencies"]]
    lines += [line for extra in DECLARED["optional-dependencies"].values() for line in extra]
    pinned = list(map(Requirement, ranges.floors(DECLARED)))
    assert [one.name for one in pinned] == [Requirement(line).name for line in lines]
    for one, line in zip(pinned, lines, strict=True):
        (exact,) = one.specifier
        assert exact.operator == "==" and exact.version in Requirement(line).specifier
        assert one.marker == Requirement(line).marker


@pytest.mark.parametrize("line", ["torch", "torch<3", "torch>=2,>=2.7"])
def test_a_range_without_one_floor_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match=r"needs one lower bound"):
        ranges.floors({"dependencies": [line], "optional-dependencies": {}})


def test_each_python_is_found_once(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    expected = {
        "3.11.9": python(tmp_path / "versions" / "3.11.9" / "bin" / "python3", "3.11.9"),
        "3.12.4": python(first / "python3.12", "3.12.4"),
        "3.13.1": python(first / "python3", "3.13.1"),
    }
    program(first / "python3.14", "exit 127")  # a shim of what is not switched on
    python(first / "python3-config", "3.15.0")
    python(first / "python3.10", "3.10.2")  # not admitted
    python(second / "python3.12", "3.12.9")  # later on the PATH
    path = os.pathsep.join(map(str, (first, tmp_path / "nowhere", second)))
    found = ranges.interpreters(ranges.candidates(path, [tmp_path / "versions"]), SpecifierSet(">=3.11"))
    assert found == expected and list(found) == sorted(expected)


def test_what_fails_is_told_and_fails_the_whole(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    broken = python(tmp_path / "python3", "3.12.4")  # makes no virtual environment
    assert ranges.main(["--python", str(broken)]) == 1
    rows = capfd.readouterr().out.splitlines()[-2:]
    assert rows == [f"| 3.12.4 | {end} | FAILED | - | - | - |" for end in ranges.ENDS]


def test_the_oldest_python_named_is_the_floor() -> None:
    named = sorted(ranges.named_pythons(DECLARED), key=lambda version: int(version.split(".")[1]))
    assert DECLARED["requires-python"] == f">={named[0]}"
    minors = [int(version.split(".")[1]) for version in named]
    assert minors == list(range(minors[0], minors[0] + len(minors))), "none is left out between two"


# --- what the page says of it -------------------------------------------------------------------


def told() -> list[list[str]]:
    """The rows of the table on docs/dependencies.md, as `make ranges` prints them."""
    text = (ranges.ROOT / "docs" / "dependencies.md").read_text()
    section = text.partition("\n## The ranges\n")[2].partition("\n## ")[0]
    header, _, *rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line[:1] == "|"]
    assert header == ["Python", "versions", *ranges.STEPS, "of which"]
    return rows


def test_each_python_that_a_classifier_names_has_passed() -> None:
    rows = told()
    assert {version.rpartition(".")[0] for version, *_ in rows} == ranges.named_pythons(DECLARED)
    assert {end for _, end, *_ in rows} == set(ranges.ENDS)
    assert all(set(steps) == {"passed"} for _, _, *steps, _ in rows)


def test_what_has_passed_as_lowest_is_what_is_declared() -> None:
    """A floor that is lowered, or raised, is tried again before it is told."""
    floors = {one.name: str(one.specifier) for one in map(Requirement, ranges.floors(DECLARED))}
    for python, end, *_, shown in told():
        versions = dict(each.split(" ") for each in shown.split(", "))
        assert tuple(versions) == ranges.SHOWN
        for name, version in versions.items():
            assert end == "newest" or version in SpecifierSet(floors[name]), f"{python}: {name} {version}"
