"""Averaged weights (EMA, SWA): what a run is judged by and gives back, beside the weights that it trains.

The average is a part of the version: further tensors beside parameters and buffers, moved on by the
training server alone, after each step. So a replay or a restored checkpoint has the average of its
time, the ledger's digests cover it, and whoever holds a version can evaluate by it. A version is then
as large again by what is averaged; who uses no average pays nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchord.cache.errors import InvalidInput, RunFailed

ENTRY = "torchord/average"
"""Name, in a version, of how many versions are averaged; the average of NAME is ENTRY/NAME."""

Update = Callable[[list[Tensor], list[Tensor], Tensor], None]


@dataclass(frozen=True)
class Average:
    """How weights are averaged.

    Attributes:
        update: (averaged tensors, present tensors, number averaged so far) -> None, changes the first in
            place; all of one call have one dtype. What `torch.optim.swa_utils.get_ema_multi_avg_fn` and
            `get_swa_multi_avg_fn` return. It is called from the second version on: the first is copied.
        start: the first version that may be averaged; until then the average is the weights themselves.
        every: version `start` and then each so many versions are averaged, 1 for all. Version 0 never is.
        buffers: whether floating buffers are averaged like parameters; else, and always for other
            buffers and for frozen parameters, those of the version go with the average.

    Raises:
        InvalidInput: a value cannot be used.
    """

    update: Update
    start: int = 0
    every: int = 1
    buffers: bool = False

    def __post_init__(self) -> None:
        if not callable(self.update):
            raise InvalidInput(f"Average.update must be callable, got {type(self.update).__name__}")
        if type(self.start) is not int or self.start < 0:
            raise InvalidInput(f"an average's start must be a version, 0 or more, got {self.start!r}")
        if type(self.every) is not int or self.every < 1:
            raise InvalidInput(f"an average's every must be 1 or more versions, got {self.every!r}")

    def takes(self, version: int) -> bool:
        """Whether a version is averaged."""
        return version >= max(self.start, 1) and (version - self.start) % self.every == 0


def is_average(name: str) -> bool:
    """Whether a tensor of a version belongs to its average."""
    return name == ENTRY or name.startswith(f"{ENTRY}/")


def average_of(entry: Callable[[], Any] | None) -> Average | None:
    """What a recipe's average entry says.

    Raises:
        InvalidInput: it returned neither an `Average` nor a function like that of its `update`.
    """
    made = None if entry is None else entry()
    if made is None and entry is None:
        return None
    if isinstance(made, torch.nn.Module) or not (isinstance(made, Average) or callable(made)):
        raise InvalidInput(
            f"the recipe's average entry returned a {type(made).__name__}; it must return "
            "torchord.coordinator.averages.ema(...) or swa(...), an Average, or a function such as "
            "torch.optim.swa_utils.get_ema_multi_avg_fn(decay) returns"
        )
    return made if isinstance(made, Average) else Average(made)


class AveragedWeights:
    """The average that belongs to one replica's version.

    Args:
        rule: how it is made.
        live: name -> tensor that is averaged, in the replica; its memory may be another's later.

    Attributes:
        count: how many versions are averaged.
    """

    def __init__(self, rule: Average, live: Callable[[], Mapping[str, Tensor]]) -> None:
        self.rule = rule
        self.count = 0
        self._live = live
        self._averaged: dict[str, Tensor] | None = None  # None: the weights themselves
        self._own = False

    def tensors(self) -> Mapping[str, Tensor]:
        """Return name -> averaged tensor, where the replica is."""
        return self._live() if self._averaged is None else self._averaged

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the average as it lies in a version."""
        found = {f"{ENTRY}/{name}": tensor for name, tensor in self.tensors().items()}
        return {ENTRY: torch.tensor(self.count, dtype=torch.int64), **found}

    def take(self, version: Mapping[str, Tensor]) -> None:
        """Take the average of a version that the replica holds now; its memory is not written to."""
        self.count = int(version[ENTRY])
        names = list(self._live())
        self._averaged = {name: version[f"{ENTRY}/{name}"] for name in names}
        self._own = False

    @torch.no_grad()
    def step(self, version: int) -> dict[str, Tensor]:
        """Average the weights of a version that has just been made; call with the process pinned.

        Returns:
            What of the version changed, as `state_tensors` has it.

        Raises:
            RunFailed: the recipe's own function raised (chained).
        """
        if self.count == 0:  # the weights themselves, or from now on a copy of them
            averaged = self.rule.takes(version)
            live = self._live()
            self._averaged = {n: t.clone() for n, t in live.items()} if averaged else None
            self._own, self.count = averaged, int(averaged)
            return self.state_tensors()
        if not self.rule.takes(version):
            return {}
        if not self._own:
            self._averaged = {
                n: torch.empty_like(t).copy_(self.tensors()[n]) for n, t in self._live().items()
            }
            self._own = True
        live, averaged_now = self._live(), self.tensors()
        number = torch.tensor(self.count, dtype=torch.int64)
        by_dtype: dict[torch.dtype, list[str]] = {}
        for name, tensor in live.items():
            by_dtype.setdefault(tensor.dtype, []).append(name)
        try:
            for dtype_names in by_dtype.values():
                self.rule.update(
                    [averaged_now[name] for name in dtype_names], [live[name] for name in dtype_names], number
                )
        except Exception as error:
            raise RunFailed(
                f"version {version}: the recipe's average raised {type(error).__name__}: {error}"
            ) from error
        self.count += 1
        return self.state_tensors()
