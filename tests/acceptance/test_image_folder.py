"""Images read and augmented with OpenCV: a plain loop's bits, on any fleet."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from examples import image_folder
from tests.support import reference
from torchord import LocalCluster, Master, TrainingConfig

WITHOUT = importlib.util.find_spec("cv2") is None
needs_opencv = pytest.mark.skipif(
    WITHOUT, reason="NOT TESTED, OpenCV is not installed (pip install '.[images]')"
)


@needs_opencv
@pytest.mark.slow
def test_augmentation_is_seeded(cluster: Callable[..., LocalCluster], tmp_path: Path) -> None:
    folder = tmp_path / "shapes"
    image_folder.draw_folder(folder, each=10)
    given, config = image_folder.recipe(folder), TrainingConfig(epochs=2, batch_size=8, shards=4)
    expected = reference.accumulate(given, config).bits
    made = cluster(1, env={"TORCHORD_ALLOWED_MODULES": "examples,torch"})
    master = Master(made.url, checkpoint_dir=made.checkpoint_dir)
    for clients in (1, 2):
        if clients == 2:
            made.add_worker()
            made.wait_ready()
        run = master.submit(given, config, name=f"shapes-{clients}")
        assert reference.all_bits(run.wait(timeout=120).module) == expected
        assert run.verify().ok


@needs_opencv
def test_a_picture_looks_another_way_each_time(tmp_path: Path) -> None:
    image_folder.draw_folder(tmp_path, each=5)
    train, test = image_folder.ImageFolder(str(tmp_path)), image_folder.ImageFolder(str(tmp_path), "test")
    assert len(train) == 16 and len(test) == 4 and test.classes == list(image_folder.SHAPES)
    assert not torch.equal(train[0][0], train[0][0])
    assert torch.equal(test[0][0], test[0][0]) and test[0][0].shape == (3, 32, 32)
    with pytest.raises(ValueError, match="OpenCV cannot read"):
        image_folder.read(str(tmp_path / "absent.png"))


def test_without_opencv_it_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert image_folder.main([]) == 2
    assert "pip install opencv-python-headless" in capsys.readouterr().err


@pytest.mark.skipif(WITHOUT, reason="needs OpenCV to get that far")
def test_a_folder_without_classes_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "only").mkdir()
    assert image_folder.main(["--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "needs two subfolders with pictures" in capsys.readouterr().err
