"""Compiled Keras models, as people write them; not imported where there is no Keras."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from tests.support import models
from tests.support.recipes_keras import dense, keras

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
layers, optimizers = keras.layers, keras.optimizers


def mlp(activation: str = "tanh") -> Any:
    hidden = layers.Dense(16, activation=activation, kernel_regularizer="l2", kernel_constraint="max_norm")
    return keras.Sequential([layers.Input((models.FEATURES,)), hidden, layers.Dense(models.CLASSES)])


def optimized(optimizer: str, **arguments: Any) -> Any:
    """With one of Keras' optimizers."""
    model = mlp()
    model.compile(getattr(optimizers, optimizer)(**arguments), LOSS, metrics=["accuracy"])
    return model


def scheduled() -> Any:
    """Decay by the optimizer's own count, several metrics that are no means."""
    model = mlp()
    rate = optimizers.schedules.PiecewiseConstantDecay([9, 19], [0.02, 0.01, 0.002])
    model.compile(
        optimizers.AdamW(rate, global_clipnorm=0.5, weight_decay=0.1),
        LOSS,
        metrics=["accuracy", keras.metrics.SparseTopKCategoricalAccuracy(2, name="top2")],
    )
    return model


def normed() -> Any:
    model = dense(0.0)
    model.compile("rmsprop", LOSS)
    return model


class Largest(keras.metrics.Metric):
    """A metric of somebody's own, which no sum gives."""

    def __init__(self, name: str = "largest") -> None:
        super().__init__(name=name)
        self.seen = self.add_weight(name="seen", initializer="zeros")

    def update_state(self, y_true: Tensor, y_pred: Tensor, sample_weight: Any = None) -> None:
        self.seen.assign(keras.ops.maximum(self.seen, keras.ops.max(y_pred)))

    def result(self) -> Any:
        return self.seen


class Two(Dataset[Any]):
    """Inputs and targets by name, and sample weights of both targets."""

    def __init__(self, size: int = 44) -> None:
        self.x, self.y = models.points(size).tensors

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        x, y = self.x[index], self.y[index]
        inputs = {"left": x[:2], "right": x[2:]}
        weight = 1.0 + (y == 0)
        return inputs, {"kind": y, "sum": x.sum()[None]}, {"kind": weight, "sum": weight}


def forked() -> Any:
    """Two inputs and two outputs, each with a loss, a weight of it and metrics."""
    left = keras.Input((2,), name="left")
    right = keras.Input((models.FEATURES - 2,), name="right")
    both = layers.Concatenate()([layers.Dense(8, activation="relu")(left), layers.Dense(8)(right)])
    outputs = {
        "kind": layers.Dense(models.CLASSES, name="kind")(both),
        "sum": layers.Dense(1, name="sum")(both),
    }
    model = keras.Model({"left": left, "right": right}, outputs)
    model.compile(
        optimizers.SGD(0.05, momentum=0.9, nesterov=True),
        loss={"kind": LOSS, "sum": "mse"},
        loss_weights={"kind": 1.0, "sum": 0.3},
        weighted_metrics={"kind": ["accuracy"], "sum": ["mae", Largest()]},
    )
    return model


class Contrasting(keras.Model):
    """A loss of its own, in the method that Keras has for it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp("relu")

    def call(self, x: Tensor) -> Tensor:
        found: Tensor = self.inner(x)
        return found

    def compute_loss(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        small = keras.ops.mean(keras.ops.square(y_pred))
        return super().compute_loss(x, y, y_pred, sample_weight) + 0.1 * small


def contrasting() -> Any:
    model = Contrasting()
    model(torch.zeros(1, models.FEATURES))
    model.compile("adam", LOSS, metrics=["accuracy"])
    return model


# --- what cannot be ---------------------------------------------------------------------


def uncompiled() -> Any:
    return mlp()


class Stepping(Contrasting):
    def train_step(self, data: Any) -> Any:
        return super().train_step(data)


def stepping() -> Any:
    model = Stepping()
    model(torch.zeros(1, models.FEATURES))
    model.compile("adam", LOSS)
    return model


def averaged() -> Any:
    return optimized("Adam", use_ema=True)


def scaled() -> Any:
    model = mlp()
    model.compile(optimizers.LossScaleOptimizer(optimizers.Adam()), LOSS)
    return model


def summed() -> Any:
    model = keras.Sequential([layers.Input((models.FEATURES,)), layers.Dense(models.CLASSES)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="sum"))
    return model


def no_keras() -> Any:
    return torch.nn.Linear(1, 1)


def four_parts() -> Any:
    return TensorDataset(*(torch.zeros(8, models.FEATURES) for _ in range(4)))


Build = Callable[..., Any]
