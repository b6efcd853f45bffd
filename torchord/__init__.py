"""torchord: train PyTorch models on a Celery queue.

    from torchord import Master, Recipe, TrainingConfig, LocalCluster      # describe, submit and follow runs
    celery -A torchord worker                                              # a worker
    torchord.install(app)                                                  # in your own Celery app

Names are imported at first use, so that `celery -A torchord` starts without loading torch. In a checkout
the three packages below lie in the folders of the same names beside this one.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from torchord.cache.settings import pin_kernels

if TYPE_CHECKING:
    from torchord.coordinator import (
        Audit,
        Estimator,
        Keep,
        LocalCluster,
        Master,
        MaxSeconds,
        MaxSteps,
        Measure,
        NotFinite,
        Plateau,
        Recipe,
        Run,
        RunStatus,
        StepReport,
        Threshold,
        TrainedModel,
        TrainingConfig,
        keras,
        lightning,
        stored_dataset,
        sweep,
    )
    from torchord.tasks import app
    from torchord.tasks.install import install

pin_kernels()

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
    "app",
    "install",
    "keras",
    "lightning",
    "stored_dataset",
    "sweep",
]


def __getattr__(name: str) -> Any:
    if name == "app":
        return import_module("torchord.tasks.celery_app").app
    if name == "install":
        return import_module("torchord.tasks.install").install
    if name in __all__:
        return getattr(import_module("torchord.coordinator"), name)
    raise AttributeError(f"module 'torchord' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
