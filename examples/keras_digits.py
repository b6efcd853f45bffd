"""Train a compiled Keras 3 model on scikit-learn's digits: its loss, its optimizer, its metrics.

    pip install 'torchord[demo,models]'
    python -m examples.keras_digits                                   on a cluster of its own
    python -m examples.keras_digits --url redis://localhost:6379/0    on workers that are up

Keras computes on torch here (`KERAS_BACKEND`, before it is imported). Nothing of `build` knows of torchord:
the same function serves `model.fit`.
"""

from __future__ import annotations

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from examples.launch import run_as

    raise SystemExit(run_as("examples.keras_digits"))

import os
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch.utils.data import TensorDataset

import torchord
from examples import launch
from examples.digits import load_digits
from torchord import Recipe, TrainingConfig

os.environ.setdefault("KERAS_BACKEND", "torch")

with launch.needed("Keras", extras="demo,models"):
    import keras

BATCH = 128


def pictures(split: str = "train") -> TensorDataset:
    """The digits as (float32 (8, 8, 1), label): Keras has channels last."""
    images, labels = load_digits(split).tensors
    return TensorDataset(images.permute(0, 2, 3, 1).contiguous(), labels)


def build(rate: float = 0.2) -> Any:
    """A small convolutional network, compiled."""
    layers = keras.layers
    model = keras.Sequential(
        [
            layers.Input((8, 8, 1)),
            layers.Conv2D(16, 3, activation="relu"),
            layers.Flatten(),
            layers.Dropout(rate),
            layers.Dense(32, activation="relu", kernel_regularizer="l2"),
            layers.Dense(10),
        ]
    )
    decay = keras.optimizers.schedules.CosineDecay(5e-3, decay_steps=150)
    model.compile(
        optimizer=keras.optimizers.AdamW(decay, clipnorm=1.0),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy", keras.metrics.SparseTopKCategoricalAccuracy(3, name="top3")],
    )
    return model


def recipe(rate: float = 0.2) -> Recipe:
    """The model and its data."""
    return torchord.keras(partial(build, rate=rate), pictures, evaluation=partial(pictures, split="test"))


def config(epochs: int) -> TrainingConfig:
    """How it is trained."""
    return TrainingConfig(epochs=epochs, batch_size=BATCH, shards=4, checkpoint_every=48)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and audit."""
    made = launch.parser("Train a Keras model on digits.", name="keras_digits", epochs=12)
    chosen = launch.options(made, arguments)
    return launch.train(chosen, recipe(), config(chosen.epochs), show=("accuracy", "top3"))
