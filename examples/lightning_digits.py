"""Train a LightningModule on scikit-learn's digits, as it is: one line makes its recipe.

    pip install 'torchord[demo,models]'
    python -m examples.lightning_digits                                   on a cluster of its own
    python -m examples.lightning_digits --url redis://localhost:6379/0    on workers that are up

`DigitModule` is what Lightning's own pages write: dropout, a scheduler that steps by epochs, numbers and an
object of torchmetrics that are logged. Lightning's Trainer trains the same class, and nothing in it knows of
torchord.
"""

from __future__ import annotations

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from examples.launch import run_as

    raise SystemExit(run_as("examples.lightning_digits"))

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import torchord
from examples import launch
from examples.digits import load_digits
from torchord import Recipe, TrainingConfig

with launch.needed("lightning", extras="demo,models"):
    import lightning
    import torchmetrics

BATCH = 128


class DigitModule(lightning.LightningModule):
    """A multilayer perceptron for inputs (N, 1, 8, 8) and outputs (N, 10)."""

    def __init__(self, hidden: int = 64, dropout: float = 0.1, lr: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, 10),
        )
        self.f1 = torchmetrics.F1Score("multiclass", num_classes=10, average="macro")

    def forward(self, images: Tensor) -> Tensor:
        outputs: Tensor = self.net(images)
        return outputs

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = functional.cross_entropy(self(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        outputs = self(images)
        loss = functional.cross_entropy(outputs, labels)
        self.f1(outputs, labels)
        self.log("val_loss", loss, prog_bar=True)
        self.log("val_accuracy", (outputs.argmax(1) == labels).float().mean())
        self.log("val_f1", self.f1)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"])
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, step_size=4, gamma=0.5)]


def recipe(dropout: float = 0.1) -> Recipe:
    """The module and its data."""
    return torchord.lightning(
        partial(DigitModule, dropout=dropout),
        load_digits,
        evaluation=partial(load_digits, split="test"),
    )


def config(epochs: int) -> TrainingConfig:
    """How it is trained."""
    return TrainingConfig(epochs=epochs, batch_size=BATCH, shards=4, checkpoint_every=48)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and audit."""
    made = launch.parser("Train a LightningModule on digits.", name="lightning_digits", epochs=12)
    chosen = launch.options(made, arguments)
    return launch.train(chosen, recipe(), config(chosen.epochs), show=("val_accuracy", "val_f1"))
