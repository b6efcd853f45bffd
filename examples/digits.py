"""Train a small convolutional network on scikit-learn's handwritten digits (`make demo`).

    python -m examples.digits                                      on a cluster of its own
    python -m examples.digits --url redis://localhost:6379/0       on workers that are up

1,797 images of 8 x 8 pixels come with scikit-learn, so nothing is downloaded.
"""

from __future__ import annotations

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from examples.launch import run_as

    raise SystemExit(run_as("examples.digits"))

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from examples import launch
from torchord import Recipe, TrainingConfig

HELD_OUT = 360  # of 1,797
BATCH = 256
STEPS_PER_EPOCH = -(-(1797 - HELD_OUT) // BATCH)


class DigitNet(nn.Sequential):
    """Two convolutions and a linear layer, for inputs (N, 1, 8, 8) and outputs (N, 10)."""

    def __init__(self, channels: int = 16, dropout: float = 0.25) -> None:
        super().__init__(
            nn.Conv2d(1, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, 2 * channels, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(2 * channels * 4 * 4, 10),
        )


def load_digits(split: str = "train") -> TensorDataset:
    """The digits as (float32 (1, 8, 8) in 0 to 1, int64 label); 360 held-out ones are split "test".

    Every worker makes the same split: numpy keeps the stream of `RandomState` for ever.
    """
    from sklearn.datasets import load_digits as load

    found = load()
    order = np.random.RandomState(0).permutation(len(found.target))
    chosen = order[:HELD_OUT] if split == "test" else order[HELD_OUT:]
    images = torch.from_numpy(found.images[chosen]).float().div(16).unsqueeze(1)
    return TensorDataset(images, torch.from_numpy(found.target[chosen]).long())


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Share of right answers: outputs (N, 10), targets (N,) -> scalar."""
    return (outputs.argmax(1) == targets).float().mean()


def recipe(epochs: int) -> Recipe:
    """What is trained: names that every worker can import, with their arguments."""
    rate = 0.01
    return Recipe(
        model=partial(DigitNet, channels=16),
        dataset=load_digits,
        loss=functional.cross_entropy,
        optimizer=partial(torch.optim.AdamW, lr=rate),
        scheduler=partial(
            torch.optim.lr_scheduler.OneCycleLR, max_lr=rate, total_steps=epochs * STEPS_PER_EPOCH
        ),
        evaluation=partial(load_digits, split="test"),
        metrics={"accuracy": accuracy},
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, audit, predict, draw."""
    made = launch.parser("Train on scikit-learn's handwritten digits.", name="digits", epochs=16)
    chosen = launch.options(made, arguments)
    config = TrainingConfig(
        epochs=chosen.epochs, batch_size=BATCH, shards=4, evaluate_every=STEPS_PER_EPOCH, checkpoint_every=48
    )
    with launch.cluster(chosen) as master:
        run = master.submit(recipe(chosen.epochs), config, name=chosen.name)
        trained = run.wait(progress=True)

        images, targets = load_digits("test").tensors
        predicted = run.predict(images).argmax(1)  # by the workers, too
        right = int((predicted == targets).sum())
        print(f"Test accuracy: {right / len(targets):.2%} ({right} of {len(targets)} held-out digits)")
        clean = launch.report(chosen, run, trained)

        from examples.plots import save_curve_and_images

        picture = save_curve_and_images(
            chosen.folder / "loss.png",
            trained,
            title=f"{chosen.name}: test accuracy {right / len(targets):.2%}",
            images=images.squeeze(1),
            targets=targets,
            predicted=predicted,
            names=[str(digit) for digit in range(10)],
        )
        print(f"Picture:     {picture}")
        launch.what_next(chosen, "examples.digits")
    return 0 if clean else 1
