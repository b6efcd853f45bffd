"""`EachEpoch`: a learning-rate scheduler that steps when an epoch of the run ends, not with each step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from torchord.cache.errors import InvalidInput


class EachEpoch(LRScheduler):
    """Steps another scheduler at the ends of epochs. Whoever takes the run's steps knows where these are.

    Args:
        scheduler: what is stepped.
        frequency: how many epochs there are to a step of it, at least 1.

    Raises:
        InvalidInput: the scheduler waits for a figure, or the frequency is none.
    """

    def __init__(self, scheduler: LRScheduler, frequency: int = 1) -> None:
        if isinstance(scheduler, ReduceLROnPlateau):
            raise InvalidInput(
                f"{type(scheduler).__name__} cannot step at the end of an epoch, since it is given the loss "
                "of the step before it; leave it to be stepped with each step, with a patience of as many"
            )
        if frequency < 1:
            raise InvalidInput(f"a scheduler's frequency is a number of epochs from 1, not {frequency!r}")
        self.scheduler = scheduler
        self.frequency = frequency
        self.optimizer = scheduler.optimizer
        self.epochs = 0
        self._schedulers = [scheduler]  # as torch's own names those that one steps

    def step(self, epoch: int | None = None) -> None:
        """Note that an epoch has ended."""
        self.epochs += 1
        if self.epochs % self.frequency == 0:
            self.scheduler.step()

    def get_last_lr(self) -> list[Any]:
        """The learning rate of each group, as the scheduler last set it."""
        return self.scheduler.get_last_lr()

    def state_dict(self) -> dict[str, Any]:
        """The scheduler's state and the epochs that have ended."""
        return {"epochs": self.epochs, "scheduler": self.scheduler.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.epochs = int(state_dict["epochs"])
        self.scheduler.load_state_dict(dict(state_dict["scheduler"]))
