"""A worker admits what lies where it was started only where nobody else can put files."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import pytest

from tests.support.installed import ROOT
from torchord.cache.errors import NotAllowed
from torchord.cache.settings import Settings
from torchord.coordinator.local_cluster.import_path import allow_list
from torchord.coordinator.spec import start_place
from torchord.coordinator.spec.admission import Admission
from torchord.coordinator.spec.start_place import doubt
from torchord.tasks import start

CODE = "def made(): return 1\n"
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to other groups")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A project with a module at its top and one in a folder, importable by name."""
    folder = tmp_path / "project"
    (folder / "placed_folder").mkdir(parents=True)
    folder.chmod(0o755)
    (folder / "placed_here.py").write_text(CODE)
    (folder / "placed_folder" / "inner.py").write_text(CODE)
    monkeypatch.syspath_prepend(folder)
    yield folder
    for name in [name for name in sys.modules if name.startswith("placed_")]:
        del sys.modules[name]


def test_a_directory_of_ones_own_vouches_for_its_code(project: Path) -> None:
    assert doubt(project) == Admission(None, project).warning == ""
    assert Admission(None, project).fetch("placed_here:made")() == 1
    assert Admission(None, project).fetch("placed_folder.inner:made")() == 1


@pytest.mark.parametrize("directory", ["/", "/tmp", "/var/tmp", "/home", "/home/someone", "/Users/someone"])
def test_places_of_everybody_and_homes_do_not(directory: str) -> None:
    assert doubt(Path(directory))
    assert Admission(None, Path(directory)).listed == ("torch",)


def test_ones_own_home_does_not(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(project))
    assert doubt(project) == "is a home directory"
    said = r"is a home directory\); .*TORCHORD_ALLOWED_MODULES=torch,placed_here$"
    with pytest.raises(NotAllowed, match=said):
        Admission(None, project).fetch("placed_here:made")
    assert "placed_here" not in sys.modules
    assert Admission((".", "torch"), project).fetch("placed_here:made")() == 1  # somebody said so
    assert Admission(("placed_here",), project).fetch("placed_here:made")() == 1


def test_a_directory_that_others_write_to_does_not(project: Path) -> None:
    project.chmod(0o777)
    assert doubt(project) == "can be written by others"
    with pytest.raises(NotAllowed, match="can be written by others"):
        Admission(None, project).fetch("placed_here:made")
    project.chmod(0o755)
    project.parent.chmod(0o777)
    assert doubt(project) == f"can be replaced by whoever writes to {project.parent}"
    project.parent.chmod(0o1777)  # as /tmp: only its owner can move it away
    assert not doubt(project)


@root_only
def test_a_group_of_others_counts_and_ones_own_does_not(project: Path) -> None:
    project.chmod(0o775)
    assert not doubt(project)
    os.chown(project, 4321, 4321)  # a user's private group, as the default of Debian and Fedora
    assert not doubt(project)
    os.chown(project, 4321, 4322)
    assert doubt(project) == "can be written by others"


@pytest.mark.parametrize("opened", ["placed_folder", "placed_folder/inner.py"])
def test_what_others_write_below_it_is_not_admitted_either(project: Path, opened: str) -> None:
    (project / opened).chmod(0o777)
    with pytest.raises(NotAllowed):
        Admission(None, project).fetch("placed_folder.inner:made")
    assert Admission(None, project).fetch("placed_here:made")() == 1
    assert Admission((".", "torch"), project).fetch("placed_folder.inner:made")() == 1


def test_a_worker_says_so_at_its_start(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = StringIO()
    monkeypatch.setattr(sys, "__stdout__", said)
    project.chmod(0o777)
    monkeypatch.setattr(start, "Admission", lambda allowed: Admission(allowed, project))
    start.announce(Settings())
    (line,) = said.getvalue().splitlines()[2:]
    assert line.startswith(f"torchord: {project} can be written by others, so no module in it is admitted: ")
    assert "name the modules in TORCHORD_ALLOWED_MODULES" in line
    said.truncate(0)
    start.announce(Settings(allowed_modules=(".", "torch")))
    assert "so no module" not in said.getvalue()


@pytest.mark.parametrize(
    "target",
    [
        "examples.launch:run_as",
        "examples.digits:main",
        "benchmarks.bench_cache:server",
        "benchmarks.chaos:main",
        "tests.conftest:pytest_addoption",
        "tests.support.attackable:fine",
        "coordinator.local_cluster.embedded_server:EmbeddedServer",
        "cache.settings:from_environment",
        "tasks.start:announce",
        "torchord.coordinator.local_cluster.guardian:Guardian",
    ],
)
def test_a_checkout_of_torchord_is_no_recipe_but_for_what_is_named(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start_place, "OWN_FOLDERS", (*start_place.OWN_FOLDERS, "tests"))  # as it is elsewhere
    for here in (Admission(None, ROOT), Admission((".", "torch"), ROOT), Admission(None, ROOT.parent)):
        with pytest.raises(NotAllowed):
            here.fetch(target)


def test_the_programs_of_a_checkout_name_them_for_their_own_workers(project: Path) -> None:
    assert allow_list(ROOT) == (".", "torch", "tests", "benchmarks", "examples")
    assert Admission(allow_list(ROOT), ROOT).fetch("examples.digits:DigitNet")
    assert allow_list(project) == (".", "torch")
