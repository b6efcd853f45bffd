"""The scripts of continuous integration that look at the code itself: do they see what they are there for?"""

from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from product import ROOT, Module, arrows, imports, longest_chain, modules
from rooms import PICTURE, drawn, rooms
from sizes import Length, lengths, lengths_in, problems
from tests.support.times import table_of_times

CAPS = {"file": 500, "class": 400, "function": 60}


def module(text: str) -> Module:
    made = Module("torchord.cache.made", Path("cache/made.py"))
    made.__dict__["text"] = text  # where a cached property keeps what it read
    return made


def function(lines: int, *, indent: str = "", docstring: int = 0) -> str:
    """A function `f` of so many lines beside its docstring."""
    doc = (
        [f'{indent}    """One.', *[f"{indent}    More."] * (docstring - 2), f'{indent}    """']
        if docstring
        else []
    )
    return "\n".join([f"{indent}def f():", *doc, *[f"{indent}    pass"] * (lines - 1)])


def test_a_function_is_counted_without_its_docstring_and_a_class_with_it() -> None:
    text = "\n".join(["@final", "class C:", '    """C."""', function(7, indent="    ", docstring=9)])
    assert sorted(lengths_in(module(text))) == [
        Length(7, "function", "cache/made.py:C.f"),
        Length(18, "class", "cache/made.py:C"),
    ]


def test_functions_in_functions_and_under_conditions_are_seen() -> None:
    text = "if True:\n    async def outer():\n" + function(3, indent="        ")
    assert [each.what for each in lengths_in(module(text))] == [
        "cache/made.py:outer",
        "cache/made.py:outer.f",
    ]


def test_the_product_is_counted_whole() -> None:
    found = {each.what for each in lengths()}
    assert {
        "cache/scripts/commit.lua",
        "tasks/worker.py",
        "torchord/doors.py",
        "cache/errors.py:CacheError",
    } <= found
    assert not any(what.startswith("torchord/cache") for what in found), "a link was followed"


def test_what_is_too_long_is_named() -> None:
    found = [Length(500, "file", "a.py"), Length(401, "class", "a.py:C"), Length(61, "function", "a.py:f")]
    assert problems(found, {"caps": CAPS, "exceptions": {}}) == [
        "a.py:C: this class has 401 lines, 400 are allowed",
        "a.py:f: this function has 61 lines, 60 are allowed",
    ]


@pytest.mark.parametrize(
    ("lines", "why", "problem"),
    [
        (501, "a table", None),
        (500, "a table", "a.py: sizes.toml excepts it, and nothing there is too long"),
        (501, " ", "a.py: its exception needs a reason"),
    ],
)
def test_an_exception_is_needed_and_has_a_reason(lines: int, why: str, problem: str | None) -> None:
    found = problems([Length(lines, "file", "a.py")], {"caps": CAPS, "exceptions": {"a.py": why}})
    assert found == ([] if problem is None else [problem])


def test_imports_are_seen_wherever_they_stand() -> None:
    text = "import torchord.cache.keys, json\ndef f():\n    from torchord.cache import errors, settings as s"
    assert imports(module(text), modules().keys()) == {
        "torchord.cache.keys",
        "torchord.cache.errors",
        "torchord.cache.settings",
    }


def test_the_longest_chain_is_found_and_a_circle_is_an_error() -> None:
    assert longest_chain({"a": {"b", "c"}, "b": {"c"}, "c": set(), "d": {"c"}}) == ["a", "b", "c"]
    with pytest.raises(ValueError, match="a > b > a"):
        longest_chain({"a": {"b"}, "b": {"a"}})


def test_the_products_modules_have_the_names_that_they_are_imported_by() -> None:
    found = modules()
    assert {"torchord", "torchord.doors", "torchord.cache.ledger.ledger", "torchord.tasks"} <= found.keys()
    assert "torchord.cache.errors" in arrows()["torchord.cache.blobs.blob"]


class Phase(NamedTuple):
    """One phase of a test."""

    nodeid: str
    duration: float


def test_the_table_of_times_names_the_slowest_files_and_their_slowest_test() -> None:
    phases = [
        Phase("tests/a.py::test_one[x]", 1.0),
        Phase("tests/a.py::test_one[x]", 2.0),
        Phase("tests/a.py::test_two", 0.5),
        Phase("tests/b.py::test_three", 0.25),
        Phase("tests/c.py::test_four", 4.0),
    ]
    assert table_of_times(phases, files=2)[2:] == [
        "| tests/c.py | 1 | 4.0 | test_four | 4.0 |",
        "| tests/a.py | 2 | 3.5 | test_one | 3.0 |",
        "| 1 more | 1 | 0.2 | | |",
        "| all 3 | 4 | 7.8 | | |",
    ]


def test_the_picture_of_the_rooms_is_of_todays_imports() -> None:
    assert PICTURE.read_text(encoding="utf-8") == drawn(), "run `make format`"


def test_every_room_lies_above_what_it_imports() -> None:
    house = rooms()
    assert {"client/", "server/", "master/", "tasks/"} <= {room.name for room in house.values()}
    for (panel, _), room in house.items():
        assert all(house[panel, below].floor < room.floor for below in room.below)
        assert room.sentence, f"{room.name} has no sentence"


def test_what_runs_before_a_commit_is_what_lint_runs_and_fetches_nothing() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert [repo["repo"] for repo in config["repos"]] == ["local"]
    recipes = (ROOT / "Makefile").read_text().replace("$(BIN)/", ".venv/bin/").splitlines()
    for hook in config["repos"][0]["hooks"]:
        assert hook["language"] == "system", hook["id"]
        command = hook["entry"].partition(" --")[0]
        assert any(line.strip().startswith(command) for line in recipes), f"no recipe of make runs {command}"
