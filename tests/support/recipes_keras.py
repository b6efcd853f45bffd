"""Recipes of Keras models on torch; not imported where there is no Keras."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tests.support import models
from torchord import Recipe

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras


def dense(rate: float = 0.5, seed: int | None = None) -> keras.Model:
    """Layers with generated names, moving statistics and a dropout."""
    return keras.Sequential(
        [
            keras.layers.Input((models.FEATURES,)),
            keras.layers.Dense(16, activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(rate, seed=seed),
            keras.layers.Dense(models.CLASSES),
        ]
    )


def many(layers: int = 12) -> keras.Model:
    """More layers of a kind than the digits of one place: by name, the tenth comes before the second."""
    inner = [keras.layers.Dense(models.FEATURES, activation="tanh") for _ in range(layers)]
    return keras.Sequential(
        [keras.layers.Input((models.FEATURES,)), *inner, keras.layers.Dense(models.CLASSES)]
    )


class Mixed(nn.Module):
    """A Keras layer inside of a module of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = dense(0.0)
        self.outer = nn.Linear(models.CLASSES, models.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.outer(self.inner(x))
        return found


class Noisy(keras.layers.Layer):
    """Draws without a seed in training, from the generator of the process."""

    def call(self, x: Tensor, training: bool = False) -> Tensor:
        return x + 0.1 * keras.random.normal(x.shape) if training else x


def noisy() -> keras.Model:
    return keras.Sequential(
        [keras.layers.Input((models.FEATURES,)), Noisy(), keras.layers.Dense(models.CLASSES)]
    )


def unbuilt() -> keras.Model:
    return keras.Sequential([keras.layers.Dense(3)])


def recipe(model: Any, **changes: Any) -> Recipe:
    return models.mlp(model=model, optimizer=partial(torch.optim.SGD, lr=0.1), **changes)
