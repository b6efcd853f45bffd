"""LightningModules, as people write them; not imported where there is no Lightning."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support import models


class Plain(lightning.LightningModule):
    """An optimizer alone."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(models.FEATURES, width), nn.ReLU(), nn.Linear(width, models.CLASSES)
        )

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.net(x)
        return found

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Normed(Plain):
    """Running statistics, a schedule by every second epoch in a dict of dicts, the loss in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.net.insert(1, nn.BatchNorm1d(8))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": super().training_step(batch, batch_idx)}

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "frequency": 2}}


class Warm(Plain):
    """Warms up step by step, scales its batches after they have arrived, logs from a helper that all steps
    share."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return 2 * batch[0], batch[1]

    def training_step(self, batch: Any) -> Any:
        return self.shared(batch, "train")

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.shared(batch, "val", batch_idx)

    def shared(self, batch: Any, stage: str, batch_idx: Any = None) -> Tensor:
        x, y = batch
        outputs = self(x)
        loss = F.cross_entropy(outputs, y)
        right = (outputs.argmax(1) == y).float()
        self.log_dict({f"{stage}_loss": loss, f"{stage}_accuracy": right.mean()}, on_epoch=True)
        if stage == "val":
            self.log("val_right", right.sum(), reduce_fx="sum")
            self.log("val_worst", F.cross_entropy(outputs, y, reduction="none").max(), reduce_fx=torch.max)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        steps = self.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=int(steps))
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


OTHER: Any = import_module("pytorch_lightning" if find_spec("pytorch_lightning") else "lightning")


class Older(OTHER.LightningModule):  # type: ignore[misc]
    """Of the same library by its other name."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(models.FEATURES, models.CLASSES)

    def training_step(self, train_batch: Any, number: int) -> Any:
        return F.cross_entropy(self.net(train_batch[0]), train_batch[1])

    def predict_step(self, batch: Any) -> Any:
        return self.net(batch).softmax(1)

    def configure_optimizers(self) -> Any:
        return {"optimizer": torch.optim.SGD(self.parameters(), lr=0.1)}


# --- what cannot be ---------------------------------------------------------------------


class ByHand(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Two(Plain):
    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD([p], lr=0.1) for p in self.parameters()]


class Plateau(Plain):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        watched = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": watched, "monitor": "val_loss"}


class Chain(Plain):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, each) for each in (1, 2)]


class Often(Plain):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        return [optimizer], [{"scheduler": scheduler, "interval": "step", "frequency": 5}]


class Unoptimized(Plain):
    def configure_optimizers(self) -> Any:
        return None


class Hooked(Plain):
    def on_train_batch_end(self, *arguments: Any) -> None:
        with torch.no_grad():
            self.net[0].weight.clamp_(-1, 1)


class Called(Plain):
    def configure_callbacks(self) -> Any:
        return [lightning.pytorch.callbacks.StochasticWeightAveraging(0.1)]


class Annealed(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) * (1 + self.current_epoch)


class Planned(Plain):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1 / self.trainer.max_epochs)


class Counting(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) * (batch_idx % 2)


class Skipping(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None


class Iterating(Plain):
    def training_step(self, dataloader_iter: Any) -> Any:
        return super().training_step(next(dataloader_iter), 0)


class Stepless(lightning.LightningModule):
    def configure_optimizers(self) -> Any:
        return None


class Reduced(Plain):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("spread", batch[0].std(), reduce_fx=lambda values: values.max() - values.min())


def no_module() -> nn.Module:
    return nn.Linear(1, 1)


ARGUED = partial(Plain, width=5)
