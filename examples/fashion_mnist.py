"""Train a convolutional network on Fashion-MNIST, read from its IDX files.

    python -m examples.fashion_mnist --data DIR                                    on a cluster of its own
    python -m examples.fashion_mnist --data DIR --url redis://localhost:6379/0     on workers that are up

The files are found by name in DIR, compressed (.gz) or not; every worker needs them at that path.
"""

from __future__ import annotations

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from examples.launch import run_as

    raise SystemExit(run_as("examples.fashion_mnist"))

import gzip
import math
import shlex
import sys
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from examples import launch
from torchord import Recipe, TrainingConfig
from torchord.cache.errors import InvalidInput

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
CLASSES = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
PREFIXES = {"train": "train", "test": "t10k"}
MEAN, DEVIATION = 0.2860, 0.3530  # of the training set's pixels
BATCH = 256
MOST_VALUES, MOST_DIMENSIONS = 1 << 32, 32
WHERE_TO_GET = f"""\
Get the four files in one of these ways:
    apt install dataset-fashion-mnist        Debian and Ubuntu; they are then in {DEBIAN}
    https://github.com/zalandoresearch/fashion-mnist        the official repository; its folder data/fashion
Then: python -m examples.fashion_mnist --data DIR"""


class FashionNet(nn.Sequential):
    """Two convolutions and two linear layers, for inputs (N, 1, 28, 28) and outputs (N, 10)."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(3136, 128),
            nn.ReLU(),
            nn.Linear(128, 10),
        )


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """Read an IDX file of unsigned bytes, compressed or not.

    The format: two zero bytes, a type (8 is unsigned byte), the number of dimensions, each
    dimension as a big-endian 32-bit integer, then the values in C order.

    Args:
        path: the file; one that ends in .gz is decompressed.

    Returns:
        uint8 array in the file's shape.

    Raises:
        InvalidInput: the file is no whole IDX file of unsigned bytes.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            head = file.read(4)
            if len(head) < 4 or head[:3] != b"\0\0\x08":
                raise InvalidInput(f"{path} is not an IDX file of unsigned bytes")
            extents = file.read(4 * head[3])
            shape = tuple(int.from_bytes(extents[at : at + 4], "big") for at in range(0, 4 * head[3], 4))
            count = math.prod(shape)
            data = file.read(min(count, MOST_VALUES) + 1)  # no more, however much is packed into it
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InvalidInput(f"{path} is not an IDX file of unsigned bytes: {error}") from error
    if len(data) != count or len(shape) > MOST_DIMENSIONS:
        held = len(data) if len(data) < count else "more"
        raise InvalidInput(f"{path} says shape {shape!s:.200}, but holds {held} values: is it truncated?")
    try:
        return np.frombuffer(data, np.uint8).reshape(shape)
    except ValueError as error:  # some extents are 0, and numpy cannot count the others
        raise InvalidInput(f"{path} says shape {shape!s:.200}, of which no array can be made") from error


def find(folder: Path, split: str, what: str) -> Path:
    """The file with the "images" or "labels" of a split.

    Raises:
        FileNotFoundError: it is not there; the message names what was looked for.
    """
    dimensions = 3 if what == "images" else 1
    name = f"{PREFIXES[split]}-{what}-idx{dimensions}-ubyte"
    for candidate in (folder / name, folder / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"there is no {name} or {name}.gz in {folder}")


def load_fashion(folder: str, split: str = "train") -> TensorDataset:
    """Fashion-MNIST as (float32 (1, 28, 28), standardised, int64 label); 60,000 "train", 10,000 "test"."""
    images = read_idx(find(Path(folder), split, "images"))
    labels = read_idx(find(Path(folder), split, "labels"))
    inputs = torch.from_numpy(images.astype(np.float32)).div_(255).sub_(MEAN).div_(DEVIATION)
    return TensorDataset(inputs.unsqueeze(1), torch.from_numpy(labels.astype(np.int64)))


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Share of right answers: outputs (N, 10), targets (N,) -> scalar."""
    return (outputs.argmax(1) == targets).float().mean()


def recipe(folder: Path) -> Recipe:
    """What is trained; the folder of the files is an argument that travels to the workers."""
    return Recipe(
        model=FashionNet,
        dataset=partial(load_fashion, str(folder)),
        loss=functional.cross_entropy,
        optimizer=partial(torch.optim.AdamW, lr=1e-3),
        evaluation=partial(load_fashion, str(folder), split="test"),
        metrics={"accuracy": accuracy},
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, audit, predict, draw."""
    made = launch.parser("Train on Fashion-MNIST.", name="fashion_mnist", epochs=2)
    made.add_argument(
        "--data",
        type=Path,
        default=DEBIAN,
        help=f"folder of the IDX files, at the same path on every worker (default: {DEBIAN})",
    )
    chosen = launch.options(made, arguments)
    folder = chosen.arguments.data.absolute()
    try:
        found = [find(folder, split, what) for split in PREFIXES for what in ("images", "labels")]
        examples, held_out = len(read_idx(found[1])), len(read_idx(found[3]))
    except (FileNotFoundError, ValueError) as error:
        print(f"Fashion-MNIST: {error}.\n{WHERE_TO_GET}", file=sys.stderr)
        return 2
    every = -(-examples // (4 * BATCH))
    config = TrainingConfig(
        epochs=chosen.epochs, batch_size=BATCH, shards=4, evaluate_every=every, checkpoint_every=every
    )
    with launch.cluster(chosen) as master:
        run = master.submit(recipe(folder), config, name=chosen.name)
        trained = run.wait(progress=True)
        print(f"Test accuracy: {trained.metrics['accuracy']:.2%} of {held_out:,} held-out pictures")
        clean = launch.report(chosen, run, trained)

        from examples.plots import save_curve_and_images

        inputs, targets = load_fashion(str(folder), "test")[:360]
        picture = save_curve_and_images(
            chosen.folder / "loss.png",
            trained,
            title=f"{chosen.name}: test accuracy {trained.metrics['accuracy']:.2%}",
            images=inputs.squeeze(1),
            targets=targets,
            predicted=run.predict(inputs).argmax(1),
            names=CLASSES,
        )
        print(f"Picture:     {picture}")
        launch.what_next(chosen, f"examples.fashion_mnist --data {shlex.quote(str(folder))}")
    return 0 if clean else 1
