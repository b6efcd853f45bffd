"""torchord's Python interface: describe a run, submit it, follow it, use its model.

Names are imported at first use, so that `celery -A tasks` starts without loading torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coordinator.audit import Audit
    from coordinator.config import TrainingConfig
    from coordinator.datasets import stored_dataset
    from coordinator.local import LocalCluster
    from coordinator.master import Master
    from coordinator.recipe import Recipe
    from coordinator.run import Run, RunStatus, StepReport, TrainedModel

_HOME = {
    "Audit": "coordinator.audit",
    "LocalCluster": "coordinator.local",
    "Master": "coordinator.master",
    "Recipe": "coordinator.recipe",
    "Run": "coordinator.run",
    "RunStatus": "coordinator.run",
    "StepReport": "coordinator.run",
    "TrainedModel": "coordinator.run",
    "TrainingConfig": "coordinator.config",
    "stored_dataset": "coordinator.datasets",
}

__all__ = [
    "Audit",
    "LocalCluster",
    "Master",
    "Recipe",
    "Run",
    "RunStatus",
    "StepReport",
    "TrainedModel",
    "TrainingConfig",
    "stored_dataset",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'coordinator' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
