"""Paths mean what they mean in a shell, wherever one is given."""

from pathlib import Path

import pytest
import torch

from torchord.cache.datasets.folder_place import FolderPlace
from torchord.cache.errors import InvalidInput
from torchord.cache.settings import from_environment, located
from torchord.coordinator.local_cluster.cluster import LocalCluster
from torchord.coordinator.local_cluster.embedded_server import EmbeddedServer
from torchord.coordinator.master.master import Master
from torchord.coordinator.master.run import TrainedModel


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home directory, while the process is in another."""
    for name in ("home", "here", "elsewhere"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


@pytest.fixture(params=["~/a b", "a/b", "URL"])
def pair(request: pytest.FixtureRequest, home: Path) -> tuple[str, str]:
    """(what is given, what it means)"""
    meant = {"~/a b": f"{home}/a b", "a/b": f"{Path.cwd()}/a/b", "URL": "s3://bucket/~/runs"}[request.param]
    return (meant if request.param == "URL" else request.param), meant


def test_a_setting_holds_wherever_the_process_goes(
    pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch, redis_url: str
) -> None:
    given, meant = pair
    monkeypatch.setenv("TORCHORD_CHECKPOINT_DIR", given)
    monkeypatch.setenv("TORCHORD_DATASET_DISK", given)
    settings = from_environment()
    master = Master(redis_url, checkpoint_dir=given)
    cluster = LocalCluster(1, checkpoint_dir=given)
    monkeypatch.chdir("../elsewhere")
    assert (settings.checkpoint_dir, settings.dataset_disk) == (meant, meant)
    assert master._services.settings.checkpoint_dir == cluster.checkpoint_dir == meant


def test_nothing_given_is_the_default(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHORD_CHECKPOINT_DIR", "TORCHORD_DATASET_DISK"):
        monkeypatch.setenv(name, "")
    settings = from_environment()
    assert (settings.checkpoint_dir, settings.dataset_disk) == (str(Path.cwd() / "checkpoints"), "")


def test_a_server_keeps_its_data_there(home: Path) -> None:
    (home / "data").mkdir()
    with EmbeddedServer(persistence_dir="~/data"):
        pass
    assert list((home / "data").iterdir())
    assert list(Path.cwd().iterdir()) == []


def test_a_model_is_saved_there(home: Path) -> None:
    assert TrainedModel(torch.nn.Linear(1, 1), []).save("~/m.safetensors") == home / "m.safetensors"
    assert (home / "m.safetensors").exists()


def test_a_folder_of_datasets(home: Path) -> None:
    assert FolderPlace("~/data/").label == str(home / "data")
    with pytest.raises(InvalidInput, match="absolute directory that every worker sees"):
        FolderPlace("data")


def test_a_home_that_nobody_has_is_a_name() -> None:
    assert located("~no-such-user/x") == str(Path.cwd() / "~no-such-user/x")
