"""Train on a folder of images, read and augmented with OpenCV, every draw of it seeded.

    pip install opencv-python-headless
    python -m examples.image_folder                    on a folder of drawings, made for the purpose
    python -m examples.image_folder --data DIR         on DIR/<class>/*.png (or .jpg, ...)
    python -m examples.image_folder --url redis://localhost:6379/0       on workers that are up

The augmentation (mirroring, rotating, shifting, brightness, noise) draws from numpy's global generator,
which a worker seeds from (run, step, shard) before it reads a shard. So the same picture looks another way in
each epoch, and the same way on whichever worker reads it: kill what you like, the bits stay.
"""

from __future__ import annotations

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from examples.launch import run_as

    raise SystemExit(run_as("examples.image_folder"))

import importlib.util
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from examples import launch
from torchord import Recipe, TrainingConfig

SIZE = 32  # pixels, after scaling
HELD_OUT = 5  # every fifth picture of a class
BATCH = 64
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
SHAPES = ("circle", "cross", "square", "triangle")
HOW_TO_INSTALL = "This example reads images with OpenCV:\n    pip install opencv-python-headless"
Image = npt.NDArray[np.uint8]


class ImageFolder(Dataset[tuple[Tensor, int]]):
    """The pictures of a folder with one subfolder a class; every fifth of a class is held out.

    Args:
        folder: at the same path on every worker.
        split: "train", augmented, or "test", as it is.
    """

    def __init__(self, folder: str, split: str = "train") -> None:
        self.classes = classes_in(Path(folder))
        self.augment = split == "train"
        self.samples: list[tuple[str, int]] = []
        for label, name in enumerate(self.classes):
            for number, path in enumerate(pictures_in(Path(folder) / name)):
                if (number % HELD_OUT == 0) == (split == "test"):
                    self.samples.append((str(path), label))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """(float32 (3, 32, 32) about -1 to 1, label)."""
        path, label = self.samples[index]
        image = read(path)
        if self.augment:
            image = augmented(image)
        return torch.from_numpy(image).permute(2, 0, 1).float().div(127.5).sub(1), label


class SmallNet(nn.Sequential):
    """Three convolutions with BatchNorm, for inputs (N, 3, 32, 32)."""

    def __init__(self, classes: int) -> None:
        layers: list[nn.Module] = []
        for before, after in ((3, 16), (16, 32), (32, 64)):
            layers += [
                nn.Conv2d(before, after, 3, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
        super().__init__(*layers, nn.Flatten(), nn.Linear(64 * 16, classes))


def classes_in(folder: Path) -> list[str]:
    """Names of the subfolders that hold pictures, sorted: their places are the labels."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and pictures_in(path))


def pictures_in(folder: Path) -> list[Path]:
    """The pictures of one class, sorted by name, which is the same order on every machine."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


def read(path: str) -> Image:
    """A picture as uint8 (32, 32, 3), red first.

    Raises:
        ValueError: OpenCV cannot read it.
    """
    import cv2

    cv2.setNumThreads(0)  # one thread reads the same bytes everywhere
    image = cv2.imread(path, cv2.IMREAD_COLOR)
    if image is None:
        raise ValueError(f"OpenCV cannot read {path}")
    scaled = cv2.resize(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), (SIZE, SIZE), interpolation=cv2.INTER_AREA)
    return np.asarray(scaled, np.uint8)


def augmented(image: Image) -> Image:
    """The picture mirrored or not, rotated, shifted, brighter or darker, with noise.

    All draws come from numpy's global generator. OpenCV's own (`cv2.randn`) is one that nobody
    seeds for you: call `cv2.setRNGSeed(np.random.randint(2**31))` first where you need it.
    """
    import cv2

    draw = np.random
    if draw.random_sample() < 0.5:
        image = np.ascontiguousarray(image[:, ::-1])
    turn = cv2.getRotationMatrix2D((SIZE / 2, SIZE / 2), draw.uniform(-15, 15), draw.uniform(0.9, 1.1))
    turn[:, 2] += draw.uniform(-2, 2, 2)
    turned = cv2.warpAffine(image, turn, (SIZE, SIZE), borderMode=cv2.BORDER_REFLECT_101)
    bright = turned.astype(np.float32) * draw.uniform(0.8, 1.2) + draw.normal(0, 4, turned.shape)
    return np.asarray(bright.clip(0, 255), np.uint8)


def draw_folder(folder: Path, each: int = 150) -> None:
    """Draw four shapes in all colours, places and sizes, on noise; the same pictures each time."""
    import cv2

    generator = np.random.default_rng(0)
    for name in SHAPES:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(each):
            image = generator.integers(0, 120, (48, 48, 3), np.uint8)
            colour = tuple(int(value) for value in generator.integers(130, 256, 3))
            x, y = (int(value) for value in generator.integers(16, 32, 2))
            half = int(generator.integers(7, 15))
            if name == "circle":
                cv2.circle(image, (x, y), half, colour, -1)
            elif name == "square":
                cv2.rectangle(image, (x - half, y - half), (x + half, y + half), colour, -1)
            elif name == "cross":
                cv2.line(image, (x - half, y - half), (x + half, y + half), colour, 3)
                cv2.line(image, (x - half, y + half), (x + half, y - half), colour, 3)
            else:
                corners = np.array([(x, y - half), (x - half, y + half), (x + half, y + half)], np.int32)
                cv2.fillPoly(image, [corners], colour)
            cv2.imwrite(str(folder / name / f"{number:04d}.png"), image)


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Share of right answers: outputs (N, classes), targets (N,) -> scalar."""
    return (outputs.argmax(1) == targets).float().mean()


def recipe(folder: Path) -> Recipe:
    """What is trained; the folder is an argument that travels to the workers."""
    return Recipe(
        model=partial(SmallNet, classes=len(classes_in(folder))),
        dataset=partial(ImageFolder, str(folder)),
        loss=functional.cross_entropy,
        optimizer=partial(torch.optim.AdamW, lr=2e-3),
        evaluation=partial(ImageFolder, str(folder), split="test"),
        metrics={"accuracy": accuracy},
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, audit, predict, draw."""
    made = launch.parser("Train on a folder of images.", name="image_folder", epochs=8)
    made.add_argument(
        "--data",
        type=Path,
        help="folder with a subfolder of pictures a class, at the same path on every worker (default: one is "
        "drawn below --out)",
    )
    chosen = launch.options(made, arguments)
    if importlib.util.find_spec("cv2") is None:
        print(HOW_TO_INSTALL, file=sys.stderr)
        return 2
    folder = (chosen.arguments.data or chosen.arguments.out / "shapes").absolute()
    if chosen.arguments.data is None:
        draw_folder(folder)
    if not folder.is_dir() or len(classes_in(folder)) < 2:
        print(f"{folder} needs two subfolders with pictures at least, one a class", file=sys.stderr)
        return 2
    test: Any = ImageFolder(str(folder), "test")
    config = TrainingConfig(
        epochs=chosen.epochs, batch_size=BATCH, shards=4, evaluate_every=25, checkpoint_every=50
    )
    with launch.cluster(chosen) as master:
        run = master.submit(recipe(folder), config, name=chosen.name)
        trained = run.wait(progress=True)
        shown = f"{trained.metrics['accuracy']:.2%}"
        print(f"Test accuracy: {shown} of {len(test)} held-out pictures in {len(test.classes)} classes")
        clean = launch.report(chosen, run, trained)

        from examples.plots import save_curve_and_images

        images, labels = zip(*(test[index] for index in range(len(test))), strict=True)
        inputs = torch.stack(images)
        picture = save_curve_and_images(
            chosen.folder / "loss.png",
            trained,
            title=f"{chosen.name}: test accuracy {shown}",
            images=inputs.mean(1),
            targets=torch.tensor(labels),
            predicted=run.predict(inputs).argmax(1),
            names=test.classes,
        )
        print(f"Picture:     {picture}")
        command = "examples.image_folder"
        if chosen.arguments.data is not None:
            command += f" --data {shlex.quote(str(folder))}"
        launch.what_next(chosen, command)
    return 0 if clean else 1
