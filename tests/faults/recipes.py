"""Data that does harm to the worker that reads it, until a file says that the harm is over.

What a sample contains never depends on that file, so a gradient stays a function of its shard.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from tests.support import models

HARMS = ("kill", "hang")


class Harmful(Dataset[tuple[Tensor, Tensor]]):
    """`models.points`, but reading the sample `at` kills or hangs the process while `cure` does not exist.

    Args:
        harm: one of `HARMS`.
    """

    def __init__(self, harm: str, at: int, cure: str, size: int = 40) -> None:
        self.inner = models.points(size)
        self.harm, self.at, self.cure = harm, at, Path(cure)

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index == self.at and not self.cure.exists():
            if self.harm == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            while not self.cure.exists():
                time.sleep(0.02)
        sample: tuple[Tensor, Tensor] = self.inner[index]
        return sample


class Hoarding(Dataset[tuple[Tensor, Tensor]]):
    """`models.points`, but the first process that reads the sample `at` keeps so much memory for itself."""

    kept: bytes = b""

    def __init__(self, nbytes: int, at: int, mark: str, size: int = 40) -> None:
        self.inner = models.points(size)
        self.nbytes, self.at, self.mark = nbytes, at, Path(mark)

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index == self.at and not self.mark.exists():
            self.mark.touch()
            Hoarding.kept = b"x" * self.nbytes
        sample: tuple[Tensor, Tensor] = self.inner[index]
        return sample


class Slow(Dataset[tuple[Tensor, Tensor]]):
    """`models.points`, read at a speed that depends on the process.

    Args:
        speeds: file with lines "PID SECONDS": how long that process takes for each sample; "*" stands for
            all that are not named. Without the file no sample takes any time. Read anew for each sample,
            and while one waits.
    """

    def __init__(self, speeds: str, size: int = 40) -> None:
        self.inner = models.points(size)
        self.speeds = Path(speeds)

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        deadline = time.monotonic() + self._seconds()
        while time.monotonic() < deadline and self._seconds():
            time.sleep(0.005)
        sample: tuple[Tensor, Tensor] = self.inner[index]
        return sample

    def _seconds(self) -> float:
        try:
            lines = self.speeds.read_text().splitlines()
        except FileNotFoundError:
            return 0.0
        known = dict(line.split() for line in lines)
        return float(known.get(str(os.getpid()), known.get("*", 0.0)))


class Stuck(Dataset[tuple[Tensor, Tensor]]):
    """`models.points`, of which one sample is never read.

    Args:
        how: the method that is called in its place.
    """

    def __init__(self, how: str, at: int = 17, size: int = 40) -> None:
        self.inner = models.points(size)
        self.how, self.at = how, at
        self.lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index == self.at:
            getattr(self, self.how)()
        sample: tuple[Tensor, Tensor] = self.inner[index]
        return sample

    def endless_loop(self) -> None:
        while True:
            pass

    def deadlock(self) -> None:
        with self.lock, self.lock:
            pass

    def ends_the_process(self) -> None:
        os._exit(3)

    def recursion(self) -> None:
        self.recursion()

    def out_of_memory(self) -> None:
        self.kept = torch.ones(1 << 50)

    def terminal(self) -> None:
        input("continue? ")


class StuckSGD(torch.optim.SGD):
    """SGD whose first step takes for ever."""

    def step(self, closure: Any = None) -> Any:
        while True:
            time.sleep(0.01)


def stuck_metric(outputs: Tensor, targets: Tensor) -> float:
    while True:
        time.sleep(0.01)
