"""What the living workers say of a run."""

from __future__ import annotations

from torchord.coordinator.messages.task_names import GRADIENTS, UPDATES
from torchord.coordinator.runtime.services import Services


class Fleet:
    """The workers as one run sees them.

    Args:
        services: of this process.
        run: the run's name.
    """

    def __init__(self, services: Services, run: str) -> None:
        self._services = services
        self._run = run

    @property
    def url(self) -> str:
        """Redis URL of broker and control plane."""
        return self._services.settings.url

    def idle_queues(self) -> list[str]:
        """The queues, of those that the run needs, that no living worker consumes that may work on it."""
        alive = self._services.registry.alive().values()
        willing = [info for info in alive if self._run not in info.refuses]
        return [queue for queue in (UPDATES, GRADIENTS) if not any(queue in info.queues for info in willing)]

    def refused(self) -> tuple[str, ...]:
        """The living workers that may not work on the run, each with the reason."""
        alive = self._services.registry.alive().values()
        return tuple(f"{info.id}: {info.refuses[self._run]}" for info in alive if self._run in info.refuses)

    def discarded(self) -> tuple[str, ...]:
        """What is said of those who throw torchord's messages away."""
        alive = self._services.registry.alive().values()
        return tuple(sorted({said for info in alive for said in info.discarded.values()}))
