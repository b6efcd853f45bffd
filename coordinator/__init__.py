"""torchord's Python interface: describe a run, submit it, follow it, use its model.

Names are imported at first use, so that `celery -A torchord` starts without loading torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchord.coordinator.adapters.keras import keras
    from torchord.coordinator.adapters.lightning import lightning
    from torchord.coordinator.compute.step_metrics import Measure
    from torchord.coordinator.datasets import stored_dataset
    from torchord.coordinator.estimator import Estimator
    from torchord.coordinator.local_cluster.cluster import LocalCluster
    from torchord.coordinator.master.audit import Audit
    from torchord.coordinator.master.master import Master
    from torchord.coordinator.master.reports import RunStatus, StepReport, TrainedModel
    from torchord.coordinator.master.run import Run
    from torchord.coordinator.spec.config import TrainingConfig
    from torchord.coordinator.spec.recipe import Recipe
    from torchord.coordinator.spec.stopping import (
        Keep,
        MaxSeconds,
        MaxSteps,
        NotFinite,
        Plateau,
        Threshold,
    )
    from torchord.coordinator.sweeps import sweep

_HOME = {
    "Audit": "torchord.coordinator.master.audit",
    "Keep": "torchord.coordinator.spec.stopping",
    "Estimator": "torchord.coordinator.estimator",
    "LocalCluster": "torchord.coordinator.local_cluster.cluster",
    "Master": "torchord.coordinator.master.master",
    "MaxSeconds": "torchord.coordinator.spec.stopping",
    "MaxSteps": "torchord.coordinator.spec.stopping",
    "Measure": "torchord.coordinator.compute.step_metrics",
    "NotFinite": "torchord.coordinator.spec.stopping",
    "Plateau": "torchord.coordinator.spec.stopping",
    "Recipe": "torchord.coordinator.spec.recipe",
    "Run": "torchord.coordinator.master.run",
    "RunStatus": "torchord.coordinator.master.reports",
    "StepReport": "torchord.coordinator.master.reports",
    "Threshold": "torchord.coordinator.spec.stopping",
    "TrainedModel": "torchord.coordinator.master.reports",
    "TrainingConfig": "torchord.coordinator.spec.config",
    "keras": "torchord.coordinator.adapters.keras",
    "lightning": "torchord.coordinator.adapters.lightning",
    "stored_dataset": "torchord.coordinator.datasets",
    "sweep": "torchord.coordinator.sweeps",
}

__all__ = [
    "Audit",
    "Keep",
    "Estimator",
    "LocalCluster",
    "Master",
    "MaxSeconds",
    "MaxSteps",
    "Measure",
    "NotFinite",
    "Plateau",
    "Recipe",
    "Run",
    "RunStatus",
    "StepReport",
    "Threshold",
    "TrainedModel",
    "TrainingConfig",
    "keras",
    "lightning",
    "stored_dataset",
    "sweep",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'torchord.coordinator' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


if not __name__.startswith("torchord."):  # a checkout's folder, imported by its own name
    from torchord.doors import open_door

    open_door(__name__)
