"""Train a ResNet on scikit-learn's digits, measured by torchmetrics.

    pip install 'torchord[demo,models]'
    python -m examples.resnet_digits                                   on a cluster of its own
    python -m examples.resnet_digits --url redis://localhost:6379/0    on workers that are up

The ResNet is that of Hugging Face, from its configuration. One of timm or torchvision is as good: their
functions (`timm.create_model`, `torchvision.models.resnet18`) return modules of torch, and take the place of
`resnet`.
"""

from __future__ import annotations

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from examples.launch import run_as

    raise SystemExit(run_as("examples.resnet_digits"))

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from examples import launch
from examples.digits import load_digits
from torchord import Recipe, TrainingConfig

with launch.needed("Hugging Face transformers and torchmetrics", extras="demo,models"):
    import torchmetrics
    import transformers

BATCH = 128
STEPS_PER_EPOCH = 12


def resnet(width: int = 16) -> nn.Module:
    """A ResNet of two stages for pictures (N, 1, 8, 8)."""
    model: nn.Module = transformers.ResNetForImageClassification(
        transformers.ResNetConfig(
            num_channels=1,
            embedding_size=width,
            hidden_sizes=[width, 2 * width],
            depths=[1, 1],
            layer_type="basic",
            num_labels=10,
        )
    )
    return model


class F1(torchmetrics.classification.MulticlassF1Score):
    """A class of this module, so that workers need no leave to import others."""

    def __init__(self) -> None:
        super().__init__(num_classes=10)


class Auroc(torchmetrics.classification.MulticlassAUROC):
    def __init__(self) -> None:
        super().__init__(num_classes=10)


def step(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    """Cross entropy; pictures are enlarged, as the first layers halve them twice."""
    return functional.cross_entropy(outputs(model, batch), batch[1], label_smoothing=0.05)


def outputs(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    """Logits (N, 10)."""
    pictures = functional.interpolate(batch[0], scale_factor=4.0)
    found: Tensor = model(pixel_values=pictures).logits
    return found


def recipe(epochs: int) -> Recipe:
    """The model, its data, and metrics of all held-out digits at once."""
    return Recipe(
        model=resnet,
        dataset=load_digits,
        step=step,
        predict=outputs,
        optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-4, nesterov=True),
        scheduler=partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=epochs * STEPS_PER_EPOCH),
        evaluation=partial(load_digits, split="test"),
        metrics={"f1": F1, "auroc": Auroc},
    )


def config(epochs: int) -> TrainingConfig:
    """How it is trained."""
    return TrainingConfig(epochs=epochs, batch_size=BATCH, shards=4, checkpoint_every=48)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and audit."""
    made = launch.parser("Train a ResNet on digits.", name="resnet_digits", epochs=6)
    chosen = launch.options(made, arguments)
    return launch.train(chosen, recipe(chosen.epochs), config(chosen.epochs), show=("f1", "auroc"))
