"""A device that is none: copies are done as late as the interface allows, so that a missing wait shows.

A copy is only noted when it is enqueued. It is done when somebody waits for a mark behind it, or when the
computation is told to wait for the copies. New memory is full of junk, and a copy reads its source when it
is done: so whoever reads too early, or writes to a buffer whose copy is under way, gets other bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

_JUNK = 0xA5


@dataclass
class _Mark:
    device: StandIn
    behind: int  # copies enqueued before it, since the beginning

    def synchronize(self) -> None:
        self.device.log.append("wait")
        self.device.flush(self.behind)


@dataclass
class StandIn:
    """`Copies` on the CPU.

    Attributes:
        pins: whether page-locked memory can be had; copies of pageable memory are done at once.
        log: what was asked for, in order: "copy", "after compute", "before compute", "mark", "wait".
    """

    pins: bool = True
    log: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._locked: dict[int, Tensor] = {}
        self._queue: list[tuple[Tensor, Tensor]] = []
        self._done = 0

    def host(self, nbytes: int) -> Tensor:
        """New host memory, never given out again."""
        made = torch.full((nbytes,), _JUNK, dtype=torch.uint8)
        if self.pins:
            self._locked[made.data_ptr()] = made
        return made

    def device_buffer(self, nbytes: int) -> Tensor:
        """New memory that stands for the device's."""
        made = torch.full((nbytes,), _JUNK, dtype=torch.uint8)
        self._locked[made.data_ptr()] = made
        return made

    def pinned(self, buffer: Tensor) -> bool:
        """Whether it came from `host`."""
        return any(
            begin <= buffer.data_ptr() < begin + max(1, held.numel()) for begin, held in self._locked.items()
        )

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Note a copy."""
        self.log.append("copy")
        self._queue.append((target, source))
        if not (self.pinned(target) and self.pinned(source)):
            self.flush()

    def after_compute(self) -> None:
        """The computation is done at once here."""
        self.log.append("after compute")

    def before_compute(self) -> None:
        """The computation that follows is done at once, so the copies have to be."""
        self.log.append("before compute")
        self.flush()

    def mark(self) -> _Mark:
        """The end of what was enqueued."""
        self.log.append("mark")
        return _Mark(self, self._done + len(self._queue))

    def flush(self, behind: int | None = None) -> None:
        """Do the copies up to the given number, or all."""
        while self._queue and (behind is None or self._done < behind):
            target, source = self._queue.pop(0)
            target.copy_(source)
            self._done += 1

    @property
    def waits(self) -> int:
        """How often the host waited."""
        return self.log.count("wait")
