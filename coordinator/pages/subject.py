"""One run as the pages see it: in Redis, or on disk where Redis knows it no more."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

from torchord.cache.errors import CheckpointError, RunNotFound
from torchord.cache.ledger.ledger import Ledger
from torchord.cache.ledger.records import Head
from torchord.coordinator.master.run import Run
from torchord.coordinator.messages.sender import Sender
from torchord.coordinator.pages.history import History
from torchord.coordinator.runtime.services import Services


@dataclass(frozen=True)
class Seen:
    """Where a run stands.

    Attributes:
        incarnation: of the run.
        version: committed steps; of a run on disk, those of which there is an entry or a checkpoint.
        head: None of a run on disk.
        spec: recipe and config as submitted.
        evaluations: metrics of each evaluated version.
    """

    incarnation: str
    version: int
    head: Head | None
    spec: dict[str, Any]
    evaluations: dict[int, dict[str, float]]


class Subject:
    """What this process keeps of one run.

    Args:
        services: of this process.
        sender: for what `run` sends.
        name: of the run.

    Attributes:
        run: as a program has it.
        ledger: its control plane.
        history: its steps and events, as far as they were read; to be held with `lock`.
    """

    def __init__(self, services: Services, sender: Sender, name: str) -> None:
        self.name = name
        self.run = Run(services, sender, name)
        self.ledger: Ledger = services.ledger(name)
        self.history = History(self.ledger, self._on_disk)
        self.lock = threading.Lock()
        self._place = services.settings.checkpoint_dir

    def seen(self) -> Seen:
        """Where the run stands now.

        Raises:
            RunNotFound: neither Redis nor the checkpoint directory knows it.
            CheckpointError: Redis does not know it, and what is on disk is damaged.
        """
        try:
            head = self.ledger.head()
        except RunNotFound as error:
            found = self.on_disk()
            if found is None:
                raise RunNotFound(
                    f"run {self.name!r} is neither in Redis nor under {self._place}; set "
                    "TORCHORD_CHECKPOINT_DIR to where its checkpoints are"
                ) from error
            return found
        return Seen(head.incarnation, head.version, head, self.ledger.spec(), self.ledger.evaluations())

    def on_disk(self) -> Seen | None:
        """Where the run stands by what lies beside its checkpoints; None if nothing does."""
        from torchord.cache.files.checkpoint import CheckpointStore  # loads torch

        spec = CheckpointStore(self._place, self.name).load_spec()
        if spec is None:
            return None
        incarnation = str(spec.get("incarnation", ""))
        store = CheckpointStore(self._place, self.name, incarnation)
        versions = store.versions()
        meta = store.meta(versions[-1]) if versions else {}
        evaluations = {int(version): found for version, found in meta.get("evaluations", {}).items()}
        last = max([store.last_entry(), *versions])
        return Seen(incarnation, last, None, spec, evaluations)

    def checkpoints(self, incarnation: str) -> tuple[str, list[int]]:
        """Where the checkpoints of a life of the run are, and of which versions there are any."""
        from torchord.cache.files.checkpoint import CheckpointStore

        store = CheckpointStore(self._place, self.name, incarnation)
        try:
            return store.path(), store.versions()
        except CheckpointError:
            return store.path(), []

    def _on_disk(self, incarnation: str, first: int, last: int) -> dict[int, str]:
        from torchord.cache.files.checkpoint import CheckpointStore

        return CheckpointStore(self._place, self.name, incarnation).entries_between(first, last)
