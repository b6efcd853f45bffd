"""One split for both: the evaluation dataset is made by the training dataset's seed.

A recipe has two entries where a script has one `random_split`, called in either. Made by the same seed, both
draw the same numbers, so that what one of them keeps is what the other leaves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchord.coordinator.compute.batch import load_batch, open_dataset
from torchord.coordinator.compute.determinism import generators, pinned, seed_everything
from torchord.coordinator.spec.config import TrainingConfig
from torchord.coordinator.spec.resolving import ResolvedRecipe


def open_evaluation(resolved: ResolvedRecipe, config: TrainingConfig, dataset: Any) -> tuple[Any, str]:
    """Make the evaluation dataset, and say by which entry's seed.

    That is the training dataset's, unless the examples themselves are drawn: by that seed they would be the
    ones that are trained on.

    Args:
        resolved: the run's recipe.
        config: the run's config.
        dataset: the training dataset.

    Returns:
        (the dataset, "dataset" or "evaluation": what `open_dataset` takes as `seeded`).

    Raises:
        InvalidInput: as `open_dataset`.
    """
    drew: list[bool] = []

    def watched() -> Any:
        before = generators()
        made = resolved.evaluation() if resolved.evaluation is not None else None
        drew.append(_moved(before, generators()))
        return made

    made = open_dataset(replace(resolved, evaluation=watched), config, "evaluation", seeded="dataset")
    if drew == [False] or not _begin_alike(dataset, made, config):
        return made, "dataset"
    own = open_dataset(resolved, config, "evaluation")
    return (made, "dataset") if _begin_alike(dataset, own, config) else (own, "evaluation")


def _moved(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Whether a generator was drawn from."""
    numpy = zip(before["numpy"], after["numpy"], strict=True)
    return (
        not torch.equal(before["torch"], after["torch"])
        or not all(np.array_equal(one, other) for one, other in numpy)
        or before["random"] != after["random"]
    )


def _begin_alike(dataset: Any, evaluation: Any, config: TrainingConfig) -> bool:
    """Whether the first examples of both have a tensor of real numbers in common."""
    if not len(dataset) or not len(evaluation):
        return False
    firsts = []
    for made in (dataset, evaluation):
        try:
            with pinned(config.threads, config.deterministic, restore=True):
                seed_everything(config.seed)
                firsts.append(_reals(load_batch(made, [0], list)))
        except Exception:  # noqa: BLE001  whoever reads it next says so, with its place
            return False
    return any(torch.equal(one, other) for one, other in zip(*firsts, strict=False))


def _reals(value: Any) -> list[Tensor]:
    """The floating tensors of a nested sample that are not one number over and over."""
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        value = torch.from_numpy(value)
    if isinstance(value, Tensor):
        varied = value.is_floating_point() and bool((value != value.flatten()[:1]).any())
        return [value] if varied else []
    if isinstance(value, Mapping):
        value = list(value.values())
    return [leaf for item in value for leaf in _reals(item)] if isinstance(value, (list, tuple)) else []
