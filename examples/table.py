"""Train on a table of pandas: numbers are standardised, groups are embedded.

    pip install 'torchord[demo,models]'
    python -m examples.table                                   on a cluster of its own
    python -m examples.table --url redis://localhost:6379/0    on workers that are up

The table is scikit-learn's of 569 tumours, whose measurements say which are malignant. `read` may read any
other: `pandas.read_csv`, `read_parquet`, `read_sql`; what it reads must be the same on every worker.
"""

from __future__ import annotations

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from examples.launch import run_as

    raise SystemExit(run_as("examples.table"))

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from examples import launch
from torchord import Recipe, TrainingConfig

with launch.needed("pandas", extras="demo,models"):
    import pandas

BATCH = 64
GROUPS = 6  # of the tumours' areas


def read() -> Any:
    """The table, with a column of groups besides."""
    from sklearn.datasets import load_breast_cancer

    table = load_breast_cancer(as_frame=True).frame
    table["size"] = pandas.qcut(table["mean area"], GROUPS, labels=False)
    return table


def rows(split: str = "train") -> TensorDataset:
    """(float32 numbers, int64 group), label of each row; every fifth is held out.

    Numbers are standardised by the rows that are trained on.
    """
    table = read()
    held_out = table.index % 5 == 0
    numbers = table.drop(columns=["target", "size"])
    trained = numbers[~held_out]
    numbers = (numbers - trained.mean()) / trained.std()
    chosen = held_out if split == "test" else ~held_out
    return TensorDataset(
        torch.tensor(numbers[chosen].to_numpy(), dtype=torch.float32),
        torch.tensor(table["size"][chosen].to_numpy(), dtype=torch.int64),
        torch.tensor(table["target"][chosen].to_numpy(), dtype=torch.float32),
    )


class Tabular(nn.Module):
    """A perceptron over numbers (N, 30) and embedded groups (N,), for logits (N,)."""

    def __init__(self, hidden: int = 32, dropout: float = 0.2) -> None:
        super().__init__()
        self.groups = nn.Embedding(GROUPS, 4)
        self.layers = nn.Sequential(
            nn.Linear(34, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, 1)
        )

    def forward(self, numbers: Tensor, groups: Tensor) -> Tensor:
        found: Tensor = self.layers(torch.cat([numbers, self.groups(groups)], 1)).squeeze(1)
        return found


def step(model: nn.Module, batch: Sequence[Tensor]) -> Any:
    """Binary cross entropy and the share of right answers."""
    logits = model(batch[0], batch[1])
    right = ((logits > 0) == (batch[2] > 0)).float().mean()
    return functional.binary_cross_entropy_with_logits(logits, batch[2]), {"accuracy": right}


def recipe() -> Recipe:
    """The model and its table."""
    return Recipe(
        model=Tabular,
        dataset=rows,
        step=step,
        optimizer=partial(torch.optim.AdamW, lr=1e-2, weight_decay=1e-2),
        evaluation=partial(rows, split="test"),
    )


def config(epochs: int) -> TrainingConfig:
    """How it is trained."""
    return TrainingConfig(epochs=epochs, batch_size=BATCH, shards=4, checkpoint_every=48)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and audit."""
    made = launch.parser("Train on a table.", name="table", epochs=12)
    chosen = launch.options(made, arguments)
    return launch.train(chosen, recipe(), config(chosen.epochs), show=("accuracy",))
