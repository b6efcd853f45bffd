"""A BatchNorm cannot train on one value per channel: a shard of one example is tried at a run's start."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from torchord.cache.errors import InvalidInput
from torchord.coordinator.compute.batch import formatted, read_batch, to_device
from torchord.coordinator.compute.determinism import pinned, seed_everything
from torchord.coordinator.compute.gradient import ALONE, autocast
from torchord.coordinator.compute.replica import Replica
from torchord.coordinator.compute.weights import loss_of
from torchord.coordinator.spec.config import TrainingConfig
from torchord.coordinator.spec.plan import Plan, derive_seed
from torchord.coordinator.spec.resolving import ResolvedRecipe


def require_company(replica: Replica, resolved: ResolvedRecipe, dataset: Any, plan: Plan) -> None:
    """Refuse a run in which a BatchNorm would meet a shard of one example that it cannot train on.

    Whether it can depends on the example: of a picture it has many values per channel. So one forward of a
    model that is thrown away afterwards decides, and only where there is such a shard, and a BatchNorm.

    Args:
        replica: the run's model; it is not touched.
        resolved: the run's recipe.
        dataset: the training dataset.
        plan: the run's plan, which can say which samples a shard has.

    Raises:
        InvalidInput: the message names the shard, and the ways out.
    """
    found = plan.alone()
    if found is None or not any(isinstance(module, _BatchNorm) for module in replica.model.modules()):
        return
    step, shard = found
    indices = next(part for part in plan.parts(step, shard) if len(part) == 1)
    try:
        _try(resolved, plan.config_at(step), replica.device, dataset, indices, (step, shard))
    except ValueError as error:
        if "more than 1 value per channel" in str(error):
            raise InvalidInput(
                f"{ALONE}; shard {shard} of step {step} would have one alone (sample {int(indices[0])})"
            ) from error
    except Exception:  # noqa: BLE001  whatever else is wrong, the shard itself says, with its place
        return


def _try(
    resolved: ResolvedRecipe,
    config: TrainingConfig,
    device: torch.device,
    dataset: Any,
    indices: Any,
    place: tuple[int, int],
) -> None:
    replica = Replica.build(resolved, config, device)
    with pinned(config.threads, config.deterministic, device, restore=True):
        batch = read_batch(resolved, config, dataset, indices, place)
        model = replica.train()
        seed_everything(derive_seed(config.seed, "model", *place))
        with torch.no_grad(), autocast(config, device):
            loss_of(resolved, model, formatted(to_device(batch.value, device), config))
