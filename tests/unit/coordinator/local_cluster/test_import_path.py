"""What a local cluster's workers are told of this program's import path."""

from __future__ import annotations

import sys
import sysconfig
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from torchord.coordinator.local_cluster.import_path import ROOT, beyond_installation, for_workers


class Editable:
    """A finder as an editable installation puts on `sys.meta_path`; it leads to `place`."""

    __module__ = "__editable___torchord_finder"

    def __init__(self, place: Path) -> None:
        self.place = place

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        spec = ModuleSpec(name, None, origin=str(self.place / name / "__init__.py"))
        return spec if name == "torchord" else None


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An interpreter that stands in a directory of its own and has torchord by no installation."""
    (tmp_path / "script").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    plain = [one for one in sys.meta_path if not getattr(one, "__module__", "").startswith("__editable__")]
    monkeypatch.setattr(sys, "meta_path", plain)
    libraries = [sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")]
    monkeypatch.setattr(sys, "path", [str(tmp_path / "script"), *libraries, str(tmp_path / "no such place")])
    return tmp_path


def test_the_programs_own_order_then_the_directory_then_torchord(here: Path) -> None:
    assert beyond_installation() == [here / "script"]
    assert for_workers() == [here / "script", here / "here", ROOT]


def test_what_is_installed_needs_no_root(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Editable(here)])
    assert for_workers()[-1] == ROOT, "this finder leads to another torchord"
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Editable(ROOT)])
    assert for_workers() == [here / "script", here / "here"]


def test_a_directory_that_the_program_has_already_keeps_its_place(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", ["", str(here / "script")])
    assert for_workers()[:2] == [here / "here", here / "script"]
