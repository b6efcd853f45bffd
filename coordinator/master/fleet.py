"""What the living workers say of a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torchord.cache.ledger.workers import WorkerInfo
from torchord.coordinator.messages.task_names import GRADIENTS, UPDATES
from torchord.coordinator.runtime.control_plane import ControlPlane


class Fleet:
    """The workers as one run sees them.

    Args:
        plane: of this process.
        run: the run's name.
    """

    def __init__(self, plane: ControlPlane, run: str) -> None:
        self._plane = plane
        self._run = run

    @property
    def url(self) -> str:
        """Redis URL of broker and control plane."""
        return self._plane.settings.url

    def alive(self) -> dict[str, WorkerInfo]:
        """The living workers, by id; the questions below take them, so that several are one look."""
        return self._plane.registry.alive()

    def idle_queues(self, alive: Mapping[str, WorkerInfo] | None = None) -> list[str]:
        """The queues, of those that the run needs, that no living worker consumes that may work on it."""
        willing = [info for info in self._here(alive) if self._run not in info.refuses]
        return [queue for queue in (UPDATES, GRADIENTS) if not any(queue in info.queues for info in willing)]

    def refused(self, alive: Mapping[str, WorkerInfo] | None = None) -> tuple[str, ...]:
        """The living workers that may not work on the run, each with the reason."""
        found = self._here(alive)
        return tuple(f"{info.id}: {info.refuses[self._run]}" for info in found if self._run in info.refuses)

    def discarded(self, alive: Mapping[str, WorkerInfo] | None = None) -> tuple[str, ...]:
        """What is said of those who throw torchord's messages away."""
        return tuple(sorted({said for info in self._here(alive) for said in info.discarded.values()}))

    def _here(self, alive: Mapping[str, WorkerInfo] | None) -> Iterable[WorkerInfo]:
        return (self.alive() if alive is None else alive).values()
